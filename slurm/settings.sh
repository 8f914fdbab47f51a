# Sourced by job.sh and sweep.sh: settings from the environment and cluster.env, the command line they make, messages.
# Expected: EMOE_HOME (the repository), EMOE_SCRIPT (name of the script, for messages), EMOE_MODEL, EMOE_MODEL_ARGS.

source "$EMOE_HOME/slurm/words.sh"
say() { echo "$EMOE_SCRIPT: $*" >&2; }
die() { echo "$EMOE_SCRIPT: error: $*" >&2; exit 2; }

# Sets dry_run (yes or empty), options (for sbatch) and flags (for the program) from the script's own words.
read_words() {
  dry_run="" options=() flags=()
  while [ $# -gt 0 ]; do
    case $1 in
      --) shift; flags=("$@"); break ;;
      --dry-run) dry_run=yes ;;
      -h | --help) sed -n '2,/^#$/s/^# \{0,1\}//p' "$EMOE_HOME/slurm/$EMOE_SCRIPT"; exit 0 ;;
      *) options+=("$1") ;;
    esac
    shift
  done
}

# Whether this process is the batch script of a job. In an interactive allocation SLURM_JOB_ID is set too.
in_batch_job() { [ -n "${SLURM_JOB_ID:-}" ] && [ "${SLURM_TASK_PID:-}" = $$ ]; }

load_settings() {
  EMOE_HOME=$(cd "$EMOE_HOME" && pwd)
  EMOE_CLUSTER_ENV=${EMOE_CLUSTER_ENV:-$EMOE_HOME/slurm/cluster.env}
  local example=$EMOE_HOME/slurm/cluster.env.example
  if [ -f "$EMOE_CLUSTER_ENV" ]; then
    bash -n "$EMOE_CLUSTER_ENV" || die "EMOE_CLUSTER_ENV $EMOE_CLUSTER_ENV: bash cannot read it (its message is above)"
    source "$EMOE_CLUSTER_ENV" || true  # its last line may be a test that does not hold
  elif [ -n "$dry_run" ]; then
    say "no $EMOE_CLUSTER_ENV: these are the values of cluster.env.example"
    source "$example"
  else
    die "EMOE_CLUSTER_ENV $EMOE_CLUSTER_ENV: no such file; copy $example there and fill it in"
  fi
  default_settings
  export EMOE_HOME EMOE_CLUSTER_ENV
}

default_settings() {
  : "${EMOE_GPUS_PER_NODE:=8}" "${EMOE_GPU_MEMORY:=80}" "${EMOE_PROCS_PER_NODE:=$EMOE_GPUS_PER_NODE}"
  : "${EMOE_PYTHON:=$EMOE_HOME/.venv/bin/python}" "${EMOE_CHECK_PYTHON:=$EMOE_PYTHON}"
  : "${EMOE_RECIPE=@$EMOE_HOME/examples/recipe.args}" "${EMOE_TRAIN_FLAGS=@$EMOE_HOME/slurm/train.args}"
  : "${EMOE_LAYOUT=}" "${EMOE_PLAN_FLAGS=}" "${EMOE_STAGE=}" "${EMOE_MOUNTS=}" "${EMOE_CONTAINER=}"
  : "${EMOE_CONTAINER_KIND:=pyxis}" "${EMOE_DEATHS:=3}" "${EMOE_SAVE_SECONDS:=150}" "${EMOE_REMIND_SECONDS:=10}"
  if [ -z "${EMOE_MODEL_FLAGS:-}" ]; then
    EMOE_MODEL_FLAGS=@$EMOE_HOME/examples/models/$EMOE_MODEL_ARGS
    [ ! -f "${EMOE_BASE:-none}/model.args" ] || EMOE_MODEL_FLAGS=@$EMOE_BASE/model.args
  fi
}

demand() {
  local name
  for name in "$@"; do
    [ -n "${!name:-}" ] || die "$name is not set: give it in $EMOE_CLUSTER_ENV (cluster.env.example explains it)"
  done
}

demand_number() {
  [[ ${!1} =~ ^[0-9]+$ ]] && [ "${!1}" -ge "$2" ] || die "$1 ${!1}: must be a whole number of at least $2"
}

demand_file() {
  [ -z "${!1}" ] || [ "${!1}" = none ] || [ -e "${!1}" ] || die "$1 ${!1}: no such file"
}

# What needs neither Python nor a file: a dry run is refused too.
check_values() {
  demand EMOE_ACCOUNT EMOE_PARTITION "$@"
  demand_number EMOE_GPUS_PER_NODE 0
  demand_number EMOE_PROCS_PER_NODE 1
  demand_number EMOE_DEATHS 1
  demand_number EMOE_SAVE_SECONDS 1
  demand_number EMOE_REMIND_SECONDS 1
  [ "$EMOE_GPUS_PER_NODE" = 0 ] || [ "$EMOE_PROCS_PER_NODE" -le "$EMOE_GPUS_PER_NODE" ] ||
    die "EMOE_PROCS_PER_NODE $EMOE_PROCS_PER_NODE: at most one process for each of $EMOE_GPUS_PER_NODE GPUs"
  case $EMOE_CONTAINER_KIND in
    pyxis | apptainer) ;;
    *) die "EMOE_CONTAINER_KIND $EMOE_CONTAINER_KIND: must be pyxis or apptainer" ;;
  esac
}

check_files() {
  demand_file EMOE_STAGE
  [ "${EMOE_BASE:-none}" = none ] || [ -d "$EMOE_BASE" ] || die "EMOE_BASE $EMOE_BASE: no such folder"
  [ -n "$EMOE_CONTAINER" ] || type -P "$EMOE_PYTHON" >/dev/null ||
    die "EMOE_PYTHON $EMOE_PYTHON: no such program; make it with 'make setup', or name another interpreter"
}

# The number of nodes: from sbatch's options, else from the script's #SBATCH line; in a job, what Slurm gave.
count_nodes() {
  local word previous=""
  nodes=$(sed -n 's/^#SBATCH --nodes=//p' "$EMOE_HOME/slurm/$EMOE_SCRIPT")
  for word in ${options[@]+"${options[@]}"}; do
    case $previous in -N | --nodes) nodes=$word ;; esac
    case $word in --nodes=*) nodes=${word#--nodes=} ;; -N?*) nodes=${word#-N} ;; esac
    previous=$word
  done
  ! in_batch_job || nodes=$SLURM_JOB_NUM_NODES
  [[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes $nodes: must be one number; the parallel layout follows from it"
  world_size=$((nodes * EMOE_PROCS_PER_NODE))
}

# Plans what will run: the model's flags, those of the recipe and the training, and what came after --. The planner takes
# files, whatever words the settings hold.
plan() {
  local words folder model=$EMOE_MODEL status=0
  folder=$(mktemp -d)
  split EMOE_RECIPE
  shown ${words[@]+"${words[@]}"} >"$folder/recipe"
  split EMOE_TRAIN_FLAGS
  shown ${words[@]+"${words[@]}"} ${flags[@]+"${flags[@]}"} >"$folder/training"
  if [ "$EMOE_MODEL_FLAGS" != "@$EMOE_HOME/examples/models/$EMOE_MODEL_ARGS" ]; then
    split EMOE_MODEL_FLAGS
    model=$folder/$EMOE_MODEL
    shown "${words[@]}" >"$model"
    [ ${#words[@]} != 1 ] || [[ ${words[0]} != @* ]] || model=${words[0]#@}
  fi
  split EMOE_PLAN_FLAGS
  PYTHONWARNINGS=ignore PYTHONPATH=$EMOE_HOME "$EMOE_CHECK_PYTHON" "$EMOE_HOME/tools/plan_job.py" \
    --model "$model" --gpus "$world_size" --gpus-per-node "$EMOE_PROCS_PER_NODE" --gpu-memory "$EMOE_GPU_MEMORY" \
    --recipe "$folder/recipe" --training "$folder/training" ${words[@]+"${words[@]}"} "$@" || status=$?
  rm -rf "$folder"
  return $status
}

# Megatron's flags of the layout: EMOE_LAYOUT, or the planner's best that fits; then planned holds what it printed.
find_layout() {
  planned=""
  [ -z "$EMOE_LAYOUT" ] || return 0
  [ "$EMOE_CHECK_PYTHON" != none ] ||
    die "EMOE_CHECK_PYTHON none: the planner cannot run; give the layout in EMOE_LAYOUT"
  if ! type -P "$EMOE_CHECK_PYTHON" >/dev/null; then
    local missing="EMOE_CHECK_PYTHON $EMOE_CHECK_PYTHON: no such program"
    [ -n "$dry_run" ] || die "$missing; make it with 'make setup'"
    say "$missing, so no plan and no layout below; make it with 'make setup'"
    planned="no plan"
    return
  fi
  planned=$(plan) ||
    die "no layout for $EMOE_MODEL on $nodes x $EMOE_PROCS_PER_NODE GPUs of $EMOE_GPU_MEMORY GB: the rule is above; EMOE_PLAN_FLAGS" \
      "has flags for the planner"
  EMOE_LAYOUT=$(sed -n 's/^flags: *//p' <<<"$planned")
}

# Sets words: the flags of pretrain_emoe.py without --data-path, which a node may have staged elsewhere.
# The first start takes weights from EMOE_BASE; every later one goes on from the newest checkpoint in EMOE_SAVE.
make_command() {
  local setting all=()
  for setting in EMOE_MODEL_FLAGS EMOE_RECIPE EMOE_TRAIN_FLAGS EMOE_LAYOUT; do
    split "$setting"
    all+=(${words[@]+"${words[@]}"})
  done
  [ "$EMOE_BASE" = none ] || all+=(--pretrained-checkpoint "$EMOE_BASE")
  words=("${all[@]}" --load "$EMOE_SAVE" --save "$EMOE_SAVE" --exit-signal-handler ${flags[@]+"${flags[@]}"})
}

# Sets data: the words of --data-path, or nothing.
data_words() {
  local words
  split EMOE_DATA
  data=()
  [ "$EMOE_DATA" = none ] || data=(--data-path "${words[@]}")
}

# Sets site: account, partition and GPUs for sbatch. Without GPUs that is said too: the script itself asks for them.
site_options() {
  site=(--gpus-per-node="$EMOE_GPUS_PER_NODE")
  [ "$EMOE_ACCOUNT" = none ] || site+=(--account="$EMOE_ACCOUNT")
  [ "$EMOE_PARTITION" = none ] || site+=(--partition="$EMOE_PARTITION")
}

# What pretrain_emoe.py would refuse, and what only a job can get wrong; exit status 2 with the rule.
check_job() {
  if [ "$EMOE_CHECK_PYTHON" = none ]; then
    say "EMOE_CHECK_PYTHON none: flags, data and checkpoint are not checked here"
    return
  fi
  data_words
  PYTHONWARNINGS=ignore PYTHONPATH=$EMOE_HOME CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} \
    "$EMOE_CHECK_PYTHON" "$EMOE_HOME/tools/check_job.py" --nodes "$nodes" --processes "$EMOE_PROCS_PER_NODE" \
    --gpus "$EMOE_GPUS_PER_NODE" --save "$EMOE_SAVE" -- ${data[@]+"${data[@]}"} "${words[@]}" || exit 2
}
