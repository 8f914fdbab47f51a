"""Selections in which the number of experts differs from token to token: pure tensor functions, no state.

Shape suffixes: T tokens, E experts, N null experts, X = E + N columns, the null experts last.
Sources: top-p, Huang et al. 2024, arXiv 2403.07652; null experts, AdaMoE, arXiv 2406.13233.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def top_p_map(probs_TE: Tensor, p: float, most: int | None = None) -> Tensor:
    """The smallest set of best experts whose probabilities sum to at least p, bool [T, E].

    A rank belongs to the set while the ranks before it sum to less than p, so every token has at least one expert.

    probs_TE: softmax over all E experts. most: no token gets more experts than that, whatever their sum.

    Sums are of whole multiples of 2^-40: a cumulative sum of floats has no deterministic kernel on CUDA, and its
    rounding differs between devices; p is rounded to the dtype of `probs_TE` first, as a comparison with it would.
    """
    ordered_TE, ranked_TE = probs_TE.sort(dim=1, descending=True)
    before_TE = pad(_fixed_point(ordered_TE).cumsum(dim=1)[:, :-1], (1, 0))
    kept_TE = before_TE < _fixed_point(probs_TE.new_full((), p))  # filled on the device: no copy, no sync
    if most is not None:
        kept_TE[:, most:] = False
    return torch.zeros_like(kept_TE).scatter_(1, ranked_TE, kept_TE)


def _fixed_point(shares: Tensor) -> Tensor:
    """Numbers from 0 to 1 as int64 multiples of 2^-40; a sum of 2^23 of them still fits."""
    return (shares.double() * 2**40).long()


def selected_weights(probs_TE: Tensor, map_TE: Tensor, *, normalize: bool, scale: float | None) -> Tensor:
    """Probabilities of the selected experts, zero elsewhere, in the dtype of `probs_TE`, [T, E].

    normalize: divided by their sum; a token without experts keeps zeros. scale: a factor on all of them.
    """
    weights_TE = probs_TE * map_TE
    if normalize:
        sum_T1 = weights_TE.sum(dim=1, keepdim=True)
        weights_TE = weights_TE / torch.where(sum_T1 > 0, sum_T1, 1.0)
    return weights_TE * scale if scale else weights_TE


def share_null_counts(counts_X: Tensor, num_experts: int) -> Tensor:
    """Assignments per column with those of the null experts shared evenly among them, fp32 [X].

    AdaMoE's rule for the load-balancing loss (arXiv 2406.13233): null experts are all alike, so only their
    use as a whole is balanced against the true experts, not that of one against another.
    """
    counts_X = counts_X.float()
    null_N = counts_X[num_experts:]
    return torch.cat([counts_X[:num_experts], null_N.mean().expand_as(null_N)])
