"""DeepSeek-V3's architecture without a query latent (moonshotai/Moonlight-16B-A3B): as DeepSeek-V2-Lite, with sigmoid
scores, a selection bias in fp32, renormalised weights and a scaling factor."""

from __future__ import annotations

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Flags
from megatron_emoe.hf.deepseek_v2 import DeepseekV2
from megatron_emoe.hf.pieces import Piece


class DeepseekV3(DeepseekV2):
    model_type = "deepseek_v3"
    known_as = "Moonlight-16B-A3B"
    must_be = {
        "q_lora_rank": (None,),
        "attention_bias": (False,),
        "mlp_bias": (False, None),
        "rope_interleave": (True, None),
        "topk_method": ("noaux_tc", None),
        # transformers scores a group by its best two experts at every k', Megatron-Core by its best k' // topk_group.
        "n_group": (1,),
        "topk_group": (1,),
        "norm_topk_prob": (True,),
        "scoring_func": ("sigmoid", None),
        "moe_layer_freq": (1, None),
    }

    def scoring(self, config: PretrainedConfig) -> Flags:
        return {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.0,  # a continued run starts from a bias that fits its experts
            # Megatron-Core leaves the weight of one expert alone as it is; transformers divides it by itself, too.
            "emoe_combine": "renormalize",
        }

    def router(self, config: PretrainedConfig, layer: int) -> list[Piece]:
        experts, name = config.n_routed_experts, f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        bias = Piece("mlp.router.expert_bias", (experts,), ((name, (experts,)),), layer, fp32=True)
        return [*super().router(config, layer), bias]
