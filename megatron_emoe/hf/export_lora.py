"""Megatron -> low-rank experts for a Hugging Face model: lora_moe.safetensors and lora_moe.json, without the base.

Tensors, for every layer n: `layers.n.router` [E, D], and its `bias` where there is one; `layers.n.gate_up.a` [E, R, D]
and `.b` [E, 2 F, R] (the gate's rows, then those of up), `layers.n.down.a` [E, R, F] and `.b` [E, D, R]. E experts of
rank R, D hidden, F inner width.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Mapping
from copy import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig

from megatron_emoe.hf.output_folder import OutputFolder, state_of
from megatron_emoe.hf.pieces import Layout, Piece, Shape
from megatron_emoe.hf.torch_dist import TorchDistReader
from megatron_emoe.settings.elastic_config import elastic_settings, flag
from megatron_emoe.settings.lora_file import (
    ADAPTER,
    DESCRIPTION,
    FINGERPRINT,
    FIRST,
    TENSORS,
    Base,
    LoraDescription,
    RouterRule,
)
from megatron_emoe.settings.result_file import write_checked

_NOT_EXPORTED = {
    "moe_router_enable_expert_bias": "a selection bias",
    "moe_router_group_topk": "groups of experts",
}


def export_lora(
    checkpoint: Path,
    args: Namespace,
    config: PretrainedConfig,
    settings: Mapping[str, Any],
    out: Path,
    report: Callable[[str], None] = print,
) -> None:
    """Write the low-rank experts of a checkpoint to the new folder `out`. args: stored with it; config: of the base;
    settings: the block "emoe" of other exports.

    Raises:
        ValueError: a router that the loader does not know, a tensor that is missing, or an output that cannot be
            written. Nothing is left behind.
    """
    check_exported(args)
    description = describe(args, config, settings)
    reader = TorchDistReader(checkpoint)
    inputs = {"files": state_of(checkpoint.glob("*")), "to": TENSORS, "settings": dict(settings)}
    with OutputFolder(out).making(inputs) as folder:
        tensors = read_tensors(reader, description, bias=args.add_bias_linear)
        folder.check_space(sum(tensor.nbytes for tensor in tensors.values()) + (16 << 20))
        save_file(tensors, folder.path / TENSORS)
        write_checked(ADAPTER, description, folder.path / DESCRIPTION)
    what = f"{description.experts} low-rank experts of rank {description.rank} for a {config.model_type}"
    report(f"{out}: {what}; a token's experts depend on the token, so they cannot be merged into its weights")
    report(f'  megatron_emoe.add_low_rank_experts(model, "{out}")')
    report(f"  megatron_emoe.set_active_experts(model, {description.k})")


def without_experts(args: Namespace) -> Namespace:
    """The arguments of the dense base under the experts."""
    dense = copy(args)
    for name in ("num_experts", "moe_ffn_hidden_size", "emoe_lora_experts", "emoe_lora_rank"):
        setattr(dense, name, None)
    dense.emoe_combine, dense.moe_router_topk_scaling_factor = "model", None
    dense.moe_router_score_function, dense.moe_router_pre_softmax = "softmax", False
    return dense


def check_exported(args: Namespace) -> None:
    """ValueError for a router that would compute something else without Megatron."""
    for name, what in _NOT_EXPORTED.items():
        if getattr(args, name, None):
            raise ValueError(
                f"{flag(name)}: the checkpoint was trained with {what}, which an export of experts has not"
            )


def describe(args: Namespace, config: PretrainedConfig, settings: Mapping[str, Any]) -> LoraDescription:
    """What stands in lora_moe.json."""
    elastic = elastic_settings(args)
    rule = RouterRule(
        args.moe_router_score_function,
        bool(args.moe_router_pre_softmax),
        args.moe_router_topk_scaling_factor,
        elastic.emoe_combine,
        args.moe_router_dtype,
    )
    source = args.pretrained_checkpoint or args.load
    base = Base(config.model_type, args.num_layers, args.hidden_size, args.ffn_hidden_size, source and str(source))
    experts, rank = args.emoe_lora_experts, elastic.lora_rank
    alpha = float(elastic.lora_scale * rank)
    return LoraDescription(1, experts, rank, alpha, args.moe_router_topk, rule, base, dict(settings))


def read_tensors(reader: TorchDistReader, about: LoraDescription, *, bias: bool) -> dict[str, Tensor]:
    """Every tensor of the export, by its name there."""
    layout = Layout(True, about.base.layers, 0)
    hidden, inner, width = about.base.hidden_size, about.base.intermediate_size, about.experts * about.rank
    stored: dict[str, tuple[str, Shape]] = {
        "router": ("mlp.router.weight", (about.experts, hidden)),
        "gate_up.a": ("mlp.lora.linear_fc1.a", (width, hidden)),
        "gate_up.b": ("mlp.lora.linear_fc1.b", (2 * inner, width)),
        "down.a": ("mlp.lora.linear_fc2.a", (width, inner)),
        "down.b": ("mlp.lora.linear_fc2.b", (hidden, width)),
    }
    if bias:
        stored["bias"] = ("mlp.router.bias", (about.experts,))
    tensors: dict[str, Tensor] = {}
    for layer in range(about.base.layers):
        pieces = [Piece(key, shape, (), layer) for key, shape in stored.values()]
        found = reader.read([layout.place(piece) for piece in pieces])
        for name, (_, shape), tensor in zip(stored, stored.values(), found, strict=True):
            tensors[f"layers.{layer}.{name}"] = by_expert(name, tensor.reshape(shape), about)
    tensors[FINGERPRINT] = fingerprint(reader, about, layout)
    return tensors


def by_expert(name: str, tensor: Tensor, about: LoraDescription) -> Tensor:
    """A [X, I] as [E, R, I], B [O, X] as [E, O, R]; what belongs to a router as it is."""
    if name.endswith(".a"):
        return tensor.unflatten(0, (about.experts, about.rank)).contiguous()
    if name.endswith(".b"):
        return tensor.unflatten(1, (about.experts, about.rank)).movedim(1, 0).contiguous()
    return tensor.clone()


def fingerprint(reader: TorchDistReader, about: LoraDescription, layout: Layout) -> Tensor:
    """The base's own numbers by which the loader knows it."""
    shape = (about.base.hidden_size, about.base.intermediate_size)
    rows = [Piece("mlp.linear_fc2.weight", shape, (), layer, rows=1) for layer in range(about.base.layers)]
    found = reader.read([layout.place(row) for row in rows])
    return torch.stack([row.flatten()[:FIRST].float() for row in found])
