"""Elastic training under expert, pipeline, tensor and sequence parallelism, and under activation recomputation.

The layouts compared see the same tokens, start from the same weights, and must draw the same k and the same experts.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megatron_emoe.routing.active_k import Place, scheduled_k
from megatron_emoe.settings.elastic_config import ElasticConfig
from tests.distributed import run_ranks
from tests.tiny import (
    COACTIVATION,
    PREFIX,
    Run,
    begin,
    build_layer,
    fill_weights,
    flags,
    hidden_states,
    layer_config,
    start,
    train,
)

pytestmark = pytest.mark.slow

AUX = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}
BOTH = COACTIVATION | {"emoe_k_schedule": "uniform", "emoe_k_min": 1, "emoe_k_max": 4}
PIPELINE = (
    AUX | BOTH | {"num_layers": 4, "emoe_k_draw": "microbatch", "train_iters": 2, "emoe_coactivation_interval": 1}
)


def runs_of(ranks: int, changes: dict[str, Any]) -> list[Run]:
    return run_ranks(train, ranks, flags(**changes), False, fill_weights, timeout=200)


def maps_of(runs: list[Run]) -> dict[tuple[int, int], list[Tensor]]:
    """(step, layer) -> routing maps in the order in which gradients saw them, over ranks that hold the layer."""
    maps: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    for run in runs:
        for route in run.routes:
            if route.training and route.grad:
                maps[route.step, route.layer].append(route.map_TE)
    return maps


def weights_of(runs: list[Run]) -> dict[str, Tensor]:
    return {name: weight for run in runs for name, weight in run.weights.items()}


def assert_same_weights(one: list[Run], other: list[Run]) -> None:
    mine, theirs = weights_of(one), weights_of(other)
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        assert torch.allclose(weight, theirs[name], rtol=1e-3, atol=2e-5), name


def ks_of(maps: dict[tuple[int, int], list[Tensor]]) -> dict[tuple[int, int], list[int]]:
    """The one k that all tokens of each map have."""
    assert all(len(set(found.sum(1).tolist())) == 1 for each in maps.values() for found in each)
    return {place: [int(found[0].sum()) for found in each] for place, each in maps.items()}


def scheduled(changes: dict[str, Any], step: int, microbatch: int, layer: int) -> int:
    elastic = ElasticConfig(**{name: value for name, value in changes.items() if name.startswith("emoe_")})
    return scheduled_k(elastic, 2, Place(step, microbatch, layer))


def test_two_expert_ranks_equal_one_with_the_same_data_parallelism():
    settings = AUX | BOTH | {"train_iters": 3}
    split, whole = (runs_of(2, settings | {"expert_model_parallel_size": size}) for size in (2, 1))
    for mine, theirs in zip(split, whole, strict=True):
        assert mine.losses == pytest.approx(theirs.losses, rel=1e-5)
        pairs = zip(mine.routes, theirs.routes, strict=True)
        assert all(torch.equal(one.map_TE, other.map_TE) for one, other in pairs)
    assert split[0].losses != split[1].losses  # data parallel ranks saw other tokens
    assert_same_weights(split, whole)
    rows: dict[tuple[int, int], list[int]] = defaultdict(lambda: [0, 0])
    for runs, column in ((split, 0), (whole, 1)):
        for seen in (seen for run in runs for seen in run.rows):
            rows[seen.step, seen.layer][column] += seen.rows
    for (step, layer), both in rows.items():
        assert both == [8 * 16 * scheduled(settings, step, 0, layer)] * 2  # sequences x length x k
    ks = ks_of(maps_of(split))
    assert {len(set(found)) for found in ks.values()} == {1}  # one k on all ranks and micro-batches of a step
    assert len({found[0] for found in ks.values()}) > 1


@pytest.fixture(scope="module")
def one_stage() -> list[Run]:
    return runs_of(1, PIPELINE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[list[Run], Path]:
    """Two pipeline stages without recomputation, and where the co-activation matrix is."""
    folder = tmp_path_factory.mktemp("plain")
    return runs_of(2, PIPELINE | {"pipeline_model_parallel_size": 2, "tensorboard_dir": str(folder)}), folder


def test_two_pipeline_stages_equal_one(one_stage, plain):
    two_stages = plain[0]
    assert two_stages[0].losses == [] and len(one_stage[0].losses) == 2 * 4
    assert two_stages[1].losses == pytest.approx(one_stage[0].losses, rel=1e-5)
    maps, single = maps_of(two_stages), maps_of(one_stage)
    assert maps.keys() == single.keys() == {(step, layer) for step in range(2) for layer in range(1, 5)}
    assert all(torch.equal(a, b) for place in maps for a, b in zip(maps[place], single[place], strict=True))
    assert_same_weights(two_stages, one_stage)
    for (step, layer), ks in ks_of(maps).items():
        assert ks == [scheduled(PIPELINE, step, microbatch, layer) for microbatch in range(4)]


def test_an_interleaved_pipeline_equals_one_stage_in_training_and_at_each_k(one_stage):
    more = {"eval_interval": 2, "eval_iters": 1, "emoe_eval_k": [1, 2, 6]}
    layout = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}
    runs = runs_of(2, PIPELINE | layout | more)
    assert runs[1].losses == pytest.approx(one_stage[0].losses, rel=1e-5)
    assert_same_weights(runs, one_stage)
    for (step, layer), ks in ks_of(maps_of(runs)).items():
        assert ks == [scheduled(PIPELINE, step, microbatch, layer) for microbatch in range(4)]
    passes = torch.tensor(runs[1].valid_losses).view(9, 4)  # validation, once more at the end, test; four micro-batches
    evaluations = torch.stack([passes[:4], passes[5:]])  # ordinary and three k'
    assert torch.equal(evaluations[:, 0], evaluations[:, 2])
    assert (evaluations[:, 1] != evaluations[:, 3]).all()


RECOMPUTE = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "selective": {"recompute_granularity": "selective", "recompute_modules": "moe"},
}


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recomputation_draws_the_same_k_and_experts_also_after_other_microbatches(kind, plain, tmp_path):
    """One forward, one backward: the first stage recomputes a micro-batch after running the forward of the next."""
    layout = {"pipeline_model_parallel_size": 2, "tensorboard_dir": str(tmp_path)}
    runs = runs_of(2, PIPELINE | RECOMPUTE[kind] | layout)
    assert runs[1].losses == plain[0][1].losses
    for mine, reference in zip(runs, plain[0], strict=True):
        for ours, theirs in zip(mine.gradients, reference.gradients, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert all(torch.equal(mine.weights[name], reference.weights[name]) for name in reference.weights)
        passes = {grad: [r for r in mine.routes if r.training and r.grad == grad] for grad in (False, True)}
        assert len(passes[False]) == len(passes[True]) == 2 * 4 * 2  # steps, micro-batches, layers of a stage
    assert all(len(set(ks)) > 1 for (_, layer), ks in ks_of(maps_of(runs)).items() if layer < 3)
    pairs, wanted = (load_file(folder / "coactivation.safetensors") for folder in (tmp_path, plain[1]))
    assert pairs.keys() == wanted.keys() == {f"layer.{layer}" for layer in range(1, 5)}
    assert all(torch.equal(pairs[layer], wanted[layer]) for layer in wanted)  # each pass is counted once


@pytest.mark.parametrize("pattern", ["[0,1]", "[1,0]"])
def test_a_pipeline_stage_without_moe_layers_does_not_hang_and_metrics_arrive(pattern, tmp_path):
    settings = {
        "pipeline_model_parallel_size": 2,
        "moe_layer_freq": pattern,
        "emoe_coactivation_interval": 1,
        "emoe_eval_k": [1, 3],
        "eval_interval": 2,
        "eval_iters": 1,
        "tensorboard_dir": str(tmp_path),
        "train_iters": 2,
    }
    runs = runs_of(2, AUX | COACTIVATION | {"moe_z_loss_coeff": 1e-3} | settings)
    layers = [{route.layer for route in run.routes} for run in runs]
    assert layers == {"[0,1]": [set(), {2}], "[1,0]": [{1}, set()]}[pattern]
    lines = [line for line in runs[1].log.splitlines() if "lm loss:" in line]
    assert len(lines) == 2
    for line in lines:
        assert " active k: 2 |" in line and "router entropy" in line and "co-activation coverage" in line


def shards(changes: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Map, input, router gradient of the hierarchical loss, and router weight of one of two sequence shards."""
    start(tensor_model_parallel_size=2)
    parallel = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    layer = build_layer(layer_config(**COACTIVATION | parallel | changes))
    begin()
    x = hidden_states(seed=1)  # the same tokens in both shards: only the draws can differ
    probs, routed = layer.router(x)
    (probs * 0).sum().backward()
    return routed, x.detach().flatten(0, 1), layer.router.weight.grad, layer.router.weight.detach()


def test_sequence_shards_draw_their_own_experts_and_share_the_hierarchical_loss():
    (first, x, gradient, weight), (second, _, other, _) = run_ranks(shards, 2, {"emoe_hr_loss_coeff": 0.5})
    assert (first.sum(1) == 2).all() and (second.sum(1) == 2).all()
    assert not torch.equal(first, second)
    weight = weight.double().requires_grad_()
    q = (x.double() @ weight.t()).softmax(-1)
    loss = -0.5 * (q * (q * 8).log()).sum(-1).mean()
    # The core sums the shards' router gradients: each must hold its half of the mean over all tokens.
    wanted = torch.autograd.grad(loss, weight)[0]
    torch.testing.assert_close((gradient + other).double(), wanted, rtol=1e-4, atol=1e-7)


def test_tensor_and_sequence_parallel_training_runs_with_one_k_on_both_ranks():
    layout = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    runs = run_ranks(
        train, 2, flags(**AUX | BOTH | layout | {"emoe_eval_k": [1, 4], "eval_interval": 4, "eval_iters": 1})
    )
    assert runs[0].losses == runs[1].losses and len(runs[0].losses) == 4 * 4
    assert runs[0].losses[-1] < runs[0].losses[0]
    ks = ks_of(maps_of(runs))
    for (step, layer), found in ks.items():
        assert found == [scheduled(BOTH, step, 0, layer)] * 8  # four micro-batches on two ranks
    assert len({found[0] for found in ks.values()}) > 1
    for seen in runs[0].rows:  # both ranks see all rows: the experts' weights are what is split
        if seen.training:
            assert seen.rows == 2 * 16 * ks[seen.step, seen.layer][0]
    assert "k'=4:" in runs[1].log


def test_layer_wise_k_is_the_same_on_both_ranks_and_differs_between_layers():
    settings = PREFIX | {"emoe_k_draw": "layer"}
    ks = ks_of(maps_of(runs_of(2, AUX | settings | {"expert_model_parallel_size": 2, "train_iters": 3})))
    for (step, layer), found in ks.items():
        assert found == [scheduled(settings, step, 0, layer)] * 4  # two micro-batches on two ranks
    assert any(ks[step, 1] != ks[step, 2] for step in range(3))
