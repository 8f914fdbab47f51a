"""Selection against hand-worked probabilities, naive loops, finite differences, the core and transformers.

Ranked pools here are 0, 1, 2, ... for every token, so an expert's number is its rank (from 0).
"""

import itertools
import math

import pytest
import torch
from megatron.core.transformer.moe.moe_utils import group_limited_topk, topk_routing_with_score_function

from megatron_emoe.routing import selection

TOKENS = 200_000
SIGMAS = 5  # a correct sampler fails one comparison in about two million

# Inclusion probability of each rank: the mean over m = k..K of k/m where the rank is inside the pool, else 0. E.g.
# k=2, K=8, rank 1: (2/2 + 2/3 + 2/4 + 2/5 + 2/6 + 2/7 + 2/8) / 7 = .491; rank 8: (2/8) / 7 = .036.
INCLUSION = {
    (2, 8): [0.491, 0.491, 0.348, 0.253, 0.181, 0.124, 0.077, 0.036],
    (8, 16): [0.700] * 8 + [0.589, 0.490, 0.402, 0.321, 0.247, 0.178, 0.115, 0.056],
}


def ranks(pool_max: int, tokens: int = TOKENS) -> torch.Tensor:
    return torch.arange(pool_max).expand(tokens, -1)


def five_sigmas(p: float, n: int = TOKENS) -> float:
    """Of a share measured on n independent draws of probability p (binomial)."""
    return SIGMAS * math.sqrt(p * (1 - p) / n)


def random_logits(tokens: int = 64, experts: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(tokens, experts, generator=torch.Generator().manual_seed(1)) * 2).to(dtype)


@pytest.mark.parametrize(("k", "pool_max"), INCLUSION)
def test_inclusion_probabilities(k, pool_max):
    chosen, _ = selection.coactivation_indices(ranks(pool_max), k, pool=None, seed=11)
    measured = selection.dense_map(chosen, pool_max).float().mean(dim=0)
    for share, expected in zip(measured.tolist(), INCLUSION[k, pool_max], strict=True):
        assert share == pytest.approx(expected, abs=five_sigmas(expected) + 0.0005)  # the table has three digits


def test_plain_top_k_probability():
    # k=2, K=8. The pool is plain top-k in 1/(K-k+1) = 1/7 of the draws. The set is it more often, as a pool of m gives
    # every pair 1/C(m,2) = 2/(m(m-1)): (1 + 1/3 + 1/6 + 1/10 + 1/15 + 1/21 + 1/28) / 7 = 1.75 / 7 = 1/4.
    chosen, sizes = selection.coactivation_indices(ranks(8), 2, pool=None, seed=12)
    for m in range(2, 9):
        assert (sizes == m).float().mean().item() == pytest.approx(1 / 7, abs=five_sigmas(1 / 7))
    is_top2 = (chosen == torch.tensor([0, 1])).all(dim=1)
    assert is_top2.float().mean().item() == pytest.approx(0.25, abs=five_sigmas(0.25))


def test_every_subset_has_its_probability():
    # k=2, K=4: P(pair) = mean over m = 2, 3, 4 of 1/C(m,2) where both ranks are in the pool, by enumeration.
    chosen, _ = selection.coactivation_indices(ranks(4), 2, pool=None, seed=13)
    for pair in itertools.combinations(range(4), 2):
        expected = sum(1 / math.comb(m, 2) for m in (2, 3, 4) if max(pair) < m) / 3
        share = (chosen == torch.tensor(pair)).all(dim=1).float().mean().item()
        assert share == pytest.approx(expected, abs=five_sigmas(expected)), pair


def test_fixed_pool_gives_every_pair_alike():
    # A pool of 8 holds C(8,2) = 28 pairs: 1/28 = 3.6 % each.
    chosen, sizes = selection.coactivation_indices(ranks(8), 2, pool=8, seed=14)
    assert sizes == 8
    for pair in itertools.combinations(range(8), 2):
        share = (chosen == torch.tensor(pair)).all(dim=1).float().mean().item()
        assert share == pytest.approx(1 / 28, abs=five_sigmas(1 / 28)), pair


def test_without_replacement_in_rank_order_inside_the_pool():
    chosen, sizes = selection.coactivation_indices(ranks(16), 5, pool=None, seed=15)
    assert (chosen[:, 1:] > chosen[:, :-1]).all()  # strictly: no expert twice, best rank first
    assert (chosen < sizes).all()


def test_each_token_draws_for_itself():
    # Independent neighbours: both tokens of a pair keep rank 1 with probability .4908**2 = .2409.
    chosen, _ = selection.coactivation_indices(ranks(8), 2, pool=None, seed=16)
    first = (chosen == 0).any(dim=1).view(-1, 2).all(dim=1)
    assert first.float().mean().item() == pytest.approx(0.2409, abs=five_sigmas(0.2409, TOKENS // 2))


def test_draw_is_a_function_of_the_seed_alone():
    before = torch.get_rng_state()
    first, _ = selection.coactivation_indices(ranks(8, 50), 2, pool=None, seed=17)
    torch.manual_seed(0)
    again, _ = selection.coactivation_indices(ranks(8, 50), 2, pool=None, seed=17)
    other, _ = selection.coactivation_indices(ranks(8, 50), 2, pool=None, seed=18)
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.set_rng_state(before)
    selection.uniform_numbers(4, 4, 2**64 - 1, torch.device("cpu"))  # the largest seed that mix() gives
    assert torch.equal(before, torch.get_rng_state())  # the global stream is not drawn from


def test_pool_sizes_at_the_ends_of_the_unit_interval():
    u_T1 = torch.tensor([[0.0], [2.0**-24], [1 - 2.0**-24]])  # the last is the largest fp32 below 1
    for k in (1, 2, 6, 8):
        for pool_max in range(k, 600):
            sizes = selection.draw_pool_sizes(u_T1, k, pool_max)
            assert sizes.flatten().tolist() == [k, k, pool_max], (k, pool_max)


# A pool of size k is plain top-k, bit for bit.


@pytest.mark.parametrize("score_function", selection.SCORE_FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_of_k_is_bit_identical_to_plain_top_k(score_function, dtype):
    logits_TE = random_logits(dtype=dtype)
    scores_TE = selection.expert_scores(logits_TE, score_function)
    ranked_TP = selection.rank_experts(scores_TE, 8, k=3)
    chosen_TK, _ = selection.coactivation_indices(ranked_TP, 3, pool=3, seed=5)
    probs_TE, map_TE = routed(logits_TE, chosen_TK, score_function, pre_softmax=True, scale=None)
    core_probs, core_map = topk_routing_with_score_function(
        logits_TE, 3, use_pre_softmax=True, score_function=score_function
    )
    assert torch.equal(map_TE, core_map)
    assert torch.equal(probs_TE, core_probs) and probs_TE.dtype == dtype


def test_tokens_whose_own_pool_is_k_are_plain():
    chosen_TK, sizes_T1 = selection.coactivation_indices(ranks(8, 5000), 2, pool=None, seed=6)
    plain = chosen_TK[sizes_T1.flatten() == 2]
    assert len(plain) > 500
    assert (plain == torch.tensor([0, 1])).all()


def routed(logits_TE, indices_TK, score_function, *, pre_softmax, scale, combine="model"):
    """Weights and map as the router puts them together."""
    weights_TK = selection.combine_weights(
        logits_TE,
        selection.expert_scores(logits_TE, score_function),
        indices_TK,
        score_function=score_function,
        normalize=selection.normalizes(combine, score_function, pre_softmax, indices_TK.shape[1]),
        scale=scale,
    )
    return selection.to_dense(weights_TK, indices_TK, logits_TE)


# Weights at given experts: the core's function takes the same indices.


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("scale", [None, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("score_function", "pre_softmax"),
    [("softmax", True), ("softmax", False), ("sigmoid", False), ("sqrtsoftplus", False)],
)
def test_weights_are_the_core_s_bit_for_bit(score_function, pre_softmax, dtype, scale, k):
    logits_TE = random_logits(dtype=dtype)
    indices_TK = torch.rand(logits_TE.shape, generator=torch.Generator().manual_seed(2)).topk(k).indices
    probs_TE, map_TE = routed(logits_TE, indices_TK, score_function, pre_softmax=pre_softmax, scale=scale)
    core_probs, core_map = topk_routing_with_score_function(
        logits_TE,
        k,
        use_pre_softmax=pre_softmax,
        scaling_factor=scale,
        score_function=score_function,
        precomputed_indices=indices_TK,
    )
    assert torch.equal(map_TE, core_map)
    assert torch.equal(probs_TE, core_probs)


@pytest.mark.parametrize("score_function", selection.SCORE_FUNCTIONS)
def test_weights_of_extreme_logits_are_finite(score_function):
    # sigmoid(-200) is 0 in fp32: a token whose scores are all 0 has weights 0, not 0/0. softmax of equals: 1/3 each.
    logits_TE = torch.tensor([[-200.0] * 4, [1e4, -1e4, 0.0, 0.0]])
    indices_TK = torch.tensor([[0, 1, 2], [0, 1, 2]])
    probs_TE, _ = routed(logits_TE, indices_TK, score_function, pre_softmax=False, scale=None)
    low = 1 / 3 if score_function == "softmax" else 0.0
    assert probs_TE[0].tolist() == pytest.approx([low, low, low, 0.0])
    assert probs_TE[1].tolist() == pytest.approx(
        [2 / 3, 0, 1 / 3, 0] if score_function == "sigmoid" else [1, 0, 0, 0], abs=0.01
    )


# combine rule, score function, pre-softmax, k -> are the weights divided by their sum?
NORMALIZES = [
    ("model", "softmax", False, 2, True),
    ("model", "softmax", False, 1, True),
    ("model", "softmax", True, 2, False),
    ("model", "sigmoid", False, 2, True),
    ("model", "sigmoid", False, 1, False),
    ("model", "sqrtsoftplus", False, 1, False),
    ("renormalize", "softmax", True, 2, True),
    ("renormalize", "sigmoid", False, 1, True),
    ("raw", "softmax", False, 2, False),
    ("raw", "sigmoid", False, 2, False),
]


@pytest.mark.parametrize(("combine", "score_function", "pre_softmax", "k", "expected"), NORMALIZES)
def test_which_weights_sum_to_one(combine, score_function, pre_softmax, k, expected):
    assert selection.normalizes(combine, score_function, pre_softmax, k) is expected
    logits_TE = random_logits()
    indices_TK = logits_TE.topk(k).indices
    probs_TE, _ = routed(logits_TE, indices_TK, score_function, pre_softmax=pre_softmax, scale=3.0, combine=combine)
    sums_T = probs_TE.sum(dim=1)
    if expected:
        assert torch.allclose(sums_T, torch.full_like(sums_T, 3.0))
    else:
        raw_T = selection.expert_scores(logits_TE, score_function).gather(1, indices_TK).sum(dim=1)
        assert torch.allclose(sums_T, 3.0 * raw_T)
        assert not torch.allclose(sums_T, torch.full_like(sums_T, 3.0), rtol=1e-3)


def test_unknown_score_function():
    with pytest.raises(ValueError, match=r"score function 'tanh': must be one of softmax, sigmoid, sqrtsoftplus"):
        selection.expert_scores(random_logits(), "tanh")


# Group limits.


@pytest.mark.parametrize(("k", "num_groups", "group_topk"), [(2, 4, 2), (3, 4, 2), (4, 4, 1), (6, 8, 4), (4, 2, 2)])
def test_group_limits_are_the_core_s(k, num_groups, group_topk):
    scores_TE = torch.sigmoid(random_logits(256))
    ours = selection.rank_experts(scores_TE, k, k=k, num_groups=num_groups, group_topk=group_topk)
    _, core = group_limited_topk(scores_TE, k, 256, 16, num_groups, group_topk)
    assert torch.equal(ours, core)


def test_a_pool_stays_in_the_groups_of_plain_top_k():
    # 16 experts in 4 groups of 4, best 2 groups, k=2: a pool of 8 is exactly those groups, and begins with plain top-k.
    scores_TE = torch.sigmoid(random_logits(256))
    pool_TP = selection.rank_experts(scores_TE, 8, k=2, num_groups=4, group_topk=2)
    _, core = group_limited_topk(scores_TE, 2, 256, 16, 4, 2)
    assert torch.equal(pool_TP[:, :2], core)
    for scores, pool in zip(scores_TE.tolist(), pool_TP.tolist(), strict=True):
        best_in_group = [max(scores[g * 4 : g * 4 + 4]) for g in range(4)]  # k // group_topk = 1 expert scores a group
        groups = sorted(range(4), key=lambda g: -best_in_group[g])[:2]
        assert sorted(pool) == sorted(e for g in groups for e in range(g * 4, g * 4 + 4))


# The complete routing, one token and one expert at a time, in double precision.

SCORE = {
    "softmax": lambda x, row: math.exp(x - max(row)) / sum(math.exp(y - max(row)) for y in row),
    "sigmoid": lambda x, row: 1 / (1 + math.exp(-x)),
    "sqrtsoftplus": lambda x, row: math.sqrt(math.log1p(math.exp(x))),
}


def naive_groups(values: list[float], k: int, num_groups: int, group_topk: int) -> set[int]:
    """Experts of the `group_topk` groups whose best k // group_topk experts have the largest sum."""
    size = len(values) // num_groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(num_groups)]
    totals = [sum(sorted((values[e] for e in group), reverse=True)[: k // group_topk]) for group in members]
    best = sorted(range(num_groups), key=lambda g: -totals[g])[:group_topk]
    return {e for g in best for e in members[g]}


def naive_route(row, bias, k, score_function, pre_softmax, groups) -> dict[int, float]:
    """Expert -> weight of one token, by plain top-k."""
    scores = [SCORE[score_function](x, row) for x in row]
    rank_by = [score + b for score, b in zip(scores, bias, strict=True)]
    allowed = naive_groups(rank_by, k, *groups) if groups else set(range(len(row)))
    chosen = sorted(allowed, key=lambda e: -rank_by[e])[:k]
    divide = not pre_softmax if score_function == "softmax" else k > 1
    total = sum(scores[e] for e in chosen) if divide else 1.0
    return {e: scores[e] / total for e in chosen}


@pytest.mark.parametrize("groups", [None, (4, 2)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize(
    ("score_function", "pre_softmax"),
    [("softmax", True), ("softmax", False), ("sigmoid", False), ("sqrtsoftplus", False)],
)
def test_complete_routing_against_a_naive_loop(score_function, pre_softmax, k, with_bias, groups):
    logits_TE = random_logits(40)
    bias_E = torch.linspace(-0.4, 0.4, 16) if with_bias else torch.zeros(16)
    num_groups, group_topk = groups or (None, None)
    indices_TK = selection.rank_experts(
        selection.expert_scores(logits_TE, score_function) + bias_E,
        k,
        k=k,
        num_groups=num_groups,
        group_topk=group_topk,
    )
    probs_TE, map_TE = routed(logits_TE, indices_TK, score_function, pre_softmax=pre_softmax, scale=None)
    for token, row in enumerate(logits_TE.double().tolist()):
        expected = naive_route(row, bias_E.double().tolist(), k, score_function, pre_softmax, groups)
        assert set(map_TE[token].nonzero().flatten().tolist()) == set(expected)
        for expert, weight in expected.items():
            assert probs_TE[token, expert].item() == pytest.approx(weight, rel=2e-6)
        assert (probs_TE[token] != 0).sum() == k


def test_bias_chooses_but_does_not_weigh():
    # Scores .5, .3, .2; a bias of .4 on the last: order 2 (.6), 0 (.5); weights are of the scores: .2/.7, .5/.7.
    logits_TE = torch.tensor([[0.5, 0.3, 0.2]]).log()
    scores_TE = selection.expert_scores(logits_TE, "softmax")
    indices_TK = selection.rank_experts(scores_TE + torch.tensor([0.0, 0.0, 0.4]), 2, k=2)
    assert indices_TK.tolist() == [[2, 0]]
    probs_TE, _ = routed(logits_TE, indices_TK, "softmax", pre_softmax=False, scale=None)
    assert probs_TE[0].tolist() == pytest.approx([5 / 7, 0, 2 / 7])


def test_softmax_with_bias_is_transformers_ernie():
    modeling = pytest.importorskip("transformers.models.ernie4_5_moe.modeling_ernie4_5_moe")
    config = modeling.Ernie4_5_MoeConfig(hidden_size=16, moe_num_experts=16, moe_k=3)
    router = modeling.Ernie4_5_MoeTopKRouter(config)
    router.weight.data = torch.eye(16)  # logits are the hidden states
    router.moe_statics.e_score_correction_bias.data = torch.linspace(-0.1, 0.1, 16).unsqueeze(0)
    hidden = random_logits(256)
    logits_TE, weights_TK, indices_TK = router(hidden)
    scores_TE = selection.expert_scores(logits_TE, "softmax")
    bias_E = router.moe_statics.e_score_correction_bias.squeeze(0)
    ours_TK = selection.rank_experts(scores_TE + bias_E, 3, k=3)
    assert torch.equal(ours_TK, indices_TK)
    assert not torch.equal(ours_TK, scores_TE.topk(3).indices)  # the bias matters here
    probs_TE, _ = routed(logits_TE, ours_TK, "softmax", pre_softmax=False, scale=None)
    assert torch.allclose(probs_TE.gather(1, ours_TK), weights_TK, rtol=1e-5, atol=0)


# Gradients.


def naive_loss(row: list[float], chosen: list[int], score_function: str, divide: bool, factors: list[float]) -> float:
    """sum_j factors[j] * weight of chosen[j], times 2.5, in double precision."""
    scores = [SCORE[score_function](row[e], row) for e in chosen]
    total = sum(scores) if divide else 1.0
    return sum(2.5 * f * s / total for f, s in zip(factors, scores, strict=True))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score_function", selection.SCORE_FUNCTIONS)
def test_gradient_of_the_weights_against_finite_differences(score_function, normalize):
    row, chosen, factors, step = [0.3, -1.2, 2.0, 0.7, -0.5], [2, 4, 0], [1.0, -2.0, 0.5], 1e-6
    logits_TE = torch.tensor([row], requires_grad=True)
    weights_TK = selection.combine_weights(
        logits_TE,
        selection.expert_scores(logits_TE, score_function),
        torch.tensor([chosen]),
        score_function=score_function,
        normalize=normalize,
        scale=2.5,
    )
    (weights_TK * torch.tensor([factors])).sum().backward()
    for expert in range(5):
        up, down = list(row), list(row)
        up[expert] += step
        down[expert] -= step
        difference = naive_loss(up, chosen, score_function, normalize, factors) - naive_loss(
            down, chosen, score_function, normalize, factors
        )
        assert logits_TE.grad[0, expert].item() == pytest.approx(difference / (2 * step), rel=1e-4, abs=1e-6)
