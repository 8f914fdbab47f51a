"""LLaMA (meta-llama/Llama-3.2-1B and its kin): a dense model with grouped queries, tied or untied embeddings, and the
rotary scaling of LLaMA 3.1. It has no experts of its own; --emoe-lora-experts makes some on top of it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, Flags, experts_in, self_attention
from megatron_emoe.hf.pieces import Piece

# What Megatron-Core fixes in its rotary scaling of LLaMA 3.1, for want of flags.
_SCALING_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


class Llama(Architecture):
    model_type = "llama"
    rope_types = ("default", "llama3")
    dense = True

    def refuse(self, config: PretrainedConfig) -> None:
        for key in ("attention_bias", "mlp_bias"):
            if getattr(config, key):
                raise ValueError(f"{key} true: llama is supported without")
        if experts_in(config):
            raise ValueError(f"num_experts {experts_in(config)}: a llama has no experts")
        if config.rope_parameters["rope_type"] == "llama3":
            _refuse_scaling(config.rope_parameters)

    def own_flags(self, config: PretrainedConfig) -> Flags:
        rope = config.rope_parameters
        if rope["rope_type"] == "default":
            return {}
        return {"use_rope_scaling": True, "rope_scaling_factor": float(rope["factor"])}

    def attention(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        return self_attention(config, layer)


def _refuse_scaling(rope: dict[str, Any]) -> None:
    for key, fixed in _SCALING_FIXED.items():
        if rope.get(key) != fixed:
            rule = f"Megatron-Core has no flag for it; it must be {fixed:g}"
            raise ValueError(f"rope_scaling.{key} {rope.get(key)!r}: {rule}")
    if not isinstance(rope.get("factor"), int | float) or rope["factor"] < 1:
        raise ValueError(f"rope_scaling.factor {rope.get('factor')!r}: must be a number of at least 1")
