"""The router's losses against hand arithmetic and finite differences in double precision."""

import math

import pytest
import torch

from megatron_emoe.routing.losses import hierarchical_router_loss, router_entropy

LN2, LN3 = math.log(2), math.log(3)


def loss_of(logits_TE: torch.Tensor, valid_T: torch.Tensor | None = None) -> torch.Tensor:
    """L_HR of logits, as the router calls the two functions."""
    probs_TE = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    entropy = router_entropy(logits_TE=logits_TE, probs_TE=probs_TE, valid_T=valid_T)
    return hierarchical_router_loss(entropy=entropy, num_experts=logits_TE.shape[-1])


def naive_loss(rows: list[list[float]]) -> float:
    """Mean over tokens of -sum_i q_i log(q_i E): the definition -KL(q || U), one expert at a time."""
    total = 0.0
    for row in rows:
        exps = [math.exp(x) for x in row]
        q = [e / sum(exps) for e in exps]
        total -= sum(p * math.log(p * len(row)) for p in q)
    return total / len(rows)


def test_value_by_hand():
    # q = (1/2, 1/4, 1/4): H = 1/2 ln 2 + 2 * 1/4 ln 4 = 3/2 ln 2. L = 3/2 ln 2 - ln 3 = -0.0589.
    logits_TE = torch.tensor([[0.5, 0.25, 0.25]]).log() + 7.0  # a shift of all logits changes nothing
    assert loss_of(logits_TE).item() == pytest.approx(1.5 * LN2 - LN3, abs=1e-6)
    assert loss_of(logits_TE).item() == pytest.approx(-0.0589, abs=1e-4)


def test_mean_over_tokens_by_hand():
    # A uniform token has H = ln 4; q = (1/2, 1/2, 0, 0) has H = ln 2. Mean 3/2 ln 2, minus ln 4 = -1/2 ln 2.
    logits_TE = torch.tensor([[3.0, 3.0, 3.0, 3.0], [5.0, 5.0, -100.0, -100.0]])
    probs_TE = torch.softmax(logits_TE, dim=-1)
    assert router_entropy(logits_TE=logits_TE, probs_TE=probs_TE).item() == pytest.approx(1.5 * LN2)
    assert loss_of(logits_TE).item() == pytest.approx(-0.5 * LN2)


@pytest.mark.parametrize("experts", [2, 8, 64])
def test_uniform_is_zero_and_one_hot_is_minus_log_e(experts):
    assert loss_of(torch.full((3, experts), 0.7)).item() == pytest.approx(0.0, abs=1e-6)
    one_hot = torch.zeros(3, experts)
    one_hot[:, 1] = 60.0
    assert loss_of(one_hot).item() == pytest.approx(-math.log(experts), abs=1e-6)


def test_value_against_the_definition():
    logits_TE = torch.randn(20, 16, generator=torch.Generator().manual_seed(3)) * 3
    assert loss_of(logits_TE).item() == pytest.approx(naive_loss(logits_TE.double().tolist()), abs=1e-6)


def test_gradient_by_hand():
    # dH/dx_j = -q_j (ln q_j + H). q = (1/2, 1/4, 1/4), H = 3/2 ln 2:
    # j=1: -1/2 (-1 + 3/2) ln 2 = -1/4 ln 2;  j=2, 3: -1/4 (-2 + 3/2) ln 2 = +1/8 ln 2. They sum to 0.
    # The loss falls along the gradient's opposite: the first expert's logit rises, the order gets sharper.
    logits_TE = torch.tensor([[0.5, 0.25, 0.25]]).log().requires_grad_()
    loss_of(logits_TE).backward()
    assert logits_TE.grad[0].tolist() == pytest.approx([-LN2 / 4, LN2 / 8, LN2 / 8], abs=1e-6)


def test_gradient_with_respect_to_a_small_probability():
    # d(-KL)/dq_i = -log(q_i E) - 1, EMoE's reason for this direction. q_2 = e^-20, E = 4: slope 20 - ln 4 - 1 = 17.61.
    # The large expert, q_1 = 1 - 3 e^-20, has -ln 4 - 1: moving mass from it to a small one changes L by 20 per unit.
    small = math.exp(-20)
    q = torch.tensor([1 - 3 * small, small, small, small], dtype=torch.float64)

    def loss_after_moving(mass: float) -> float:
        moved = q + torch.tensor([-mass, mass, 0, 0], dtype=torch.float64)
        return -(moved * (moved * 4).log()).sum().item()

    slope = (loss_after_moving(small * 1e-3) - loss_after_moving(-small * 1e-3)) / (2 * small * 1e-3)
    assert slope == pytest.approx(20.0, rel=1e-3)
    # The same slope from our gradient: dL/dx_2 = q_2 * (slope_2 - sum_j q_j slope_j) and the sum is slope_1 up to 1e-7.
    logits_TE = q.log().float().unsqueeze(0).requires_grad_()
    loss_of(logits_TE).backward()
    assert logits_TE.grad[0, 1].item() / small == pytest.approx(20.0, rel=1e-3)


def test_gradient_against_finite_differences():
    logits_TE = torch.randn(4, 6, generator=torch.Generator().manual_seed(4)).requires_grad_()
    loss_of(logits_TE).backward()
    rows, step = logits_TE.detach().double().tolist(), 1e-6
    for token in range(4):
        for expert in range(6):
            up, down = [list(row) for row in rows], [list(row) for row in rows]
            up[token][expert] += step
            down[token][expert] -= step
            difference = (naive_loss(up) - naive_loss(down)) / (2 * step)
            assert logits_TE.grad[token, expert].item() == pytest.approx(difference, abs=1e-6)


def test_padding_is_left_out():
    logits_TE = torch.randn(5, 8, generator=torch.Generator().manual_seed(5)).requires_grad_()
    valid_T = torch.tensor([True, False, True, True, False])
    loss = loss_of(logits_TE, valid_T)
    loss.backward()
    kept = logits_TE.detach()[valid_T]
    assert loss.item() == pytest.approx(naive_loss(kept.double().tolist()), abs=1e-6)
    alone = kept.clone().requires_grad_()
    loss_of(alone).backward()
    assert torch.allclose(logits_TE.grad[valid_T], alone.grad, atol=1e-7)
    assert logits_TE.grad[valid_T].abs().min() > 0
    assert (logits_TE.grad[~valid_T] == 0).all()


def test_a_batch_of_padding_alone_has_no_gradient():
    logits_TE = torch.randn(3, 8, generator=torch.Generator().manual_seed(6)).requires_grad_()
    loss = loss_of(logits_TE, torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss.isfinite()
    assert (logits_TE.grad == 0).all()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_large_logits_are_finite(size):
    logits_TE = torch.tensor([[size, -size, 0.0, 0.0], [-size, -size, size, size]]).requires_grad_()
    loss = loss_of(logits_TE)
    loss.backward()
    # One-hot: H = 0; two equal: H = ln 2. Mean 1/2 ln 2, minus ln 4. (At 1e30 fp32 has no digit left for the ln 2.)
    tolerance = {1e2: 1e-5, 1e4: 1e-3, 1e30: 1.0}[size]
    assert loss.item() == pytest.approx(0.5 * LN2 - 2 * LN2, abs=tolerance)
    assert logits_TE.grad.isfinite().all()


def test_half_precision_logits_are_computed_in_fp32():
    logits_TE = torch.tensor([[2.0, 1.0, 0.5, -1.0]], dtype=torch.bfloat16)
    assert loss_of(logits_TE).dtype == torch.float32
    assert loss_of(logits_TE).item() == pytest.approx(naive_loss(logits_TE.double().tolist()), abs=1e-6)
