"""The router's losses and counts under elastic selection, against their formulas. One rank, real core."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.tiny import COACTIVATION, PREFIX, begin, build_layer, hidden_states, layer_config, start


def build_router(settings: dict[str, Any]) -> Any:
    return build_layer(layer_config(**settings)).router


def loss_gradients(
    changes: dict[str, Any], passes: int, padded: list[int]
) -> tuple[list[Tensor], Tensor, dict[str, Tensor], list[Tensor], Tensor | None]:
    """Maps of each pass, hidden states, tracked values, router gradient after each pass, and the weight.

    Everything but the losses is kept out of the backward pass, so the gradient is theirs alone.
    padded: how many tokens at the end of each of the two sequences are padding.
    """
    from megatron_emoe.routing.metrics import get_elastic_tracker

    start()
    tracker = get_elastic_tracker()
    router, x = build_router(changes), hidden_states()
    mask = torch.zeros(8, 2, dtype=torch.bool)
    for column, count in enumerate(padded):
        mask[8 - count :, column] = True
    maps, gradients, values = [], [], {}
    for iteration in range(passes):
        begin(iteration)
        router.weight.grad = None
        probs, routed = router(x, mask if padded else None)
        (probs * 0).sum().backward()
        maps.append(routed)
        gradients.append(router.weight.grad.clone())
        values = {name: entry.values.clone() for name, entry in tracker.metrics.items()}
    return maps, x.detach(), values, gradients, router.weight.detach()


def gradient_of(loss: Any, weight: Tensor, x: Tensor) -> Tensor:
    weight = weight.double().requires_grad_()
    logits_SBE = x.double() @ weight.t()
    return torch.autograd.grad(loss(logits_SBE), weight)[0]


def balance(q_TE: Tensor, counted_TE: Tensor, k: int) -> Tensor:
    """E * sum_i f_i P_i: f the share of the T x k assignments that expert i got, P its mean probability."""
    tokens, experts = q_TE.shape
    return experts * sum(counted_TE[:, i].sum() / (tokens * k) * q_TE[:, i].mean() for i in range(experts))


@pytest.mark.slow
@pytest.mark.parametrize("function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [[], [3, 1]])
def test_aux_loss_under_coactivation_counts_the_dispatched_experts(function, padded):
    settings = {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "moe_router_score_function": function,
        "moe_router_pre_softmax": function == "softmax",
        "emoe_hr_loss_coeff": 0.0,
    }
    (routed, *_), x, values, (gradient, *_), weight = run_ranks(loss_gradients, 1, COACTIVATION | settings, 1, padded)[
        0
    ]
    valid = [s < 8 - (padded[b] if padded else 0) for s in range(8) for b in range(2)]

    def loss(logits: Tensor) -> Tensor:
        scores = logits.flatten(0, 1).softmax(-1) if function == "softmax" else logits.flatten(0, 1).sigmoid()
        q = scores / scores.sum(-1, keepdim=True)
        return 0.1 * balance(q[valid], routed[valid].double(), 2)

    assert values["load_balancing_loss"].item() == pytest.approx(loss(x.double() @ weight.double().t()).item() / 0.1)
    torch.testing.assert_close(gradient.double(), gradient_of(loss, weight, x), rtol=1e-4, atol=1e-7)


def test_balance_on_topk_counts_what_plain_top_k_would_use():
    settings = COACTIVATION | {
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": 0.1,
        "emoe_hr_loss_coeff": 0.0,
    }
    results = [
        run_ranks(loss_gradients, 1, settings | {"emoe_balance_on": choice}, 1, [])[0]
        for choice in ("dispatched", "topk")
    ]
    (dispatched, x, *_), weight = results[0], results[0][-1]
    assert torch.equal(dispatched[0], results[1][0][0])  # what is dispatched is the same; what is counted is not
    q = (x.double() @ weight.double().t()).flatten(0, 1).softmax(-1)
    plain = torch.zeros_like(q).scatter(1, q.topk(2, dim=1).indices, 1.0)
    values = [result[2]["load_balancing_loss"].item() for result in results]
    assert values == pytest.approx([balance(q, dispatched[0].double(), 2).item(), balance(q, plain, 2).item()])
    assert abs(values[0] - values[1]) > 0.05


def test_sequence_and_global_balance_losses_under_coactivation():
    settings = COACTIVATION | {
        "moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"],
        "moe_aux_loss_coeff": [0.1, 0.2],
        "emoe_hr_loss_coeff": 0.0,
    }
    maps, x, values, gradients, weight = run_ranks(loss_gradients, 1, settings, 2, [])[0]
    mean_map = (maps[0].double() + maps[1].double()) / 2  # global: counts averaged over the micro-batches so far

    def sequence_loss(logits: Tensor) -> Tensor:
        q, last = logits.softmax(-1), maps[1].view(8, 2, 8).double()
        return sum(balance(q[:, b], last[:, b], 2) for b in range(2)) / 2

    def loss(logits: Tensor) -> Tensor:
        return 0.1 * sequence_loss(logits) + 0.2 * balance(logits.flatten(0, 1).softmax(-1), mean_map, 2)

    torch.testing.assert_close(gradients[1].double(), gradient_of(loss, weight, x), rtol=1e-4, atol=1e-7)
    assert set(values) >= {"seq_load_balancing_loss", "global_load_balancing_loss"}


@pytest.mark.slow
@pytest.mark.parametrize("selection", ["coactivation", "topk", "prefix"])
@pytest.mark.parametrize("padded", [[], [3, 1]])
def test_z_loss_and_hierarchical_loss_reach_the_router_with_their_coefficients(selection, padded):
    elastic = {"coactivation": COACTIVATION, "topk": {}, "prefix": PREFIX}[selection]
    settings = elastic | {"moe_z_loss_coeff": 0.03, "emoe_hr_loss_coeff": 0.5}
    _, x, values, (gradient, *_), weight = run_ranks(loss_gradients, 1, settings, 1, padded)[0]
    valid = [s < 8 - (padded[b] if padded else 0) for s in range(8) for b in range(2)]

    def loss(logits: Tensor) -> Tensor:
        x_TE = logits.flatten(0, 1)[valid]
        q = x_TE.softmax(-1)
        hierarchical = -(q * (q * 8).log()).sum(-1).mean()  # -KL(q || uniform)
        return 0.03 * x_TE.logsumexp(-1).square().mean() + 0.5 * hierarchical

    torch.testing.assert_close(gradient.double(), gradient_of(loss, weight, x), rtol=1e-4, atol=1e-7)
    logits_TE = (x.double() @ weight.double().t()).flatten(0, 1)[valid]
    assert values["z_loss"].item() == pytest.approx(logits_TE.logsumexp(-1).square().mean().item())


def test_the_hierarchical_loss_is_per_token_where_the_core_divides_by_tokens():
    settings = COACTIVATION | {"emoe_hr_loss_coeff": 0.5}
    once = run_ranks(loss_gradients, 1, settings, 1, [])[0][3][0]
    per_token = run_ranks(loss_gradients, 1, settings | {"calculate_per_token_loss": True}, 1, [])[0][3][0]
    assert once.abs().max() > 1e-4
    torch.testing.assert_close(per_token, once * 16)  # 8 x 2 tokens


def count_for_bias() -> list[tuple[Tensor, Tensor]]:
    """Tokens counted for the bias update and those dispatched so far, after training, evaluation, and no gradient."""
    start()
    settings = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}
    router = build_router(settings | COACTIVATION | {"moe_router_enable_expert_bias": True})
    x, seen, dispatched = hidden_states(), [], torch.zeros(8)
    mask = torch.zeros(8, 2, dtype=torch.bool)
    mask[5:, 0] = True
    for iteration, padding in enumerate((None, mask)):
        begin(iteration)
        routed = router(x, padding)[1]
        dispatched = dispatched + (routed if padding is None else routed & ~padding.reshape(-1, 1)).sum(0)
        seen.append((router.local_tokens_per_expert.clone(), dispatched))
    with torch.no_grad():  # the first pass of a recomputed layer, and evaluation
        router(x)
        router.eval()(x)
    return [*seen, (router.local_tokens_per_expert.clone(), dispatched)]


def test_the_expert_bias_counts_dispatched_tokens_once_and_in_training_only():
    seen = run_ranks(count_for_bias, 1)[0]
    assert seen[0][1].sum() == 32 and seen[1][1].sum() == 32 + 2 * 13
    for counted, dispatched in seen:
        assert torch.equal(counted, dispatched)


def capacity(pad: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    start()
    config = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": pad}
    x = hidden_states()
    drawn = build_router(COACTIVATION)
    begin()
    free = [tensor.detach() for tensor in drawn(x)]
    limited = build_router(COACTIVATION | config)
    begin()
    return *free, *(tensor.detach() for tensor in limited(x))


@pytest.mark.parametrize("pad", [False, True])
def test_capacity_keeps_the_most_probable_of_the_drawn_tokens(pad):
    free_probs, free_map, probs, kept = run_ranks(capacity, 1, pad)[0]
    limit = 16 * 2 // 8  # tokens x k x factor / experts
    assert free_map.sum(0).max() > limit  # otherwise nothing is dropped and the test shows nothing
    for expert in range(8):
        mine = sorted(free_map[:, expert].nonzero().flatten().tolist(), key=lambda t: -free_probs[t, expert])
        wanted = set(mine[:limit])
        assert set(probs[:, expert].nonzero().flatten().tolist()) == wanted
        assert kept[:, expert].sum() == (limit if pad else len(wanted))
        for token in wanted:
            assert probs[token, expert] == free_probs[token, expert]
