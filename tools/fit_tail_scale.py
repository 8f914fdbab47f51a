"""Fit the tail scale a(k') of a checkpoint on held-out data, and store the table with the checkpoint.

    torchrun --nproc-per-node 2 tools/fit_tail_scale.py --load CKPT --k 6 8 12 16 --data-path HELDOUT

No weight is touched. Sweeps and tasks then use the table unless --emoe-tail-scale is given (1 is plain top-k'). The
second half of the tokens is fitted on and the first half judged; what is printed at the end includes how many tokens a
sweep may read without one that was fitted on. Exit status 2 for what is refused, 1 where a loss is no number; then
nothing is stored.
"""

from __future__ import annotations

import math
from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_emoe.host import mode as host_mode
from megatron_emoe.settings.flag_files import own_command
from megatron_emoe.settings.flag_types import path_word, whole
from megatron_emoe.settings.paths import check_out
from megatron_emoe.settings.refusal import NoNumber, fail
from megatron_emoe.training.first_look import look_at_evaluation

if TYPE_CHECKING:
    from megatron_emoe.sweep.tail_fit import Fitted


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    group = parser.add_argument_group("tail scale")
    group.add_argument("--k", type=int, nargs="+", required=True, help="The k' to fit, each above --moe-router-topk.")
    group.add_argument(
        "--max-eval-tokens",
        type=whole,
        default=2_000_000,
        help="Held-out tokens to use at most (default: 2,000,000): the second half is fitted on, the first judged. "
        "Twice the default of tools/sweep_k.py, which then reads none that was fitted on, if the data hold as many.",
    )
    group.add_argument("--max-scale", type=float, default=1.0, help="The largest a to consider.")
    group.add_argument(
        "--fold",
        action="store_true",
        help="Also fit a factor of the router's weight for each k', which an engine without a tail scale can load, and "
        "say what it gives. It is not stored in the model.",
    )
    group.add_argument("--out", type=path_word, help="Write the table here instead of into the checkpoint.")
    return parser


def check_asked(args: Namespace) -> None:
    """What can be refused without the checkpoint (ValueError with flag, value and rule)."""
    if not 0 < args.max_scale < math.inf:
        raise ValueError(f"--max-scale {args.max_scale}: must be above 0 and finite")
    if args.out:
        check_out(args.out)


def check(args: Namespace) -> Path:
    """The file to write (ValueError with flag, value and rule)."""
    from megatron_emoe.model.checkpoint import locate
    from megatron_emoe.routing.transformer_config import check_ks
    from megatron_emoe.sweep.tail_fit import tail_scale_path

    for k in args.k:
        if not args.moe_router_topk < k <= args.num_experts:
            rule = f"must lie in [{args.moe_router_topk + 1}, {args.num_experts}], above the k of the checkpoint"
            raise ValueError(f"--k {k}: {rule}")
    check_ks(args, "--k", args.k)
    if args.emoe_selection in ("top-p", "null-experts"):
        raise ValueError(
            f"--load {args.load}: was trained with --emoe-selection {args.emoe_selection}: no tail to scale"
        )
    if args.out:
        return Path(args.out)
    target = tail_scale_path(locate(args.load, args.ckpt_step))
    check_out(target, "--load")
    return target


def table(found: dict[int, Fitted]) -> str:
    """Markdown, with two more columns where a factor of the router was fitted."""
    folds = any(fitted.folded is not None for fitted in found.values())
    head = ["k'", "a(k')", "loss at k", "plain top-k'", "with a(k')", *(["router x", "with it"] if folds else [])]
    lines = ["| " + " | ".join(head) + " |", "|" + " ---: |" * len(head)]
    for k, fitted in found.items():
        numbers = [f"{fitted.scale:.3f}", *(f"{loss:.4f}" for loss in (fitted.at_k, fitted.plain, fitted.judged))]
        if fitted.folded is not None:
            numbers += [f"{fitted.router_scale:.2f}", f"{fitted.folded:.4f}"]
        lines.append("| " + " | ".join([str(k), *numbers]) + " |")
    return "\n".join(lines)


def main() -> None:
    look_at_evaluation(__doc__, add_arguments, check_asked)
    host_mode.start()
    run()


def run() -> None:
    """The fit, with Megatron."""
    import torch

    from megatron_emoe.sweep.tail_fit import run_fit
    from megatron_emoe.training.arguments import parse_evaluation

    fixed = {"skip_train": True, "no_load_optim": True, "no_load_rng": True, "split": "0,100,0"}
    fixed |= {"create_attention_mask_in_dataloader": False, "dataloader_type": "single"}
    args = parse_evaluation(add_arguments, **fixed, seed=1234)
    header = {
        "checkpoint": args.load,
        "k_train": args.moe_router_topk,
        "data": [str(path) for path in args.data_path or []],
        "max_eval_tokens": args.max_eval_tokens,
        "command": own_command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        target = check(args)
        found, before = run_fit(args, target, header)
    except ValueError as error:
        fail(error)
    except NoNumber as error:
        fail(error, status=1)
    except OSError as error:
        fail(f"{error.filename}: cannot be written ({error.strerror})", status=1)
    if torch.distributed.get_rank() == 0:
        print(f"Held-out loss, nats per token, on the half that was not fitted on:\n\n{table(found)}\n")
        print(f"a sweep with --max-eval-tokens {before} or fewer reads nothing that was fitted on\nstored: {target}")


if __name__ == "__main__":
    main()
