"""The numbers that are read off the curve of a k' sweep, and the file format (result.py) under one name.

A sweep evaluates one checkpoint, trained with k active experts, at several budgets k' and stores one cell per k'.
Everything here is a pure function over such results; nothing imports torch. Losses are in nats per token.

The numbers (effective range, wall, peak gain) extend "Elastic MoE: Unlocking the Inference-Time Scalability of
Mixture-of-Experts", arXiv 2509.21892, which shows the curves but does not condense them.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from megatron_emoe.sweep.result import (
    K,
    SweepCell,
    SweepData,
    SweepResult,
    cell_order,
    check_k,
    check_same_data,
    load,
    missing_ks,
    resume,
    save,
    upsert_cell,
    with_digest,
)

__all__ = [
    "TOLERANCE",
    "K",
    "Metric",
    "SweepCell",
    "SweepData",
    "SweepResult",
    "active_parameters",
    "best_k",
    "check_labels",
    "check_same_data",
    "cost_at_k",
    "curve",
    "effective_range",
    "expert_flops_per_token",
    "load",
    "loss_at",
    "markdown_table",
    "missing_ks",
    "peak_gain",
    "range_end",
    "resume",
    "save",
    "sensitivity_budgets",
    "upsert_cell",
    "wall",
    "with_digest",
]

TOLERANCE = 0.001
"""Share of the loss at k by which a k' may be worse and still count as "not worse"."""

Metric = Literal[
    "loss",
    "tokens_per_second",
    "expert_flops_per_token",
    "active_params",
    "flops_per_token",
    "latency_ms_batch1",
    "latency_ms_large",
]


def curve(result: SweepResult) -> dict[int, SweepCell]:
    """The measured k' in ascending order. Cells with one k per layer are not on the curve."""
    return {cell.k: cell for cell in sorted(result.cells, key=cell_order) if isinstance(cell.k, int)}


def loss_at(result: SweepResult, k: int) -> float:
    """Loss at k'. Raises `ValueError` where that k' was not measured."""
    measured = curve(result)
    if k not in measured:
        raise ValueError(
            f"{result.label}: no cell at k' = {k} (k_train = {result.k_train}); measured: {list(measured)}"
        )
    return measured[k].loss


def range_end(result: SweepResult, tolerance: float = TOLERANCE) -> int:
    """Largest measured k' such that no measured k'' in [k, k'] is worse than at k by more than `tolerance` x loss at k.

    Budgets below k = k_train play no part. Raises `ValueError` without a cell at k or with a negative tolerance.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance: {tolerance}; must be a finite number >= 0")
    end = result.k_train
    reference = loss_at(result, result.k_train)
    for k, cell in curve(result).items():
        if k > result.k_train:
            if _is_worse(cell.loss, reference, tolerance):
                break
            end = k
    return end


def _is_worse(loss: float, reference: float, tolerance: float) -> bool:
    # Exact in the decimal digits that the file shows: in binary, 2.002 > 2.0 * 1.001.
    exact_loss, exact_reference, exact_tolerance = (Fraction(str(float(x))) for x in (loss, reference, tolerance))
    return exact_loss > exact_reference * (1 + exact_tolerance)


def effective_range(result: SweepResult, tolerance: float = TOLERANCE) -> float:
    """R = `range_end` / k. 1.0 means that the next measured budget is already worse, or that there is none."""
    return range_end(result, tolerance) / result.k_train


def wall(result: SweepResult, tolerance: float = TOLERANCE) -> int | None:
    """The first measured k' past the effective range, or None where no measured budget is worse."""
    end = range_end(result, tolerance)
    return next((k for k in curve(result) if k > end), None)


def best_k(result: SweepResult) -> int:
    """The k' with the lowest loss, the smallest where several tie. Raises `ValueError` without any cell."""
    measured = curve(result)
    if not measured:
        raise ValueError(f"{result.label}: no cell with a single k")
    return min(measured, key=lambda k: (measured[k].loss, k))


def peak_gain(method: SweepResult, baseline: SweepResult) -> float:
    """Loss of plain top-k at k minus the best loss of `method` over k', nats per token; positive is better.

    Raises `ValueError` where the two differ in k_train, experts or held-out data, or the baseline lacks the k cell.
    """
    _check_comparable(method, baseline)
    return loss_at(baseline, baseline.k_train) - loss_at(method, best_k(method))


def cost_at_k(method: SweepResult, baseline: SweepResult) -> float:
    """Loss of `method` at k' = k minus that of plain top-k there, nats per token; positive: the method costs quality.

    Raises `ValueError` like `peak_gain`.
    """
    _check_comparable(method, baseline)
    return loss_at(method, method.k_train) - loss_at(baseline, baseline.k_train)


def _check_comparable(method: SweepResult, baseline: SweepResult) -> None:
    check_same_data([method, baseline])
    by_path = None in (method.data.digest, baseline.data.digest)  # where both are known, equal digests are proof
    left, right = (_basis(result, by_path) for result in (method, baseline))
    for key in left:
        if left[key] != right[key]:
            raise ValueError(f"{key}: {left[key]} in {method.label}, {right[key]} in {baseline.label}; must be equal")


def _basis(result: SweepResult, by_path: bool) -> dict[str, object]:
    held_out = {"data.path": list(result.data.path), "data.tokens": result.data.tokens} if by_path else {}
    evaluated = {"cells.tokens": sorted({cell.tokens for cell in result.cells})}
    return {"k_train": result.k_train, "num_experts": result.num_experts} | held_out | evaluated


def expert_flops_per_token(
    *, hidden_size: int, moe_ffn_hidden_size: int, num_moe_layers: int, k: int | Sequence[int], gated: bool
) -> int:
    """Forward FLOPs of the routed experts for one token, over all MoE layers; a multiply-add counts as 2 FLOPs.

    An expert is 2 matrices of hidden x ffn, 3 where it is gated (SwiGLU). Router, shared experts, biases and
    activation functions are not counted. `k` is one number, or one per MoE layer.
    """
    return 2 * (3 if gated else 2) * hidden_size * moe_ffn_hidden_size * _experts_per_token(k, num_moe_layers)


def active_parameters(
    *,
    total_parameters: int,
    num_experts: int,
    hidden_size: int,
    moe_ffn_hidden_size: int,
    num_moe_layers: int,
    k: int | Sequence[int],
    gated: bool,
    bias: bool = False,
) -> int:
    """Parameters one token uses: all of the model, embeddings included, less the routed experts it skips.

    Per expert: 2 matrices of hidden x ffn (3 where gated), with `bias` also ffn (2 ffn where gated) + hidden.
    `total_parameters` counts the whole model, not one rank. Raises `ValueError` for a k outside 1..num_experts.
    """
    routed = _experts_per_token(k, num_moe_layers)
    if max([k] if isinstance(k, int) else k) > num_experts:
        raise ValueError(f"k: {k}; must be at most num_experts ({num_experts})")
    matrices = 3 if gated else 2
    per_expert = matrices * hidden_size * moe_ffn_hidden_size
    if bias:
        per_expert += (matrices - 1) * moe_ffn_hidden_size + hidden_size
    return total_parameters - (num_experts * num_moe_layers - routed) * per_expert


def _experts_per_token(k: int | Sequence[int], num_moe_layers: int) -> int:
    checked = check_k(k)
    if isinstance(checked, int):
        return checked * num_moe_layers
    if len(checked) != num_moe_layers:
        raise ValueError(f"k: {k}; must have one entry for each of the {num_moe_layers} MoE layers")
    return sum(checked)


def sensitivity_budgets(ks: Sequence[int], k_train: int, num_moe_layers: int) -> list[tuple[int, ...]]:
    """k_train in every MoE layer but one, which has k' instead: for every layer and every other k' of `ks`."""
    others = [k for k in dict.fromkeys(ks) if k != k_train]
    return [
        tuple(k if layer == changed else k_train for layer in range(num_moe_layers))
        for changed in range(num_moe_layers)
        for k in others
    ]


_FORMATS = {
    "loss": ".4f",
    "tokens_per_second": ",.0f",
    "expert_flops_per_token": ",.0f",
    "active_params": ",d",
    "flops_per_token": ",.0f",
    "latency_ms_batch1": ".3g",
    "latency_ms_large": ".3g",
}


def markdown_table(results: Sequence[SweepResult], metric: Metric = "loss") -> str:
    """A Markdown table: a row per k', a column per result. What was not measured stays empty.

    Raises `ValueError` without results or where two have the same label.
    """
    check_labels([result.label for result in results])
    curves = [curve(result) for result in results]
    rows = [["k'", *(result.label.replace("|", "\\|") for result in results)], ["---:"] * (len(results) + 1)]
    for k in sorted(set().union(*curves)):
        rows.append([str(k), *(_text(measured.get(k), metric) for measured in curves)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def check_labels(labels: Sequence[str]) -> None:
    """Raises `ValueError` where there is no label or one occurs twice: a reader could not tell the curves apart."""
    if not labels:
        raise ValueError("results: none given; must be at least one")
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"label: {label!r} is given {labels.count(label)} times; must be unique")


def _text(cell: SweepCell | None, metric: Metric) -> str:
    value = None if cell is None else getattr(cell, metric)
    return "" if value is None else format(value, _FORMATS[metric])
