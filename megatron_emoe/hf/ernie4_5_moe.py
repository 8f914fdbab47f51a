"""ERNIE-4.5 (baidu/ERNIE-4.5-21B-A3B-Base-PT): softmax scores, a selection bias in fp32, renormalised weights,
interleaved rope, tied embeddings, dense first layer."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, Flags, self_attention
from megatron_emoe.hf.pieces import Piece, gated


class Ernie45Moe(Architecture):
    model_type = "ernie4_5_moe"
    k_key = "moe_k"
    # Multi-token prediction: transformers ignores it too, and Megatron's has a final norm that this one lacks.
    carried = ("model.mtp_",)

    def refuse(self, config: PretrainedConfig) -> None:
        if config.use_bias:
            raise ValueError("use_bias true: ernie4_5_moe is supported without")
        if config.moe_norm_min > 1e-9:
            raise ValueError(
                f"moe_norm_min {config.moe_norm_min}: must be at most 1e-9, Megatron-Core has no such floor"
            )

    def is_moe(self, config: PretrainedConfig, layer: int) -> bool:
        last = config.moe_layer_end_index
        last = config.num_hidden_layers - 1 if last == -1 else last
        return (layer + 1) % config.moe_layer_interval == 0 and config.moe_layer_start_index <= layer <= last

    def own_flags(self, config: PretrainedConfig) -> Flags:
        shared = config.moe_num_shared_experts * config.moe_intermediate_size
        return {
            "rotary_interleaved": True,
            "no_rope_fusion": True,
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,  # the core's 1e-3 per step is large against the bias's spread
            **({"moe_shared_expert_intermediate_size": shared} if shared else {}),
        }

    def attention(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        return self_attention(config, layer)

    def router(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        experts, name = config.moe_num_experts, f"model.layers.{layer}.mlp.moe_statics.e_score_correction_bias"
        bias = Piece("mlp.router.expert_bias", (experts,), ((name, (1, experts)),), layer, fp32=True)
        return [*super().router(config, layer), bias]

    def shared_experts(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        width = config.moe_num_shared_experts * config.moe_intermediate_size
        hf = f"model.layers.{layer}.mlp.shared_experts"
        return gated("mlp.shared_experts", hf, width, config.hidden_size, layer) if width else []
