#!/usr/bin/env bash
# Continue-train OLMoE-1B-7B elastically on one GPU of 80 to 141 GB, with the recipe of docs/study.md.
#
#   BASE=CHECKPOINT DATA=data/text SAVE=OUT examples/continue_olmoe_1gpu.sh [--dry-run] [FLAGS]
#
# BASE is an imported checkpoint (tools/convert_checkpoint.py import), DATA what --data-path takes. FLAGS go to
# pretrain_emoe.py and override what stands here. --dry-run prints the command and runs nothing. A run that is started
# again goes on from its newest checkpoint in SAVE.
#
#   PRECISION     bf16 (default), or fp8: the linear layers' products, experts' too; needs an FP8 GPU (Hopper, Ada ...)
#   STATE         what gradients and Adam's moments are kept in: bf16, bf16-grads or fp8 (tools/plan_job.py
#                 --optimizer-state). Unset: the first of these that fits GPU_MEMORY
#   GPU_MEMORY    GiB of the GPU. Unset: what nvidia-smi says
#   MICRO_BATCH   sequences of 4096 tokens in a micro-batch (1: leaves most memory)
#   RESERVE       GiB of the GPU that the layout leaves free (12: nothing here was tried on a GPU)
#   GLOBAL_BATCH  sequences of 4096 tokens in a step (32: gradients may be added up in bf16)
#   PYTHON        the interpreter (.venv/bin/python), with Transformer Engine
#
# Not run on a GPU yet (docs/gpu.md).
[ -n "${BASH_VERSION:-}" ] || { echo "continue_olmoe_1gpu.sh: error: run it with bash, not sh" >&2; exit 2; }
set -euo pipefail

home=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
: "${PRECISION:=bf16}" "${STATE:=}" "${GPU_MEMORY:=}"
: "${GLOBAL_BATCH:=32}" "${MICRO_BATCH:=1}" "${RESERVE:=12}" "${PYTHON:=$home/.venv/bin/python}"
: "${BASE:=}" "${DATA:=}" "${SAVE:=}"
export PYTHONPATH=$home${PYTHONPATH:+:$PYTHONPATH}

die() { echo "continue_olmoe_1gpu.sh: error: $*" >&2; exit 2; }

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

check_settings() {
  local name
  for name in BASE DATA SAVE; do [ -n "${!name}" ] || die "$name is not set (--help says what it is)"; done
  [ -d "$BASE" ] || die "BASE $BASE: no such folder"
  case $PRECISION in bf16 | fp8) ;; *) die "PRECISION $PRECISION: must be bf16 or fp8" ;; esac
  case $STATE in "" | bf16 | bf16-grads | fp8) ;; *) die "STATE $STATE: must be bf16, bf16-grads or fp8" ;; esac
  for name in GLOBAL_BATCH MICRO_BATCH RESERVE; do
    [[ ${!name} =~ ^[1-9][0-9]*$ ]] || die "$name ${!name}: must be a whole number of at least 1"
  done
  type -P "$PYTHON" >/dev/null || die "PYTHON $PYTHON: no such program; make it with 'make setup'"
  [ -n "$GPU_MEMORY" ] || GPU_MEMORY=$(memory_of_the_gpu) || die "GPU_MEMORY is not set, and nvidia-smi finds no GPU"
  [[ $GPU_MEMORY =~ ^[1-9][0-9]*$ ]] || die "GPU_MEMORY $GPU_MEMORY: must be a whole number of GiB"
}

# GiB of the first GPU, as nvidia-smi gives its MiB.
memory_of_the_gpu() {
  local mib
  mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
  [[ $mib =~ ^[0-9]+$ ]] && echo $((mib / 1024))
}

# Sets layout: the planner's flags for the first state that fits.
find_layout() {
  local state why=""
  for state in ${STATE:-bf16 bf16-grads fp8}; do
    if layout=$("$PYTHON" "$home/tools/plan_job.py" --model "$model" --recipe "$recipe" --gpus 1 --print-flags \
      --gpu-memory "$GPU_MEMORY" --precision "$PRECISION" --optimizer-state "$state" \
      --global-batch "$GLOBAL_BATCH" --micro-batch "$MICRO_BATCH" --reserve "$RESERVE" 2>&1); then return; fi
    why=$layout
  done
  die "no state fits; of the last one: $why"
}

make_command() {
  command=("@$model" "@$recipe" "@$home/slurm/train.args" --data-path $DATA)
  command+=($layout --transformer-impl transformer_engine --no-gradient-accumulation-fusion)  # that fusion needs Apex
  command+=(--pretrained-checkpoint "$BASE" --load "$SAVE" --save "$SAVE" --exit-signal-handler)
  command+=(${flags[@]+"${flags[@]}"})
}

# What makes a run impossible, before anything is loaded.
check_run() {
  "$PYTHON" -c 'import transformer_engine.pytorch' 2>/dev/null ||
    die "PYTHON $PYTHON: Transformer Engine does not import there, and the precision-aware optimizer is its own (pip install .[te])"
  "$PYTHON" "$home/tools/check_job.py" --nodes 1 --processes 1 --save "$SAVE" -- "${command[@]}" || exit $?
}

read_words "$@"
check_settings
model=$home/examples/models/olmoe_1b_7b.args recipe=$home/examples/recipe.args
[ ! -f "$BASE/model.args" ] || model=$BASE/model.args
find_layout
make_command
start=("$PYTHON" -m torch.distributed.run --standalone --nproc-per-node 1 "$home/pretrain_emoe.py" "${command[@]}")
if [ -n "$dry_run" ]; then printf '%s ' "${start[@]}"; echo; exit 0; fi
check_run
exec "${start[@]}"
