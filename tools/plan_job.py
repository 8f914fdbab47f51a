"""Plan a training job before it starts: layout, memory, traffic, FLOPs, hours. No GPU, no data, no process group.

    python tools/plan_job.py --model olmoe-7b --gpus 8
    python tools/plan_job.py --model ernie-4.5-21b --gpus 16 --gpu-memory 141 --recipe examples/recipe.args
    python tools/plan_job.py --model MODEL.args --gpus 32 --tp 2 --pp 2 --ep 8 --print-flags

What is not given of the layout is searched: the best layout that fits, and the runners-up. Exit status 2, with the rule
on stderr, where a layout is impossible or nothing fits. --check builds every distinct rank of the layout at full size,
without memory for its tensors, and compares the parameters (status 1 where they differ).
"""

import argparse
import json
import logging
import sys
import warnings
from collections.abc import Sequence

from megatron_emoe.host import mode as host_mode
from megatron_emoe.plan import kept
from megatron_emoe.plan import report as plan_report
from megatron_emoe.plan.given import Given, read_given
from megatron_emoe.plan.layout import OPTIMIZER_STATES
from megatron_emoe.plan.model import MODELS, read_model
from megatron_emoe.plan.search import MOST_GPUS, RECOMPUTATIONS, Machine, Plan, Wanted, propose
from megatron_emoe.settings.command_line import command_line
from megatron_emoe.settings.flag_types import path_word, positive, whole, whole_to
from megatron_emoe.settings.refusal import fail

TOKENS = 20e9
GLOBAL_BATCH = 256


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or a file of Megatron's flags")
    parser.add_argument("--recipe", type=path_word, metavar="FILE", help="elastic settings, for E[k] and k_max")
    _add_job(parser)
    _add_machine(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object: bytes, FLOPs, hours")
    parser.add_argument("--print-flags", action="store_true", help="print Megatron's flags of the layout, one line")
    parser.add_argument("--check", action="store_true", help="build every distinct rank and compare its parameters")
    args = parser.parse_args(argv)
    if args.json + args.print_flags + args.check > 1:
        parser.error("--json, --print-flags and --check exclude each other")
    if args.mfu > 1:
        parser.error(f"--mfu {args.mfu:g}: must be at most 1")
    if args.imbalance < 1:
        parser.error(f"--imbalance {args.imbalance:g}: must be at least 1, the mean")
    return args


def _add_job(parser: argparse.ArgumentParser) -> None:
    job = parser.add_argument_group("job")
    job.add_argument("--gpus", type=whole_to(MOST_GPUS), required=True, help="GPUs of the whole job")
    job.add_argument("--gpus-per-node", type=whole, default=8, help="(8)")
    job.add_argument("--tp", type=whole, help="tensor-parallel ranks; with sequence parallelism")
    job.add_argument("--pp", type=whole, help="pipeline stages")
    job.add_argument("--ep", type=whole, help="expert-parallel ranks")
    job.add_argument("--etp", type=whole, help="ranks that share one expert (1)")
    job.add_argument("--micro-batch", type=whole, help="sequences of a micro-batch")
    job.add_argument("--global-batch", type=whole, help="sequences of a step (256)")
    job.add_argument("--seq", type=whole, help="tokens of a sequence (4096, or the model's longest where shorter)")
    job.add_argument("--recompute", choices=RECOMPUTATIONS, help="what the backward pass computes again")
    job.add_argument(
        "--precision", choices=("bf16", "fp8"), help="of a model in fp32 too, whose run then gets --bf16 (bf16)"
    )
    job.add_argument(
        "--optimizer-state",
        choices=OPTIMIZER_STATES,
        default="fp32",
        help="gradients and Adam's state in memory (fp32)",
    )
    length = job.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=positive, help="token budget, for steps and hours (20e9)")
    length.add_argument(
        "--training",
        type=path_word,
        metavar="FILE",
        help="flags of the run, as in slurm/train.args: steps and hours are those of its --train-iters, what it says "
        "of the layout is kept, and its elastic flags override the recipe's",
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine, default = parser.add_argument_group("machine"), Machine()
    machine.add_argument("--gpu-memory", type=positive, default=default.gpu_memory, help="GiB of a GPU (80)")
    machine.add_argument(
        "--reserve",
        type=positive,
        default=default.reserve,
        help="GiB of it for CUDA context, NCCL, workspaces and fragmentation (8)",
    )
    machine.add_argument("--gpu-tflops", type=positive, default=default.tflops, help="peak of a GPU (989: H100, bf16)")
    machine.add_argument("--mfu", type=positive, default=default.mfu, help="share of the peak that hours assume (0.3)")
    machine.add_argument(
        "--node-gbs", type=positive, default=default.node_gbs, help="GB/s that a GPU sends within its node (300)"
    )
    machine.add_argument(
        "--network-gbs", type=positive, default=default.network_gbs, help="GB/s that a GPU sends to other nodes (40)"
    )
    machine.add_argument(
        "--imbalance",
        type=positive,
        default=default.imbalance,
        help="rows of the busiest rank's experts, as a multiple of the mean (1.25)",
    )


def plans_of(args: argparse.Namespace, elastic: Sequence[str]) -> list[Plan]:
    """The plans that fit, best first; elastic: flags that override the recipe's. Raises ValueError with the rule that
    nothing satisfies."""
    given = {"bf16": args.precision is not None, "elastic": elastic}
    model = read_model(args.model, args.recipe, args.seq, kept.user_folder(), **given)
    wanted = Wanted(
        gpus=args.gpus,
        gpus_per_node=min(args.gpus_per_node, args.gpus),
        global_batch=args.global_batch or GLOBAL_BATCH,
        seq=model.args.seq_length,
        tp=args.tp,
        pp=args.pp,
        ep=args.ep,
        etp=args.etp,
        micro_batch=args.micro_batch,
        recompute=args.recompute,
        fp8=args.precision == "fp8",
        state=args.optimizer_state,
    )
    speeds = {"tflops": args.gpu_tflops, "mfu": args.mfu, "node_gbs": args.node_gbs, "network_gbs": args.network_gbs}
    machine = Machine(args.gpu_memory, args.reserve, imbalance=args.imbalance, **speeds)
    return propose(model, wanted, machine)


def _precision(*named: str | None) -> str | None:
    """FP8 is computed in a model of bf16, so it counts where only one of them names it."""
    return "fp8" if "fp8" in named else next(filter(None, named), None)


def check(plan: Plan) -> int:
    """Build and compare; the exit status."""
    host_mode.enable(force=True)  # the ranks have no memory, and none of a GPU
    from megatron_emoe.plan.check import check_parameters

    print(f"{plan.model.name}, {plan.layout.name()}: every distinct rank built at full size on the meta device")
    agree = True
    for checked in check_parameters(plan.model, plan.layout):
        print(plan_report.checked_line(checked), flush=True)
        agree = agree and checked.agrees
    print("all parameter counts are as planned" if agree else "the plan's parameter counts are wrong")
    return 0 if agree else 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    warnings.filterwarnings("ignore")  # Megatron's, about libraries of GPUs
    logging.disable(logging.WARNING)
    try:
        given = read_given(args.training) if args.training else Given({})
        vars(args).update(given.layout, precision=_precision(args.precision, given.precision))
        plans = plans_of(args, given.elastic)
        if args.check:
            return check(plans[0])
    except ValueError as error:
        fail(error)
    layout = plans[0].layout
    tokens = args.tokens or given.tokens(layout.global_batch, layout.seq) or TOKENS
    if args.print_flags:
        print(plan_report.flags_line(plans[0]))
    elif args.json:
        print(json.dumps(plan_report.as_json(plans, tokens), indent=1))
    else:
        print("\n".join(plan_report.text(plans, tokens)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
