"""Agreement between budgets: against torch's own on whole logits, with the vocabulary on one rank and on two."""

import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from tests.distributed import run_ranks
from tests.tiny import start

VOCABULARY = 12


def logits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of two budgets [2, 5, 12], and which positions count."""
    generator = torch.Generator().manual_seed(4)
    at_k = 3 * torch.randn(2, 5, VOCABULARY, generator=generator)
    other = at_k + 2 * torch.randn(2, 5, VOCABULARY, generator=generator)
    return other, at_k, torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 1, 0]])


def compare(ranks: int) -> dict[str, float]:
    from megatron.core import parallel_state

    from megatron_emoe.sweep.agreement import compared, fields

    start(tensor_model_parallel_size=ranks)
    group = parallel_state.get_tensor_model_parallel_group()
    share = VOCABULARY // ranks
    mine = slice(share * group.rank(), share * (group.rank() + 1))
    other, at_k, mask = logits()
    return fields(compared(other[..., mine].contiguous(), at_k[..., mine].contiguous(), mask, group))


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_torch_s(ranks):
    other, at_k, mask = logits()
    same = (other.argmax(-1) == at_k.argmax(-1))[mask.bool()]
    divergence = kl_div(log_softmax(other, -1), log_softmax(at_k, -1), reduction="none", log_target=True).sum(-1)
    assert 0 < same.sum() < 8
    for found in run_ranks(compare, ranks, ranks):
        assert found["agreement"] == pytest.approx(same.float().mean().item())
        assert found["kl_to_k"] == pytest.approx(divergence[mask.bool()].mean().item(), rel=1e-5)
