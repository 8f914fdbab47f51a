# The training job behind emoe_7b.sh ... emoe_21b.sh, which source this. Started by hand it checks and submits, started
# by Slurm it runs: one srun over all nodes, signals passed on to it, requeued where there is work left (docs/slurm.md).
set -euo pipefail
source "$EMOE_HOME/slurm/settings.sh"

submit() {
  local site
  site_options
  submission=(sbatch "${site[@]}" ${options[@]+"${options[@]}"} --nodes="$nodes" --export=ALL
    "$EMOE_HOME/slurm/$EMOE_SCRIPT" ${flags[@]+-- "${flags[@]}"})
  [ -z "$dry_run" ] || return 0
  type -P sbatch >/dev/null || die "sbatch: not found; this machine has no Slurm (--dry-run needs none)"
  check_job
  exec "${submission[@]}"
}

show_plan() {
  data_words
  printf '%s\n' "${planned:-layout as given in EMOE_LAYOUT, not planned: $EMOE_LAYOUT}"
  submit
  printf '\nsubmission:\n%s\n\non each of %d nodes, %d processes:\n%s\n' "$(shown "${submission[@]}")" "$nodes" \
    "$EMOE_PROCS_PER_NODE" "$(shown pretrain_emoe.py ${data[@]+"${data[@]}"} "${words[@]}")"
}

newest_checkpoint() { cat "$EMOE_SAVE/latest_checkpointed_iteration.txt" 2>/dev/null || echo none; }

# Two jobs that write into one folder destroy each other's checkpoints. The claim is read again after a moment: of two
# jobs that start at once the later one's stays, and the other one sees it.
claim_folder() {
  local owner=""
  mkdir -p "$EMOE_SAVE" || die "EMOE_SAVE $EMOE_SAVE: cannot be written"
  mkdir -p "$logs" || die "EMOE_LOGS ${EMOE_LOGS:-$EMOE_SAVE/logs}: cannot be written"
  owner=$(cat "$EMOE_SAVE/running_job" 2>/dev/null) || true
  [ -z "$owner" ] || [ "$owner" = "$SLURM_JOB_ID" ] || await_end_of "$owner"
  echo "$SLURM_JOB_ID" >"$EMOE_SAVE/running_job"
  sleep "$EMOE_REMIND_SECONDS"
  owner=$(cat "$EMOE_SAVE/running_job" 2>/dev/null) || true
  [ "$owner" = "$SLURM_JOB_ID" ] || die "EMOE_SAVE $EMOE_SAVE: job $owner took it at the same moment"
}

# A job that was cancelled may still save: it is waited for. One whose state is not known counts as running.
await_end_of() {
  local state="" second
  for second in $(seq "$EMOE_SAVE_SECONDS"); do
    state=$(squeue -h -j "$1" -o %T 2>&1) || [[ $state == *"Invalid job id"* ]] || state="of unknown state ($state)"
    case $state in
      "" | PENDING | *"Invalid job id"*) return 0 ;;
      COMPLETING) sleep 1 ;;
      *) break ;;
    esac
  done
  die "EMOE_SAVE $EMOE_SAVE: job $1, which is $state, writes there; wait for it or take another folder"
}

check_allocation() {
  [ "$EMOE_GPUS_PER_NODE" != 0 ] && [ -n "${SLURM_GPUS_ON_NODE:-}" ] || return 0
  [ "$SLURM_GPUS_ON_NODE" -ge "$EMOE_PROCS_PER_NODE" ] ||
    die "SLURM_GPUS_ON_NODE $SLURM_GPUS_ON_NODE: EMOE_PROCS_PER_NODE $EMOE_PROCS_PER_NODE needs a GPU for each process"
}

# The address that the nodes meet at. A name need not resolve; Slurm itself knows an address that works.
first_address() {
  local name
  name=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  scontrol show node "$name" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

# A node that fails tells the others (node.sh); --wait is for one that could not.
start_step() {
  local container=()
  if [ -n "$EMOE_CONTAINER" ] && [ "$EMOE_CONTAINER_KIND" = pyxis ]; then
    container=(--container-image="$EMOE_CONTAINER"
      --container-mounts="$EMOE_HOME,$EMOE_SAVE,$logs${EMOE_MOUNTS:+,$EMOE_MOUNTS}")
  fi
  export EMOE_RDZV_ADDRESS EMOE_RDZV_PORT=$((20000 + SLURM_JOB_ID % 10000)) EMOE_RUN_ID=$SLURM_JOB_ID.$restarts
  EMOE_RDZV_ADDRESS=$(first_address)
  export EMOE_LOGS=$logs EMOE_PYTHON EMOE_PROCS_PER_NODE EMOE_GPUS_PER_NODE EMOE_DATA EMOE_STAGE EMOE_CONTAINER
  export EMOE_CONTAINER_KIND EMOE_MOUNTS EMOE_SAVE EMOE_FINISHED=$logs/finished
  srun --kill-on-bad-exit=0 --wait=120 --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" \
    --ntasks-per-node=1 --cpu-bind=none --export=ALL ${container[@]+"${container[@]}"} \
    bash "$EMOE_HOME/slurm/node.sh" "${words[@]}" &
  step=$!
}

# Waits for the step; sets status. Once this script was signalled, the ranks are, again and again: one that was still
# starting has not heard it. (srun hands SIGUSR1 to every process of the step; SIGTERM would make it kill them.)
await_step() {
  local deadline=""
  while kill -0 "$step" 2>/dev/null; do
    if [ -n "$asked" ]; then
      : "${deadline:=$((SECONDS + EMOE_SAVE_SECONDS))}"
      [ "$asked" = USR1 ] && [ $SECONDS -ge $deadline ] && { status=late; return; }
      kill -USR1 "$step" 2>/dev/null || true
    fi
    sleep "$EMOE_REMIND_SECONDS" >/dev/null 2>&1 & # it may outlive this script
    wait -n "$step" $! 2>/dev/null || true
  done
  wait "$step" && status=0 || status=$?
}

requeue() {
  say "$1; job $SLURM_JOB_ID goes back into the queue"
  scontrol requeue "$SLURM_JOB_ID" && exit 0
  say "it cannot be requeued (the reason is above): submit it again, it goes on from checkpoint $(newest_checkpoint)"
  exit 1
}

# Counts deaths without a new checkpoint between them: in EMOE_SAVE/deaths, the checkpoint and the count.
count_death() {
  local checkpoint=none count=0 newest
  newest=$(newest_checkpoint)
  read -r checkpoint count 2>/dev/null <"$EMOE_SAVE/deaths" || true
  [ "$checkpoint" = "$newest" ] || count=0
  deaths=$((count + 1))
  echo "$newest $deaths" >"$EMOE_SAVE/deaths"
}

# $1: what happened.
after_death() {
  count_death
  [ "$deaths" -ge "$EMOE_DEATHS" ] || requeue "$1 ($deaths of $EMOE_DEATHS since checkpoint $(newest_checkpoint))"
  say "stopped: the run died $deaths times in a row without a new checkpoint (newest: $(newest_checkpoint))." \
    "The last time:"
  cat "$logs/first_failure" >&2 2>/dev/null || say "$1; no rank left a message; logs: $logs"
  exit 1
}

# Why the step ended decides what comes next. A rank that was signalled saves and ends with status 0, like one that is
# done: pretrain_emoe.py leaves a mark at the end of all training, node.sh one at a signal (a preemption with a grace
# time signals the ranks alone). A signal that brought no checkpoint counts as a death: data that take longer to stage
# than a job may run would be staged for ever.
decide() {
  local newest
  newest=$(newest_checkpoint)
  if [ -e "$logs/finished" ] && [ "$status" = 0 ]; then finish; fi
  if [ -e "$EMOE_SAVE/emoe_stopped.txt" ]; then stopped_by_watch; fi
  if [ "$status" = late ]; then after_death "no checkpoint in EMOE_SAVE_SECONDS $EMOE_SAVE_SECONDS after the signal"; fi
  if [ "$asked" = TERM ]; then
    say "ended by SIGTERM at checkpoint $newest: it goes on when Slurm requeues it, or when it is submitted again"
    exit "$status"
  fi
  if [ "$status" != 0 ]; then after_death "the run died with status $status"; fi
  if [ -n "$asked" ] || [ -e "$logs/signalled" ]; then
    [ "$newest" != "$first_checkpoint" ] || after_death "a signal came before there was anything to save"
    requeue "saved checkpoint $newest on a signal"
  fi
  finish
}

finish() {
  rm -f "$EMOE_SAVE/deaths"
  say "finished"
  exit 0
}

stopped_by_watch() {
  say "stopped by --emoe-router-watch: $EMOE_SAVE/emoe_stopped.txt says why; it is not started again:"
  cat "$EMOE_SAVE/emoe_stopped.txt" >&2
  exit 1
}

run() {
  restarts=${SLURM_RESTART_COUNT:-0}
  logs=${EMOE_LOGS:-$EMOE_SAVE/logs}/$SLURM_JOB_ID.$restarts
  claim_folder
  first_checkpoint=$(newest_checkpoint)
  if [ "$restarts" = 0 ]; then
    rm -f "$EMOE_SAVE/deaths"
    check_allocation
    check_job
  fi
  start_step
  await_step
  decide
}

asked=""
trap 'asked=USR1' USR1  # from the first moment: without a trap the signal would end the job
trap 'asked=TERM' TERM
read_words "$@"
load_settings
check_values EMOE_SAVE EMOE_BASE EMOE_DATA
[ -n "$dry_run" ] || check_files
count_nodes
find_layout
make_command
in_batch_job || trap - USR1 TERM
if in_batch_job; then run; elif [ -n "$dry_run" ]; then show_plan; else submit; fi
