"""Qwen1.5-MoE (Qwen/Qwen1.5-MoE-A2.7B): biases on q, k and v, one shared expert behind a sigmoid gate."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, Flags, self_attention
from megatron_emoe.hf.pieces import Piece, gated, linear


class Qwen2Moe(Architecture):
    model_type = "qwen2_moe"

    def refuse(self, config: PretrainedConfig) -> None:
        if config.use_sliding_window:
            raise ValueError("use_sliding_window true: sliding-window attention is not supported")

    def is_moe(self, config: PretrainedConfig, layer: int) -> bool:
        return layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0

    def own_flags(self, config: PretrainedConfig) -> Flags:
        return {
            **({"add_qkv_bias": True} if config.qkv_bias else {}),
            "moe_shared_expert_intermediate_size": config.shared_expert_intermediate_size,
            "moe_shared_expert_gate": True,
            **({} if config.norm_topk_prob else {"moe_router_pre_softmax": True}),
        }

    def attention(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        return self_attention(config, layer, bias=config.qkv_bias)

    def shared_experts(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        hf, hidden = f"model.layers.{layer}.mlp", config.hidden_size
        gate = linear("mlp.shared_experts.gate_weight", f"{hf}.shared_expert_gate.weight", (1, hidden), layer)
        width = config.shared_expert_intermediate_size
        return [*gated("mlp.shared_experts", f"{hf}.shared_expert", width, hidden, layer), gate]
