"""Low-rank experts on a dense model through pretrain_emoe.py: the start from the core's own checkpoint, what is trained
and what stays, a stop on the way, layouts, and a sweep over k'."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.sweeps import flags as sweep_flags
from tests.sweeps import run_tool, write_tokens
from tests.tiny import COACTIVATION, Run, flags, stored_tensors, train

pytestmark = pytest.mark.slow

DENSE: dict[str, Any] = {
    **dict.fromkeys(("num_experts", "moe_router_topk", "moe_router_pre_softmax", "moe_ffn_hidden_size")),
    "moe_token_dispatcher_type": None,
    "global_batch_size": 4,
}
LORA = DENSE | {
    "emoe_lora_experts": 8,
    "emoe_lora_rank": 3,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
    "use_distributed_optimizer": True,
}
DRAWN = LORA | COACTIVATION | {"emoe_eval_k": [1, 6], "eval_iters": 1, "eval_interval": 4}
ADAPTERS = {f"decoder.layers.mlp.lora.linear_fc{n}.{side}" for n in (1, 2) for side in "ab"}
ADDED = ADAPTERS | {"decoder.layers.mlp.router.weight"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A dense model of the core's own training."""
    folder = tmp_path_factory.mktemp("base")
    run_ranks(train, 1, flags(**DENSE, save=folder, save_interval=4), True)
    return folder


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> tuple[Run, Path]:
    """Four steps with co-activation sampling, without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return run_ranks(train, 1, flags(**DRAWN, pretrained_checkpoint=base, save=folder, save_interval=4))[0], folder


def test_the_first_loss_is_the_dense_model_s(base, whole):
    asked = flags(**DENSE | {"train_iters": 1}, load=base, finetune=True)
    (stock,) = run_ranks(train, 1, asked, True)
    assert stock.losses == whole[0].losses[: len(stock.losses)]
    assert len(set(whole[0].losses)) == len(whole[0].losses) == 8


def test_experts_and_routers_are_trained_and_nothing_else(base, whole):
    before, after = stored_tensors(base, 4), stored_tensors(whole[1], 4)
    weights = {name for name in after if not name.startswith("optimizer")}
    assert weights - before.keys() == ADDED
    for name in weights - ADDED:
        assert torch.equal(after[name], before[name]), name
    assert all(after[name].any() for name in ADAPTERS)
    trained = sum(after[name].numel() for name in ADDED)
    assert sum(gradient.numel() for gradient in whole[0].gradients[0]) == trained
    assert {route.map_TE.sum(1).unique().item() for route in whole[0].routes if route.training} == {2}


def test_a_log_has_what_a_mixture_of_experts_logs(whole):
    run, folder = whole
    for name in ("load_balancing_loss", "active k: 2 ", "pool size", "hierarchical router loss", "load p95"):
        assert name in run.log, name
    lines = [json.loads(line) for line in (folder / "validation_k.jsonl").read_text().splitlines()]
    assert {"1", "6"} == lines[0]["loss"].keys() and lines[0]["loss"]["1"] != lines[0]["loss"]["6"]


def test_a_run_that_stopped_goes_on_bit_by_bit(base, whole, tmp_path):
    settings = DRAWN | {"pretrained_checkpoint": base, "save": tmp_path, "load": tmp_path}
    stopping = flags(**settings, exit_interval=2, save_interval=2)
    first, second = (run_ranks(train, 1, stopping)[0] for _ in range(2))
    assert first.losses + second.losses == whole[0].losses and len(first.losses) == 4
    before, after = stored_tensors(whole[1], 4), stored_tensors(tmp_path, 4)
    assert all(torch.equal(after[name], before[name]) for name in ADDED)


LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "recomputed": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "recomputed mlp": {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
}


@pytest.fixture(scope="module")
def plain(whole) -> Run:
    """A new run from the trained experts, without draws: tensor ranks hold other tokens, and would draw others."""
    return run_ranks(train, 1, flags(**LORA, pretrained_checkpoint=whole[1], train_iters=3))[0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_train_alike(name, whole, plain):
    ranks = 1 if name.startswith("recomputed") else 2
    runs = run_ranks(train, ranks, flags(**LORA | LAYOUTS[name], pretrained_checkpoint=whole[1], train_iters=3))
    assert runs[-1].losses == pytest.approx(plain.losses, rel=2e-5)
    assert plain.losses[-1] != plain.losses[0]


def test_weights_that_are_still_being_gathered_are_waited_for(base):
    """With overlap, the core waits in a hook on each module that is called, for that module's own weights."""
    asked = LORA | {"pretrained_checkpoint": base, "train_iters": 4, "lr": 0.05, "ddp_bucket_size": 300}
    overlapped = asked | {"overlap_grad_reduce": True, "overlap_param_gather": True}
    found = [[run.losses for run in run_ranks(train, 2, flags(**each))] for each in (asked, overlapped)]
    assert found[0] == found[1]


def swept(load: Path, data: Path, out: Path, ranks: int) -> Any:
    asked = sweep_flags(data, out, load=load, k=[1, 2, 4, 6], moe_token_dispatcher_type=None)
    parallel = [] if ranks == 1 else ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
    return run_tool("sweep_k", *asked, *parallel)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_sweep_runs_every_k(ranks, whole, tmp_path):
    data, out = write_tokens(tmp_path / "data", vocabulary=96), tmp_path / "sweep.json"
    answer = run_ranks(swept, ranks, whole[1], data, out, ranks)[0]
    assert answer.status is None, answer.err
    result = json.loads(out.read_text())
    cells = {cell["k"]: cell for cell in result["cells"]}
    assert list(cells) == [1, 2, 4, 6] and result["num_experts"] == 8 and result["k_train"] == 2
    for k, cell in cells.items():
        assert cell["rows_per_layer"] == {"1": 64 * 16 * k, "2": 64 * 16 * k}
        # 8 experts of rank 3 in 2 layers, on 32 x 128 (gate and up) and 64 x 32: all are computed, whatever k' is
        assert cell["expert_flops_per_token"] == 2 * 2 * 8 * 3 * (32 + 128 + 64 + 32)
        assert cell["active_params"] == cells[1]["active_params"] + (k - 1) * 2 * 3 * (32 + 128 + 64 + 32)
    assert len({cell["loss"] for cell in cells.values()}) == 4
    assert len({cell["flops_per_token"] for cell in cells.values()}) == 1
