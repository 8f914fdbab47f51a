"""Levels: the numbers that tokens carry in place of a budget, and for every layer what a level means there.

Level 0 is padding: no expert at all. Level k' in [1, k_max] is that k' in every layer. After those come the budgets
with a k' for each layer: those that have a name, then others in the order in which they were first asked for. Shape
suffixes: V levels, K ranks (k_max).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from emoe_vllm.block import Block
from emoe_vllm.settings import MOST_LAYOUTS, ElasticSettings, as_layout

PADDING = 0


class Levels:
    """The numbering of budgets, the same in every process that learns of the same budgets in the same order."""

    def __init__(self, settings: ElasticSettings) -> None:
        self.settings = settings
        self.layouts: list[tuple[int, ...]] = []
        self.most = MOST_LAYOUTS + len(settings.budgets)
        for budget in settings.budgets:
            self.of(budget.k)

    @property
    def count(self) -> int:
        """Of all levels that there can be."""
        return 1 + self.settings.k_max + self.most

    def of(self, budget: int | tuple[int, ...]) -> int:
        """The level of a budget, numbered now if it is new (ValueError: too many with a k' for each layer)."""
        if isinstance(budget, int):
            return budget
        if len(set(budget)) == 1:
            return budget[0]
        if budget not in self.layouts:
            if len(self.layouts) == self.most:
                raise ValueError(f"k {list(budget)}: {self.most} budgets with a k' per layer are known; no more fit")
            self.layouts.append(budget)
        return 1 + self.settings.k_max + self.layouts.index(budget)

    def budget(self, level: int) -> int | tuple[int, ...]:
        """What `of` gave a level to."""
        return level if level <= self.settings.k_max else self.layouts[level - 1 - self.settings.k_max]

    def layout(self, level: int) -> tuple[int, ...]:
        """The k' of every layer at a level."""
        return as_layout(self.budget(level), len(self.settings.layers))


@dataclass
class LayerTable:
    """One layer's meaning of the levels. factors_VK: fp32, of the ranks' scores, 0 from rank k' on. k_V: int32; ks: the
    same on the host."""

    factors_VK: Tensor
    k_V: Tensor
    ks: list[int]


class Tables:
    """The tables of all layers, on the device of the model. They are filled in place: captured graphs read them."""

    def __init__(self, levels: Levels, block: Block, device: torch.device) -> None:
        self.levels, self.block, self.filled = levels, block, 0
        shape = (levels.count, levels.settings.k_max)
        self.layers = [
            LayerTable(
                torch.zeros(shape, dtype=torch.float32, device=device),
                torch.zeros(shape[0], dtype=torch.int32, device=device),
                [0] * shape[0],
            )
            for _ in levels.settings.layers
        ]
        for k in range(1, levels.settings.k_max + 1):
            self._fill(k)

    def learn(self, layouts: Sequence[tuple[int, ...]]) -> None:
        """Add the budgets with a k' per layer that are not known yet. `layouts`: all of them, in order."""
        for layout in layouts[self.filled :]:
            self._fill(self.levels.of(layout))
        self.filled = max(self.filled, len(layouts))

    def _fill(self, level: int) -> None:
        for number, (table, k) in enumerate(zip(self.layers, self.levels.layout(level), strict=True)):
            factors = torch.tensor(self.block.factors(number, k), dtype=torch.float32)
            table.factors_VK[level, :k] = factors.to(table.factors_VK.device)
            table.k_V[level] = table.ks[level] = k
