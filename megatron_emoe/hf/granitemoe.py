"""Granite-MoE (ibm-granite/granite-3.0-1b-a400m-base): weights renormalised over the chosen experts, and four
multipliers: of the embedding, of attention scores, of what every layer adds, and of the logits.

Megatron-Core has flags for three of them, those of maximal update parameterisation. The residual multiplier m needs
none: transformers adds m f(norm(h)) to h, so h / m gets f(norm(h)) added, and a norm does not see a factor of its input
if its epsilon is divided by the factor's square. Megatron's hidden states are transformers' over m, begun by an
embedding multiplier that is divided by m. No weight is changed.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, Flags, experts_in, head_dim, self_attention
from megatron_emoe.hf.pieces import Piece, linear

_MULTIPLIERS = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling")


class GraniteMoe(Architecture):
    model_type = "granitemoe"
    moe_block = "block_sparse_moe"
    fused = ("input_linear.weight", "output_linear.weight")

    def refuse(self, config: PretrainedConfig) -> None:
        if config.attention_bias:
            raise ValueError("attention_bias true: granitemoe is supported without")
        for key in _MULTIPLIERS:
            if not getattr(config, key) or getattr(config, key) <= 0:
                raise ValueError(f"{key} {getattr(config, key)}: must be a number above 0")

    def stream_scale(self, config: PretrainedConfig) -> float:
        return config.residual_multiplier

    def own_flags(self, config: PretrainedConfig) -> Flags:
        scale = config.residual_multiplier
        return {
            "norm_epsilon": config.rms_norm_eps / scale**2,
            "use_mup": True,
            "mup_embedding_mult": config.embedding_multiplier / scale,
            "mup_output_mult": 1 / config.logits_scaling,
            # Megatron-Core multiplies scores by the root of this over the width of a head.
            "mup_base_head_dim": (config.attention_multiplier * head_dim(config)) ** 2,
        }

    def expert_width(self, config: PretrainedConfig) -> int:
        return config.intermediate_size

    def attention(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        return self_attention(config, layer)

    def router(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        name = f"model.layers.{layer}.block_sparse_moe.router.layer.weight"
        return [linear("mlp.router.weight", name, (experts_in(config), config.hidden_size), layer)]
