"""Mixtral (mistralai/Mixtral-8x7B-v0.1): weights renormalised over the chosen experts, grouped queries, names of its
own."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, Flags, self_attention
from megatron_emoe.hf.pieces import Piece


class Mixtral(Architecture):
    model_type = "mixtral"
    moe_block = "block_sparse_moe"
    expert_matrices = ("w1", "w3", "w2")

    def refuse(self, config: PretrainedConfig) -> None:
        if config.sliding_window is not None:
            raise ValueError(f"sliding_window {config.sliding_window}: sliding-window attention is not supported")

    def own_flags(self, config: PretrainedConfig) -> Flags:
        return {}  # a softmax over the chosen experts is Megatron's default

    def expert_width(self, config: PretrainedConfig) -> int:
        return config.intermediate_size

    def attention(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        return self_attention(config, layer)
