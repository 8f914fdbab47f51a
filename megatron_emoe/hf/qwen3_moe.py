"""Qwen3-MoE (Qwen/Qwen3-30B-A3B): q and k normalised head by head, heads wider than hidden size / heads, renormalised
weights, no shared expert."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, Flags, head_norms, self_attention
from megatron_emoe.hf.pieces import Piece


class Qwen3Moe(Architecture):
    model_type = "qwen3_moe"

    def refuse(self, config: PretrainedConfig) -> None:
        if config.use_sliding_window:
            raise ValueError("use_sliding_window true: sliding-window attention is not supported")
        if config.attention_bias:
            raise ValueError("attention_bias true: qwen3_moe is supported without")

    def is_moe(self, config: PretrainedConfig, layer: int) -> bool:
        return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0

    def own_flags(self, config: PretrainedConfig) -> Flags:
        return {"qk_layernorm": True, **({} if config.norm_topk_prob else {"moe_router_pre_softmax": True})}

    def attention(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        return self_attention(config, layer) + head_norms(config, layer, whole=False)
