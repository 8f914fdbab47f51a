"""How far answers change with the budget: next-token agreement and divergence between k' and the k of training.

A curve of losses does not say it: two budgets of one loss may predict different tokens (MoE-PHDS, arXiv 2509.23012).
Shape suffixes: B sequences, S positions, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_emoe.training.distillation import teacher_divergence


def compared(logits_BSV: Tensor, at_k_BSV: Tensor, mask_BS: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """Over the positions that count: how many have the same likeliest token, the sum of KL(at k || at k') in nats, and
    how many there are; float64 [3].

    Both logits: [B, S, V / ranks], of which the ranks of `group` share the vocabulary; those at k are overwritten.
    """
    same_BS = _likeliest(logits_BSV, group) == _likeliest(at_k_BSV, group)
    divergence_BS = teacher_divergence(logits_BSV, at_k_BSV, group)
    sums = [(values_BS.double() * mask_BS).sum() for values_BS in (same_BS, divergence_BS)]
    return torch.stack([*sums, mask_BS.double().sum()])


def _likeliest(logits_BSV: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The token of the largest logit, int64 [B, S]; of equal ones the first rank's."""
    largest_BS, token_BS = logits_BSV.float().max(dim=-1)
    ranks = torch.distributed.get_world_size(group)
    if ranks == 1:
        return token_BS
    token_BS = token_BS + torch.distributed.get_rank(group) * logits_BSV.shape[-1]
    every_RBS = [[torch.empty_like(mine) for _ in range(ranks)] for mine in (largest_BS, token_BS)]
    for gathered, mine in zip(every_RBS, (largest_BS, token_BS), strict=True):
        torch.distributed.all_gather(gathered, mine, group=group)
    first_BS = torch.stack(every_RBS[0]).argmax(dim=0)
    return torch.stack(every_RBS[1]).gather(0, first_BS.unsqueeze(0)).squeeze(0)


def fields(sums: Tensor) -> dict[str, float]:
    """The cell's fields, from what `compared` gave for all tokens together; sync."""
    same, divergence, tokens = sums.tolist()
    return {"agreement": same / tokens, "kl_to_k": max(0.0, divergence / tokens)}
