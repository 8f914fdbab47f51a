"""The router's one function against naive loops, and against vLLM's own router at its own k."""

import pytest
import served  # noqa: F401  vLLM in one process
import torch

from emoe_vllm.levels import LayerTable
from emoe_vllm.routing import Rule, route
from emoe_vllm.surplus import without_surplus

TOKENS, EXPERTS, MOST = 17, 8, 6
GENERATOR = torch.Generator().manual_seed(5)
LOGITS = torch.randn(TOKENS, EXPERTS, generator=GENERATOR)
BIAS = 0.3 * torch.randn(EXPERTS, generator=GENERATOR)
LEVELS = torch.arange(TOKENS) % (MOST + 1)  # 0 is padding
RULES = [
    Rule(score, renormalise, groups, kept, scale, bias)
    for score in ("softmax", "sigmoid")
    for renormalise in (True, False)
    for groups, kept in ((1, 1), (4, 3))
    for scale, bias in ((1.0, None), (2.5, BIAS))
]


def table():
    factors = torch.rand(MOST + 1, MOST, generator=torch.Generator().manual_seed(6)) + 0.5
    return LayerTable(factors.tril(-1), torch.arange(MOST + 1, dtype=torch.int32), list(range(MOST + 1)))


def naive(logits, k, factors, rule):
    """One token, step by step: {expert: weight}."""
    scores = logits.softmax(0) if rule.score == "softmax" else logits.sigmoid()
    choice = scores.clone() if rule.bias_E is None else scores + rule.bias_E
    size = EXPERTS // rule.groups
    groups = [choice[group * size : (group + 1) * size].sort(descending=True).values for group in range(rule.groups)]
    values = [float(group[0]) if rule.bias_E is None else float(group[:2].sum()) for group in groups]
    kept = sorted(range(rule.groups), key=lambda group: -values[group])[: rule.kept_groups]
    possible = [expert for expert in range(EXPERTS) if expert // size in kept]
    chosen = sorted(possible, key=lambda expert: -float(choice[expert]))[:k]
    weights = [float(scores[expert]) * float(factors[rank]) for rank, expert in enumerate(chosen)]
    whole = sum(weights) if rule.renormalise else 1.0
    return {expert: weight / whole * rule.scale for expert, weight in zip(chosen, weights, strict=True)}


@pytest.mark.parametrize("rule", RULES)
def test_every_mode_is_the_naive_loop(rule):
    found = table()
    weights_TK, experts_TK = route(LOGITS, found.factors_VK[LEVELS], rule)
    for token, k in enumerate(LEVELS.tolist()):
        expected = naive(LOGITS[token], k, found.factors_VK[k], rule)
        assert experts_TK[token].unique().numel() == MOST  # all different
        assert experts_TK[token, :k].tolist() == list(expected)
        torch.testing.assert_close(weights_TK[token, :k], torch.tensor(list(expected.values())), rtol=1e-5, atol=1e-6)
        assert not weights_TK[token, k:].any()


@pytest.mark.parametrize("rule", RULES[:4])
def test_fewer_ranks_give_the_same_weights(rule):
    levels = LEVELS.clamp(max=3)
    factors = table().factors_VK[levels]
    whole, part = route(LOGITS, factors, rule), route(LOGITS, factors[:, :3], rule)
    torch.testing.assert_close(whole[0][:, :3], part[0])
    assert torch.equal(whole[1][:, :3], part[1])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_scores_are_fp32_whatever_the_logits_are(kind):
    weights, _ = route(LOGITS.to(kind), table().factors_VK[LEVELS], Rule(bias_E=BIAS.to(kind)))
    assert weights.dtype == torch.float32 and torch.isfinite(weights).all()


def test_vllms_own_router_at_its_own_k():
    from vllm.model_executor.layers.fused_moe.router.cpu_router import _grouped_topk, _softmax_topk

    for rule, (weights, experts) in (
        (Rule(), _softmax_topk(LOGITS, 4, True)),
        (Rule(renormalise=False), _softmax_topk(LOGITS, 4, False)),
        (Rule("sigmoid", True, 4, 3, 2.5, BIAS), _grouped_topk(LOGITS, 4, True, 4, 3, "sigmoid", 2.5, BIAS)),
    ):
        mine, chosen = route(LOGITS, torch.ones(1, 4), rule)
        dense = torch.zeros(TOKENS, EXPERTS)
        theirs = dense.scatter(1, experts.long(), weights)
        torch.testing.assert_close(dense.scatter(1, chosen, mine), theirs, rtol=1e-5, atol=1e-6)


def test_surplus_experts_are_elsewhere():
    experts = torch.tensor([[3, 1, 2], [0, 5, 7], [4, 6, 1]])
    found = without_surplus(experts, torch.tensor([1, 3, 0], dtype=torch.int32), EXPERTS)
    assert found.tolist() == [[3, 8, 8], [0, 5, 7], [8, 8, 8]]


def test_a_layer_with_an_expert_elsewhere_does_the_same_on_the_kernels_terms():
    """What vLLM's Triton experts do with an expert that is elsewhere, in torch: leave its rows out of the sum."""
    outputs = torch.randn(TOKENS, EXPERTS, 3, generator=GENERATOR)
    weights, experts = route(LOGITS, table().factors_VK[LEVELS], Rule())
    dropped = without_surplus(experts, table().k_V[LEVELS], EXPERTS)
    held = torch.cat([torch.arange(EXPERTS), torch.tensor([-1])])
    rows = torch.full((TOKENS, MOST, 3), torch.nan)  # what the kernel does not write
    here = held[dropped] >= 0
    full = (outputs.gather(1, experts.unsqueeze(-1).expand(-1, -1, 3)) * weights.unsqueeze(-1)).nan_to_num()
    rows[here] = full[here]
    torch.testing.assert_close(torch.where(here.unsqueeze(-1), rows, 0).sum(1), full.sum(1))
