"""Routing that has broken down: values that are no numbers, one expert for everything, experts that nobody uses.

What is looked at was measured for the log already: on logged steps, over all ranks, so every rank sees the same and
stops at the same step. Nothing is added to other steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

COLLAPSED_SHARE = 0.05  # of log E, the entropy of uniform routing
DEAD_SHARE = 0.5  # of the experts of a layer
PATIENCE = 3  # logged steps in a row
MARKER = "emoe_stopped.txt"
"""In --save: why the run stopped itself. A run does not go on while it is there."""


class RoutingFailure(RuntimeError):
    """The router watch ends a run: layer, value, limit."""


def troubles(values: Mapping[str, Tensor], layers: Sequence[int], num_experts: int) -> list[str]:
    """What is wrong with the routing of each layer, a line each; none: nothing.

    values: of the metrics tracker, by name, fp32 [L]. layers: their numbers, from 1.
    """
    lines = []
    entropy, dead = values["router entropy"], values["dead experts"]
    numbers = torch.stack([values["router entropy"], values["hierarchical router loss"]]).isfinite().all(dim=0)
    limit = COLLAPSED_SHARE * math.log(num_experts)
    for place, layer in enumerate(layers):
        if not numbers[place]:
            lines.append(f"layer {layer}: router entropy {entropy[place]:.3g}: no finite number")
        elif entropy[place] < limit:
            lines.append(
                f"layer {layer}: router entropy {entropy[place]:.3g} nats, below {limit:.3g}: "
                "routing has collapsed to one expert"
            )
        if dead[place] > DEAD_SHARE * num_experts:
            lines.append(f"layer {layer}: {dead[place]:.0f} of {num_experts} experts got no token")
    return lines


class RouterWatch:
    """Warns of trouble on logged steps and, if asked, ends the run after PATIENCE of them in a row.

    mode: --emoe-router-watch. folder: --save, where the reason is left (None: nowhere).
    """

    def __init__(self, mode: str, folder: str | None) -> None:
        self.mode = mode
        self.folder = Path(folder) if folder else None
        self._in_a_row = 0

    def look(self, values: Mapping[str, Tensor], layers: Sequence[int], num_experts: int, iteration: int) -> str:
        """A warning for the log, or nothing.

        Raises:
            RoutingFailure: with mode stop, on every rank alike.
        """
        found = troubles(values, layers, num_experts) if self.mode != "off" else []
        self._in_a_row = self._in_a_row + 1 if found else 0
        if not found:
            return ""
        if self.mode == "stop" and self._in_a_row >= PATIENCE:
            self._stop(f"routing has broken down by iteration {iteration}: {'; '.join(found)}")
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return f" WARNING: {found[0]}{more} |"

    def _stop(self, reason: str) -> None:
        if self.folder is not None and torch.distributed.get_rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / MARKER).write_text(f"{reason}\n")
        raise RoutingFailure(f"--emoe-router-watch stop: {reason}")


def check_marker(folder: str | None) -> None:
    """ValueError where an earlier run in `folder` stopped itself: going on would repeat it."""
    path = Path(folder) / MARKER if folder else None
    if path is not None and path.is_file():
        raise ValueError(
            f"--save {folder}: the run stopped itself ({path.read_text().strip()}). Start from an earlier checkpoint "
            f"(--ckpt-step) or with other settings; delete {path} to go on"
        )
