"""The learned scales by budget in a Megatron checkpoint, as an export writes them into config.json."""

from __future__ import annotations

from argparse import Namespace

from torch import Tensor

from megatron_emoe.hf.torch_dist import Place, TorchDistReader
from megatron_emoe.routing.budget_scales import log_scales
from megatron_emoe.settings.budget_table import BudgetTable
from megatron_emoe.settings.elastic_config import elastic_settings
from megatron_emoe.settings.k_schedule import trained_ks

STORED = "router.budget_scales"
"""How the names of these tensors end."""


def stored_budget_table(reader: TorchDistReader, args: Namespace) -> BudgetTable | None:
    """The table of a checkpoint, None where it was trained without. args: stored with it."""
    if not getattr(args, "emoe_budget_scales", False):
        return None
    own = args.moe_router_topk
    ks = trained_ks(elastic_settings(args), own)
    return BudgetTable(tuple(ks), tuple(_of_layer(values, ks, own) for values in _values(reader)))


def _of_layer(values: Tensor, ks: list[int], own: int) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(f"{value:.7g}") for value in log_scales(values, ks, k, own).tolist()) for k in ks)


def _values(reader: TorchDistReader) -> list[Tensor]:
    """The parameters of each layer with experts, in layer order; where all layers are alike they are one tensor."""
    keys = [key for key in reader.tensors if key.startswith("decoder.") and key.endswith(STORED)]
    places = []
    for key in sorted(keys, key=_number):
        size = tuple(reader.tensors[key].size)
        if len(size) == 1:
            places.append(Place(key, size, (0,), size))
        else:
            places += [Place(key, size, (layer, 0), (1, size[1])) for layer in range(size[0])]
    return [values.flatten() for values in reader.read(places)]


def _number(key: str) -> int:
    """Of the layer in a tensor's name; 0 where it holds all of them."""
    return next((int(word) for word in key.split(".") if word.isdecimal()), 0)
