"""Import, train, export: what transformers loads in the end is the model that was trained, in any parallel layout."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_emoe.sweep.result import load
from megatron_emoe.sweep.serving import has_learned_scales
from tests import hf_models, sweeps
from tests.distributed import run_ranks
from tests.hf_models import MODEL_TYPES
from tests.tiny import Run, train

pytestmark = pytest.mark.slow

STEPS: dict[str, Any] = {
    "seq_length": 16,
    "micro_batch_size": 2,
    "global_batch_size": 8,
    "lr_decay_style": "constant",
    "eval_iters": 0,
    "log_interval": 1,
    "save_interval": 1000,
    "mock_data": True,
    "split": "90,5,5",
    "moe_token_dispatcher_type": "alltoall",
    "weight_decay": 0,
}
ELASTIC = "--emoe-selection coactivation --emoe-pool-k 5 --emoe-eval-k 1 4 --eval-iters 1".split()
LAYOUTS = {
    "one rank": [],
    "EP 2": ["--expert-model-parallel-size", "2"],
    "PP 2": ["--pipeline-model-parallel-size", "2"],
    "TP 2": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
}


def words(folder: Path, load: Path, save: Path | None, *more: str, lr: str = "5e-3", steps: int = 3) -> list[str]:
    """The command line of a run from an imported checkpoint: its flag file, and how to run."""
    run = [f"@{folder / 'model.args'}", "--load", str(load), "--finetune", "--lr", lr, "--train-iters", str(steps)]
    for name, value in STEPS.items():
        run += ["--" + name.replace("_", "-"), *([] if value is True else [str(value)])]
    # Conversion is compared. With the balancing loss ERNIE's weights make one of the 512 tokens so sensitive that its
    # logits differ by 4.5 times the noise; against fp64 transformers' are off by 1.0e-5 there, ours by 2.0e-5.
    run += ["--moe-aux-loss-coeff", "0"]
    return run + (["--save", str(save)] if save else []) + list(more)


def import_here(model_type: str, folder: Path, options: dict[str, Any]) -> None:
    from megatron_emoe.hf.import_model import import_model

    import_model(hf_models.save(model_type, folder / "hf", **options), folder / "megatron", report=str)


def export_here(megatron: Path, out: Path) -> dict[str, Any]:
    """Export, and compare transformers' logits with ours at several k'."""
    from megatron_emoe.hf.export_model import export_model
    from megatron_emoe.hf.safetensors_files import SafetensorsFolder
    from megatron_emoe.hf.verify import verify

    export_model(megatron, out, report=str)
    report = verify(out, megatron, ks=[1, 2, 4], report=str)
    before, after = (SafetensorsFolder(path) for path in (megatron.parent / "hf", out))
    names = before.tensors.keys()
    old, new = before.read(names), after.read(names)
    return {
        "report": report.to_dict(),
        "unchanged": sorted(name for name in names if torch.equal(old[name], new[name])),
        "names": (sorted(names), sorted(after.tensors)),
        "dtypes": {new[name].dtype for name in names},
    }


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_model_that_was_trained_at_ep_2_is_what_transformers_then_loads(model_type, tmp_path):
    run_ranks(import_here, 1, model_type, tmp_path, {"tokenizer": True} if model_type == "olmoe" else {})
    command = words(tmp_path / "megatron", tmp_path / "megatron", tmp_path / "trained", *LAYOUTS["EP 2"], *ELASTIC)
    runs: list[Run] = run_ranks(train, 2, command)
    assert {step for run in runs for step in (route.step for route in run.routes)} == {0, 1, 2}
    (seen,) = run_ranks(export_here, 1, tmp_path / "trained", tmp_path / "back")
    assert seen["report"]["passed"], seen["report"]
    assert not any(row["ours"]["other_sets"] for row in seen["report"]["rows"])  # token by token, in every layer
    assert seen["names"][0] == seen["names"][1]
    # The selection bias stays as it was (--moe-router-bias-update-rate 0); everything else was trained.
    assert all(name.endswith("e_score_correction_bias") for name in seen["unchanged"]), seen["unchanged"]
    settings = json.loads((tmp_path / "back/config.json").read_text())["emoe"]
    assert (settings["k_train"], settings["pool_k"], settings["evaluated_k"]) == (2, 5, [1, 4])
    assert settings["iteration"] == 3


def still(folder: Path, load: Path, save: Path | None, layout: str) -> list[Run]:
    """A run that changes nothing (learning rate 0): what was loaded, and is saved again."""
    command = words(folder, load, save, *LAYOUTS[layout], lr="0", steps=1)
    return run_ranks(train, 1 if layout == "one rank" else 2, command)


def merged(runs: list[Run]) -> dict[str, torch.Tensor]:
    """Weights of all ranks by their global names; what two ranks hold is equal."""
    weights: dict[str, torch.Tensor] = {}
    for run in runs:
        for name, tensor in run.weights.items():
            assert name not in weights or torch.equal(weights[name], tensor), name
            weights[name] = tensor
    return weights


@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v2"])  # one of each layout of keys
def test_one_import_serves_every_layout_and_passes_from_one_to_the_next(model_type, tmp_path):
    run_ranks(import_here, 1, model_type, tmp_path, {"num_hidden_layers": 4})
    first = tmp_path / "megatron"
    expected = merged(still(first, first, None, "one rank"))
    assert any("experts.local_experts.7" in name for name in expected)
    split = merged(still(first, first, tmp_path / "ep", "EP 2"))
    staged = merged(still(first, tmp_path / "ep", tmp_path / "pp", "PP 2"))
    for found in (split, staged):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    (seen,) = run_ranks(export_here, 1, tmp_path / "pp", tmp_path / "back")
    assert seen["unchanged"] == seen["names"][0] == seen["names"][1]  # through three layouts, every bit


def test_tensor_parallel_training_in_bf16_comes_back_in_bf16(tmp_path):
    options = {"dtype": torch.bfloat16, "num_key_value_heads": 2, "max_shard_size": "30KB"}
    run_ranks(import_here, 1, "qwen2_moe", tmp_path, options)
    first = tmp_path / "megatron"
    still(first, first, tmp_path / "tp", "TP 2")
    (seen,) = run_ranks(export_here, 1, tmp_path / "tp", tmp_path / "back")
    assert seen["unchanged"] == seen["names"][0] == seen["names"][1]
    assert seen["dtypes"] == {torch.bfloat16}
    assert seen["report"]["passed"]


BUDGETS = "--emoe-selection prefix --emoe-k-schedule stratified --emoe-k-grid 1 4 --emoe-budget-scales".split()


@pytest.mark.parametrize("model_type", ["ernie4_5_moe"])  # weights by hand on all four: test_active_experts.py
def test_learned_scales_by_budget_go_along_and_transformers_computes_with_them(model_type, tmp_path):
    run_ranks(import_here, 1, model_type, tmp_path, {})
    imported, trained, out = tmp_path / "megatron", tmp_path / "trained", tmp_path / "out"
    run_ranks(train, 1, words(imported, imported, trained, *BUDGETS, "--emoe-tail-scale", "0.5", steps=4))
    (found,) = run_ranks(export_here, 1, trained, out)
    assert all(row["ours"]["max_difference"] < 1e-4 for row in found["report"]["rows"]), found["report"]["rows"]
    block = json.loads((out / "config.json").read_text())["emoe"]
    table = block["budget_scales"]
    assert table["k"] == [1, 2, 4] and [[len(row) for row in layer] for layer in table["log"]] == [[1, 2, 4]] * 2
    assert all(abs(value) > 1e-4 for layer in table["log"] for value in layer[2])
    assert [layer[1] for layer in table["log"]] == [[0, 0]] * 2  # at the k of training
    curves = [run_ranks(swept, 1, tmp_path, name, model)[0] for name, model in (("load", trained), ("hf", out))]
    assert curves[0] == pytest.approx(curves[1], abs=2e-5)
    assert all(has_learned_scales(load(tmp_path / f"{name}.json")) for name in ("load", "hf"))
    (without,) = run_ranks(differs_without, 1, out)
    assert without > 1e-3
    with pytest.raises(RuntimeError, match="emoe.budget_scales: learned scales by budget cannot be imported; take the"):
        run_ranks(import_again, 1, out, tmp_path / "again")


def swept(folder: Path, kind: str, model: Path) -> list[float]:
    """Held-out loss at trained k' and between and beyond them, in Megatron or in transformers."""
    data = sweeps.write_tokens(folder / f"{kind}-data")
    answer = sweeps.run_tool(
        "sweep_k", *sweeps.flags(data, folder / f"{kind}.json", k=[1, 2, 3, 4, 6], **{kind: model})
    )
    assert answer.status is None, answer
    return [cell.loss for cell in load(folder / f"{kind}.json").cells]


def differs_without(out: Path) -> float:
    """The largest difference that the scales make to a logit at k' = 4."""
    from transformers import AutoModelForCausalLM

    from megatron_emoe.hf.active_experts import set_active_experts

    model = AutoModelForCausalLM.from_pretrained(out)
    found = []
    for block in (model.config.emoe, model.config.emoe | {"budget_scales": None}):
        model.config.emoe = block
        set_active_experts(model, 4)
        with torch.no_grad():
            found.append(model(hf_models.tokens()).logits)
    return (found[0] - found[1]).abs().max().item()


def import_again(hf: Path, out: Path) -> None:
    from megatron_emoe.hf.import_model import import_model

    import_model(hf, out, report=str)
