"""What the load-balancing losses count, against the core's own router at the same k. One rank, real core."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.tiny import begin, build_layer, hidden_states, layer_config, start

LOSSES = {
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.1, 0.2, 0.05],
    "emoe_hr_loss_coeff": 0.0,
}
SIGMOID = {
    "moe_router_score_function": "sigmoid",
    "moe_router_pre_softmax": False,
    "moe_router_enable_expert_bias": True,
}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
MODELS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid, bias": SIGMOID,
    "groups": GROUPS,
    "sigmoid, bias, groups": SIGMOID | GROUPS,
    "softmax, bias": {"moe_router_enable_expert_bias": True},
}
AT = {"emoe_selection": "prefix", "emoe_k_schedule": "uniform"}
WEIGHTED = {"emoe_selection": "prefix", "emoe_k_schedule": "weighted"}
POOL = {"emoe_selection": "coactivation", "emoe_pool_k": 4}
DRAWS: dict[str, tuple[dict[str, Any], int]] = {
    "recipe at k": ({"emoe_tail_scale": ["0.25"], "emoe_k_max": 3, "emoe_k_weights": [1.0, 1e-9]} | WEIGHTED, 2),
    "recipe above k": ({"emoe_tail_scale": ["0.25"], "emoe_k_max": 4} | AT, 4),
    "prefix above k": ({"emoe_k_max": 3} | AT, 3),
    "other weights": ({"emoe_combine": "raw"}, 2),
    "pool of k": (POOL | {"emoe_pool_draw": "step", "emoe_pool_prob": 1e-9}, 2),
    "pool not grown yet": (POOL | {"emoe_pool_anneal_iters": 100}, 2),
    "balance on top-k": (POOL | {"emoe_balance_on": "topk"}, 2),
}
"""Settings under which plain top-k is selected, or counted, and at which k."""

Seen = tuple[dict[str, float], Tensor, Tensor, Tensor]


def seen_by(settings: dict[str, Any], *, stock: bool = False) -> Seen:
    """The losses' values, their gradient, the map and the logits [T, E] of one training pass."""
    from megatron_emoe.routing.metrics import get_elastic_tracker

    if stock and settings.get("moe_router_score_function") != "sigmoid":  # a bias with softmax is refused there
        settings = settings | {"moe_router_enable_expert_bias": False}
    router = build_layer(layer_config(stock=stock, **settings)).router
    if router.expert_bias is not None:
        router.expert_bias.copy_(torch.linspace(0.6, -0.6, 8))
    tracker = get_elastic_tracker()
    tracker.clear()
    begin()
    x = hidden_states()
    probs, routed = router(x)
    (probs * 0).sum().backward()
    values = {name: entry.values.sum().item() for name, entry in tracker.metrics.items()}
    return values, router.weight.grad, routed, x.detach().flatten(0, 1) @ router.weight.detach().t()


def all_of_them() -> dict[tuple[str, str], Seen]:
    start()
    seen = {}
    for model, settings in MODELS.items():
        for k in (2, 3, 4):
            plain = {name: value for name, value in (LOSSES | settings).items() if not name.startswith("emoe")}
            seen[model, f"stock at {k}"] = seen_by(plain | {"moe_router_topk": k}, stock=True)
        for draw, (elastic, k) in DRAWS.items():
            k_min = {"emoe_k_min": k} if "emoe_k_schedule" in elastic else {}
            seen[model, draw] = seen_by(LOSSES | settings | elastic | k_min)
        seen[model, "drawn"] = seen_by(LOSSES | settings | POOL | {"emoe_pool_fixed": True})
    return seen


@pytest.fixture(scope="module")
def seen() -> dict[tuple[str, str], Seen]:
    return run_ranks(all_of_them, 1)[0]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("model", MODELS)
def test_plain_top_k_counts_as_in_the_core_at_that_k(seen, model, draw):
    values, gradient, _, _ = seen[model, draw]
    stock, stock_gradient, _, _ = seen[model, f"stock at {DRAWS[draw][1]}"]
    assert len(stock) == 3 and values == pytest.approx(stock, rel=1e-6)
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(gradient, stock_gradient, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("model", MODELS)
def test_drawn_ranks_are_counted_in_the_order_of_the_scores(seen, model):
    """The same ranks of each token, among all experts by score alone: what ran, where nothing else ranks experts."""
    values, _, routed, logits_TE = seen[model, "drawn"]
    scores = logits_TE.sigmoid() if "sigmoid" in model else logits_TE.softmax(-1)
    ranked_by = scores + torch.linspace(0.6, -0.6, 8) if "bias" in model else scores
    counted, q = torch.zeros(16, 8), scores / scores.sum(-1, keepdim=True)
    for token in range(16):
        by_key = ranked_by[token].clone()
        if "groups" in model:  # of 2 experts; one of each counts at k = 2
            worst = ranked_by[token].view(4, 2).amax(1).argsort()[:2]
            by_key.view(4, 2)[worst] = -torch.inf
        ranks = [by_key.argsort(descending=True).tolist().index(expert) for expert in routed[token].nonzero()]
        counted[token, scores[token].argsort(descending=True)[ranks]] = 1
    assert torch.equal(counted.bool(), routed) == (model == "softmax")
    balance = 8 * (counted.mean(0) / 2 * q.mean(0)).sum()
    assert values["load_balancing_loss"] == pytest.approx(balance.item(), rel=1e-5)
