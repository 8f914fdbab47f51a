"""Sweep k': held-out loss, speed and cost of one checkpoint at several numbers of active experts.

    torchrun --nproc-per-node 2 tools/sweep_k.py --load CKPT --k 1 2 4 6 8 --data-path HELDOUT --out sweep.json
    python tools/sweep_k.py --hf FOLDER --k 1 2 4 6 8 --data-path HELDOUT --seq-length 4096 --out sweep.json

The model's flags come from the checkpoint, or from the config.json of a Hugging Face folder, which transformers runs on
the same tokens; parallel layout and --micro-batch-size may differ from training. Cells already in the output are kept,
so an interrupted sweep goes on where it stopped, and --evidence or --latency can be added later; cells of other data,
another checkpoint or other settings are refused. One rank needs no torchrun. Where the tail scale was fitted, give the
sweep other tokens than the fit, which says how many it may read. Exit status 2 for what is refused, 1 where a loss is
no number.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from megatron_emoe.host import mode as host_mode
from megatron_emoe.settings.command_line import say
from megatron_emoe.settings.flag_types import path_word, per_layer
from megatron_emoe.settings.refusal import fail
from megatron_emoe.sweep.request import check_asked, check_sweep
from megatron_emoe.sweep.summary import ending
from megatron_emoe.training.first_look import look_at_evaluation


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    group = parser.add_argument_group("sweep")
    group.add_argument("--hf", type=path_word, metavar="FOLDER", help="Sweep this model with transformers; no --load.")
    group.add_argument("--k", type=int, nargs="+", default=[], help="Numbers of active experts k' to evaluate.")
    group.add_argument(
        "--k-per-layer",
        type=per_layer,
        nargs="+",
        default=[],
        metavar="K,K,...",
        help="One k' for each MoE layer in layer order, dense layers left out, with commas: 2,4,4,6; several lists.",
    )
    group.add_argument(
        "--layer-sensitivity",
        action="store_true",
        help="Also, for every MoE layer and every --k: that k' in this layer, the k of training in all others.",
    )
    group.add_argument("--out", type=path_word, required=True, help="Result file (JSON); its finished cells are kept.")
    group.add_argument(
        "--label", help="Name of the curve in tables and plots. Default: that in --out, else the model's folder."
    )
    group.add_argument(
        "--max-eval-tokens",
        type=int,
        default=1_000_000,
        help="Held-out tokens to use at most (a random part, the same in every sweep).",
    )
    group.add_argument(
        "--latency",
        action="store_true",
        help="Also milliseconds per token, for one token alone and in a full micro-batch (a few seconds per k').",
    )
    group.add_argument(
        "--evidence",
        action="store_true",
        help="Also router entropy, load, coverage of training's co-activations, and the co-activation matrices, in a "
        "file beside --out (a second pass over the data per k').",
    )
    group.add_argument(
        "--agreement",
        action="store_true",
        help="Also how often the likeliest next token is that at the k of training, and the divergence from the "
        "predictions there (two more passes over the data per k'; one pipeline stage).",
    )
    group.add_argument(
        "--coverage-at-least",
        type=int,
        default=1,
        metavar="N",
        help="Tokens of training that must have used two experts together for the pair to count as covered.",
    )
    return parser


def hf_arguments(folder: Path) -> tuple[Namespace, dict[str, Any] | None]:
    """The arguments of a Hugging Face folder (see import_model.arguments_of)."""
    from megatron_emoe.hf.import_model import arguments_of  # transformers takes seconds to import

    return arguments_of(folder)


def main() -> None:
    look_at_evaluation(__doc__, add_arguments, check_asked)
    host_mode.start()
    run()


def asked() -> Namespace:
    """The arguments of the command line, with what a sweep fixes: they decide which tokens it reads."""
    from megatron_emoe.training.arguments import parse_evaluation

    fixed = {"skip_train": True, "no_load_optim": True, "no_load_rng": True, "split": "0,100,0"}
    fixed["create_attention_mask_in_dataloader"] = False  # causal; [s, s] per sequence would be kept for every k
    fixed["mtp_num_layers"] = None  # layers that predict further tokens have no part in this loss
    fixed["dataloader_type"] = "single"  # in the order of the data, as the digest and the blocks of losses have them
    fixed["seed"] = 1234  # it decides which part of the data is read
    return parse_evaluation(add_arguments, hf_arguments, **fixed)


def run() -> None:
    """The sweep, with Megatron."""
    args = asked()
    try:
        header = check_sweep(args)
    except ValueError as error:
        fail(error)
    if args.hf:
        from megatron_emoe.sweep.on_transformers import run_sweep_hf as run_sweep
    else:
        from megatron_emoe.sweep.on_megatron import run_sweep
    say("\n" + ending(run_sweep(args, header)))


if __name__ == "__main__":
    main()
