"""Tokens of several k' as rows of equally many experts, against a naive sum over each token's experts."""

import pytest
import served  # noqa: F401  vLLM in one process
import torch

from emoe_vllm.levels import LayerTable
from emoe_vllm.on_cpu import Batch, ExpertsOnCPU, Rows
from emoe_vllm.routing import Rule, route

TOKENS, EXPERTS, HIDDEN, MOST = 11, 16, 3, 12
GENERATOR = torch.Generator().manual_seed(7)
STATES = torch.randn(TOKENS, HIDDEN, generator=GENERATOR)
LOGITS = torch.randn(TOKENS, EXPERTS, generator=GENERATOR)
SCALES = torch.randn(EXPERTS, HIDDEN, generator=GENERATOR)


class Layer:
    """Experts that multiply what they get, in place of vLLM's; it notes the shape that it was called with."""

    class quant_method:
        topk_indices_dtype = moe_kernel = None

    def forward_modular(self, x, topk_weights, topk_ids):
        assert topk_ids.dtype == torch.int32 and int(topk_ids.min()) >= 0
        assert topk_weights.is_contiguous() and topk_ids.is_contiguous()
        self.shape = tuple(topk_ids.shape)
        return x * (SCALES[topk_ids] * topk_weights.unsqueeze(-1)).sum(1)


def table():
    factors = torch.rand(MOST + 1, MOST, generator=torch.Generator().manual_seed(8)) + 0.5
    return LayerTable(factors.tril(-1), torch.arange(MOST + 1, dtype=torch.int32), list(range(MOST + 1)))


def batch(ks):
    levels = torch.tensor(ks, dtype=torch.int32)
    found = sorted(set(ks) - {0})
    groups = [(k, (levels == k).nonzero()[:, 0]) for k in found] if len(set(ks)) > 1 else [(found[0], None)]
    return Batch(levels, groups)


def naive(ks, rule):
    out = torch.zeros(TOKENS, HIDDEN)
    for token, k in enumerate(ks):
        weights, experts = route(LOGITS[token : token + 1], table().factors_VK[k : k + 1, :k], rule)
        for weight, expert in zip(weights[0], experts[0], strict=True):
            out[token] += weight * STATES[token] * SCALES[expert]
    return out


@pytest.mark.parametrize("rule", [Rule(), Rule(renormalise=False)])
@pytest.mark.parametrize(
    ("ks", "shape"),
    [
        ([4] * 11, (11, 4)),
        ([2, 4, 8, 12, 2, 4, 8, 12, 2, 4, 8], (33, 2)),
        ([1, 8, 3, 2, 1, 1, 1, 1, 1, 1, 1], (21, 1)),
        ([12, 6, 6, 6, 6, 6, 6, 6, 6, 6, 6], (12, 6)),
        ([3, 9, 9, 9, 9, 9, 9, 9, 9, 0, 0], (25, 3)),  # two tokens of padding
    ],
)
def test_every_token_has_the_sum_of_its_own_experts(ks, shape, rule):
    layer, known = Layer(), batch(ks)
    found = ExpertsOnCPU(layer, 0, rule, known, table())(STATES, LOGITS)
    torch.testing.assert_close(found, naive(ks, rule))
    assert layer.shape == shape and known.rows == {0: sum(ks)}  # no more work than the tokens' k' together


def test_layers_in_which_two_levels_are_alike_have_rows_of_their_own():
    known = batch([2, 4, 8, 2, 4, 8, 2, 4, 8, 2, 4])
    first, second = known.as_rows((2, 4, 8)), known.as_rows((4, 4, 4))
    assert (first.width, second.width) == (2, 4) and known.as_rows((2, 4, 8)) is first
    assert sorted(second.token_R.tolist()) == list(range(TOKENS))
    known.groups = [(2, torch.arange(5)), (4, torch.arange(5, TOKENS))]
    assert known.as_rows((2, 4)).token_R.tolist() == [*range(5), *(t for t in range(5, TOKENS) for _ in range(2))]


def test_rows_of_one_token():
    rows = Rows.of([torch.tensor([0]), torch.tensor([1])], [3, 6])
    assert rows.added(torch.ones(3, 2), 2).tolist() == [[1, 1], [2, 2]]
