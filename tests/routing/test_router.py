"""The elastic router against a naive loop over tokens, and its losses against their formulas. One rank, real core."""

import math
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.tiny import COACTIVATION, PREFIX, begin, build_layer, hidden_states, layer_config, start

BIAS = [0.3, -0.2, 0.0, 0.15, -0.4, 0.25, -0.1, 0.05]

# Name -> configuration and the k' to evaluate: below, at and above the configured k, as far as groups allow.
CASES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "softmax-before": ({"moe_router_topk": 3}, (1, 3, 6)),
    "softmax-after": ({"moe_router_topk": 3, "moe_router_pre_softmax": False}, (2, 3, 6)),
    "sigmoid-bias": (
        {
            "moe_router_topk": 3,
            "moe_router_pre_softmax": False,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": 2.5,
        },
        (1, 3, 6),
    ),
    "softmax-bias": ({"moe_router_topk": 3, "moe_router_enable_expert_bias": True}, (1, 3, 6)),
    "softmax-bias-after": (
        {"moe_router_topk": 3, "moe_router_enable_expert_bias": True, "moe_router_pre_softmax": False},
        (2, 3, 6),
    ),
    "sqrtsoftplus": (
        {"moe_router_topk": 3, "moe_router_pre_softmax": False, "moe_router_score_function": "sqrtsoftplus"},
        (1, 3, 6),
    ),
    "groups": ({"moe_router_topk": 2, "moe_router_num_groups": 2, "moe_router_group_topk": 1}, (1, 2, 4)),
    "groups-bias": (
        {
            "moe_router_topk": 4,
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_enable_expert_bias": True,
        },
        (2, 3, 4),
    ),
    "renormalize": ({"moe_router_topk": 3, "emoe_combine": "renormalize"}, (1, 3, 6)),
    "raw": ({"moe_router_topk": 3, "moe_router_pre_softmax": False, "emoe_combine": "raw"}, (2, 3, 6)),
}


def naive_scores(logits: list[float], function: str) -> list[float]:
    if function == "softmax":
        top = max(logits)
        exps = [math.exp(x - top) for x in logits]
        return [x / sum(exps) for x in exps]
    if function == "sigmoid":
        return [1 / (1 + math.exp(-x)) for x in logits]
    return [math.sqrt(math.log1p(math.exp(x))) for x in logits]


def naive_ranking(scores: list[float], settings: dict[str, Any], k: int) -> list[int]:
    """Experts of one token, best first, of the groups it may use."""
    bias = BIAS if settings.get("moe_router_enable_expert_bias") else [0.0] * len(scores)
    keys = [score + shift for score, shift in zip(scores, bias, strict=True)]
    allowed = list(range(len(keys)))
    if chosen := settings.get("moe_router_group_topk"):
        size = len(keys) // settings["moe_router_num_groups"]
        groups = [allowed[i : i + size] for i in range(0, len(keys), size)]
        groups.sort(key=lambda group: -sum(sorted((keys[e] for e in group), reverse=True)[: k // chosen]))
        allowed = [expert for group in groups[:chosen] for expert in group]
    return sorted(allowed, key=lambda expert: -keys[expert])


def naive_weights(scores: list[float], experts: list[int], settings: dict[str, Any]) -> dict[int, float]:
    """Combine weights of one token's experts by the model's own rule, or by --emoe-combine."""
    function = settings.get("moe_router_score_function", "softmax")
    rule = settings.get("emoe_combine", "model")
    divides = not settings.get("moe_router_pre_softmax", True) if function == "softmax" else len(experts) > 1
    if rule != "model":
        divides = rule == "renormalize"
    total = sum(scores[e] for e in experts) if divides else 1.0
    scale = settings.get("moe_router_topk_scaling_factor", 1.0)
    return {e: scores[e] / total * scale for e in experts}


def naive_token(logits: list[float], settings: dict[str, Any], k: int) -> dict[int, float]:
    scores = naive_scores(logits, settings.get("moe_router_score_function", "softmax"))
    return naive_weights(scores, naive_ranking(scores, settings, k)[:k], settings)


def router_of(settings: dict[str, Any], **more: Any) -> Any:
    """A router in training mode, its selection bias filled in."""
    router = build_layer(layer_config(**settings), **more).router
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.tensor(BIAS))
    return router


def logits_of(router: Any, x: Tensor) -> Tensor:
    return (x.detach().flatten(0, 1) @ router.weight.detach().t()).double()


def evaluate_cases() -> dict[tuple[str, int | None, bool], tuple[Tensor, Tensor, Tensor]]:
    """(case, k', trained with coactivation) -> logits, probabilities, map in evaluation; k' None: nothing is said."""
    from megatron_emoe.routing.active_k import get_active_k

    start()
    x, results = hidden_states(), {}
    for (name, (settings, ks)), sampled in product(CASES.items(), (False, True)):
        # A pool of all reachable experts: with coactivation off and on, evaluation must be the same plain top-k'.
        pool = {"emoe_selection": "coactivation", "emoe_pool_k": 4 if "groups" in name else 7} if sampled else {}
        if sampled and settings["moe_router_topk"] == pool["emoe_pool_k"]:
            continue
        router = router_of(settings | pool).eval()
        for k in (*ks, None):
            with torch.no_grad(), get_active_k().evaluating(k):
                results[name, k, sampled] = (logits_of(router, x), *router(x))
    return results


@pytest.fixture(scope="module")
def evaluated() -> dict[tuple[str, int | None, bool], tuple[Tensor, Tensor, Tensor]]:
    return run_ranks(evaluate_cases, 1)[0]


@pytest.mark.parametrize("name", CASES)
def test_evaluation_is_the_naive_top_k_below_at_and_above_the_models_k(name, evaluated):
    settings, ks = CASES[name]
    mine = {key[1:]: value for key, value in evaluated.items() if key[0] == name}
    for (k, sampled), (logits, probs, routed) in mine.items():
        experts = k or settings["moe_router_topk"]
        for token, row in enumerate(logits.tolist()):
            wanted = naive_token(row, settings, experts)
            assert set(routed[token].nonzero().flatten().tolist()) == set(wanted), (k, sampled, token)
            for expert in range(8):
                assert probs[token, expert].item() == pytest.approx(wanted.get(expert, 0.0), rel=1e-5), (k, token)
    assert {k for k, _ in mine} == {*ks, None}


def train_cases(steps: int) -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    """Case -> logits, probabilities and map of `steps` training passes under coactivation."""
    start()
    x, results = hidden_states(sequence=16), {}
    for name, (settings, _) in CASES.items():
        k = settings["moe_router_topk"]
        if "groups" in name:
            settings = settings | {"moe_router_topk": (k := 2)}
        router = router_of(settings | {"emoe_selection": "coactivation", "emoe_pool_k": 4 if k == 2 else 7})
        results[name] = []
        for step in range(steps):
            begin(step)
            results[name].append((logits_of(router, x), *(t.detach() for t in router(x))))
    return results


@pytest.fixture(scope="module")
def trained() -> dict[str, list[tuple[Tensor, Tensor, Tensor]]]:
    return run_ranks(train_cases, 1, 6)[0]


@pytest.mark.parametrize("name", CASES)
def test_training_draws_k_experts_of_the_pool_and_combines_them_by_the_models_rule(name, trained):
    settings = CASES[name][0]
    k = 2 if "groups" in name else 3
    pool = 4 if "groups" in name else 7
    drawn_outside_top_k = 0
    for logits, probs, routed in trained[name]:
        for token, row in enumerate(logits.tolist()):
            drawn = routed[token].nonzero().flatten().tolist()
            scores = naive_scores(row, settings.get("moe_router_score_function", "softmax"))
            ranking = naive_ranking(scores, settings, k)
            assert len(drawn) == k and set(drawn) <= set(ranking[:pool])
            drawn_outside_top_k += set(drawn) != set(ranking[:k])
            wanted = naive_weights(scores, drawn, settings)
            for expert in range(8):
                assert probs[token, expert].item() == pytest.approx(wanted.get(expert, 0.0), rel=1e-5)
    # P(plain top-k) is 1/(K-k+1) from m = k, plus a little from the other pools: most sets are not plain top-k.
    assert 0.4 < drawn_outside_top_k / (6 * 32) < 0.95


def count_ranks(settings: dict[str, Any], k: int) -> tuple[Tensor, list[list[int]]]:
    """Share of tokens that use each rank, and for 24 places the largest rank in use, by iteration and micro-batch."""
    start()
    router = router_of(settings)
    x = hidden_states(sequence=512, batch=16)
    ranks = logits_of(router, x).argsort(dim=1, descending=True)
    share, largest = torch.zeros(8, dtype=torch.float64), []
    for iteration in range(6):
        largest.append([])
        for microbatch in range(4):
            begin(iteration, microbatch)
            used = router(x)[1].gather(1, ranks)
            share += used.double().mean(0) / 24
            largest[-1].append(used.any(0).nonzero().max().item() + 1)
    return share, largest


def test_the_router_uses_each_rank_as_often_as_the_paper_s_draw():
    # k=2, K=8: mean over m = max(r, 2)..8 of 2/m over the 7 sizes. 8192 x 24 draws: standard deviation 0.001.
    share, largest = run_ranks(count_ranks, 1, {"emoe_selection": "coactivation", "emoe_pool_k": 8}, 2)[0]
    by_hand = [sum(2 / m for m in range(max(rank, 2), 9)) / 7 for rank in range(1, 9)]
    assert by_hand[0] == pytest.approx(0.491, abs=5e-4) and by_hand[7] == pytest.approx(0.036, abs=5e-4)
    assert share.tolist() == pytest.approx(by_hand, abs=0.006)
    assert all(rank == 8 for row in largest for rank in row)


def test_a_fixed_pool_uses_all_its_ranks_equally():
    settings = {"emoe_selection": "coactivation", "emoe_pool_k": 6, "emoe_pool_fixed": True}
    share, _ = run_ranks(count_ranks, 1, settings, 2)[0]
    assert share.tolist() == pytest.approx([2 / 6] * 6 + [0] * 2, abs=0.006)


@pytest.mark.parametrize("draw", ["microbatch", "step"])
def test_pool_sizes_drawn_per_microbatch_or_step_hold_for_all_tokens(draw):
    settings = {"emoe_selection": "coactivation", "emoe_pool_k": 8, "emoe_pool_draw": draw}
    _, largest = run_ranks(count_ranks, 1, settings, 2)[0]
    sizes = {size for row in largest for size in row}
    assert sizes <= set(range(2, 9)) and len(sizes) > 2
    assert all(len(set(row)) == 1 for row in largest) == (draw == "step")


def draw_twice(changes: dict[str, Any]) -> dict[str, Tensor]:
    """Maps of the same tokens at different places, layers and seeds, and under other random states."""
    start()
    x, maps = hidden_states(sequence=64), {}
    router = router_of(COACTIVATION | changes)
    for name, place in {"first": (3, 1), "iteration": (4, 1), "microbatch": (3, 2), "again": (3, 1)}.items():
        torch.cuda.manual_seed(len(name))  # the draws must not depend on any random stream
        begin(*place)
        maps[name] = router(x)[1]
    router.set_layer_number(2)
    maps["layer"] = router(x)[1]
    router.set_layer_number(1)
    router.config.emoe_seed += 1
    maps["seed"] = router(x)[1]
    return maps


def test_draws_depend_on_iteration_microbatch_layer_and_seed_alone():
    maps = run_ranks(draw_twice, 1, {})[0]
    assert torch.equal(maps["again"], maps["first"])
    for other in ("iteration", "microbatch", "layer", "seed"):
        assert not torch.equal(maps[other], maps["first"]), other


def plain_tokens() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    start()
    router, x = router_of({"emoe_selection": "coactivation", "emoe_pool_k": 3}), hidden_states(sequence=64)
    begin()
    drawn = [tensor.detach() for tensor in router(x)]
    router.eval()
    with torch.no_grad():
        return *drawn, *router(x)


def test_a_token_that_draws_plain_top_k_has_bit_identical_weights():
    probs, routed, plain_probs, plain_map = run_ranks(plain_tokens, 1)[0]
    same = (routed == plain_map).all(dim=1)
    assert 30 < same.sum() < 120  # of 128: m = 2 for half of them, and a third of the rest
    assert torch.equal(probs[same], plain_probs[same])


def scheduled(settings: dict[str, Any]) -> list[tuple[int, Tensor, Tensor, Tensor]]:
    """k that the schedule names, logits, probabilities and map of 12 training passes."""
    from megatron_emoe.routing.active_k import Place, scheduled_k

    start()
    router, x, passes = router_of(settings), hidden_states(), []
    for iteration, microbatch in product(range(6), range(2)):
        begin(iteration, microbatch)
        probs, routed = (tensor.detach() for tensor in router(x))
        place = Place(iteration, microbatch, layer=1)
        passes.append((scheduled_k(router.config, 2, place), logits_of(router, x), probs, routed))
    return passes


@pytest.mark.parametrize("name", ["softmax-before", "sigmoid-bias", "softmax-bias"])
def test_prefix_training_is_the_naive_top_k_at_the_scheduled_k(name):
    settings = CASES[name][0] | {"moe_router_topk": 2} | PREFIX | {"emoe_k_draw": "microbatch"}
    passes = run_ranks(scheduled, 1, settings)[0]
    assert len({k for k, *_ in passes}) > 2
    for k, logits, probs, routed in passes:
        for token, row in enumerate(logits.tolist()):
            wanted = naive_token(row, settings, k)
            assert set(routed[token].nonzero().flatten().tolist()) == set(wanted)
            assert probs[token].tolist() == pytest.approx([wanted.get(e, 0.0) for e in range(8)], rel=1e-5, abs=1e-9)


def no_place() -> str:
    start()
    router = router_of(COACTIVATION)
    with pytest.raises(RuntimeError) as error:
        router(hidden_states())
    return str(error.value)


def test_a_training_pass_without_a_place_is_an_error_not_a_plain_pass():
    assert "begin_microbatch" in run_ranks(no_place, 1)[0]


def plain_config() -> str:
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_emoe.routing.router import ElasticRouter

    start()
    with pytest.raises(TypeError) as error:
        ElasticRouter(config=layer_config(stock=True), pg_collection=get_default_pg_collection())
    return str(error.value)


def test_a_plain_configuration_is_refused():
    assert "ElasticTransformerConfig" in run_ranks(plain_config, 1)[0]
