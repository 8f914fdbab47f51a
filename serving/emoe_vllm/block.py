"""The block "emoe" that an export leaves in config.json, and the factor of every rank at every k'. Pure, no tensors.

A token's experts are ranked by what selects them. At k' the weight of rank r, before weights are renormalised, is
multiplied by `Block.factors(layer, k')[r]`: the learned scale of that rank at k' (1 where the model has none), times
the tail scale a(k') where r is at or past the k of training.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LARGEST = 40
"""A learned logarithm beyond is no scale that training could leave, and its exponential would not fit in fp32."""

Rows = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Block:
    """k_train: k of training. k_range: the smallest and the largest k' to serve, None where an older export does not
    say. k_per_layer: the k' of every layer with experts that the model is to be served with, if it says so. tail:
    a by k', ascending (one entry with the key 0: the same at every k'), empty without. ks, log: the learned scales,
    by layer and trained k the logarithm of each rank's scale; empty without."""

    k_train: int
    k_range: tuple[int, int] | None = None
    k_per_layer: tuple[int, ...] | None = None
    tail: tuple[tuple[int, float], ...] = ()
    ks: tuple[int, ...] = ()
    log: tuple[Rows, ...] = ()

    def factors(self, layer: int, k: int) -> list[float]:
        """The factor of each of the `k` ranks in `layer`, from 0 among those with experts."""
        tail = 1.0 if not self.tail or k <= self.k_train else interpolated(self.tail, k)
        learned = [0.0] * k if not self.ks else at_budget(self.log[layer], self.ks, k)
        return [math.exp(value) * (tail if rank >= self.k_train else 1.0) for rank, value in enumerate(learned)]


def interpolated(table: Sequence[tuple[int, float]], k: int) -> float:
    """Linear between the entries of a table in ascending k, constant before the first and after the last."""
    ks = [key for key, _ in table]
    after = bisect_left(ks, k)
    if after == len(ks):
        return table[-1][1]
    if after == 0 or ks[after] == k:
        return table[after][1]
    (low, first), (high, last) = table[after - 1 : after + 1]
    return first + (last - first) * (k - low) / (high - low)


def at_budget(rows: Rows, ks: Sequence[int], k: int) -> list[float]:
    """Learned logarithms at `k`: linear in k between two trained k, of which the smaller one has no say beyond its
    ranks, and those of the nearest outside, whose last rank then stands for all after it."""
    after = bisect_left(ks, k)
    if after == len(ks):
        return [*rows[-1], *[rows[-1][-1]] * (k - ks[-1])]
    upper = list(rows[after][:k])
    if after == 0 or ks[after] == k:
        return upper
    between = (k - ks[after - 1]) / (ks[after] - ks[after - 1])
    lower = rows[after - 1]
    return [low + (high - low) * between for low, high in zip(lower, upper, strict=False)] + upper[len(lower) :]


def read_block(found: Any, layers: int, experts: int, k: int) -> Block:
    """The block as it stands in config.json. layers: with experts. k: of config.json, where the block says none.

    Raises:
        ValueError: key, value and rule.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"emoe {found!r}: must be an object")
    k_train = found.get("k_train", k)
    _check_k("emoe.k_train", k_train, experts)
    k_range = found.get("k_range")
    if k_range is not None:
        if not isinstance(k_range, list) or len(k_range) != 2 or not all(type(end) is int for end in k_range):
            raise ValueError(f"emoe.k_range {k_range!r}: must be [smallest, largest]")
        if not 1 <= k_range[0] <= k_range[1] <= experts:
            raise ValueError(f"emoe.k_range {k_range!r}: must be ascending in [1, {experts}]")
    ks, log = _learned(found.get("budget_scales"), layers, experts)
    return Block(
        k_train=k_train,
        k_range=None if k_range is None else (k_range[0], k_range[1]),
        k_per_layer=_per_layer(found.get("k_per_layer"), layers, experts),
        tail=_tail(found.get("tail_scale")),
        ks=ks,
        log=log,
    )


def _check_k(where: str, k: Any, experts: int) -> None:
    if type(k) is not int or not 1 <= k <= experts:
        raise ValueError(f"{where} {k!r}: must be a whole number in [1, {experts}]")


def _per_layer(found: Any, layers: int, experts: int) -> tuple[int, ...] | None:
    if found is None:
        return None
    if not isinstance(found, list) or len(found) != layers:
        raise ValueError(f"emoe.k_per_layer {found!r}: must have one k' for each of the {layers} layers with experts")
    for k in found:
        _check_k("emoe.k_per_layer", k, experts)
    return tuple(found)


def _tail(words: Any) -> tuple[tuple[int, float], ...]:
    """`["0.25"]`: the same at every k'; `["6:0.25", "8:0.1"]`: by k'."""
    if words is None:
        return ()
    rule = 'must be a list of words such as "6:0.25", or null'
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise ValueError(f"emoe.tail_scale {words!r}: {rule}")
    table: dict[int, float] = {}
    for word in words:
        k, colon, scale = word.partition(":") if ":" in word else ("0", "", word)
        try:
            value = float(scale)
        except ValueError:
            value = math.nan
        if not k.isdecimal() or int(k) in table or (not colon and len(words) > 1) or not 0 <= value < math.inf:
            raise ValueError(f"emoe.tail_scale {word!r}: {rule}")
        table[int(k)] = value
    return tuple(sorted(table.items()))


def _learned(found: Any, layers: int, experts: int) -> tuple[tuple[int, ...], tuple[Rows, ...]]:
    if found is None:
        return (), ()
    where = "emoe.budget_scales"
    if not isinstance(found, Mapping) or not {"k", "log"} <= set(found):
        raise ValueError(f"{where}: must be an object with the keys k and log")
    ks, log = found["k"], found["log"]
    whole = isinstance(ks, list) and bool(ks) and all(type(k) is int and 1 <= k <= experts for k in ks)
    if not whole or sorted(set(ks)) != ks:
        raise ValueError(f"{where}.k {ks!r}: must be whole numbers in [1, {experts}], ascending")
    if not isinstance(log, list) or len(log) != layers:
        raise ValueError(f"{where}.log: must have one entry for each of the {layers} layers with experts")
    return tuple(ks), tuple(_rows(rows, ks, f"{where}.log") for rows in log)


def _rows(rows: Any, ks: Sequence[int], where: str) -> Rows:
    if not isinstance(rows, list) or [len(row) if isinstance(row, list) else None for row in rows] != list(ks):
        raise ValueError(f"{where}: must have, for every layer, {', '.join(map(str, ks))} numbers at those k")
    for value in (value for row in rows for value in row):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= LARGEST:  # NaN is not
            raise ValueError(f"{where}: {value!r}; must be a number in [-{LARGEST}, {LARGEST}]")
    return tuple(tuple(map(float, row)) for row in rows)
