"""The tiny models of tests/hf_models.py: classes, sizes and variants of every supported architecture."""

from typing import Any

from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Ernie4_5_MoeConfig,
    Ernie4_5_MoeForCausalLM,
    GraniteMoeConfig,
    GraniteMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

CLASSES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM),
    "ernie4_5_moe": (Ernie4_5_MoeConfig, Ernie4_5_MoeForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "granitemoe": (GraniteMoeConfig, GraniteMoeForCausalLM),
}
MODEL_TYPES = ("olmoe", "qwen2_moe", "deepseek_v2", "ernie4_5_moe")
"""Those that every test of conversion is run on."""
LATER_TYPES = ("llama", "qwen3_moe", "mixtral", "deepseek_v3", "granitemoe")
"""Those of which most parts are a model's above: hf/test_later_models.py has what is theirs."""

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000,
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 0.707,
    "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096,
}
"""DeepSeek-V2-Lite's position embedding."""

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 500000,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""LLaMA 3.2's. With heads of width 8 one of four frequencies is left, one smoothed, one divided by the factor."""

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "olmoe": {
        "num_hidden_layers": 2,
        "intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
    },
    "qwen2_moe": {
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    },
    "deepseek_v2": {
        **_DEEPSEEK,
        "topk_method": "greedy",
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
        "max_position_embeddings": 163840,
        "rope_parameters": YARN,
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "moe_num_experts": 8,
        "moe_num_shared_experts": 2,
        "moe_k": 2,
        "moe_layer_start_index": 1,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000},
    },
    "llama": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": LLAMA3,
    },
    "qwen3_moe": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    },
    "mixtral": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000},
    },
    "deepseek_v3": {
        **_DEEPSEEK,
        "routed_scaling_factor": 2.446,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-5,
        "num_nextn_predict_layers": 0,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 50000},
    },
    "granitemoe": {
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "intermediate_size": 16,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "embedding_multiplier": 12.0,
        "attention_multiplier": 0.2,
        "residual_multiplier": 0.22,
        "logits_scaling": 6.0,
        "router_aux_loss_coef": 0.01,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
    },
}
RENAMED = {  # what the other architectures call a setting
    "deepseek_v2": {"num_experts": "n_routed_experts"},
    "ernie4_5_moe": {"num_experts": "moe_num_experts", "num_experts_per_tok": "moe_k"},
    "deepseek_v3": {"num_experts": "n_routed_experts"},
    "mixtral": {"num_experts": "num_local_experts"},
    "granitemoe": {"num_experts": "num_local_experts"},
}

VARIANTS: dict[str, dict[str, Any]] = {
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 2, "clip_qkv": 0.7, "tied": True},
    "qwen2_moe": {"num_experts": 10, "num_experts_per_tok": 4, "num_key_value_heads": 1, "tied": True},
    "deepseek_v2": {"num_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 0, "tied": True},
    "ernie4_5_moe": {"num_experts": 10, "num_experts_per_tok": 6, "num_key_value_heads": 4, "tied": False},
    "llama": {
        "num_key_value_heads": 4,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000},
        "tied": True,
    },
    "qwen3_moe": {"num_experts": 10, "num_experts_per_tok": 4, "num_key_value_heads": 1, "tied": True},
    "mixtral": {"num_experts": 6, "num_experts_per_tok": 3, "num_key_value_heads": 4, "tied": True},
    "deepseek_v3": {"num_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 0, "tied": True},
    "granitemoe": {"num_experts": 6, "num_experts_per_tok": 3, "residual_multiplier": 1.5, "tied": True},
}
"""A second model of each architecture: uneven numbers of experts, grouped queries, clamps, the other tying."""
