"""What is to be trained gets a gradient, or the run ends and names it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_emoe.routing.watch import MARKER
from megatron_emoe.training.gradient_check import _ONE_OF_MANY, STEPS, reason
from tests.distributed import run_ranks
from tests.tiny import PREFIX, Run, fill_weights, flags, train

ROUTERS = PREFIX | {"emoe_train": "router", "train_iters": 2}
RECOMPUTED: dict[str, dict[str, Any]] = {
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 1},
    "moe": {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
}


def router_gradients(ranks: int, changes: dict[str, Any]) -> list[torch.Tensor]:
    runs: list[Run] = run_ranks(train, ranks, flags(**ROUTERS | changes), False, fill_weights)
    return [gradient for run in runs for gradient in run.gradients[0]]


@pytest.fixture(scope="module")
def plain() -> list[torch.Tensor]:
    return router_gradients(1, {})


@pytest.mark.slow
@pytest.mark.parametrize("how", RECOMPUTED)
def test_routers_alone_have_the_same_gradient_when_layers_are_recomputed(how: str, plain: list[torch.Tensor]):
    found = router_gradients(1, RECOMPUTED[how])
    assert len(found) == len(plain) == 2 and all(gradient.any() for gradient in plain)
    for ours, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_routers_alone_have_a_gradient_in_every_pipeline_stage(plain: list[torch.Tensor]):
    found = router_gradients(2, {"pipeline_model_parallel_size": 2})
    for ours, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, expected)


def add_a_weight_that_nothing_uses() -> None:
    from megatron_emoe.model.layer_spec import ElasticGPTModelBuilder

    build = ElasticGPTModelBuilder.build_model

    def and_one_more(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = build(self, *args, **kwargs)
        model.decoder.layers[1].forgotten = torch.nn.Parameter(torch.ones(3))
        return model

    ElasticGPTModelBuilder.build_model = and_one_more


def iterations_of(words: list[str]) -> tuple[str | None, int]:
    """What ended a run, and the steps that it took."""
    from megatron.training import get_args

    from megatron_emoe.routing.watch import RunStopped

    try:
        train(words, False, add_a_weight_that_nothing_uses)
    except RunStopped as error:
        return str(error), get_args().curr_iteration + 1
    return None, get_args().curr_iteration + 1


@pytest.mark.slow
@pytest.mark.parametrize("check", ["stop", "off"])
def test_a_weight_without_a_gradient_ends_the_run_which_does_not_start_again(check: str, tmp_path: Path):
    saving = {"save": tmp_path, "save_interval": 100} if check == "stop" else {}  # a checkpoint has no place for it
    words = flags(train_iters=STEPS + 2, global_batch_size=2, emoe_gradient_check=check, **saving)
    why = reason(["decoder.layers.1.forgotten"])
    assert run_ranks(iterations_of, 1, words) == [(why, STEPS) if check == "stop" else (None, STEPS + 2)]
    marker = tmp_path / MARKER
    assert marker.read_text() == f"{why}\n" if check == "stop" else not marker.exists()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_experts_of_a_layer_count_as_one(name: str):
    experts = [f"decoder.layers.3.mlp.experts.linear_fc1.{name}{expert}" for expert in (0, 7, 12)]
    experts += [f"decoder.layers.3.mlp.experts.local_experts.{expert}.linear_fc2.{name}" for expert in (0, 12)]
    assert {_ONE_OF_MANY.sub("*", expert) for expert in experts} == {
        f"decoder.layers.3.mlp.experts.linear_fc1.{name}*",
        f"decoder.layers.3.mlp.experts.local_experts.*.linear_fc2.{name}",
    }


def test_of_many_weights_three_are_named():
    said = reason(["a", "b", "c", "d", "e"])
    assert said.startswith(f"no gradient reached a, b, c and 2 more in the first {STEPS} steps")
