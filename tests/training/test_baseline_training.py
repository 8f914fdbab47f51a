"""Training with the baselines through pretrain_emoe.py: layouts, recomputation, a stop on the way, and the start from a
checkpoint of plain top-k, which lacks the weights that they add."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.model.test_quantization_state import write
from tests.tiny import Run, flags, stored_tensors, train
from tests.training.test_parallel import assert_same_weights, maps_of, runs_of, weights_of

pytestmark = pytest.mark.slow

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2, "global_batch_size": 4}
BASELINES: dict[str, dict[str, Any]] = {
    "top-p": {"emoe_selection": "top-p", "emoe_top_p": 0.7},
    "null": {"emoe_selection": "null-experts", "emoe_null_experts": 4, "moe_router_topk": 3},
    "noisy": {"emoe_selection": "noisy-topk"},
}
ADDED = {"top-p": None, "null": "null_weight", "noisy": "noise_weight"}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


def losses_of(runs: list[Run]) -> list[list[float]]:
    return [run.losses for run in runs]


@pytest.mark.parametrize("name", BASELINES)
def test_expert_ranks_recomputation_and_a_stop_change_nothing(name, tmp_path):
    settings = AUX | BASELINES[name] | {"train_iters": 3}
    whole = runs_of(2, settings)
    stopping = (
        settings
        | RECOMPUTE
        | {"expert_model_parallel_size": 2, "save": tmp_path, "exit_interval": 2, "save_interval": 2}
    )
    first, second = runs_of(2, stopping), runs_of(2, stopping | {"load": tmp_path})
    for mine, start, end in zip(whole, first, second, strict=True):
        assert [len(each.losses) for each in (start, end)] == [2, 1]
        assert start.losses + end.losses == pytest.approx(mine.losses, rel=1e-5)
    maps, start, end = maps_of(whole), maps_of(first), maps_of(second)
    assert maps.keys() == start.keys() | end.keys() and len(start) == 2 * len(end) == 4
    counts = {int(count) for each in maps.values() for found in each for count in found.sum(1)}
    assert (counts == {2}) == (name == "noisy")
    for place, found in (start | end).items():
        assert all(torch.equal(one, other) for one, other in zip(found, maps[place], strict=True)), place
    for runs in (whole, first, second):  # what the experts received is what the routers chose, over both ranks
        received = sum(seen.rows for run in runs for seen in run.rows if seen.grad)
        assert received == sum(int(found.sum()) for each in maps_of(runs).values() for found in each) > 0
    assert_same_weights(second, whole)
    assert sum(str(ADDED[name]) in key for key in weights_of(second)) == (0 if ADDED[name] is None else 2)


def added_weights(name: str, weights: dict[str, Tensor]) -> list[Tensor]:
    return [weight for key, weight in weights.items() if ADDED[name] in key]


@pytest.mark.parametrize("name", ["null", "noisy"])
def test_tensor_parallel_ranks_keep_one_copy_of_the_added_weight(name):
    settings = AUX | BASELINES[name] | {"train_iters": 2}
    # Experts are whole on each rank: gloo gathers no shards of unequal size.
    layout = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True}
    split = runs_of(2, settings | layout)
    mine, theirs = (added_weights(name, run.weights) for run in split)
    assert len(mine) == 2 and all(torch.equal(one, other) for one, other in zip(mine, theirs, strict=True))
    assert split[0].losses == pytest.approx(split[1].losses, rel=1e-6)


STILL = {"lr": 1e-30, "train_iters": 1, "save_interval": 1, "no_save_optim": True, "global_batch_size": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A checkpoint of plain top-k."""
    folder = tmp_path_factory.mktemp("base")
    run_ranks(train, 1, flags(**STILL, save=folder))
    return folder


@pytest.mark.parametrize("name", BASELINES)
def test_a_checkpoint_of_plain_top_k_is_a_start(name, base, tmp_path):
    start = STILL | {"load": base, "finetune": True, "save": tmp_path}
    run = run_ranks(train, 1, flags(**start | BASELINES[name]))[0]
    assert "load_return" not in run.log  # the core's words when its strict load has failed
    before, after = stored_tensors(base, 1), stored_tensors(tmp_path, 1)
    added = {key: after.pop(key) for key in after.keys() - before.keys()}
    assert list(added) == ([f"decoder.layers.mlp.router.{ADDED[name]}"] if ADDED[name] else [])
    for key, weight in before.items():
        assert torch.equal(weight, after[key]), key
    if name == "null":
        (weight,) = added.values()
        assert weight.shape == (2, 4, 32) and 0.01 < weight.std() < 0.04  # as the router starts: deviation 0.02
        back = run_ranks(train, 1, flags(**STILL | {"load": tmp_path, "finetune": True}))[0]
        assert len(back.losses) == 1  # and plain top-k starts from it in turn
    if name == "noisy":
        (weight,) = added.values()
        assert weight.shape == (2, 8, 32) and weight.abs().max() < 1e-29  # zero, and a step of that size


def test_any_other_missing_weight_is_still_an_error(tmp_path):
    run_ranks(write, 1, {"save": tmp_path, "save_interval": 1}, "mlp.router.weight", None)
    words = flags(**STILL | BASELINES["null"] | {"load": tmp_path, "finetune": True})
    with pytest.raises(RuntimeError, match="decoder.layers.mlp.router.weight from model not in state dict"):
        run_ranks(train, 1, words)
