#!/usr/bin/env bash
# Instruction tuning on one node (docs/sft.md): chats, packed, with the recipe of docs/study.md, EMoE or plain top-k.
#
#   BASE=CHECKPOINT DATA=data/chats SAVE=OUT examples/sft_emoe.sh [--dry-run] [FLAGS]
#
# BASE is an imported checkpoint (tools/convert_checkpoint.py import), DATA what --data-path takes: the prefix that
# tools/preprocess_data.py --chat wrote, or weights and prefixes. FLAGS go to pretrain_emoe.py and override what stands
# here. --dry-run prints the command and runs nothing. A run that is started again goes on from its newest checkpoint in
# SAVE.
#
#   METHOD      recipe (default: examples/recipe.args), emoe (co-activation sampling), or topk
#   POOL        with METHOD=emoe the largest pool, --emoe-pool-k (three times the model's k)
#   SEQ         --seq-length, that of the chats (4096)
#   BATCH       sequences in a step, for the planner (64)
#   GPUS        of this node (what nvidia-smi counts)
#   GPU_MEMORY  GiB of each (80)
#   LAYOUT      a flag file with ranks and batch, such as examples/cpu.args for a trial on a CPU. Unset: the planner's
#   PYTHON      the interpreter (.venv/bin/python)
#
# Not run on a GPU yet (docs/gpu.md).
[ -n "${BASH_VERSION:-}" ] || { echo "sft_emoe.sh: error: run it with bash, not sh" >&2; exit 2; }
set -euo pipefail

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${BASE:=}" "${DATA:=}" "${SAVE:=}" "${METHOD:=recipe}" "${POOL:=}" "${SEQ:=4096}" "${BATCH:=64}"
: "${GPUS:=}" "${GPU_MEMORY:=80}" "${LAYOUT:=}" "${PYTHON:=$home/.venv/bin/python}"
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}

die() { echo "sft_emoe.sh: error: $*" >&2; exit 2; }

read_words() {
  dry_run="" flags=()
  while [ $# -gt 0 ]; do
    case $1 in
      --dry-run) dry_run=yes ;;
      -h | --help) sed -n '2,/^set /s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 0 ;;
      *) flags+=("$1") ;;
    esac
    shift
  done
}

demand_number() { [[ ${!1} =~ ^[1-9][0-9]*$ ]] || die "$1 ${!1}: must be a whole number of at least 1"; }

check_settings() {
  local name
  for name in BASE DATA SAVE; do [ -n "${!name}" ] || die "$name is not set (--help says what it is)"; done
  [ -f "$BASE/model.args" ] || die "BASE $BASE: no model.args in it; tools/convert_checkpoint.py import makes one"
  [ -z "$LAYOUT" ] || [ -f "$LAYOUT" ] || die "LAYOUT $LAYOUT: no such file"
  type -P "$PYTHON" >/dev/null || die "PYTHON $PYTHON: no such program; make it with 'make setup'"
  [ -n "$GPUS" ] || GPUS=$(nvidia-smi --list-gpus 2>/dev/null | grep -c .) || die "GPUS is not set, and nvidia-smi finds none"
  for name in GPUS GPU_MEMORY SEQ BATCH; do demand_number $name; done
}

# Sets method: the flags that make the run elastic.
find_method() {
  local k
  case $METHOD in
    recipe) method=("@$home/examples/recipe.args") ;;
    topk) method=(--emoe-selection topk) ;;
    emoe)
      k=$(sed -n 's/^--moe-router-topk \([0-9]*\).*/\1/p' "$BASE/model.args" | tail -n 1)
      : "${POOL:=$((3 * ${k:-0}))}"
      demand_number POOL
      method=(--emoe-selection coactivation --emoe-pool-k "$POOL")
      ;;
    *) die "METHOD $METHOD: must be recipe, emoe or topk" ;;
  esac
}

# Sets layout: LAYOUT's flags, or the planner's.
find_layout() {
  local recipe
  layout=("@$LAYOUT")
  [ -z "$LAYOUT" ] || return 0
  recipe=$(mktemp)
  printf '%s\n' "${method[*]}" >"$recipe"
  planned=$("$PYTHON" "$home/tools/plan_job.py" --model "$BASE/model.args" --recipe "$recipe" --gpus "$GPUS" \
    --training "$home/slurm/train.args" --seq "$SEQ" --global-batch "$BATCH" --gpu-memory "$GPU_MEMORY" --precision bf16 --print-flags 2>&1) ||
    { rm -f "$recipe"; die "no layout: $planned"; }
  rm -f "$recipe"
  read -ra layout <<<"$planned"
}

make_command() {
  local data
  read -ra data <<<"$DATA"
  command=("@$BASE/model.args" "${method[@]}" "@$home/slurm/train.args" "@$home/examples/sft.args" "${layout[@]}")
  command+=(--seq-length "$SEQ" --data-path "${data[@]}")
  command+=(--pretrained-checkpoint "$BASE" --load "$SAVE" --save "$SAVE" --exit-signal-handler)
  command+=(${flags[@]+"${flags[@]}"})
}

read_words "$@"
check_settings
find_method
find_layout
make_command
start=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" "$home/pretrain_emoe.py" "${command[@]}")
if [ -n "$dry_run" ]; then printf '%s ' "${start[@]}"; echo; exit 0; fi
exec "${start[@]}"
