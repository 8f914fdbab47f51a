#!/usr/bin/env bash
# A k' sweep of a checkpoint as a job array: every task measures one k' on one node, then joins what there is.
#
#   slurm/sweep.sh --dry-run -- FLAGS                  print the command lines, submit nothing
#   slurm/sweep.sh [SBATCH OPTIONS] -- FLAGS           FLAGS go to tools/sweep_k.py: --data-path, --evidence, layout ...
#
# EMOE_SWEEP_LOAD: the checkpoint. EMOE_SWEEP_K: the k', as in "4 6 8 12 16 24". EMOE_SWEEP_OUT: the result, as in
# sweep.json; task by task it grows out of sweep.k4.json, sweep.k6.json ...; `tools/join_sweeps.py` joins them by hand.
#
#SBATCH --job-name=emoe-sweep
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A-%a.out
[ -n "${BASH_VERSION:-}" ] || { echo "sweep.sh: error: run it with bash, not sh" >&2; exit 2; }
set -euo pipefail

EMOE_MODEL=sweep
EMOE_MODEL_ARGS=""
EMOE_SCRIPT=sweep.sh
submitted=${SLURM_SUBMIT_DIR:-}
for EMOE_HOME in "$(dirname "${BASH_SOURCE[0]}")/.." "${EMOE_HOME:-}" "$submitted" "$submitted/.."; do
  [ ! -f "$EMOE_HOME/slurm/settings.sh" ] || break
done
[ -f "$EMOE_HOME/slurm/settings.sh" ] ||
  { echo "$EMOE_SCRIPT: error: no slurm/settings.sh found: submit from the repository, or set EMOE_HOME" >&2; exit 2; }
source "$EMOE_HOME/slurm/settings.sh"

check_sweep() {
  local k seen=" "
  check_values EMOE_SWEEP_LOAD EMOE_SWEEP_K EMOE_SWEEP_OUT
  for k in $EMOE_SWEEP_K; do
    [[ $k =~ ^[1-9][0-9]*$ ]] || die "EMOE_SWEEP_K $EMOE_SWEEP_K: $k is no number of experts"
    [[ $seen != *" $k "* ]] || die "EMOE_SWEEP_K $EMOE_SWEEP_K: $k is given twice"
    seen+="$k "
  done
  [[ $EMOE_SWEEP_OUT == *.json ]] || die "EMOE_SWEEP_OUT $EMOE_SWEEP_OUT: must end in .json"
  [ -z "$EMOE_CONTAINER" ] || die "EMOE_CONTAINER $EMOE_CONTAINER: sweep.sh runs without one; give EMOE_CONTAINER="
  [ -n "$dry_run" ] || check_files
  [ -n "$dry_run" ] || [ -w "$(dirname "$EMOE_SWEEP_OUT")" ] ||
    die "EMOE_SWEEP_OUT $EMOE_SWEEP_OUT: its folder is not there, or cannot be written"
  [ -n "$dry_run" ] || [ -e "$EMOE_SWEEP_LOAD/latest_checkpointed_iteration.txt" ] ||
    die "EMOE_SWEEP_LOAD $EMOE_SWEEP_LOAD: no checkpoint in it (latest_checkpointed_iteration.txt is missing)"
}

# Sets command: what measures the k' of a task.
make_sweep_command() {
  command=("$EMOE_PYTHON" -m torch.distributed.run --standalone --nproc-per-node="$EMOE_PROCS_PER_NODE"
    "$EMOE_HOME/tools/sweep_k.py" --load "$EMOE_SWEEP_LOAD" --k "$1" --out "${EMOE_SWEEP_OUT%.json}.k$1.json"
    ${flags[@]+"${flags[@]}"})
}

run_task() {
  make_sweep_command "${ks[$SLURM_ARRAY_TASK_ID]}"
  export PYTHONPATH=$EMOE_HOME OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  srun --cpu-bind=none --export=ALL "${command[@]}"
  join_parts
}

# Joins what is there, and again if another task's part has come meanwhile: whichever task writes last, all are in it.
join_parts() {
  local k part parts=() joined=-1
  while [ ${#parts[@]} -gt $joined ]; do
    joined=${#parts[@]} parts=()
    for k in "${ks[@]}"; do
      part=${EMOE_SWEEP_OUT%.json}.k$k.json
      [ ! -e "$part" ] || parts+=("$part")
    done
    [ ${#parts[@]} = $joined ] ||
      "$EMOE_PYTHON" "$EMOE_HOME/tools/join_sweeps.py" "${parts[@]}" --out "$EMOE_SWEEP_OUT"
  done
}

submit_sweep() {
  local site k
  site_options
  submission=(sbatch "${site[@]}" --array="0-$((${#ks[@]} - 1))" ${options[@]+"${options[@]}"} --export=ALL
    "$EMOE_HOME/slurm/sweep.sh" ${flags[@]+-- "${flags[@]}"})
  [ -n "$dry_run" ] || exec "${submission[@]}"
  printf '%s\n' "$(shown "${submission[@]}")"
  for k in "${ks[@]}"; do make_sweep_command "$k"; printf '%s\n' "$(shown "${command[@]}")"; done
}

read_words "$@"
load_settings
check_sweep
read -r -a ks <<<"$EMOE_SWEEP_K"
export EMOE_SWEEP_LOAD EMOE_SWEEP_K EMOE_SWEEP_OUT
if in_batch_job; then run_task; else submit_sweep; fi
