"""The best number of active experts k' for a budget, from a sweep.

    python tools/pick_k.py sweep.json --max-flops 0.6
    python tools/pick_k.py sweep.json --max-latency-ms 12 --at batch1
    python tools/pick_k.py sweep.json --min-quality 0.98
    python tools/pick_k.py sweep.json --budgets budgets.json

The answer is the measured k' of the lowest loss within the budget (with --min-quality: of the fewest expert FLOPs).
Where the sweep measured layers alone (tools/sweep_k.py --layer-sensitivity), a greedy search looks for a k' per layer
that is better at the same cost. Its loss is a prediction until that very cell is measured; the command for it is
printed, and the answer changes only for a measured, lower loss. Exit status 1 where no measured k' fits, 2 for bad
input.

With --budgets no single k' is picked: the measured k' that no cheaper one equals are written with names (fast, default,
best), for a server that offers them all. --min-quality is then the floor of the cheapest.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from megatron_emoe.settings.command_line import command_line
from megatron_emoe.settings.flag_types import a_path
from megatron_emoe.settings.refusal import fail
from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep import named_budgets
from megatron_emoe.sweep.allocation import Allocation, moe_layers, sensitivities
from megatron_emoe.sweep.budget import (
    Answer,
    Limit,
    answer,
    flops_limit,
    flops_share,
    latency_limit,
    name,
    quality_limit,
)
from megatron_emoe.sweep.curve import SweepCell, SweepResult
from megatron_emoe.sweep.serving import serving_lines, sweep_command, tail_scale_at
from megatron_emoe.sweep.summary import speeds_count, to_k
from megatron_emoe.sweep.uncertainty import signed


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("result", type=a_path, metavar="SWEEP.json", help="a result of tools/sweep_k.py")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument(
        "--max-flops",
        type=float,
        metavar="X",
        help="expert FLOPs per token, as a multiple of those at the k of training: with k = 4, 0.6 allows k' <= 2",
    )
    budget.add_argument(
        "--max-latency-ms",
        type=float,
        metavar="X",
        help="milliseconds per token as the sweep measured them (--latency); see --at",
    )
    budget.add_argument(
        "--min-quality",
        type=float,
        metavar="X",
        help="quality relative to the k of training: exp(loss at k - loss at k'), the geometric mean of the right "
        "token's probability over that at k. 1 is as good as at k; 0.98 allows a loss 0.0202 nats higher",
    )
    parser.add_argument(
        "--at",
        choices=("batch1", "large"),
        help="which latency: of one token alone, or of a token in a full batch (default: batch1)",
    )
    parser.add_argument(
        "--budgets",
        type=a_path,
        metavar="TABLE.json",
        help="write a table of named budgets there; alone, or with --min-quality as the floor of the cheapest "
        f"(default: {named_budgets.FLOOR:g})",
    )
    args = parser.parse_args(argv)
    if args.at and args.max_latency_ms is None:
        parser.error("--at: only with --max-latency-ms")
    _check_asked(parser, args)
    return args


def _check_asked(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    asked = [flag for flag in ("--max-flops", "--max-latency-ms", "--min-quality") if _value(args, flag) is not None]
    if not asked and args.budgets is None:
        parser.error("one of --max-flops, --max-latency-ms, --min-quality, --budgets is required")
    if args.budgets is not None and asked not in ([], ["--min-quality"]):
        parser.error(f"{asked[0]} {_value(args, asked[0]):g}: not with --budgets, which lists every budget")


def _value(args: argparse.Namespace, flag: str) -> float | None:
    return getattr(args, flag.removeprefix("--").replace("-", "_"))


def limit_of(result: SweepResult, args: argparse.Namespace) -> Limit:
    """The budget of the command line. Raises `ValueError` where the sweep cannot tell what it asks for."""
    if args.max_flops is not None:
        return flops_limit(result, args.max_flops)
    if args.max_latency_ms is not None:
        return latency_limit(result, args.max_latency_ms, args.at or "batch1")
    return quality_limit(result, args.min_quality)


def lines(path: Path, result: SweepResult, limit: Limit, found: Answer) -> list[str]:
    """What is printed: the budget, the candidates, the answer, how to measure more, how to run it."""
    best = found.best
    tail = tail_scale_at(result, best.k)
    scaled = "" if tail == 1 else f", with tail scale {tail:g}"
    return [
        f"{result.label} ({result.checkpoint}), trained at k = {result.k_train} of {result.num_experts} experts",
        f"{limit.flag}: {limit.bound()}{_of_cpu(result, limit)}",
        "",
        *table(result, limit, found),
        "",
        f"best: k' = {name(best.k)}, loss {best.loss:.4f} (measured){scaled}",
        *per_layer_lines(path, result, found),
        "",
        *serving_lines(result, best.k),
    ]


def table(result: SweepResult, limit: Limit, found: Answer) -> list[str]:
    """A Markdown table of the candidates: k', experts over all layers, their FLOPs, loss, and what is limited."""
    measured = {cell.k: cell for cell in (found.single, found.best) if cell is not None}
    rows = [_row(result, limit, k, cell.loss, cell) for k, cell in measured.items()]
    rows += [_row(result, limit, each.k, each.loss, each.cell) for each in found.per_layer if each.k not in measured]
    head = ["k'", "experts", "expert FLOPs", "loss", f"to k = {result.k_train}", "", *_limited(limit, "ms per token")]
    rule = ["---:"] * 5 + ["---", *_limited(limit, "---:")]
    return ["| " + " | ".join(row) + " |" for row in (head, rule, *rows)]


def _of_cpu(result: SweepResult, limit: Limit) -> str:
    """A word on a latency that says nothing of a GPU."""
    return "" if limit.flag != "--max-latency-ms" or speeds_count(result) else " (measured on a CPU)"


def _limited(limit: Limit, text: str) -> list[str]:
    """A column for what is limited, where no other column has it."""
    return [text] if limit.flag == "--max-latency-ms" else []


def _row(result: SweepResult, limit: Limit, k: int | Allocation, loss: float, cell: SweepCell | None) -> list[str]:
    layers = moe_layers(result)
    experts = k * (layers or 1) if isinstance(k, int) else sum(k)
    share = experts / (layers or 1) / result.k_train if cell is None else flops_share(result, cell)
    value = None if cell is None else limit.of(cell)
    return [
        name(k),
        str(experts) if layers else "",
        f"{share:.3f}",
        f"{loss:.4f}",
        signed(loss - sweep.loss_at(result, result.k_train)) if cell is None else to_k(result, cell).text(),
        ("predicted" if cell is None else "measured") + ("" if isinstance(k, int) else ", per layer"),
        *_limited(limit, "" if value is None else f"{value:.4g}"),
    ]


def per_layer_lines(path: Path, result: SweepResult, found: Answer) -> list[str]:
    """How one k' per layer compares within this budget, and the command that would tell more."""
    if not any(len(layer) > 1 for layer in sensitivities(result)):
        command = sweep_command(result, path, more="--layer-sensitivity")
        return ["per layer: no layer was measured alone; to measure:", f"  {command}"]
    unmeasured = [each.k for each in found.per_layer if each.cell is None]
    verdict = [f"per layer: {_verdict(found)}"]
    if not unmeasured:
        return verdict
    return [
        *verdict,
        "a predicted loss counts only once measured; to measure:",
        f"  {sweep_command(result, path, unmeasured)}",
    ]


def _verdict(found: Answer) -> str:
    """How the best measured k' per layer compares with the best single k'."""
    best, single = found.best, found.single
    if single is None:
        return "no single k' fits"
    if best.k != single.k:
        share = best.expert_flops_per_token / single.expert_flops_per_token
        return (
            f"{name(best.k)} is better than {name(single.k)} everywhere, measured: "
            f"loss {best.loss - single.loss:+.4f} at {share:.3g} times its expert FLOPs"
        )
    if not found.per_layer:
        return f"nothing is predicted to be better than {name(single.k)} everywhere"
    if any(each.cell is None for each in found.per_layer):
        return f"not all of it is measured, and nothing measured is better than {name(single.k)} everywhere"
    return f"measured, and not better than {name(single.k)} everywhere"


def write_budgets(args: argparse.Namespace) -> None:
    """The table of named budgets, whole or not at all, and what is printed of it."""
    floor = named_budgets.FLOOR if args.min_quality is None else args.min_quality
    try:
        named_budgets.check_target(args.budgets, args.result)
        result = sweep.load(args.result)
        table = named_budgets.budget_table(result, floor)
        named_budgets.save(table, args.budgets)
    except ValueError as error:
        fail(error)
    except OSError as error:
        fail(f"--budgets {args.budgets}: cannot be written ({error.strerror})")
    print("\n".join(named_budgets.lines(result, table, args.budgets, floor)))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    if args.budgets is not None:
        return write_budgets(args)
    try:
        result = sweep.load(args.result)
        limit = limit_of(result, args)
    except ValueError as error:
        fail(error)
    try:
        found = answer(result, limit)
    except ValueError as error:  # nothing fits: an answer too, and no mistake in the question
        raise SystemExit(f"pick_k.py: {error}") from error
    print("\n".join(lines(args.result, result, limit, found)))


if __name__ == "__main__":
    main()
