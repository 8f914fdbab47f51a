"""From router logits to the experts a token uses: pure tensor functions, no state, no random stream of their own.

Shape suffixes: T tokens, E experts, P pool (ranked candidates), K active experts.
Source: EMoE, arXiv 2509.21892 (stochastic co-activation sampling); the score functions are Megatron-Core's.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")


def expert_scores(logits_TE: Tensor, score_function: str) -> Tensor:
    """Scores of all experts, fp32 [T, E]: softmax over E, or an elementwise sigmoid or sqrt(softplus).

    Raises:
        ValueError: unknown score function.
    """
    if score_function == "softmax":
        return torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    if score_function == "sigmoid":
        return torch.sigmoid(logits_TE.float())
    if score_function == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits_TE.float()).sqrt()
    raise ValueError(f"score function {score_function!r}: must be one of {', '.join(SCORE_FUNCTIONS)}")


def mask_groups(selection_TE: Tensor, k: int, num_groups: int, group_topk: int) -> Tensor:
    """Group-limited routing (DeepSeek-V2, arXiv 2405.04434): -inf outside the `group_topk` best of `num_groups` groups.

    A group's score is the sum of its best k // group_topk experts, Megatron-Core's rule, with the active k and not the
    pool's size, so a pool never reaches an expert that plain top-k could not. Another active k may choose other groups:
    the experts at k' > k then need not include those at k.
    """
    grouped_TGe = selection_TE.unflatten(1, (num_groups, -1))
    scores_TG = grouped_TGe.topk(k // group_topk, dim=-1).values.sum(dim=-1)
    chosen_Tg = scores_TG.topk(group_topk, dim=-1, sorted=False).indices
    allowed_TG = torch.zeros_like(scores_TG, dtype=torch.bool).scatter_(1, chosen_Tg, True)
    return grouped_TGe.masked_fill(~allowed_TG.unsqueeze(-1), float("-inf")).flatten(1)


def rank_experts(
    selection_TE: Tensor, size: int, *, k: int, num_groups: int | None = None, group_topk: int | None = None
) -> Tensor:
    """The `size` best experts of each token, best first, int64 [T, P].

    `selection_TE` is what plain top-k ranks by: scores plus selection bias. The first k columns are plain top-k's
    experts.
    """
    if group_topk:
        selection_TE = mask_groups(selection_TE, k, num_groups or 1, group_topk)
    return torch.topk(selection_TE, size, dim=1).indices


def uniform_numbers(rows: int, columns: int, seed: int, device: torch.device) -> Tensor:
    """fp32 [rows, columns] in [0, 1), a function of `seed` (64 bits) alone; seeded on the host, no device sync."""
    generator = torch.Generator(device=device)
    generator.manual_seed(seed)
    return torch.rand(rows, columns, generator=generator, device=device)


def draw_pool_sizes(u_T1: Tensor, k: int, pool_max: int, prob: float = 1.0) -> Tensor:
    """m ~ Uniform{k, ..., pool_max} with probability `prob`, else k, from uniform numbers, int64 [T, 1] (EMoE: pool
    size drawn, never fixed).

    u_T1: fp32 in [0, 1). Its largest value is 1 - 2**-24, and fp32 rounds that times n below n for every n < 2**24.
    """
    sizes = pool_max - k + 1
    if prob == 1.0:
        return k + (u_T1 * sizes).long()
    # By the reciprocal: dividing by a number on the host does that on a GPU, and the CPU must draw the same pools.
    drawn = (u_T1 * (1 / prob) * sizes).long().clamp(max=sizes - 1)  # below prob the share may round up to 1
    return k + drawn.masked_fill(u_T1 >= prob, 0)


def sample_from_pool(ranked_TP: Tensor, k: int, pool: Tensor | int, u_TP: Tensor, keep: int = 0) -> Tensor:
    """k experts drawn uniformly without replacement from the first `pool` ranks, int64 [T, K], in rank order.

    The k smallest of independent uniform numbers mark a uniform k-subset. Rank order makes a pool of size k
    bit-identical to plain top-k, weights included. pool: [T, 1] or one number, between k and P. keep: ranks that are
    always among the k.
    """
    ranks_P = torch.arange(ranked_TP.shape[1], device=ranked_TP.device)
    keys_TP = u_TP.masked_fill(ranks_P >= pool, 2.0)
    keys_TP[:, :keep] = -1.0
    positions_TK = keys_TP.topk(k, dim=1, largest=False, sorted=False).indices.sort(dim=1).values
    return ranked_TP.gather(1, positions_TK)


def coactivation_indices(
    ranked_TP: Tensor, k: int, *, pool: int | None, seed: int, keep: int = 0, prob: float = 1.0
) -> tuple[Tensor, Tensor | int]:
    """Stochastic co-activation sampling (EMoE): experts [T, K] and pool sizes ([T, 1] or one number).

    pool None: every token draws its own size from {k, ..., P}, with probability `prob`, else it is k. keep: ranks that
    are always used.
    """
    tokens, pool_max = ranked_TP.shape
    u_TPplus1 = uniform_numbers(tokens, pool_max + 1, seed, ranked_TP.device)
    sizes = draw_pool_sizes(u_TPplus1[:, :1], k, pool_max, prob) if pool is None else pool
    return sample_from_pool(ranked_TP, k, sizes, u_TPplus1[:, 1:], keep), sizes


def combine_weights(
    logits_TE: Tensor,
    scores_TE: Tensor,
    indices_TK: Tensor,
    *,
    score_function: str,
    normalize: bool,
    scale: float | None,
    tail: tuple[int, float] | None = None,
    log_scales_K: Tensor | None = None,
) -> Tensor:
    """Weights of the selected experts, fp32 [T, K].

    normalize: they sum to 1 (softmax over the selected logits, or scores divided by their sum); else the raw scores.
    tail: (first, a) multiplies the scores of the columns from `first` on by a, before normalisation (tail_scale.py).
    log_scales_K: fp32, likewise a factor of each column, as its logarithm (budget_scales.py). Without both it matches
    Megatron-Core's `topk_routing_with_score_function` bit for bit at the same indices.
    """
    if score_function == "softmax" and normalize:
        selected_TK = logits_TE.gather(1, indices_TK)
        if tail is not None:  # softmax(x + log a) is exp(x) a, normalised
            selected_TK = selected_TK.float()
            selected_TK[:, tail[0] :] += math.log(tail[1]) if tail[1] > 0 else -math.inf
        if log_scales_K is not None:
            selected_TK = selected_TK.float() + log_scales_K
        weights_TK = torch.softmax(selected_TK, dim=-1, dtype=torch.float32)
    else:
        weights_TK = scores_TE.gather(1, indices_TK)
        if tail is not None:
            weights_TK[:, tail[0] :] *= tail[1]
        if log_scales_K is not None:
            weights_TK = weights_TK * log_scales_K.exp()
        if normalize:
            weights_TK = weights_TK / (weights_TK.sum(dim=-1, keepdim=True) + 1e-20)
    return weights_TK * scale if scale else weights_TK


def normalizes(combine: str, score_function: str, pre_softmax: bool, k: int) -> bool:
    """Whether weights are divided by their sum: forced by `combine`, else the model's own rule as the core has it."""
    if combine != "model":
        return combine == "renormalize"
    return not pre_softmax if score_function == "softmax" else k > 1


def to_dense(weights_TK: Tensor, indices_TK: Tensor, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Weights in the logits' dtype and the boolean routing map, both [T, E], as the dispatchers take them."""
    probs_TE = torch.zeros_like(logits_TE).scatter(1, indices_TK, weights_TK.type_as(logits_TE))
    return probs_TE, dense_map(indices_TK, logits_TE.shape[1])


def dense_map(indices_TK: Tensor, num_experts: int) -> Tensor:
    """True where a token uses an expert, bool [T, E]."""
    empty_TE = torch.zeros(indices_TK.shape[0], num_experts, dtype=torch.bool, device=indices_TK.device)
    return empty_TE.scatter_(1, indices_TK, True)
