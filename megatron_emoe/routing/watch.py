"""Routing that has broken down: values that are no numbers, the same experts for every token, experts that nobody uses.

A router that is sure of itself has not broken down: the hierarchical loss asks for that, token by token. It has where
the tokens are all sure of the same, so it is their load that counts.

What is looked at was measured for the log already: on logged steps, over all ranks, so every rank sees the same and
stops at the same step. Nothing is added to other steps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from megatron.training.checkpointing import get_checkpoint_tracker_filename
from torch import Tensor

COLLAPSED_SHARE = 0.05  # of the way from the least to the largest entropy
SAME_SHARE = 0.95  # of the tokens, that use one expert
DEAD_SHARE = 0.5  # of the experts of a layer
PATIENCE = 3  # logged steps in a row
MARKER = "emoe_stopped.txt"
"""In --save: why the run stopped itself. A run does not go on while it is there."""


class RunStopped(RuntimeError):
    """A run ends itself, for a reason that would come again: it is not to be started again as it is."""


class RoutingFailure(RunStopped):
    """The router watch ends a run: layer, value, limit."""


def stop(folder: Path | None, reason: str, error: RunStopped) -> NoReturn:
    """Leave the reason in --save (None: nowhere) and raise the error; on every rank alike."""
    if folder is not None and torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).write_text(f"{reason}\n")
    raise error


def troubles(values: Mapping[str, Tensor], layers: Sequence[int], num_experts: int) -> list[str]:
    """What is wrong with the routing of each layer, a line each; none: nothing.

    values: of the metrics tracker, by name, fp32 [L] on the CPU. layers: their numbers, from 1.
    """
    lines = []
    for place, layer in enumerate(layers):
        of_layer = {name: value[place].item() for name, value in values.items()}
        found = (*_collapse(of_layer, num_experts), *_dead(of_layer, num_experts))
        lines += [f"layer {layer}: {what}" for what in found]
    return lines


def _collapse(values: Mapping[str, float], num_experts: int) -> Iterator[str]:
    """A token uses an expert once, so k experts that every token uses have a load of entropy log k, the least there is.

    One expert that takes all weight shows in the load only as the one that every token uses.
    """
    entropy, load, k = values["router entropy"], values["load entropy"], max(1.0, values["active k"])
    least, largest = math.log(k), math.log(num_experts)
    limit, sure = least + COLLAPSED_SHARE * (largest - least), COLLAPSED_SHARE * largest
    if not (math.isfinite(entropy) and math.isfinite(values["hierarchical router loss"])):
        yield f"router entropy {entropy:.3g}: no finite number"
    elif k < num_experts and load < limit:
        collapsed = "routing has collapsed to the same experts for all tokens"
        yield f"load entropy {load:.3g} nats, below {limit:.3g}: {collapsed}"
    elif k <= num_experts / 2 and entropy < sure and values["load max"] * k >= SAME_SHARE * num_experts:
        yield (
            f"router entropy {entropy:.3g} nats, below {sure:.3g}, with one expert in every token's choice: "
            "routing has collapsed to one expert"
        )


def _dead(values: Mapping[str, float], num_experts: int) -> Iterator[str]:
    """E - k are the most that can be: then all tokens use the same k."""
    dead, most = values["dead experts"], num_experts - values["active k"]
    if dead > 0 and dead >= min(DEAD_SHARE * num_experts, most - 1e-3):
        yield f"{dead:.0f} of {num_experts} experts got no token"


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
            broken = f"routing has broken down by iteration {iteration}: {'; '.join(found)}"
            stop(self.folder, broken, RoutingFailure(f"--emoe-router-watch stop: {broken}"))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return f" WARNING: {found[0]}{more} |"


def check_marker(folder: str | None) -> None:
    """ValueError where an earlier run in `folder` stopped itself: going on would repeat it."""
    path = Path(folder) / MARKER if folder else None
    if path is not None and path.is_file():
        tracker = get_checkpoint_tracker_filename(folder)
        raise ValueError(
            f"--save {folder}: the run stopped itself ({path.read_text().strip()}). To go on from an earlier "
            f"checkpoint, write its iteration into {tracker}; to go on, with other settings or not, delete {path}"
        )
