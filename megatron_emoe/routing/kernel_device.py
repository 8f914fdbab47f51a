"""The Triton kernels of kernel.py: a block of tokens from logits to routing probabilities, and back.

Shape suffixes: B tokens of a block, E experts, W columns (E padded), P ranks of the pool (padded), G groups (padded).

What is compiled in (tl.constexpr) and what is an ordinary argument: sizes of tiles must be known to the compiler, so E,
groups and the padded pool are constants, as are the switches of a model's rule. k, the pool's size, where a tail begins
and all factors change from step to step: they are arguments, and Triton is told not to specialise on their values, so
that a drawn k compiles nothing. The padded pool is a power of two: a pool that grows compiles log2 K variants at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_emoe.routing.kernel_sort import NEVER, key_at, largest, ordered, packed, unordered

SOFTMAX: tl.constexpr = tl.constexpr(0)
SIGMOID: tl.constexpr = tl.constexpr(1)
SQRTSOFTPLUS: tl.constexpr = tl.constexpr(2)
BY_LOGITS: tl.constexpr = tl.constexpr(0)
BY_SCORES: tl.constexpr = tl.constexpr(1)
BY_BIASED: tl.constexpr = tl.constexpr(2)


@triton.jit
def _log1p(t):
    """log(1 + t) for t in [0, 1] by the series 2 artanh(t / (2 + t)): fp32-exact also where 1 + t would round to 1."""
    s = t / (2 + t)
    square = s * s
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11 + square * (1 / 13)))))
    return 2 * s * (1 + square * (series + square * square * square * square * square * square * (1 / 15)))


@triton.jit
def _scores(x, most, total, SCORE: tl.constexpr):
    """Scores of logits; most, total: largest logit and sum of exponentials of the token, for a softmax."""
    small = tl.exp(-tl.abs(x))
    if SCORE == SOFTMAX:
        scores = tl.exp(x - most) / total
    elif SCORE == SIGMOID:
        scores = tl.where(x >= 0, 1.0, small) / (1 + small)
    else:
        scores = tl.sqrt(tl.maximum(x, 0.0) + _log1p(small))
    return scores


@triton.jit
def _weights(x, most, total, used, late, tail, log_tail, SCORE: tl.constexpr, NORMALIZE: tl.constexpr):
    """Combine weights before the scaling factor: selection.combine_weights on a tile. used, late: the selected experts,
    and those of them that a tail scales."""
    if SCORE == SOFTMAX and NORMALIZE:
        y = tl.where(used, tl.where(late, x + log_tail, x), float("-inf"))
        weights = tl.exp(y - tl.max(y, 1, keep_dims=True))
        weights = weights / tl.sum(weights, 1, keep_dims=True)
    else:
        scores = tl.where(used, _scores(x, most, total, SCORE), 0.0)
        weights = tl.where(late, scores * tail, scores)
        if NORMALIZE:
            weights = weights / (tl.sum(weights, 1, keep_dims=True) + 1e-20)
    return weights


@triton.jit
def _allowed(
    values,
    group_best,
    B: tl.constexpr,
    GROUPS: tl.constexpr,
    CHOSEN: tl.constexpr,
    LOG_G: tl.constexpr,
    LOG: tl.constexpr,
):
    """selection.mask_groups: whether a column's group is among the CHOSEN whose best scores have the largest sums."""
    LOG_SIZE: tl.constexpr = LOG - LOG_G
    best = largest(tl.reshape(ordered(values), [B * 2**LOG_G, 2**LOG_SIZE]), B * 2**LOG_G, LOG_SIZE, LOG_SIZE)
    counts = tl.arange(0, 2**LOG_SIZE)[None, :] < group_best
    sums_BG = tl.reshape(tl.sum(tl.where(counts, unordered(best), 0.0), 1), [B, 2**LOG_G])
    groups = tl.arange(0, 2**LOG_G)[None, :]
    keys_BG = tl.where(groups < GROUPS, packed(sums_BG, GROUPS - groups), NEVER)
    least = key_at(largest(keys_BG, B, LOG_G, LOG_G), groups, CHOSEN - 1)
    inside = (keys_BG >= least).to(tl.int32)[:, :, None]
    return tl.reshape(tl.broadcast_to(inside, [B, 2**LOG_G, 2**LOG_SIZE]), [B, 2**LOG]) != 0


@triton.jit
def _draw(u, rows, live, ranks, k, pool_max, pool, keep, prob, inverse_prob, B: tl.constexpr, LOG_P: tl.constexpr):
    """selection.draw_pool_sizes and sample_from_pool: which ranks are drawn [B, P], and the pool's size [B, 1]."""
    row = u + rows * (pool_max + 1)
    first = tl.load(row, mask=live, other=0.0)
    sizes = pool_max - k + 1
    more = tl.minimum((first * inverse_prob * sizes.to(tl.float32)).to(tl.int32), sizes - 1)
    size = tl.where(pool > 0, pool, k + tl.where(first < prob, more, 0))
    numbers = tl.load(row + 1 + ranks, mask=live & (ranks < pool_max), other=3.0)
    numbers = tl.where((ranks >= size) & (ranks < pool_max), 2.0, numbers)
    numbers = tl.where(ranks < keep, -1.0, numbers)
    keys_BP = -1 - packed(numbers, ranks)  # the largest key is the smallest number
    return keys_BP >= key_at(largest(keys_BP, B, LOG_P, LOG_P), ranks, k - 1), size


@triton.jit
def _place(columns, GROUPS: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    """Expert of a column: each group of SIZE begins at a multiple of a power of two."""
    if (
        GROUPS == 1 or SIZE == 2**LOG_SIZE
    ):  # columns and experts are the same: so the compiler sees that they are side by side
        experts = columns
    else:
        experts = (columns >> LOG_SIZE) * SIZE + columns % 2**LOG_SIZE
    return experts


@triton.jit
def _is_expert(columns, GROUPS: tl.constexpr, SIZE: tl.constexpr, LOG_SIZE: tl.constexpr):
    """Whether a column is an expert, not padding."""
    if GROUPS == 1:  # noqa: SIM108 (a constant for the compiler)
        is_expert = columns < SIZE
    else:
        is_expert = (columns >> LOG_SIZE < GROUPS) & (columns % 2**LOG_SIZE < SIZE)
    return is_expert


@triton.jit
def _scored(logits, mask, is_expert, SCORE: tl.constexpr):
    """Logits with padding at -inf, their largest, exp(logit - largest), the sum of those, and the scores."""
    x = tl.where(is_expert, tl.load(logits, mask=mask, other=0.0).to(tl.float32), float("-inf"))
    most = tl.max(x, 1, keep_dims=True)
    exps = tl.exp(x - most)
    total = tl.sum(exps, 1, keep_dims=True)
    return x, most, exps, total, _scores(x, most, total, SCORE)


@triton.jit
def _rank(
    x, scores, bias, experts, columns, is_expert, group_best, E: tl.constexpr, GROUPS: tl.constexpr,
    CHOSEN: tl.constexpr, B: tl.constexpr, LOG: tl.constexpr, LOG_G: tl.constexpr, LOG_P: tl.constexpr,
    RANK: tl.constexpr,
):  # fmt: skip
    """selection.rank_experts: the experts of the best 2**LOG_P columns, best first, int32 [B, P].

    Every score function grows with the logit. Without a bias the ranks are therefore those of the logits, and a score
    that is rounded makes no tie.
    """
    values = x
    if RANK == BY_BIASED:
        values = scores + tl.load(bias + experts, mask=is_expert, other=0.0)
    if CHOSEN > 0:
        compared = tl.where(is_expert, scores if RANK == BY_SCORES else values, float("-inf"))
        values = tl.where(_allowed(compared, group_best, B, GROUPS, CHOSEN, LOG_G, LOG), values, float("-inf"))
    keys_BW = tl.where(is_expert, packed(values, 2**LOG - columns), NEVER)
    best_BP = 2**LOG - (largest(keys_BW, B, LOG, LOG_P) & 0xFFFF).to(tl.int32)
    return _place(best_BP, GROUPS, E // GROUPS, LOG - LOG_G)


@triton.jit
def _clear(target, offsets, mask):
    tl.store(target + offsets, tl.zeros(offsets.shape, target.dtype.element_ty), mask=mask)


# Numbers that change while a run goes on; without this Triton would compile anew for 1, and for multiples of 16.
_FORWARD = ["tokens", "k", "pool_max", "pool", "keep", "first", "group_best"]


@triton.jit(do_not_specialize=_FORWARD)
def forward_kernel(
    logits, bias, u, probs, routed, head, plain, pools, entropy, balance,
    tokens, k, pool_max, pool, keep, first, group_best, prob, inverse_prob, scale, tail, log_tail,
    E: tl.constexpr, GROUPS: tl.constexpr, CHOSEN: tl.constexpr, B: tl.constexpr,
    LOG: tl.constexpr, LOG_G: tl.constexpr, LOG_P: tl.constexpr,
    SCORE: tl.constexpr, RANK: tl.constexpr, NORMALIZE: tl.constexpr, SAMPLE: tl.constexpr, POOLS: tl.constexpr,
    HEAD: tl.constexpr, PLAIN: tl.constexpr, ENTROPY: tl.constexpr, BALANCE: tl.constexpr,
):  # fmt: skip
    """Route B tokens. Pointers to what is read (logits, bias, u), then to what is written; see kernel.py."""
    columns = tl.arange(0, 2**LOG)[None, :]
    experts = _place(columns, GROUPS, E // GROUPS, LOG - LOG_G)
    is_expert = _is_expert(columns, GROUPS, E // GROUPS, LOG - LOG_G)
    rows = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)[:, None]
    live = rows < tokens
    mask, offsets = live & is_expert, rows * E + experts

    x, most, exps, total, scores = _scored(logits + offsets, mask, is_expert, SCORE)
    if ENTROPY:  # log sum exp(x) - sum q x, with the largest logit taken from both
        mean = tl.sum(exps * tl.where(is_expert, x - most, 0.0), 1, keep_dims=True) / total
        tl.store(entropy + rows, tl.log(total) - mean, mask=live)
    if BALANCE:
        shares = scores if SCORE == SOFTMAX else scores / (tl.sum(scores, 1, keep_dims=True) + 1e-20)
        tl.store(balance + offsets, shares, mask=mask)

    ranked_BP = _rank(
        x, scores, bias, experts, columns, is_expert, group_best, E, GROUPS, CHOSEN, B, LOG, LOG_G, LOG_P, RANK
    )  # fmt: skip
    ranks = tl.arange(0, 2**LOG_P)[None, :]
    chosen = live & (ranks < k)
    places = rows * E + ranked_BP
    _clear(probs, offsets, mask)
    _clear(routed, offsets, mask)
    if PLAIN:
        _clear(plain, offsets, mask)
    if HEAD:
        _clear(head, offsets, mask)
    # What other threads of the block have cleared is written to below: without the barrier zeros could come last.
    tl.debug_barrier()
    if PLAIN:
        tl.store(plain + places, tl.full(places.shape, 1, tl.uint8), mask=chosen)
    if SAMPLE:
        drawn, size = _draw(u, rows, live, ranks, k, pool_max, pool, keep, prob, inverse_prob, B, LOG_P)
        chosen = live & drawn
        if POOLS:
            tl.store(pools + rows, size, mask=live)
    late = chosen & (tl.cumsum(chosen.to(tl.int32), 1) > first)
    if HEAD:
        tl.store(head + places, tl.full(places.shape, 1, tl.uint8), mask=chosen & (late == 0))
    selected = tl.load(logits + places, mask=chosen, other=0.0).to(tl.float32)
    used = chosen | (live == 0)  # rows past the last token: any weights, but numbers
    weights = scale * _weights(selected, most, total, used, late, tail, log_tail, SCORE, NORMALIZE)
    tl.store(probs + places, weights.to(probs.dtype.element_ty), mask=chosen)
    tl.store(routed + places, tl.full(places.shape, 1, tl.uint8), mask=chosen)


@triton.jit
def _slope(x, scores, SCORE: tl.constexpr):
    """Derivative of an elementwise score by its logit."""
    if SCORE == SIGMOID:
        slope = scores * (1 - scores)
    else:
        slope = _scores(x, 0.0, 1.0, SIGMOID) / tl.where(scores > 0, 2 * scores, 1.0)  # both 0 far below: slope 0
    return slope


@triton.jit
def _shares_back(g, values, total):
    """Gradient of values from the gradient `g` of values / total, where total is their sum."""
    return (g - tl.sum(g * values, 1, keep_dims=True) / total) / total


@triton.jit(do_not_specialize=["tokens"])
def backward_kernel(
    logits, routed, head, grad_probs, grad_entropy, grad_balance, grad_logits,
    tokens, scale, tail, log_tail,
    E: tl.constexpr, B: tl.constexpr, LOG: tl.constexpr, SCORE: tl.constexpr, NORMALIZE: tl.constexpr,
    HEAD: tl.constexpr, PROBS: tl.constexpr, ENTROPY: tl.constexpr, BALANCE: tl.constexpr,
):  # fmt: skip
    """Gradient of B tokens' logits; scores are computed again from the logits. PROBS, ENTROPY, BALANCE: which gradients
    there are."""
    columns = tl.arange(0, 2**LOG)[None, :]
    is_expert = columns < E
    rows = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)[:, None]
    live = rows < tokens
    mask, offsets = live & is_expert, rows * E + columns

    x, most, exps, total, scores = _scored(logits + offsets, mask, is_expert, SCORE)
    grad_x, grad_scores = tl.zeros_like(x), tl.zeros_like(x)
    if PROBS:
        used = tl.load(routed + offsets, mask=mask, other=0) != 0
        late = used & (columns < 0)
        if HEAD:
            late = used & (tl.load(head + offsets, mask=mask, other=0) == 0)
        g = scale * tl.load(grad_probs + offsets, mask=used, other=0.0).to(tl.float32)
        if SCORE == SOFTMAX and NORMALIZE:
            used = used | (live == 0)  # rows past the last token: any weights, but numbers
            weights = _weights(x, most, total, used, late, tail, log_tail, SCORE, NORMALIZE)
            grad_x = weights * (g - tl.sum(weights * g, 1, keep_dims=True))
        else:
            factor = tl.where(used, tl.where(late, tail, 1.0), 0.0)
            if NORMALIZE:
                g = _shares_back(g, scores * factor, tl.sum(scores * factor, 1, keep_dims=True) + 1e-20)
            grad_scores = g * factor
    if BALANCE:
        g = tl.load(grad_balance + offsets, mask=mask, other=0.0)
        if SCORE != SOFTMAX:
            g = _shares_back(g, scores, tl.sum(scores, 1, keep_dims=True) + 1e-20)
        grad_scores += g
    if SCORE == SOFTMAX:
        grad_x += scores * (grad_scores - tl.sum(scores * grad_scores, 1, keep_dims=True))
    else:
        grad_x += grad_scores * _slope(x, scores, SCORE)
    if ENTROPY:  # dH / dx = -q (x - sum q x)
        q, centred = exps / total, tl.where(is_expert, x - most, 0.0)
        g = tl.load(grad_entropy + rows, mask=live, other=0.0)
        grad_x -= g * q * (centred - tl.sum(q * centred, 1, keep_dims=True))
    tl.store(grad_logits + offsets, grad_x.to(grad_logits.dtype.element_ty), mask=mask)


INTERPRETED = not isinstance(forward_kernel, triton.runtime.JITFunction)
"""Whether they run in Triton's interpreter, in host memory (TRITON_INTERPRET=1 when Triton is first imported)."""
