#!/usr/bin/env bash
# Elastic training of low-rank experts on LLaMA-2-7B on a Slurm cluster (docs/lora.md, docs/slurm.md).
#
#   slurm/emoe_lora_7b.sh --dry-run                          print plan and command line, submit nothing
#   slurm/emoe_lora_7b.sh [SBATCH OPTIONS] -- [FLAGS]        check everything, then submit; FLAGS go to pretrain_emoe.py
#   sbatch [SBATCH OPTIONS] slurm/emoe_lora_7b.sh -- [FLAGS] submit; checked when the job starts
#
#SBATCH --job-name=emoe-lora-7b
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@180
#SBATCH --output=%x-%j.out

[ -n "${BASH_VERSION:-}" ] || { echo "emoe_lora_7b.sh: error: run it with bash, not sh" >&2; exit 2; }
EMOE_MODEL=llama2-7b-lora
EMOE_MODEL_ARGS=../llama_2_7b_lora.args

# Under sbatch this file is a copy in Slurm's spool: the repository is EMOE_HOME, or the folder of the submission.
EMOE_SCRIPT=emoe_lora_7b.sh
submitted=${SLURM_SUBMIT_DIR:-}
for EMOE_HOME in "$(dirname "${BASH_SOURCE[0]}")/.." "${EMOE_HOME:-}" "$submitted" "$submitted/.."; do
  [ ! -f "$EMOE_HOME/slurm/job.sh" ] || break
done
[ -f "$EMOE_HOME/slurm/job.sh" ] ||
  { echo "$EMOE_SCRIPT: error: no slurm/job.sh found: submit from the repository, or set EMOE_HOME to it" >&2; exit 2; }
EMOE_HOME=$(cd "$EMOE_HOME" && pwd)
# Behind train.args once more: the learning rate is that of experts, not of a whole model.
: "${EMOE_RECIPE=@$EMOE_HOME/examples/lora.args}"
: "${EMOE_TRAIN_FLAGS=@$EMOE_HOME/slurm/train.args @$EMOE_HOME/examples/lora.args}"
source "$EMOE_HOME/slurm/job.sh"
