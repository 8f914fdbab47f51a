"""OLMoE (allenai/OLMoE-1B-7B-0924): softmax over all experts, q and k normalised over their full width."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, Flags, head_norms, self_attention
from megatron_emoe.hf.pieces import Piece


class Olmoe(Architecture):
    model_type = "olmoe"

    def refuse(self, config: PretrainedConfig) -> None:
        if config.attention_bias:
            raise ValueError("attention_bias true: OLMoE is supported without")

    def own_flags(self, config: PretrainedConfig) -> Flags:
        return {
            "qk_layernorm": True,
            "emoe_qk_norm": "full",
            **({} if config.clip_qkv is None else {"emoe_clip_qkv": config.clip_qkv}),
            **({} if config.norm_topk_prob else {"moe_router_pre_softmax": True}),
        }

    def expert_width(self, config: PretrainedConfig) -> int:
        return config.intermediate_size

    def attention(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        return self_attention(config, layer) + head_norms(config, layer, whole=True)
