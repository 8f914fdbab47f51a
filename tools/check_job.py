"""Check the command line of a job before it waits in a queue; the scripts in slurm/ call this.

    python tools/check_job.py --nodes 2 --processes 8 --save OUT -- @model.args --load OUT --save OUT ...

After `--` come the flags of pretrain_emoe.py. Exit status 2, with flag or path, value and rule, where the run would be
refused on the nodes, could not be stopped and requeued, or could not write a checkpoint.
"""

import sys

from megatron_emoe.plan.job import Job, check_given
from megatron_emoe.settings import flag_files
from megatron_emoe.settings.command_line import SAID, command_line
from megatron_emoe.settings.flag_types import a_path, whole
from megatron_emoe.settings.quiet import leave_out_noise
from megatron_emoe.settings.refusal import fail
from megatron_emoe.training.first_look import check_training_words


def read_job(words: list[str]) -> Job:
    parser = command_line(__doc__, epilog="The flags of pretrain_emoe.py: pretrain_emoe.py --help, and --help-all.")
    parser.add_argument("--nodes", type=whole, required=True, help="Nodes of the job.")
    parser.add_argument("--processes", type=whole, required=True, help="Ranks on each node.")
    parser.add_argument("--gpus", type=int, help="GPUs on each node; 0: host mode. Default: as many as processes.")
    parser.add_argument("--save", type=a_path, required=True, help="Folder of the job's checkpoints.")
    args = parser.parse_args(words)
    gpus = args.processes if args.gpus is None else args.gpus
    return Job(nodes=args.nodes, processes=args.processes, gpus=gpus, save=args.save)


def main() -> None:
    leave_out_noise()
    own, flags = sys.argv[1:], []
    if "--" in own:
        split = own.index("--")
        own, flags = own[:split], own[split + 1 :]
    job = read_job(own)
    try:
        flags = flag_files.expand(flags)
        check_given(job, flags)
        check_training_words(flags)
        from megatron_emoe.plan.preflight import check

        check(job, flags)
    except ValueError as error:
        fail(error)
    for line in SAID:  # of the run's start: what is switched off, what changes
        print(line)
    print(f"checked: {job.nodes} nodes x {job.processes} processes, checkpoints in {job.save}")


if __name__ == "__main__":
    main()
