"""Noisy top-k gating and its two balancing losses: pure tensor functions, no state.

Shape suffixes: T tokens, E experts. Source: Shazeer et al. 2017, arXiv 1701.06538, section 2.1 (gating), section 4
(importance) and appendix A (load).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import softplus

SMALLEST_DEVIATION = 1e-6  # softplus reaches 0 in fp32; the load divides by it


def normal_numbers(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """Standard normal fp32 [rows, columns], a function of `seed` (64 bits) alone; seeded on the host: no sync."""
    generator = torch.Generator(device=device)
    generator.manual_seed(seed)
    return torch.randn(rows, columns, generator=generator, device=device)


def noise_deviation(raw_TE: Tensor) -> Tensor:
    """Standard deviation of each logit's noise, softplus(x W_noise), fp32 [T, E]. raw_TE: x W_noise."""
    return softplus(raw_TE.float()).clamp(min=SMALLEST_DEVIATION)


def load_probabilities(logits_TE: Tensor, noisy_TE: Tensor, deviation_TE: Tensor, k: int) -> Tensor:
    """P(x, i): the probability that expert i is selected if only its own noise is drawn again, fp32 [T, E].

    Appendix A: Phi((x W_g)_i - kth_excluding(H(x), k, i)) / deviation_i), where kth_excluding is the k-th highest noisy
    logit of the other experts. Smooth in the weights, unlike the count of selected tokens. k: less than E.

    logits_TE: x W_g without noise. noisy_TE: H(x), with it.
    """
    noisy_TE = noisy_TE.float()
    highest_TK = noisy_TE.topk(k + 1, dim=1).values
    among_TE = noisy_TE > highest_TK[:, k:]  # selected: without it, rank k + 1 is the k-th
    others_TE = torch.where(among_TE, highest_TK[:, k:], highest_TK[:, k - 1 : k])
    return torch.special.ndtr((logits_TE.float() - others_TE) / deviation_TE)


def squared_variation(values_E: Tensor) -> Tensor:
    """CV(values)^2: variance (of the whole population, not an estimate) over squared mean, fp32 scalar.

    Zero where all are equal, and where all are zero.
    """
    values_E = values_E.float()
    mean = values_E.mean()
    return (values_E - mean).square().mean() / (mean.square() + 1e-10)
