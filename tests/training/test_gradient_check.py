"""What is to be trained gets a gradient, or the run ends and names it."""

from typing import Any

import pytest
import torch

from megatron_emoe.training.gradient_check import STEPS, refusal
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


@pytest.mark.parametrize("how", RECOMPUTED)
def test_routers_alone_have_the_same_gradient_when_layers_are_recomputed(how: str, plain: list[torch.Tensor]):
    found = router_gradients(1, RECOMPUTED[how])
    assert len(found) == len(plain) == 2 and all(gradient.any() for gradient in plain)
    for ours, expected in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, expected)


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


def iterations_of(words: list[str]) -> tuple[int | None, int]:
    """The exit status of a run, and the steps that it took."""
    from megatron.training import get_args

    try:
        train(words, False, add_a_weight_that_nothing_uses)
    except SystemExit as leaving:
        return leaving.code, get_args().curr_iteration + 1
    return None, get_args().curr_iteration + 1


@pytest.mark.parametrize(("check", "ended"), [("stop", (2, STEPS)), ("off", (None, STEPS + 2))])
def test_a_weight_without_a_gradient_ends_the_run(check: str, ended: tuple, capfd: pytest.CaptureFixture):
    words = flags(train_iters=STEPS + 2, global_batch_size=2, emoe_gradient_check=check)
    assert run_ranks(iterations_of, 1, words) == [ended]
    said = capfd.readouterr().err
    assert (f"error: {refusal(['decoder.layers.1.forgotten'])}" in said) == (check == "stop")


def test_of_many_weights_three_are_named():
    said = refusal(["a", "b", "c", "d", "e"])
    assert said.startswith(f"no gradient reached a, b, c and 2 more in the first {STEPS} steps")
