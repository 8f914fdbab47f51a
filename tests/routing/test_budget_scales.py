"""Learned scales by budget: their table by hand, routing with them against a naive loop, and a run that learns them."""

import math
from argparse import Namespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_emoe.model.checkpoint import check_budgets
from megatron_emoe.routing.budget_scales import RATE, empty_scales, log_scales
from megatron_emoe.settings.elastic_config import ElasticConfig
from tests.distributed import run_ranks
from tests.routing.test_router import CASES, hidden_states, logits_of, naive_ranking, naive_scores, router_of, start
from tests.tiny import flags, stored_tensors, train

GRID = {"emoe_selection": "prefix", "emoe_k_schedule": "stratified", "emoe_k_grid": [1, 5]}
SCALES = GRID | {"emoe_budget_scales": True}


def test_the_table_by_hand():
    parameters = torch.tensor([[0.1, 9, 9, 9], [0.2, 0.3, 9, 9], [0.4, 0.5, 0.6, 0.8]]).flatten()  # 9: ranks of nobody
    ks = (1, 2, 4)

    def at(k: int, own: int) -> list[float]:
        return [value / RATE for value in log_scales(parameters, ks, k, own).tolist()]

    assert at(1, own=4) == pytest.approx([0.1])
    assert at(2, own=4) == pytest.approx([0.2, 0.3])
    assert at(4, own=2) == pytest.approx([0.4, 0.5, 0.6, 0.8])
    assert at(3, own=1) == pytest.approx([0.3, 0.4, 0.6])  # half way; of rank 3 the upper one alone has learned
    assert at(6, own=1) == pytest.approx([0.4, 0.5, 0.6, 0.8, 0.8, 0.8])
    assert [value / RATE for value in log_scales(parameters[4:], (2, 4), 1, 4).tolist()] == pytest.approx([0.2])
    # At the model's own k they are 1, and so is its share half way.
    assert at(1, own=1) == [0] and at(2, own=2) == [0, 0] and at(4, own=4) == [0, 0, 0, 0]
    assert at(3, own=2) == pytest.approx([0.2, 0.25, 0.6])
    assert empty_scales(ks).shape == (12,) and not empty_scales(ks).any()


def routed(name: str, scales: list[float] | None, tail: list[str] | None) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """At k' = 1 ... 6: logits, probabilities and map in evaluation, of a router with k = 3."""
    from megatron_emoe.routing.active_k import get_active_k

    start()
    settings = CASES[name][0] | ({} if scales is None else SCALES) | {"emoe_tail_scale": tail}
    router, x, found = router_of(settings).eval(), hidden_states(), {}
    if scales:
        router.budget_scales.data.copy_(torch.tensor(scales))
    for k in range(1, 7):
        with torch.no_grad(), get_active_k().evaluating(k):
            found[k] = (logits_of(router, x), *router(x))
    return found


@pytest.mark.parametrize("name", ["softmax-before", "softmax-after", "sigmoid-bias", "sqrtsoftplus"])
def test_untrained_scales_are_none(name):
    plain, scaled = (run_ranks(routed, 1, name, scales, ["0.25"])[0] for scales in (None, []))
    for k in range(1, 7):
        assert torch.equal(plain[k][2], scaled[k][2])
        torch.testing.assert_close(scaled[k][1], plain[k][1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["softmax-before", "softmax-after", "sigmoid-bias", "sqrtsoftplus"])
def test_weights_are_the_naive_ones(name):
    # Of k = 1, 3, 5 and five ranks; the tail scale beside them multiplies ranks past the third.
    values = [0.05, 0, 0, 0, 0, 0.02, -0.03, 0.04, 0, 0, -0.02, 0.01, 0.03, -0.05, 0.06]
    table = {k: [RATE * value for value in values[5 * row : 5 * row + k]] for row, k in enumerate((1, 3, 5))}
    table[3] = [0, 0, 0]  # the model's own k
    table[2] = [(table[1][0] + table[3][0]) / 2, table[3][1]]
    table[4] = [(a + b) / 2 for a, b in zip(table[3], table[5], strict=False)] + [table[5][3]]
    table[6] = [*table[5], table[5][4]]
    settings = CASES[name][0]
    divides = settings.get("moe_router_score_function", "softmax") != "softmax" or name == "softmax-after"
    for k, (logits, probs, chosen) in run_ranks(routed, 1, name, values, ["0.25"])[0].items():
        for token, row in enumerate(logits.tolist()):
            scores = naive_scores(row, settings.get("moe_router_score_function", "softmax"))
            experts = naive_ranking(scores, settings, k)[:k]
            weights = {
                expert: scores[expert] * math.exp(table[k][rank]) * (0.25 if rank >= 3 else 1)
                for rank, expert in enumerate(experts)
            }
            total = sum(weights.values()) if divides and (k > 1 or name == "softmax-after") else 1
            scale = settings.get("moe_router_topk_scaling_factor", 1.0)
            wanted = [weights.get(expert, 0.0) / total * scale for expert in range(8)]
            assert probs[token].tolist() == pytest.approx(wanted, rel=1e-5, abs=1e-9)
            assert set(chosen[token].nonzero().flatten().tolist()) == set(experts)


RUN: dict[str, Any] = {"expert_model_parallel_size": 2, "global_batch_size": 16, "train_iters": 4, "save_interval": 2}
NAME = "decoder.layers.0.mlp.router.budget_scales"


@pytest.mark.slow
def test_a_run_learns_them_from_a_checkpoint_without_and_goes_on_bit_by_bit(tmp_path):
    base, save, part = tmp_path / "base", tmp_path / "save", tmp_path / "part"
    run_ranks(train, 2, flags(**RUN | {"train_iters": 2, "save": base}))
    begin = {"load": base, "finetune": True} | SCALES
    whole = run_ranks(train, 2, flags(**RUN | begin | {"save": save}))
    scales_BK = whole[0].weights[NAME].view(3, 5)  # k = 1, 2, 5
    assert torch.equal(whole[0].weights[NAME], whole[1].weights[NAME])
    assert scales_BK[0, 0] and scales_BK[2].all()
    assert not scales_BK[0, 1:].any() and not scales_BK[1].any()  # ranks that no k has, and the model's own k
    run_ranks(train, 2, flags(**RUN | begin | {"save": part, "exit_interval": 2}))
    resumed = run_ranks(train, 2, flags(**RUN | SCALES | {"load": part, "save": part}))
    for mine, theirs in zip(resumed, whole, strict=True):
        assert all(torch.equal(mine.weights[name], theirs.weights[name]) for name in theirs.weights)
    assert any(name.endswith("router.budget_scales") for name in stored_tensors(save, 4))


@pytest.mark.parametrize("grid", [[1, 6], [3, 5], [1, 3, 5]])  # of as many k and ranks, fewer or more
def test_scales_of_other_k_are_refused_in_a_new_run_too(grid):
    def settings(**changes: Any) -> Namespace:
        return Namespace(**vars(ElasticConfig(**SCALES | changes)), moe_router_topk=2)

    check_budgets(settings(), settings(), "--load A")
    check_budgets(settings(emoe_budget_scales=False, emoe_k_grid=grid), settings(), "--load A")
    check_budgets(settings(emoe_k_grid=grid), Namespace(), "--load A")  # stored before there were any
    message = "--load A: has learned scales for k = 1, 2, 5, this run trains "
    with pytest.raises(ValueError, match=message):
        check_budgets(settings(emoe_k_grid=grid), settings(), "--load A")
