"""Configurations that no released model has: computed exactly, or refused by name before anything is written."""

from pathlib import Path
from typing import Any

import pytest

from tests import hf_models
from tests.distributed import run_ranks

YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000,
    "factor": 8,
    "original_max_position_embeddings": 4096,
}
BOTH_SCALES = {"mscale": 0.707, "mscale_all_dim": 1.0}

EXACT: dict[str, list[dict[str, Any]]] = {
    "olmoe": [{"norm_topk_prob": True}, {"save_original_format": False}, {"num_experts_per_tok": 1}],
    "qwen2_moe": [
        {"norm_topk_prob": True, "qkv_bias": False},
        {"mlp_only_layers": [0]},
        {"decoder_sparse_step": 2},
        {"num_key_value_heads": 2, "head_dim": 16},
    ],
    "deepseek_v2": [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000}, "routed_scaling_factor": 2.5},
        {"rope_parameters": YARN, "v_head_dim": 24},
        {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 0.0}},
        {"rope_parameters": YARN | BOTH_SCALES, "first_k_dense_replace": 2, "rms_norm_eps": 1e-5},
    ],
    "ernie4_5_moe": [
        {"moe_layer_interval": 2},
        {"moe_layer_start_index": 0, "moe_layer_end_index": 1, "head_dim": 16, "vocab_size": 131},
        {"moe_num_shared_experts": 0, "mtp": True},
    ],
}
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("olmoe", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000, "factor": 2.0}}, "rope_type 'linear'"),
    ("qwen2_moe", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("deepseek_v2", {"num_key_value_heads": 2}, "num_key_value_heads 2: must be num_attention_heads 4"),
    ("deepseek_v2", {"rope_parameters": YARN | {"mscale": 0.707}}, "mscale and mscale_all_dim must be given together"),
    ("deepseek_v2", {"rope_parameters": YARN | {"mscale_all_dim": 0.707}}, "must be given together"),
    ("deepseek_v2", {"rope_parameters": YARN | {"beta_fast": 16}}, "rope_scaling.beta_fast 16"),
    ("deepseek_v2", {"rope_parameters": YARN | {"attention_factor": 1.5}}, "rope_scaling.attention_factor 1.5"),
    ("deepseek_v2", {"rope_parameters": YARN | {"factor": 0.5}}, "rope_scaling.factor 0.5: must be a number of at"),
    ("deepseek_v2", {"topk_method": None}, "topk_method None"),
    ("deepseek_v2", {"first_k_dense_replace": 9}, "no layer has experts: a dense model"),
    ("ernie4_5_moe", {"moe_norm_min": 0.5}, "moe_norm_min 0.5: must be at most 1e-9"),
    (
        "llama",
        {"rope_parameters": hf_models.LLAMA3 | {"low_freq_factor": 2.0}},
        "rope_scaling.low_freq_factor 2.0",
    ),
    ("llama", {"rope_parameters": hf_models.LLAMA3 | {"factor": 0.5}}, "rope_scaling.factor 0.5: must be a number of"),
    ("llama", {"attention_bias": True}, "attention_bias true: llama is supported without"),
    ("llama", {"mlp_bias": True}, "mlp_bias true: llama is supported without"),
    ("llama", {"num_experts": 4}, "num_experts 4: a llama has no experts"),
    ("llama", {"emoe": {"k_train": 2}}, "emoe: a block about active experts, in a model that has none"),
    ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window true"),
    ("qwen3_moe", {"attention_bias": True}, "attention_bias true: qwen3_moe is supported without"),
    ("mixtral", {"sliding_window": 4096}, "sliding_window 4096: sliding-window attention is not supported"),
    ("granitemoe", {"attention_bias": True}, "attention_bias true: granitemoe is supported without"),
    ("granitemoe", {"residual_multiplier": 0.0}, "residual_multiplier 0.0: must be a number above 0"),
    ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok 9: must lie in [1, 8]"),
    ("deepseek_v3", {"q_lora_rank": 8}, "q_lora_rank 8: deepseek_v3 is supported with None (Moonlight-16B-A3B)"),
    ("deepseek_v3", {"n_group": 2, "topk_group": 1}, "n_group 2: deepseek_v3 is supported with 1 (Moonlight"),
    ("deepseek_v3", {"norm_topk_prob": False}, "norm_topk_prob False: deepseek_v3 is supported with True"),
    ("deepseek_v3", {"rope_interleave": False}, "rope_interleave False: deepseek_v3 is supported with True"),
    ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax': deepseek_v3 is supported with 'sigmoid'"),
]


def check_all(model_type: str, folder: Path) -> list[float]:
    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.hf.layer_check import check_layers

    largest = []
    for number, options in enumerate(EXACT[model_type]):
        hf = hf_models.save(model_type, folder / f"hf{number}", **options)
        import_model(hf, folder / str(number), report=str)
        largest.append(check_layers(hf, folder / str(number) / "release", report=str).largest.difference)
    return largest


@pytest.mark.slow
@pytest.mark.parametrize("model_type", hf_models.MODEL_TYPES)
def test_unusual_settings_are_exact(model_type, tmp_path):
    largest = run_ranks(check_all, 1, model_type, tmp_path)[0]
    assert len(largest) == len(EXACT[model_type])
    assert max(largest) < 3e-6, dict(zip(map(str, EXACT[model_type]), largest, strict=True))


@pytest.mark.parametrize(("model_type", "options", "message"), REFUSED)
def test_what_cannot_be_exact_is_refused_by_its_key(model_type, options, message, tmp_path):
    from megatron_emoe.hf.registry import read_config

    hf_models.config(model_type, **options).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as refused:
        read_config(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/config.json: ") and message in str(refused.value)
