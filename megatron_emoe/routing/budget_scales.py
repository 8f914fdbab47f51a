"""Learned scales by budget: for every trained k and rank a factor on a selected expert's weight. Pure tensor functions.

Where weights are renormalised the scales say what the ranks weigh against each other at that k, else also how much all
of them weigh together. They multiply what the tail scale (tail_scale.py) gives, and start at 1: a model without
training is the one that it was. At the model's own k they stay 1, so that an engine without scales runs the model as it
is there. Own to this package; a router that knows its budget is also in MoE-PHDS (arXiv 2509.23012).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

RATE = 10.0
"""A scale's logarithm is this times its parameter, so it learns as many times as fast as the weights beside it."""


def empty_scales(ks: Sequence[int]) -> Tensor:
    """Parameters of scales that are all 1: fp32 [len(ks) x max(ks)], in one row, so that weight decay, which optimizers
    keep from vectors, leaves them. ks: the trained k, ascending."""
    return torch.zeros(len(ks) * max(ks), dtype=torch.float32)


def log_scales(parameters: Tensor, ks: Sequence[int], k: int, own: int) -> Tensor:
    """Logarithm of the scales at `k`, by rank, fp32 [k]. own: the model's own k, one of `ks`.

    Part of the parameters' graph at every k: gradient buckets that wait for all their parameters would wait forever.
    """
    table_BK = parameters.float().view(len(ks), -1) * RATE
    row = ks.index(own)
    fixed_1K = torch.zeros_like(table_BK[row : row + 1])
    return at_budget(torch.cat([table_BK[:row], fixed_1K, table_BK[row + 1 :]]), ks, k)


def at_budget(table_BK: Tensor, ks: Sequence[int], k: int) -> Tensor:
    """The row of a table [len(ks), max(ks)] for `k`, fp32 [k]; linear in k between two of `ks`, of which the smaller
    one has no say beyond its ranks, and that of the nearest outside, whose last rank then stands for all after it."""
    after = bisect_left(ks, k)
    if after == len(ks):
        last = ks[-1]
        return torch.cat([table_BK[-1, :last], table_BK[-1, last - 1 : last].expand(k - last)])
    upper_K = table_BK[after, :k]
    if after == 0 or ks[after] == k:
        return upper_K
    low, high = ks[after - 1], ks[after]
    between = (k - low) / (high - low)
    mixed_K = torch.lerp(table_BK[after - 1, :low], upper_K[:low], between)
    return torch.cat([mixed_K, upper_K[low:]])
