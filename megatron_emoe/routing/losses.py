"""Router losses: pure functions of tensors. Shape suffixes: T tokens, E experts."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def token_entropy(*, logits_TE: Tensor, probs_TE: Tensor) -> Tensor:
    """Entropy H(q) of each token's softmax in nats, fp32 [T]; `probs_TE` is q = softmax(logits) in fp32.

    H(q) = logsumexp(x) - sum_i q_i x_i: no logarithm of a small q is taken.
    """
    x_TE = logits_TE.float()
    return torch.logsumexp(x_TE, dim=-1) - (probs_TE * x_TE).sum(dim=-1)


def mean_over_tokens(values_T: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean of one number per token, fp32 scalar. valid_T: bool, False for padding, which is left out of the mean."""
    if valid_T is None:
        return values_T.mean()
    return (values_T * valid_T).sum() / valid_T.sum().clamp(min=1)


def router_entropy(*, logits_TE: Tensor, probs_TE: Tensor, valid_T: Tensor | None = None) -> Tensor:
    """Mean entropy H(q) of the router's softmax in nats, fp32 scalar; arguments as above."""
    return mean_over_tokens(token_entropy(logits_TE=logits_TE, probs_TE=probs_TE), valid_T)


def hierarchical_router_loss(*, entropy: Tensor, num_experts: int) -> Tensor:
    """L_HR = -D_KL(q || U) = H(q) - log E, scalar <= 0 (EMoE, arXiv 2509.21892, hierarchical router loss).

    Minimising it sharpens the order of the experts within a token. `entropy` is the mean H(q) over tokens.
    """
    return entropy - math.log(num_experts)
