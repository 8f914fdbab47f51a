"""Several budgets in one step: the gradient is the weighted sum of plain runs' gradients at each k alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.distributed import run_ranks
from tests.tiny import flags, train

pytestmark = pytest.mark.slow

ONE: dict[str, Any] = {
    "global_batch_size": 2,  # one micro-batch
    "train_iters": 4,
    "lr": 1e-30,  # the weights stay what they were
    "clip_grad": 0,
    "weight_decay": 0,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.5,
}
STRATIFIED = {"emoe_selection": "prefix", "emoe_k_schedule": "stratified", "emoe_k_grid": [5]}


def gradients(changes: dict[str, Any]) -> list[list[Tensor]]:
    """Of each step, in the order of the parameters; each weight follows from its name, whatever the flags."""
    return run_ranks(train, 1, flags(**ONE | changes), False, tiny.fill_weights)[0].gradients


@pytest.fixture(scope="module")
def alone() -> dict[int, list[list[Tensor]]]:
    """Plain runs at the two k."""
    return {k: gradients({"moe_router_topk": k}) for k in (2, 5)}


def assert_weighted(found: list[Tensor], *parts: tuple[float, list[Tensor]]) -> None:
    for index, gradient in enumerate(found):
        wanted = sum(weight * part[index] for weight, part in parts)
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("more", [{}, {"recompute_granularity": "full", "recompute_method": "uniform"}], ids=str)
def test_a_second_pass(more, alone):
    if more:
        more = more | {"recompute_num_layers": 1}
    found = gradients(STRATIFIED | {"emoe_second_pass": 0.25} | more)
    assert len(found) == 4
    for step, gradient in enumerate(found):
        assert_weighted(gradient, (0.8, alone[2][step]), (0.2, alone[5][step]))
    at_k, other = alone[2][0], alone[5][0]
    assert any((mine - theirs).abs().max() > 1e-4 for mine, theirs in zip(at_k, other, strict=True))


def test_micro_batches_by_their_weight(alone):
    found = gradients(STRATIFIED | {"emoe_other_weight": 0.25})
    own, other = 1 / 0.625, 0.25 / 0.625
    for step, gradient in enumerate(found):  # a share of one half, one micro-batch a step: k, 5, k, 5
        k, weight = ((2, own), (5, other))[step % 2]
        assert_weighted(gradient, (weight, alone[k][step]))
