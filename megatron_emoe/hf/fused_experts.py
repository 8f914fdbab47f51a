"""Experts that a file holds in one tensor for a layer, and the names that each of them has in this package's tables.

transformers 5 holds experts so in memory, and writes them so with save_original_format=False; Granite's files have
always been so. Shapes: E experts, F width, H hidden size.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_FUSED = (
    re.compile(r"(?P<block>.*\.)experts\.(?P<kind>gate_up|down)_proj"),
    re.compile(r"(?P<block>.*\.block_sparse_moe\.)(?P<kind>input|output)_linear\.weight"),
)
_EXPERT = re.compile(r"(?P<block>.*\.)experts\.(?P<expert>\d+)\.(?P<matrix>gate|up|down)_proj\.weight")
_GATE_AND_UP = ("gate_up", "input")


def parts(name: str, shape: tuple[int, ...]) -> dict[str, tuple[int, slice]]:
    """Name of each expert's matrix -> its place in the tensor `name`: [E, 2F, H] of gate and up, or [E, H, F] of down.
    Empty where the tensor is of no such kind."""
    found = next((match for pattern in _FUSED if (match := pattern.fullmatch(name))), None)
    if found is None or len(shape) != 3:
        return {}
    experts, rows, _ = shape
    cuts = {"down": slice(0, rows)}
    if found["kind"] in _GATE_AND_UP:
        cuts = {"gate": slice(0, rows // 2), "up": slice(rows // 2, rows)}
    return {
        f"{found['block']}experts.{expert}.{kind}_proj.weight": (expert, cut)
        for expert in range(experts)
        for kind, cut in cuts.items()
    }


def joined(tensors: Mapping[str, Tensor], names: tuple[str, str]) -> dict[str, Tensor]:
    """The tensors of whole layers with each layer's experts in two. names: of that of gate and up, and that of down,
    within the block that holds the experts."""
    rest: dict[str, Tensor] = {}
    found: dict[tuple[str, str], dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _EXPERT.fullmatch(name)
        if match is None:
            rest[name] = tensor
        else:
            found.setdefault((match["block"], match["matrix"]), {})[int(match["expert"])] = tensor
    stacked = {key: torch.stack([each[n] for n in sorted(each)]) for key, each in found.items()}
    for block in dict.fromkeys(block for block, _ in stacked):
        rest[f"{block}{names[0]}"] = torch.cat([stacked[block, "gate"], stacked[block, "up"]], dim=1)
        rest[f"{block}{names[1]}"] = stacked[block, "down"]
    return rest
