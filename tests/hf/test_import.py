"""What an import refuses, before or instead of writing anything, and how it goes on after an interruption."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_emoe.hf.import_model import FLAG_FILE, import_model
from megatron_emoe.settings.flag_files import expand
from tests import hf_models
from tests.distributed import run_ranks
from tests.hf_models import MODEL_TYPES


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """One tiny model of each architecture, not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    return {model_type: hf_models.save(model_type, folder / model_type) for model_type in MODEL_TYPES}


@pytest.fixture
def copy(models, tmp_path):
    """A function: a copy of a model, with changes to config.json and to its tensors."""

    def make(which: str, tensors: dict | None = None, drop: str | None = None, **config: object) -> Path:
        path = Path(shutil.copytree(models[which], tmp_path / "hf"))
        raw = json.loads((path / "config.json").read_text()) | config
        (path / "config.json").write_text(json.dumps(raw))
        stored = load_file(path / "model.safetensors") | (tensors or {})
        stored.pop(drop, None)
        save_file(stored, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return make


def refused(hf: Path, message: str) -> None:
    """The import fails with this message (a pattern) and leaves nothing."""
    before = sorted(hf.parent.iterdir())
    with pytest.raises(ValueError, match=message):
        import_model(hf, hf.parent / "out")
    assert sorted(hf.parent.iterdir()) == before


def test_no_configuration(tmp_path):
    (tmp_path / "hf").mkdir()
    refused(tmp_path / "hf", r"hf/config\.json: no such file; .*/hf is no Hugging Face model")
    (tmp_path / "hf/config.json").write_text("{")
    refused(tmp_path / "hf", r"hf/config\.json: not valid JSON")


def test_an_architecture_that_is_not_supported(copy):
    refused(
        copy("olmoe", model_type="phimoe"), "model_type 'phimoe' is not supported; supported: olmoe, qwen2_moe, deepse"
    )


DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000, "factor": 2.0}


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("olmoe", {"hidden_act": "gelu"}, "hidden_act 'gelu': only 'silu' (SwiGLU) is supported"),
        ("olmoe", {"attention_bias": True}, "attention_bias true: OLMoE is supported without"),
        ("olmoe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9: must lie in [1, 8]"),
        (
            "olmoe",
            {"rope_parameters": DYNAMIC},
            "rope_type 'dynamic' (rope_scaling): olmoe is supported with 'default'",
        ),
        (
            "qwen2_moe",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.5}},
            "rope_theta 10000.5: must be a whole number",
        ),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window true: sliding-window attention"),
        ("deepseek_v2", {"q_lora_rank": 8}, "q_lora_rank 8: deepseek_v2 is supported with None (DeepSeek-V2-Lite)"),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "topk_method 'group_limited_greedy': deepseek_v2"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob True: deepseek_v2 is supported with False"),
        (
            "deepseek_v2",
            {"rope_parameters": hf_models.YARN | {"beta_fast": 16}},
            "rope_scaling.beta_fast 16: Megatron-Core has no flag for it; it must be 32",
        ),
        ("ernie4_5_moe", {"use_bias": True}, "use_bias true: ernie4_5_moe is supported without"),
        ("ernie4_5_moe", {"moe_k": 0}, "moe_k 0: must lie in [1, 8]"),
    ],
)
def test_settings_that_cannot_be_expressed(copy, model_type, changes, message):
    refused(copy(model_type, **changes), re.escape("config.json: " + message))


def test_a_configuration_that_contradicts_the_shapes(copy):
    refused(
        copy("olmoe", intermediate_size=24),
        r"experts\.0\.gate_proj\.weight has shape \[16, 32\], .*config\.json leads to \[24, 32\]",
    )


def test_a_missing_tensor(copy):
    hf = copy("deepseek_v2", drop="model.layers.1.self_attn.kv_a_layernorm.weight")
    refused(hf, r"model\.layers\.1\.self_attn\.kv_a_layernorm\.weight is missing, which .*config\.json asks for")


def test_an_extra_tensor(copy):
    hf = copy("qwen2_moe", {"model.layers.7.mlp.gate.weight": torch.zeros(8, 32)})
    refused(hf, r"model\.layers\.7\.mlp\.gate\.weight is not a tensor of qwen2_moe as config\.json has it")


def test_a_tied_head_that_is_not_the_embedding(copy):
    hf = copy("ernie4_5_moe", {"lm_head.weight": torch.zeros(128, 32)})
    refused(hf, r"config\.json ties lm_head\.weight to model\.embed_tokens\.weight, and they differ")


def test_a_truncated_file(copy):
    hf = copy("olmoe")
    file = hf / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(hf, r"model\.safetensors: not a readable safetensors file")


def test_no_space(copy, monkeypatch):
    from megatron_emoe.hf import output_folder

    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused(copy("olmoe"), r"out: 0\.02 GB are needed, 0\.00 GB are free on that disk")


def test_an_output_folder_that_is_not_empty(copy):
    hf = copy("olmoe")
    (hf.parent / "out").mkdir()
    (hf.parent / "out/file").write_text("mine")
    refused(hf, "out: is not empty; nothing is overwritten")


def interrupt_and_go_on(hf: Path, out: Path) -> dict:
    """Kill an import in its third group, import again, and count what is read from then on."""
    from megatron_emoe.hf.safetensors_files import SafetensorsFolder

    read, asked = SafetensorsFolder.read, []

    def read_until_killed(folder, names):
        names = list(names)
        asked.append(names)
        if len(names) > 1 and len([1 for names in asked if len(names) > 1]) == 2:
            raise KeyboardInterrupt
        return read(folder, names)

    SafetensorsFolder.read = read_until_killed
    try:
        import_model(hf, out, workers=1, report=str)
    except KeyboardInterrupt:
        left = sorted(path.name for path in out.parent.iterdir())
    asked.clear()
    SafetensorsFolder.read = lambda folder, names: asked.append(list(names)) or read(folder, asked[-1])
    import_model(hf, out, workers=1, report=str)
    return {"left": left, "asked": [names for names in asked if names], "after": sorted(out.parent.iterdir())}


def test_an_interrupted_import_goes_on_where_it_stopped(models, tmp_path):
    (seen,) = run_ranks(interrupt_and_go_on, 1, models["olmoe"], tmp_path / "out")
    assert seen["left"] == ["out.unfinished"]
    read = [name for names in seen["asked"] for name in names]
    assert not any(".layers.0." in name or "embed_tokens" in name for name in read)  # finished before the interruption
    assert any(".layers.1." in name for name in read)
    assert seen["after"] == [tmp_path / "out"]


def fail_in_check(hf: Path, out: Path) -> list[str]:
    def check(hf_folder: Path, release: Path) -> None:
        assert (release / ".metadata").is_file()
        raise ValueError("layer 1 differs")

    with pytest.raises(ValueError, match="layer 1 differs"):
        import_model(hf, out, verify=check, report=str)
    return [path.name for path in out.parent.iterdir()]


def test_a_checkpoint_that_fails_its_check_does_not_appear(models, tmp_path):
    assert run_ranks(fail_in_check, 1, models["olmoe"], tmp_path / "out") == [[]]


def checked(hf: Path, out: Path) -> list[str]:
    from megatron_emoe.hf.layer_check import check_layers

    with pytest.raises(ValueError, match="transformers cannot build the (layer 0|embedding and head) that config.json"):
        import_model(hf, out, verify=check_layers, report=str)
    return [path.name for path in out.parent.iterdir()]


def test_a_configuration_that_transformers_cannot_build_is_one_line_and_leaves_nothing(copy, tmp_path):
    assert run_ranks(checked, 1, copy("olmoe", base_model_tp_plan=[1]), tmp_path / "out") == [["hf"]]


def import_and_say(hf: Path, out: Path) -> tuple[list[str], list[str]]:
    said: list[str] = []
    import_model(hf, out, report=said.append)
    return said, expand([f"@{out / FLAG_FILE}"])


def test_a_run_of_an_imported_model_balances_its_experts_as_its_configuration_says(copy, tmp_path):
    hf = copy("olmoe", router_aux_loss_coef=0.03)
    ((said, words),) = run_ranks(import_and_say, 1, hf, tmp_path / "out")
    assert words[words.index("--moe-router-load-balancing-type") + 1] == "aux_loss"
    # transformers: alpha x k over the mean of 2 layers, k = 2; Megatron: the coefficient of each layer
    assert float(words[words.index("--moe-aux-loss-coeff") + 1]) == 0.03 * 2 / 2
    assert "config.json" not in said[-1]


@pytest.mark.parametrize("changes", [{"router_aux_loss_coef": 0.0}, {"router_aux_loss_coef": None}], ids=["0", "gone"])
def test_where_the_configuration_does_not_say_how_it_is_said(changes, copy, tmp_path):
    hf = copy("olmoe", **changes)
    if changes["router_aux_loss_coef"] is None:
        raw = json.loads((hf / "config.json").read_text())
        del raw["router_aux_loss_coef"]
        (hf / "config.json").write_text(json.dumps(raw))
        expected = "router_aux_loss_coef is not there; --moe-aux-loss-coeff follows from transformers' default"
    else:
        expected = "router_aux_loss_coef is 0, so these flags balance no experts: to train with a loss that does, give"
    ((said, words),) = run_ranks(import_and_say, 1, hf, tmp_path / "out")
    assert said[-1].startswith(f"config.json: {expected}")
    assert ("--moe-aux-loss-coeff" in words) == (changes["router_aux_loss_coef"] is None)


def import_and_move(folder: Path) -> tuple[list[str], str]:
    """The flags of an import that was renamed, another in its old place, and the tokenizer of an evaluation."""
    from argparse import Namespace

    from megatron_emoe.training.arguments import _evaluated

    hf = hf_models.save("olmoe", folder / "hf", tokenizer=True)
    import_model(hf, folder / "out", report=str)
    (folder / "out").rename(folder / "renamed")
    shutil.copytree(folder / "renamed/hf", folder / "out/hf")
    evaluated = _evaluated(Namespace(load=str(folder / "renamed"), ckpt_step=None, hf=None), None)
    return expand([f"@{folder}/renamed/{FLAG_FILE}"]), evaluated.tokenizer_model


def test_an_import_that_was_renamed_has_its_own_tokenizer(tmp_path):
    ((words, tokenizer),) = run_ranks(import_and_move, 1, tmp_path)
    assert words[words.index("--tokenizer-model") + 1] == tokenizer == str(tmp_path / "renamed/hf")
