"""What a sweep comes to, in words and one table: which k' to use, at which cost and gain."""

from __future__ import annotations

from megatron_emoe.sweep.budget import flops_share, name
from megatron_emoe.sweep.curve import SweepCell, SweepResult, best_k, curve, wall
from megatron_emoe.sweep.uncertainty import Difference, difference


def sure_k(result: SweepResult) -> int:
    """The k' to use where only the loss counts: the smallest one that is not surely worse than the best.

    Raises `ValueError` without any cell.
    """
    best = best_k(result)
    measured = curve(result)
    return next(k for k, cell in measured.items() if k == best or not difference(cell, measured[best]).is_sure)


def scaled(result: SweepResult) -> bool:
    """Whether a tail scale changed any weight; a table of ones is plain top-k'."""
    return any(scale != 1 for scale in (result.tail_scale or {}).values())


def shown_label(result: SweepResult) -> str:
    """The label, with `+ a(k')` where a tail scale was in force and the label does not say so."""
    return f"{result.label} + a(k')" if scaled(result) and "a(k" not in result.label else result.label


def speeds_count(result: SweepResult) -> bool:
    """Whether speed and latency say anything: not where a cell is known to have run on a CPU."""
    return all(cell.device != "cpu" for cell in result.cells)


def to_k(result: SweepResult, cell: SweepCell) -> Difference:
    """Loss of a cell less that at the k of training. ValueError where there is none."""
    measured = curve(result)
    if result.k_train not in measured:
        raise ValueError(f"{result.label}: no cell at k' = {result.k_train}, the k of training")
    return difference(cell, measured[result.k_train])


def answer(result: SweepResult) -> str:
    """`use k' = 8: loss -0.0210 ± 0.0008 to k = 4, at 2 times its expert FLOPs; no wall up to k' = 16`."""
    k, measured, first = sure_k(result), curve(result), wall(result)
    if k == result.k_train:
        gain = "the k of training: no other measured k' is surely better"
    else:
        share = f"{flops_share(result, measured[k]):.3g} times its expert FLOPs"
        gained = to_k(result, measured[k])
        unsure = " (error unknown)" if gained.error is None else ""
        gain = f"loss {gained.text()}{unsure} to k = {result.k_train}, at {share}"
    return f"use k' = {k}: {gain}; " + (f"wall at k' = {first}" if first else f"no wall up to k' = {max(measured)}")


def table(result: SweepResult) -> str:
    """Every cell in Markdown: loss, difference to k where that was measured, cost, tokens/s."""
    has_k = result.k_train in curve(result)
    speed = speeds_count(result)
    head = ["k'", "loss", *([f"to k = {result.k_train}", "expert FLOPs"] if has_k else []), *["tokens/s"] * speed]
    lines = [head, ["---:"] * len(head)]
    for cell in result.cells:
        more = [to_k(result, cell).text(), f"x {flops_share(result, cell):.3g}"] if has_k else []
        lines.append([name(cell.k), f"{cell.loss:.4f}", *more, *[f"{cell.tokens_per_second:,.0f}"] * speed])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def ending(result: SweepResult) -> str:
    """What a sweep prints at its end."""
    errors = any(cell.block_losses for cell in result.cells)
    lines = [f"{result.label}: held-out loss, nats per token" + (" (± standard error over the data)" if errors else "")]
    lines += ["", table(result)]
    return "\n".join([*lines, answer(result)] if result.k_train in curve(result) else lines).rstrip("\n")
