"""DeepSeek-V2-Lite (deepseek-ai/DeepSeek-V2-Lite): multi-latent attention without a query latent, yarn, shared experts
without a gate, a dense first layer."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, Flags
from megatron_emoe.hf.pieces import Piece, gated, linear

# What Megatron's multi-latent attention fixes, for want of flags: values of its configuration class.
_YARN_FIXED = {
    "beta_fast": 32,
    "beta_slow": 1,
    "original_max_position_embeddings": 4096,
    "truncate": True,
    "attention_factor": None,
}


class DeepseekV2(Architecture):
    model_type = "deepseek_v2"
    rope_types = ("default", "yarn")
    balancing_key = "aux_loss_alpha"
    known_as: ClassVar[str] = "DeepSeek-V2-Lite"
    must_be: ClassVar[dict[str, tuple[Any, ...]]] = {
        "q_lora_rank": (None,),
        "attention_bias": (False,),
        "mlp_bias": (False, None),
        "topk_method": ("greedy",),
        "n_group": (1, None),
        "topk_group": (1, None),
        "norm_topk_prob": (False, None),
        "scoring_func": ("softmax", None),
        "moe_layer_freq": (1, None),
    }
    """Key of config.json -> the values that are supported, None where it may be left out."""

    def refuse(self, config: PretrainedConfig) -> None:
        for key, allowed in self.must_be.items():
            value = getattr(config, key, None)
            if value not in allowed:
                raise ValueError(
                    f"{key} {value!r}: {self.model_type} is supported with {allowed[0]!r} ({self.known_as})"
                )
        if config.num_key_value_heads != config.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads {config.num_key_value_heads}: must be num_attention_heads "
                f"{config.num_attention_heads}, the latent makes keys and values for every head"
            )
        if config.rope_parameters["rope_type"] == "yarn":
            self._refuse_yarn(config.rope_parameters)

    def _refuse_yarn(self, rope: dict[str, Any]) -> None:
        for key, fixed in _YARN_FIXED.items():
            if rope.get(key, fixed) not in (fixed, None):
                raise ValueError(
                    f"rope_scaling.{key} {rope[key]}: Megatron-Core has no flag for it; it must be {fixed}"
                )
        if not isinstance(rope.get("factor"), int | float) or rope["factor"] < 1:
            raise ValueError(f"rope_scaling.factor {rope.get('factor')!r}: must be a number of at least 1")
        scale, scale_all = rope.get("mscale") or 1.0, rope.get("mscale_all_dim")
        if (scale != 1.0 and not scale_all) or (scale_all and not rope.get("mscale")):
            raise ValueError("rope_scaling: mscale and mscale_all_dim must be given together, or neither")

    def is_moe(self, config: PretrainedConfig, layer: int) -> bool:
        return layer >= config.first_k_dense_replace

    def group_query(self, config: PretrainedConfig) -> Flags:
        return {}  # every head has keys and values of its own, made from the latent

    def own_flags(self, config: PretrainedConfig) -> Flags:
        return {
            "multi_latent_attention": True,
            "kv_lora_rank": config.kv_lora_rank,
            "qk_head_dim": config.qk_nope_head_dim,
            "qk_pos_emb_head_dim": config.qk_rope_head_dim,
            "v_head_dim": config.v_head_dim,
            "qk_layernorm": True,
            "emoe_qk_norm": "latent",
            **self._rope(config),
            "no_rope_fusion": True,
            **self.scoring(config),
            "moe_router_topk_scaling_factor": float(config.routed_scaling_factor),
            **self._shared_width(config),
        }

    def scoring(self, config: PretrainedConfig) -> Flags:
        """How scores are made and become weights."""
        return {"moe_router_pre_softmax": True}

    def balancing(self, config: PretrainedConfig) -> Flags:
        """Its aux_loss_alpha is defined as Megatron's coefficient: per layer, counts divided by k."""
        alpha = getattr(config, self.balancing_key, None)
        if not alpha:
            return {}
        kind = "seq_aux_loss" if getattr(config, "seq_aux", False) else "aux_loss"
        return {"moe_router_load_balancing_type": kind, "moe_aux_loss_coeff": float(alpha)}

    def _rope(self, config: PretrainedConfig) -> Flags:
        rope = config.rope_parameters
        if rope["rope_type"] == "default":
            return {"rope_type": "rope"}
        return {
            "rope_type": "yarn",
            "rotary_scaling_factor": float(rope["factor"]),
            "mscale": float(rope.get("mscale") or 1.0),
            "mscale_all_dim": float(rope.get("mscale_all_dim") or 0.0),
        }

    def _shared_width(self, config: PretrainedConfig) -> Flags:
        if not config.n_shared_experts:
            return {}
        return {"moe_shared_expert_intermediate_size": config.n_shared_experts * config.moe_intermediate_size}

    def attention(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        hf, heads, hidden = f"model.layers.{layer}.self_attn", config.num_attention_heads, config.hidden_size
        latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
        nope, value = config.qk_nope_head_dim, config.v_head_dim
        shapes = {
            "linear_q_proj.weight": ("q_proj", (heads * (nope + rope), hidden)),
            "linear_kv_down_proj.weight": ("kv_a_proj_with_mqa", (latent + rope, hidden)),
            "linear_kv_up_proj.layer_norm_weight": ("kv_a_layernorm", (latent,)),
            "linear_kv_up_proj.weight": ("kv_b_proj", (heads * (nope + value), latent)),
            "linear_proj.weight": ("o_proj", (hidden, heads * value)),
        }
        pieces = [linear("input_layernorm.weight", f"model.layers.{layer}.input_layernorm.weight", (hidden,), layer)]
        for name, (theirs, shape) in shapes.items():
            pieces.append(linear(f"self_attention.{name}", f"{hf}.{theirs}.weight", shape, layer))
        return pieces

    def shared_experts(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        width = self._shared_width(config).get("moe_shared_expert_intermediate_size")
        hf = f"model.layers.{layer}.mlp.shared_experts"
        return gated("mlp.shared_experts", hf, width, config.hidden_size, layer) if width else []
