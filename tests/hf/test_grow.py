"""Experts several times over: the grown model computes what the first did, says where it does not, and takes noise."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_emoe.hf.active_experts import set_active_experts
from megatron_emoe.hf.grow import grow_model
from megatron_emoe.hf.safetensors_files import SafetensorsFolder
from tests import hf_models
from tests.hf_models import LATER_TYPES, MODEL_TYPES

MOE_TYPES = [*MODEL_TYPES, *(name for name in LATER_TYPES if name != "llama")]


def logits(folder: Path, k: int | None = None) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder)
    if k:
        set_active_experts(model, k)
    with torch.no_grad():
        return model(hf_models.tokens(), use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MOE_TYPES)
def test_twice_the_experts_and_twice_k_are_the_same_function(model_type, tmp_path):
    said: list[str] = []
    hf = hf_models.save(model_type, tmp_path / "hf", mtp=model_type == "ernie4_5_moe")
    grow_model(hf, tmp_path / "grown", times=2, report=said.append)
    before = logits(hf)
    torch.testing.assert_close(logits(tmp_path / "grown"), before, rtol=0, atol=1e-5)
    assert said[-1] == "it computes what the model did" and "16 experts" in said[0]
    grow_model(hf, tmp_path / "same k", times=2, k=2, report=said.append)
    torch.testing.assert_close(logits(tmp_path / "same k"), logits(hf, k=1), rtol=0, atol=1e-5)
    assert said[-1] == "another model than before: 2 active experts, where 4 would be as many as before"


def test_copies_lie_behind_the_originals_and_noise_is_on_them_alone(tmp_path):
    hf = hf_models.save("qwen3_moe", tmp_path / "hf", num_hidden_layers=1)
    for name, noise in (("plain", 0.0), ("noisy", 0.1), ("again", 0.1)):
        grow_model(hf, tmp_path / name, times=3, noise=noise, report=str)
    folders = {name: SafetensorsFolder(tmp_path / name) for name in ("hf", "plain", "noisy", "again")}
    first, plain, noisy, again = (folder.read(folder.tensors) for folder in folders.values())
    assert plain.keys() == noisy.keys() and len(plain) == len(first) + 2 * 8 * 3
    assert all(torch.equal(noisy[name], again[name]) for name in noisy)
    gate = "model.layers.0.mlp.gate.weight"
    assert torch.equal(plain[gate], first[gate].repeat(3, 1)) and torch.equal(noisy[gate][:8], first[gate])
    matrix = "model.layers.0.mlp.experts.{}.up_proj.weight"
    original = first[matrix.format(5)]
    for copy in (5, 13, 21):
        assert torch.equal(plain[matrix.format(copy)], original)
    assert torch.equal(noisy[matrix.format(5)], original)
    added = [noisy[matrix.format(copy)] - original for copy in (13, 21)]
    assert all(0.08 < (each.std() / original.std()).item() < 0.12 for each in added)
    assert not torch.equal(*added)
    rest = [name for name in first if ".experts." not in name and name != gate]
    assert all(torch.equal(noisy[name], first[name]) for name in rest)
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert config["num_experts_per_tok"] == 6 and 24 in (config.get("num_experts"), config.get("num_local_experts"))


@pytest.mark.parametrize(
    ("model_type", "changes", "options", "message"),
    [
        ("llama", {}, {}, "config.json: model_type 'llama' has no experts, and so no k'"),
        ("olmoe", {}, {"k": 17}, r"--k 17: must lie in \[1, 16\], the number of experts"),
        (
            "olmoe",
            {"emoe": {"k_train": 2, "tail_scale": ["4:0.5"]}},
            {},
            "config.json: emoe.tail_scale: scales of ranks",
        ),
    ],
)
def test_what_cannot_be_grown_is_refused_and_leaves_nothing(model_type, changes, options, message, tmp_path):
    hf = hf_models.save(model_type, tmp_path / "hf")
    path = hf / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        grow_model(hf, tmp_path / "grown", times=2, report=str, **options)
    assert [each.name for each in tmp_path.iterdir()] == ["hf"]


def test_a_tensor_that_has_no_place_is_refused(tmp_path):
    hf = hf_models.save("olmoe", tmp_path / "hf")
    tensors = load_file(hf / "model.safetensors") | {"model.layers.0.mlp.extra": torch.zeros(2)}
    save_file(tensors, hf / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.layers.0.mlp.extra is not a tensor of olmoe"):
        grow_model(hf, tmp_path / "grown", times=2, report=str)
