"""Sweep k': held-out loss, speed and cost of one checkpoint at several numbers of active experts.

    torchrun --nproc-per-node 2 tools/sweep_k.py --load CKPT --k 1 2 4 6 8 --data-path HELDOUT --out sweep.json

The model's flags come from the checkpoint; parallel layout and --micro-batch-size may differ from training. Cells
already in the output are kept, so an interrupted sweep goes on where it stopped.
"""

from megatron_emoe import host_mode

host_mode.start()

from argparse import ArgumentParser  # noqa: E402

from megatron_emoe.arguments import fail, parse_evaluation  # noqa: E402
from megatron_emoe.sweep_run import check_sweep, run_sweep  # noqa: E402


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    group = parser.add_argument_group("sweep")
    group.add_argument("--k", type=int, nargs="+", required=True, help="Numbers of active experts k' to evaluate.")
    group.add_argument("--out", required=True, help="Result file (JSON); finished cells in it are kept.")
    group.add_argument("--label", help="Name of the curve in tables and plots. Default: the name of the --load folder.")
    group.add_argument(
        "--max-eval-tokens",
        type=int,
        default=1_000_000,
        help="Held-out tokens to use at most (a random part, the same in every sweep).",
    )
    return parser


def main() -> None:
    fixed = {"skip_train": True, "no_load_optim": True, "no_load_rng": True, "split": "0,100,0"}
    fixed["create_attention_mask_in_dataloader"] = False  # causal; [s, s] per sequence would be kept for every k
    args = parse_evaluation(add_arguments, **fixed, seed=1234)  # the seed decides which part of the data is read
    try:
        header = check_sweep(args)
    except ValueError as error:
        fail(error)
    run_sweep(args, header)


if __name__ == "__main__":
    main()
