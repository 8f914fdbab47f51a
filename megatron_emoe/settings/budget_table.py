"""Learned scales by budget as an export holds them: numbers in the block "emoe" of config.json. Pure, no tensors.

`{"k": [2, 4, 8], "log": [...]}`: for every layer with experts, in layer order, and every trained k the natural
logarithm of each rank's scale. What they do and how they are read between two k: routing/budget_scales.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LARGEST = 40
"""A logarithm beyond is no scale that training could leave, and its exponential, summed, would not fit in float32."""

KEY = "budget_scales"
"""In the block "emoe"."""


@dataclass(frozen=True)
class BudgetTable:
    """ks: the trained k, ascending. log: by layer, by k, the logarithm of each of the k ranks' scale."""

    ks: tuple[int, ...]
    log: tuple[tuple[tuple[float, ...], ...], ...]

    def padded(self, layer: int) -> list[list[float]]:
        """`log` of a layer, from 0 among those with experts, as a table: a row for each k, filled up with 0."""
        return [[*row, *[0.0] * (self.ks[-1] - len(row))] for row in self.log[layer]]

    def as_json(self) -> dict[str, Any]:
        """What belongs under KEY."""
        return {"k": list(self.ks), "log": [[list(row) for row in layer] for layer in self.log]}


def read_budget_table(block: Mapping[str, Any] | None, layers: int, experts: int) -> BudgetTable | None:
    """The table in the block "emoe", None where it has none. layers: with experts.

    Raises:
        ValueError: key, value and rule.
    """
    found = (block or {}).get(KEY)
    if found is None:
        return None
    where = f"emoe.{KEY}"
    if not isinstance(found, Mapping) or not {"k", "log"} <= set(found):
        raise ValueError(f"{where}: must be an object with the keys k and log")
    ks = found["k"]
    whole = isinstance(ks, list) and bool(ks) and all(type(k) is int and 1 <= k <= experts for k in ks)
    if not whole or sorted(set(ks)) != ks:
        raise ValueError(f"{where}.k {ks!r}: must be whole numbers in [1, {experts}], ascending")
    if not isinstance(found["log"], list) or len(found["log"]) != layers:
        raise ValueError(f"{where}.log: must have one entry for each of the {layers} layers with experts")
    return BudgetTable(tuple(ks), tuple(_layer(rows, ks, f"{where}.log") for rows in found["log"]))


def _layer(rows: Any, ks: Sequence[int], where: str) -> tuple[tuple[float, ...], ...]:
    if not isinstance(rows, list) or [len(row) if isinstance(row, list) else None for row in rows] != list(ks):
        raise ValueError(f"{where}: must have, for every layer, {', '.join(map(str, ks))} numbers at those k")
    for value in (value for row in rows for value in row):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not abs(value) <= LARGEST:  # NaN is not
            raise ValueError(f"{where}: {value!r}; must be a number in [-{LARGEST}, {LARGEST}]")
    return tuple(tuple(map(float, row)) for row in rows)
