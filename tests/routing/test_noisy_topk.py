"""Noisy top-k against naive loops, hand arithmetic, and drawing the noise again."""

import math

import pytest
import torch
from torch import Tensor

from megatron_emoe.routing.noisy_topk import load_probabilities, noise_deviation, normal_numbers, squared_variation

CPU = torch.device("cpu")


def inputs(tokens: int = 40, experts: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """Clean logits, noisy logits, deviations."""
    generator = torch.Generator().manual_seed(2)
    logits, raw, normal = (torch.randn(tokens, experts, generator=generator) for _ in range(3))
    deviation = noise_deviation(raw)
    return logits, logits + normal * deviation, deviation


def phi(x: float) -> float:
    return (1 + math.erf(x / math.sqrt(2))) / 2


def naive_load(logits: Tensor, noisy: Tensor, deviation: Tensor, k: int) -> list[list[float]]:
    """Appendix A literally: for each expert, the k-th highest noisy logit of the others."""
    rows = []
    for clean, noise, sigma in zip(logits.tolist(), noisy.tolist(), deviation.tolist(), strict=True):
        rows.append([])
        for i in range(len(clean)):
            kth = sorted((h for j, h in enumerate(noise) if j != i), reverse=True)[k - 1]
            rows[-1].append(phi((clean[i] - kth) / sigma[i]))
    return rows


@pytest.mark.parametrize("k", [1, 2, 5])
def test_load_is_the_paper_s_probability(k):
    got, wanted = load_probabilities(*inputs(), k), torch.tensor(naive_load(*inputs(), k))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
    assert got.min() >= 0 and got.max() <= 1


def test_load_by_hand():
    # k = 1, noisy (2, 1): expert 0 must beat 1, expert 1 must beat 2; clean (1, 3), deviations (1, 2).
    load = load_probabilities(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0]]), torch.tensor([[1.0, 2.0]]), 1)
    assert load.flatten().tolist() == pytest.approx([phi(0.0), phi(0.5)])
    assert load.flatten().tolist() == pytest.approx([0.5, 0.6915], abs=1e-4)


def test_load_is_how_often_an_expert_is_selected_when_its_noise_is_drawn_again():
    logits, noisy, deviation = inputs(tokens=3)
    load = load_probabilities(logits, noisy, deviation, 2)
    draws = 20_000
    again = normal_numbers(draws, 18, seed=5, device=CPU).view(draws, 3, 6)
    for expert in range(6):
        drawn = noisy.expand(draws, 3, 6).clone()
        drawn[:, :, expert] = logits[:, expert] + again[:, :, expert] * deviation[:, expert]
        share = (drawn.topk(2, dim=2).indices == expert).any(dim=2).float().mean(dim=0)
        assert share.tolist() == pytest.approx(load[:, expert].tolist(), abs=5 * math.sqrt(0.25 / draws))


def test_load_has_the_gradients_of_the_paper_s_formula():
    logits, noisy, _ = (tensor.double() for tensor in inputs(tokens=4))
    raw = torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()

    def loss(clean: Tensor, raw_TE: Tensor) -> Tensor:
        sigma = torch.nn.functional.softplus(raw_TE)
        others = torch.tensor(naive_thresholds(noisy, 2)).double()
        return torch.special.ndtr((clean - others) / sigma).sum(0).square().sum()

    clean, raw = logits.requires_grad_(), raw.requires_grad_()
    wanted = torch.autograd.grad(loss(clean, raw), (clean, raw))
    ours = load_probabilities(clean, noisy, noise_deviation(raw), 2).sum(0).square().sum()
    for got, want in zip(torch.autograd.grad(ours, (clean, raw)), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        assert got.abs().max() > 0.1


def naive_thresholds(noisy: Tensor, k: int) -> list[list[float]]:
    return [
        [sorted((h for j, h in enumerate(row) if j != i), reverse=True)[k - 1] for i in range(len(row))]
        for row in noisy.tolist()
    ]


def test_squared_variation_by_hand():
    # (1, 2, 3, 6): mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5, over 9.
    assert squared_variation(torch.tensor([1, 2, 3, 6])).item() == pytest.approx(3.5 / 9)
    assert squared_variation(torch.full((5,), 0.3)).item() == pytest.approx(0, abs=1e-9)
    assert squared_variation(torch.zeros(4)).item() == 0
    one_hot = torch.tensor([7.0, 0, 0, 0])  # all on one of E experts: E - 1
    assert squared_variation(one_hot).item() == pytest.approx(3)


def test_noise_is_standard_normal_and_follows_from_its_seed():
    first = normal_numbers(4000, 10, seed=1 << 63, device=CPU)
    torch.manual_seed(0)
    torch.testing.assert_close(first, normal_numbers(4000, 10, seed=1 << 63, device=CPU), rtol=0, atol=0)
    assert not torch.equal(first, normal_numbers(4000, 10, seed=1, device=CPU))
    assert first.mean().item() == pytest.approx(0, abs=5 / 200)
    assert first.std().item() == pytest.approx(1, abs=5 / 280)


def test_deviation_starts_at_ln_2_and_never_reaches_zero():
    assert noise_deviation(torch.zeros(1, 1)).item() == pytest.approx(math.log(2))
    assert 0 < noise_deviation(torch.tensor([[-1e4]])).item() < 1e-5
