"""A k' per MoE layer from layer sensitivities: the measured losses of cells that run k at every layer but one.

Pure functions. An allocation has one k' per MoE layer in layer order; its experts are their sum, to which the expert
FLOPs of a token are proportional. Losses in nats per token.

What the layers add is summed up here. Measured together it adds up only roughly, so such a sum is a prediction.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence

from megatron_emoe.sweep.curve import SweepResult, loss_at

Allocation = tuple[int, ...]
Sensitivity = dict[int, float]
"""k' -> loss with that k' at one layer and k elsewhere, less the loss at k, nats per token; 0 at k."""

_LEAST_DROP = 1e-12  # nats; a smaller fall of a sum of losses may be rounding, and the search must end


def moe_layers(result: SweepResult) -> int | None:
    """Number of MoE layers, from the header, the cells with one k' per layer, or the counted rows; None if none tells.

    Raises `ValueError` where two of them disagree.
    """
    told = {len(cell.k) for cell in result.cells if not isinstance(cell.k, int)}
    told |= {len(cell.rows_per_layer) for cell in result.cells if cell.rows_per_layer}
    told |= {result.num_moe_layers} if result.num_moe_layers else set()
    if len(told) > 1:
        raise ValueError(f"{result.label}: cells of {sorted(told)} MoE layers; must be one and the same number")
    return next(iter(told), None)


def sensitivities(result: SweepResult) -> list[Sensitivity]:
    """Per MoE layer, what each measured k' of that layer alone adds to the loss; at least `{k: 0}`.

    Raises `ValueError` where there is no cell at k, the point from which layers differ.
    """
    reference, k = loss_at(result, result.k_train), result.k_train
    table: list[Sensitivity] = [{k: 0.0} for _ in range(moe_layers(result) or 0)]
    for cell in result.cells:
        changed = [] if isinstance(cell.k, int) else [(layer, own) for layer, own in enumerate(cell.k) if own != k]
        if len(changed) == 1:
            layer, own = changed[0]
            table[layer][own] = cell.loss - reference
    return table


def complete(table: Sequence[Sensitivity]) -> list[Sensitivity]:
    """The table with only those k' that every layer has: a half-finished measurement favours no layer."""
    shared = set.intersection(*map(set, table)) if table else set()
    return [{k: layer[k] for k in sorted(shared)} for layer in table]


def rise(table: Sequence[Sensitivity], allocation: Allocation) -> float:
    """Predicted loss of an allocation less that at k: the sum of what its layers add."""
    return sum(layer[k] for layer, k in zip(table, allocation, strict=True))


def allocate(table: Sequence[Sensitivity], experts: int) -> Allocation | None:
    """The allocation of at most `experts` experts with the lowest predicted loss that greedy moves find.

    Two starts, the smallest k' everywhere and the best uniform one; from each, budget goes where the loss falls most
    per expert, then from layer to layer while the loss falls: never predicted worse than uniform. None where not even
    the smallest k' fits. The table must be `complete`.
    """
    uniform = [(k,) * len(table) for k in table[0] if k * len(table) <= experts] if table else []
    if not uniform:
        return None
    starts = (uniform[0], min(uniform, key=lambda start: rise(table, start)))
    ends = [_improve(table, start, experts) for start in starts]
    return min(ends, key=lambda end: (rise(table, end), sum(end)))


def _improve(table: Sequence[Sensitivity], allocation: Allocation, experts: int) -> Allocation:
    now = list(allocation)
    while True:
        move = _best(_changes(table, now, experts)) or _best(_exchanges(table, now, experts))
        if move is None:
            return tuple(now)
        for layer, k in move:
            now[layer] = k


Move = tuple[float, float, tuple[tuple[int, int], ...]]
"""How good it is, by how much the loss falls, and the new k' of each layer that changes."""


def _best(moves: Iterator[Move]) -> tuple[tuple[int, int], ...] | None:
    return max((move for move in moves if move[1] > _LEAST_DROP), default=(0.0, 0.0, None))[2]


def _changes(table: Sequence[Sensitivity], now: Sequence[int], experts: int) -> Iterator[Move]:
    """Another k' at one layer, rated by the fall per expert. One that needs no more experts comes before all others."""
    spare = experts - sum(now)
    for i, layer in enumerate(table):
        for k, loss in layer.items():
            more, drop = k - now[i], layer[now[i]] - loss
            if more <= spare:
                yield (drop / more if more > 0 else math.inf), drop, ((i, k),)


def _exchanges(table: Sequence[Sensitivity], now: Sequence[int], experts: int) -> Iterator[Move]:
    """One layer gets more experts, another fewer; rated by the fall."""
    spare = experts - sum(now)
    options = [(layer[now[i]] - loss, k - now[i], i, k) for i, layer in enumerate(table) for k, loss in layer.items()]
    lowered = sorted((option for option in options if option[1] < 0), reverse=True)
    for gain, more, i, high in options:
        if more <= 0:
            continue
        for cost, fewer, j, low in lowered:
            if gain + cost <= _LEAST_DROP:
                break  # sorted: what follows costs more
            if j != i and more + fewer <= spare:
                yield gain + cost, gain + cost, ((i, high), (j, low))


def cheapest(table: Sequence[Sensitivity], most: float) -> Allocation | None:
    """The allocation of the fewest experts that is predicted to add at most `most` nats to the loss at k; None if none.

    By bisection: with more experts, `allocate` predicts no higher loss.
    """
    totals = range(min(table[0]) * len(table), max(table[0]) * len(table) + 1) if table else range(0)
    place = bisect_left(totals, True, key=lambda experts: _added(table, experts) <= most)
    return allocate(table, totals[place]) if place < len(totals) else None


def _added(table: Sequence[Sensitivity], experts: int) -> float:
    found = allocate(table, experts)
    return math.inf if found is None else rise(table, found)
