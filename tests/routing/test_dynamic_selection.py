"""Selections with a count of their own for every token, against naive loops over tokens and hand arithmetic."""

import pytest
import torch
from torch import Tensor

from megatron_emoe.routing.dynamic_selection import selected_weights, share_null_counts, top_p_map

BY_HAND = torch.tensor([[0.5, 0.125, 0.25, 0.125], [0.0625, 0.0625, 0.125, 0.75], [0.25, 0.25, 0.25, 0.25]])


def random_probs(tokens: int = 200, experts: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sharpness = torch.linspace(0, 5, tokens).unsqueeze(1)  # from uniform to nearly one-hot
    return torch.softmax(torch.randn(tokens, experts, generator=generator) * sharpness, dim=1)


def naive_top_p(row: list[float], p: float, most: int | None) -> set[int]:
    chosen, total = set(), 0.0
    for expert in sorted(range(len(row)), key=lambda e: -row[e]):
        if total >= p or len(chosen) == most:
            break
        chosen.add(expert)
        total += row[expert]
    return chosen


def experts_of(map_TE: Tensor) -> list[set[int]]:
    return [set(row.nonzero().flatten().tolist()) for row in map_TE]


def test_top_p_by_hand():
    # 0.75 is reached exactly by .5 + .25 in the first row, at once in the second, by three equal ones in the third.
    first, second, third = experts_of(top_p_map(BY_HAND, 0.75))
    assert (first, second, len(third)) == ({0, 2}, {3}, 3)
    first, second, third = experts_of(top_p_map(BY_HAND, 0.76))
    assert (first & {0, 2}, len(first), second, len(third)) == ({0, 2}, 3, {3, 2}, 4)


@pytest.mark.parametrize("most", [None, 1, 5])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.4, 0.75, 0.95, 1.0])
def test_top_p_is_the_naive_smallest_set(p, most):
    probs = random_probs()
    wanted = [naive_top_p(row, p, most) for row in probs.double().tolist()]
    got = experts_of(top_p_map(probs, p, most))
    if p == 1.0:  # whether the last crumbs are needed to reach 1 is a matter of rounding
        assert all(len(row) <= (most or 16) for row in got)
        assert [row for row in got if len(row) == most] == got if most == 1 else max(map(len, got)) == (most or 16)
        return
    assert got == wanted
    counts = {len(row) for row in got}
    assert (len(counts) > 3) == (most is None and p >= 0.4) or most == 5


def test_every_token_has_an_expert_and_no_more_than_the_cap():
    probs = torch.full((3, 8), 1 / 8)
    assert top_p_map(probs, 1e-9).sum(1).tolist() == [1, 1, 1]
    assert top_p_map(probs, 1.0).sum(1).tolist() == [8, 8, 8]
    assert top_p_map(probs, 1.0, most=3).sum(1).tolist() == [3, 3, 3]


def test_weights_by_hand():
    routed = torch.tensor([[True, False, True, False], [False, False, False, True], [False] * 4])
    raw = selected_weights(BY_HAND, routed, normalize=False, scale=None)
    assert raw.tolist() == [[0.5, 0, 0.25, 0], [0, 0, 0, 0.75], [0] * 4]
    shares = selected_weights(BY_HAND, routed, normalize=True, scale=3.0)
    assert shares.flatten().tolist() == pytest.approx([2, 0, 1, 0, 0, 0, 0, 3, 0, 0, 0, 0])


def test_a_token_without_experts_gives_finite_gradients_and_none_of_its_own():
    probs = BY_HAND.clone().requires_grad_()
    routed = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4])
    weights = selected_weights(probs, routed, normalize=True, scale=None)
    (weights * torch.arange(1.0, 5.0)).sum().backward()
    assert probs.grad.isfinite().all() and probs.grad[1].abs().sum() == 0
    # d/dp0 of (1 p0 + 3 p2) / (p0 + p2) at (.5, .25) is (p2 - 3 p2) / .75^2 = -8/9; the mirror image is +16/9.
    assert probs.grad[0].tolist() == pytest.approx([-8 / 9, 0, 16 / 9, 0])


def test_null_experts_share_their_assignments():
    # 4 true experts keep 3 5 0 2; the nulls' 6 + 1 + 2 = 9 are 3 each.
    counts = torch.tensor([3, 5, 0, 2, 6, 1, 2])
    shared = share_null_counts(counts, 4)
    assert shared.tolist() == [3, 5, 0, 2, 3, 3, 3]
    assert shared.sum() == counts.sum()
