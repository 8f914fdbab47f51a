"""A config.json that is wrong, or only unusual, read by the one function that reads them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_emoe.hf.registry import architecture_of, read_config
from megatron_emoe.hf.verify import load_hf
from tests import hf_models
from tests.hf.full_size import CONFIGS, MODELS


def write(folder: Path, model_type: str = "olmoe", **changes: Any) -> Path:
    hf_models.config(model_type).save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 200_000, "not valid JSON (nested too deeply)"),
        (b"{", "not valid JSON ("),
        (b"\xff\xfe", "not valid JSON ("),
        (b"[]", "must be a JSON object, not '[]'"),
        (b"7", "must be a JSON object, not '7'"),
        (b"{}", "model_type None is not supported; supported: olmoe"),
        (b'{"model_type": ["olmoe"]}', "model_type ['olmoe'] is not supported"),
    ],
)
def test_what_is_no_configuration(content, reason, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError) as refused:
        read_config(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path}/config.json: {reason}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"rms_norm_eps": "word"}, "Field 'rms_norm_eps' expected float, got str (value: 'word')"),
        ({"vocab_size": 1.5}, "Field 'vocab_size' expected int, got float (value: 1.5)"),
        ({"hidden_size": float("nan")}, "hidden_size nan: must be a finite number"),
        ({"router_aux_loss_coef": float("inf")}, "router_aux_loss_coef inf: must be a finite number"),
        ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef -0.1: must not be negative"),
        ({"num_hidden_layers": 0}, "num_hidden_layers 0: must be above 0"),
        ({"num_experts": -8}, "num_experts -8: must be above 0"),
        ({"num_experts": 10**9}, "num_experts 1000000000: must be at most 4096"),
        ({"dtype": "int8"}, "dtype 'int8': must be one of float16, bfloat16, float32, float64"),
        ({"torch_dtype": 5}, "torch_dtype 5: must be one of float16, bfloat16, float32, float64"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": "word"}},
            "rope_parameters.rope_theta 'word': must be a number",
        ),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: a quantised model; only weights of"),
        ({"vocab_size": 2**64}, "vocab_size: a number of 68 bits; must fit in 64"),
        ({"num_experts_per_tok": None}, "Field 'num_experts_per_tok' expected int, got NoneType (value: None)"),
        ({"head_dim": "16"}, "head_dim '16': must be a whole number"),
        ({"num_local_experts": 0}, "num_local_experts 0: must be above 0"),
        ({"emoe": 5}, "emoe 5: must be an object"),
        ({"emoe": {"k_train": 9}}, "emoe.k_train 9: must be a whole number in [1, 8]"),
        ({"emoe": {"iteration": "word"}}, "emoe.iteration 'word': must be a whole number"),
        ({"emoe": {"tail_scale": {"6": 0.5}}}, "emoe.tail_scale {'6': 0.5}: must be a list of words such as"),
        ({"emoe": {"k_train": 4, "tail_scale": ["4:0.5"]}}, "--emoe-tail-scale 4:0.5: k' must lie in [5, 8], above k"),
    ],
)
def test_key_value_and_rule(changes, rule, tmp_path):
    with pytest.raises(ValueError) as refused:
        read_config(write(tmp_path, **changes))
    assert str(refused.value).startswith(f"{tmp_path}/config.json: {rule}")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(("model_type", "key"), [("ernie4_5_moe", "moe_k"), ("deepseek_v2", "num_experts_per_tok")])
def test_null_where_transformers_takes_it_and_a_number_is_needed(model_type, key, tmp_path):
    with pytest.raises(ValueError, match=f"{key} None: must be a number"):
        read_config(write(tmp_path, model_type, **{key: None}))


def test_whole_numbers_are_floats_where_transformers_wants_those(tmp_path):
    model = hf_models.build("deepseek_v2", routed_scaling_factor=2.0)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text()) | {"routed_scaling_factor": 2, "attention_dropout": 0}
    path.write_text("\N{ZERO WIDTH NO-BREAK SPACE}" + json.dumps(raw), encoding="utf-8")
    assert read_config(tmp_path).routed_scaling_factor == 2.0
    tokens = hf_models.tokens()
    with torch.no_grad():
        loaded = load_hf(tmp_path, torch.float32)(tokens, use_cache=False).logits
        torch.testing.assert_close(loaded, model.eval()(tokens, use_cache=False).logits, rtol=0, atol=1e-5)


def test_a_negative_number_may_say_none(tmp_path):
    assert read_config(write(tmp_path / "o", pad_token_id=-1)).pad_token_id == -1
    assert read_config(write(tmp_path / "e", "ernie4_5_moe", moe_layer_end_index=-1)).moe_layer_end_index >= -1


def test_the_k_of_an_export_is_the_k_of_training(tmp_path):
    served = write(tmp_path, num_experts_per_tok=8, emoe={"k_train": 2, "tail_scale": ["4:0.5"]})
    assert read_config(served).num_experts_per_tok == 2


def published(folder: Path, name: str, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(json.loads((CONFIGS / f"{name}.json").read_text()) | changes))
    return folder


def flags(folder: Path) -> dict[str, Any]:
    config = read_config(folder)
    return architecture_of(config).flags(config)


@pytest.mark.parametrize("name", MODELS)
def test_the_keys_of_old_and_new_releases_of_transformers_are_one_model(name, tmp_path):
    old = published(tmp_path / "old", name)
    read_config(old).save_pretrained(tmp_path / "new")
    keys = [json.loads((folder / "config.json").read_text()).keys() for folder in (old, tmp_path / "new")]
    assert "rope_theta" in keys[0] - keys[1] and "torch_dtype" in keys[0] - keys[1]
    assert {"rope_parameters", "dtype"} <= keys[1] - keys[0]
    assert flags(tmp_path / "new") == flags(old)


# What other releases have beside the keys of the model in configs/, and what it changes. From general knowledge.
RELEASES = {
    "OLMoE-1B-7B-0125": ("olmoe_1b_7b", {"rms_norm_eps": 1e-5, "head_dim": None}, {}),
    "Qwen1.5-MoE-A2.7B-Chat": (
        "qwen1_5_moe_a2_7b",
        {"max_position_embeddings": 32768, "max_window_layers": 21, "sliding_window": 32768, "qkv_bias": True},
        {"max_position_embeddings": 32768},
    ),
    "DeepSeek-V2-Lite-Chat": ("deepseek_v2_lite", {"ep_size": 1, "pretraining_tp": 1, "num_key_value_heads": 16}, {}),
    "ERNIE-4.5-21B-A3B-PT": (
        "ernie4_5_21b_a3b",
        {"moe_capacity": [64, 64, 64], "moe_gate": "topk", "head_dim": 128},
        {},
    ),
    "ERNIE-4.5-21B-A3B-Paddle": (
        "ernie4_5_21b_a3b",
        {"compression_ratio": 1.0, "use_rmsnorm": True, "moe_use_hard_gate": True, "dtype": "bfloat16"},
        {},
    ),
    "Llama-3.1-8B": (
        "llama_3_2_1b",
        {"rope_scaling": hf_models.LLAMA3 | {"factor": 8.0}, "tie_word_embeddings": False},
        {"rope_scaling_factor": 8.0, "untie_embeddings_and_output_weights": True},
    ),
    "granite-3.1": ("granite_3_0_1b_a400m", {"rope_theta": 1500000}, {"rotary_base": 1500000}),
}


@pytest.mark.parametrize("release", RELEASES)
def test_other_releases_of_an_architecture(release, tmp_path):
    name, keys, changes = RELEASES[release]
    assert flags(published(tmp_path / "other", name, **keys)) == flags(published(tmp_path / "first", name)) | changes
