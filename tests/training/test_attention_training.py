"""Training with the attention of OLMoE and DeepSeek-V2-Lite: every layout starts from one checkpoint, sees the same
tokens, and must end with the same weights, norms included."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.tiny import PREFIX, Run, flags, stored_tensors, train

pytestmark = pytest.mark.slow

OLMOE = {
    "qk_layernorm": True,
    "emoe_qk_norm": "full",
    "emoe_clip_qkv": 1.5,
    "group_query_attention": True,
    "num_query_groups": 2,
}
DEEPSEEK = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "emoe_qk_norm": "latent",
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 12,
    "moe_layer_freq": "[0,1]",
    "moe_shared_expert_intermediate_size": 32,
}
MODELS = {"OLMoE": OLMOE, "DeepSeek-V2-Lite": DEEPSEEK}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
LAYOUTS = {
    "expert parallel": {"expert_model_parallel_size": 2},
    "tensor and sequence parallel": TP2,
    "tensor and expert parallel": TP2 | {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 1},
}
STEPS = 3


def runs_of(ranks: int, *changes: dict[str, Any]) -> list[Run]:
    merged: dict[str, Any] = {"train_iters": STEPS, "no_save_optim": True, "save_interval": 100} | PREFIX
    for each in changes:
        merged |= each
    return run_ranks(train, ranks, flags(**merged), timeout=200)


def losses_of(runs: list[Run]) -> list[float]:
    """Mean loss of each step: over its micro-batches and over ranks, which saw other tokens or the same."""
    per_step = len(runs[0].losses) // STEPS
    steps = [[loss for run in runs for loss in run.losses[i * per_step :][:per_step]] for i in range(STEPS)]
    return [sum(step) / len(step) for step in steps]


@pytest.fixture(scope="module", params=MODELS)
def started(request, tmp_path_factory) -> tuple[dict[str, Any], dict[str, Any], list[float], dict[str, Tensor]]:
    """A model; flags that start from a checkpoint of it; losses and last weights of one rank from there."""
    model, folder = MODELS[request.param], tmp_path_factory.mktemp("runs")
    runs_of(1, model, {"save": folder / "start", "lr": 5e-2})
    load = {"load": folder / "start", "finetune": True, "exit_on_missing_checkpoint": True}
    runs = runs_of(1, model, load, {"save": folder / "one"})
    return model, load, losses_of(runs), stored_tensors(folder / "one", STEPS)


def changed(weights: dict[str, Tensor], folder: Path) -> set[str]:
    before = stored_tensors(folder, STEPS)
    assert before.keys() == weights.keys()
    return {key for key in before if (before[key] - weights[key]).abs().max() > 1e-3}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_goes_the_way_of_one_rank(started, layout, tmp_path):
    model, load, losses, weights = started
    assert changed(weights, load["load"]) == weights.keys()  # norms too: equal weights below are trained weights
    runs = runs_of(2, model, load, LAYOUTS[layout], {"save": tmp_path})
    assert losses_of(runs) == pytest.approx(losses, rel=1e-4)
    ours = stored_tensors(tmp_path, STEPS)
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in weights.items()}
    for key, weight in weights.items():
        torch.testing.assert_close(ours[key], weight, rtol=1e-3, atol=1e-4, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("name", MODELS)
def test_recomputation_changes_nothing(name, tmp_path):
    model = MODELS[name]
    modules = ["mla_up_proj", "layernorm"] if "multi_latent_attention" in model else ["core_attn", "layernorm"]
    plain = runs_of(1, model)
    assert plain[0].losses[-1] < plain[0].losses[0]
    selective = {"recompute_granularity": "selective", "recompute_modules": modules}
    assert losses_of(runs_of(1, model, selective)) == pytest.approx(losses_of(plain), abs=1e-5)
