"""What the block "emoe" of an export says to whoever serves the model: which k', and which k' in which layer."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import experts_in
from megatron_emoe.hf.registry import architectures
from megatron_emoe.settings.elastic_config import ElasticConfig


def served(
    args: Namespace, settings: Mapping[str, Any], config: PretrainedConfig, k_per_layer: Sequence[int] | None = None
) -> dict[str, Any]:
    """`k_range`: from 1 to the largest k' that training drew or an evaluation ran, at least twice the k of training.
    `k_per_layer`: as given. args: stored with the checkpoint; settings: the block so far.

    Raises:
        ValueError: another number of layers, or a k' out of range.
    """
    most = reachable_experts(config)
    largest = max(_largest_trained(args), settings["pool_k"] or 0, *settings["evaluated_k"], 2 * args.moe_router_topk)
    if k_per_layer is not None:
        largest = max(largest, *k_per_layer)
        _check_layers(k_per_layer, config, most)
    return {"k_range": [1, min(largest, most)], "k_per_layer": None if k_per_layer is None else list(k_per_layer)}


def reachable_experts(config: PretrainedConfig) -> int:
    """Experts that a token can have: with group limits those of its groups."""
    groups, kept = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    experts = experts_in(config)
    return experts // groups * kept if kept < groups else experts


def _largest_trained(args: Namespace) -> int:
    stored: dict[str, Any] = {field.name: getattr(args, field.name, field.default) for field in fields(ElasticConfig)}
    return ElasticConfig(**stored).largest_k(args.moe_router_topk)


def _check_layers(k_per_layer: Sequence[int], config: PretrainedConfig, most: int) -> None:
    architecture = architectures()[config.model_type]
    layers = sum(architecture.is_moe(config, layer) for layer in range(config.num_hidden_layers))
    words = ",".join(map(str, k_per_layer))
    if len(k_per_layer) != layers:
        raise ValueError(f"--k-per-layer {words}: {len(k_per_layer)} numbers; the model has {layers} MoE layers")
    for k in k_per_layer:
        if not 1 <= k <= most:
            raise ValueError(f"--k-per-layer {words}: {k}; must lie in [1, {most}], the experts of a token")
