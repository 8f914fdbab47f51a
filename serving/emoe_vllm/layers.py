"""Which layers of a model have experts, how many, and what its config.json calls k. Pure, no tensors."""

from __future__ import annotations

from typing import Any

ARCHITECTURES = {
    "OlmoeForCausalLM": "num_experts_per_tok",
    "Qwen2MoeForCausalLM": "num_experts_per_tok",
    "Qwen3MoeForCausalLM": "num_experts_per_tok",
    "DeepseekV2ForCausalLM": "num_experts_per_tok",
    "Glm4MoeForCausalLM": "num_experts_per_tok",
    "MixtralForCausalLM": "num_experts_per_tok",
    "Ernie4_5_MoeForCausalLM": "moe_k",
}
"""vLLM's names of the supported architectures, and the key of k in config.json."""


def k_key(config: Any) -> str:
    """The name of k in the configuration of a supported architecture."""
    return ARCHITECTURES[config.architectures[0]]


def experts_of(config: Any) -> int:
    """Experts of a layer."""
    for key in ("moe_num_experts", "n_routed_experts", "num_local_experts", "num_experts"):
        value = getattr(config, key, None)
        if isinstance(value, int):
            return value
    raise ValueError(f"config.json of {config.model_type}: names no number of experts")


def reachable_experts(config: Any) -> int:
    """Experts that one token can have: with group limits those of its groups."""
    groups, kept = getattr(config, "n_group", None) or 1, getattr(config, "topk_group", None) or 1
    return experts_of(config) // groups * kept if 1 <= kept < groups else experts_of(config)


def moe_layers(config: Any) -> tuple[int, ...]:
    """Numbers, from 0, of the decoder layers with experts: the rule that vLLM's model of each architecture has."""
    return tuple(layer for layer in range(config.num_hidden_layers) if _has_experts(config, layer))


def _has_experts(config: Any, layer: int) -> bool:
    if config.model_type == "ernie4_5_moe":
        start = getattr(config, "moe_layer_start_index", 0)
        end = getattr(config, "moe_layer_end_index", config.num_hidden_layers - 1)
        end = config.num_hidden_layers - 1 if end == -1 else end
        return start <= layer <= end and (layer + 1) % getattr(config, "moe_layer_interval", 1) == 0
    if config.model_type in ("deepseek_v2", "glm4_moe"):
        return layer >= config.first_k_dense_replace and layer % getattr(config, "moe_layer_freq", 1) == 0
    if config.model_type in ("qwen2_moe", "qwen3_moe"):
        return layer not in (getattr(config, "mlp_only_layers", None) or []) and (
            (layer + 1) % config.decoder_sparse_step == 0
        )
    return True
