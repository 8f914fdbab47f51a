#!/usr/bin/env bash
# Continued elastic training of Granite-3.0-1B-A400M on a Slurm cluster (docs/slurm.md).
#
#   slurm/emoe_1b.sh --dry-run                          print plan and command line, submit nothing
#   slurm/emoe_1b.sh [SBATCH OPTIONS] -- [FLAGS]        check everything, then submit; FLAGS go to pretrain_emoe.py
#   sbatch [SBATCH OPTIONS] slurm/emoe_1b.sh -- [FLAGS] submit; checked when the job starts
#
#SBATCH --job-name=emoe-1b
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

[ -n "${BASH_VERSION:-}" ] || { echo "emoe_1b.sh: error: run it with bash, not sh" >&2; exit 2; }
EMOE_MODEL=granite-1b
EMOE_MODEL_ARGS=granite_3_0_1b_a400m.args

# Under sbatch this file is a copy in Slurm's spool: the repository is EMOE_HOME, or the folder of the submission.
EMOE_SCRIPT=emoe_1b.sh
submitted=${SLURM_SUBMIT_DIR:-}
for EMOE_HOME in "$(dirname "${BASH_SOURCE[0]}")/.." "${EMOE_HOME:-}" "$submitted" "$submitted/.."; do
  [ ! -f "$EMOE_HOME/slurm/job.sh" ] || break
done
[ -f "$EMOE_HOME/slurm/job.sh" ] ||
  { echo "$EMOE_SCRIPT: error: no slurm/job.sh found: submit from the repository, or set EMOE_HOME to it" >&2; exit 2; }
source "$EMOE_HOME/slurm/job.sh"
