"""Elastic routing in one pass over the logits and one back: what `--moe-router-fusion` runs where the core's fused
top-k does not select what is asked for. selection.py is the definition; kernel_device.py has the kernels.

Ties: of equal logits (with a bias: equal sums of score and bias) the lower expert number ranks first, of equal random
numbers the better rank. torch.topk, and so selection.py, leaves both open. Shape suffixes: T tokens, E experts, P pool.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    from megatron_emoe.routing import kernel_device as device
except ImportError:  # no Triton on this platform: why_not() says so
    device = None  # type: ignore[assignment]

MAX_EXPERTS = 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_TILE = 1024  # elements of a block of tokens: 8 per thread, so that the 64-bit keys of a sort stay in registers


@dataclass(frozen=True)
class RoutingRule:
    """How logits become experts and weights: numbers on the host, the model's and one draw's.

    rank_by_scores: else by logits; without a bias it matters for the sums of groups alone. tail: (first, a), as in
    selection.combine_weights. pool: None where each token draws its own from {k, ..., pool_max}.
    """

    score_function: str
    k: int
    pool_max: int
    normalize: bool
    rank_by_scores: bool = False
    scale: float | None = None
    num_groups: int | None = None
    group_topk: int | None = None
    tail: tuple[int, float] | None = None
    pool: int | None = None
    keep: int = 0
    prob: float = 1.0


class Wanted(NamedTuple):
    """What is asked for beside probabilities and map; what is not costs nothing."""

    entropy: bool = False
    balance: bool = False
    plain: bool = False


NOTHING = Wanted()


class Routed(NamedTuple):
    """What routing gives. probs_TE: in the logits' dtype. map_TE: bool. pool: its size, int [T, 1] or one number.

    entropy_T: of the softmax, nats, fp32. balance_TE: scores that sum to 1, fp32. plain_TE: plain top-k's map, bool.
    """

    probs_TE: Tensor
    map_TE: Tensor
    pool: Tensor | int
    entropy_T: Tensor | None = None
    balance_TE: Tensor | None = None
    plain_TE: Tensor | None = None


def why_not(logits_TE: Tensor) -> str | None:
    """Why the kernel cannot route these logits, or None. Reads what the host knows: no sync."""
    if device is None:
        return "Triton is not installed"
    if not logits_TE.is_cuda and not device.INTERPRETED:
        return "the logits are not on a GPU"
    if logits_TE.dtype not in DTYPES:
        return f"the logits are {logits_TE.dtype}"
    return f"there are more than {MAX_EXPERTS} experts" if logits_TE.shape[1] > MAX_EXPERTS else None


def route(
    logits_TE: Tensor, rule: RoutingRule, bias_E: Tensor | None = None, u_TP: Tensor | None = None, wanted=NOTHING
) -> Routed:
    """Route tokens by `rule`, differentiably in probabilities, entropy and balance scores.

    logits_TE: fp32, bf16 or fp16. bias_E: fp32, added to the scores for ranking alone. u_TP: fp32 [T, pool_max + 1] of
    selection.uniform_numbers, needed where pool_max > k. Without gradients nothing is kept for a backward pass.
    """
    logits_TE = logits_TE.contiguous()
    u_TP = None if rule.pool_max == rule.k else u_TP
    if torch.is_grad_enabled() and logits_TE.requires_grad:
        parts = _Route.apply(logits_TE, bias_E, u_TP, rule, wanted)
    else:
        parts = _forward(logits_TE.detach(), bias_E, u_TP, rule, wanted, False)[:-1]
    probs_TE, map_TE, pool_T1, *rest = parts
    return Routed(probs_TE, map_TE, (rule.pool or rule.k) if pool_T1 is None else pool_T1, *rest)


class _Route(torch.autograd.Function):
    """Saves the logits, the map and, under a tail, which of the map's experts come before it."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, bias_E: Tensor | None, u_TP: Tensor | None, rule: RoutingRule, wanted):
        probs_TE, map_TE, pool_T1, entropy_T, balance_TE, plain_TE, head_TE = _forward(
            logits_TE, bias_E, u_TP, rule, wanted, rule.tail is not None
        )
        ctx.save_for_backward(logits_TE, map_TE, head_TE)
        ctx.rule = rule
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in (map_TE, pool_T1, plain_TE) if t is not None))
        return probs_TE, map_TE, pool_T1, entropy_T, balance_TE, plain_TE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_probs_TE: Tensor | None, _map, _pool, grad_entropy_T, grad_balance_TE, _plain):
        grads = [None if g is None else g.contiguous() for g in (grad_probs_TE, grad_entropy_T, grad_balance_TE)]
        unused = all(grad is None for grad in grads)
        logits_TE, map_TE, head_TE = ctx.saved_tensors
        return None if unused else _backward(logits_TE, map_TE, head_TE, ctx.rule, grads), None, None, None, None


def _forward(logits_TE: Tensor, bias_E: Tensor | None, u_TP: Tensor | None, rule: RoutingRule, wanted, save_head: bool):
    """Probabilities, map, pool sizes, entropy, balance scores, plain map, head map; None for what is not asked for."""
    tokens, experts = logits_TE.shape
    groups = (rule.num_groups or 1) if rule.group_topk else 1
    log_groups, log_size, log_pool = (_log2(n) for n in (groups, experts // groups, rule.pool_max))
    probs_TE = torch.empty_like(logits_TE)
    map_TE = torch.empty_like(logits_TE, dtype=torch.bool)
    head_TE = torch.empty_like(map_TE) if save_head else None
    plain_TE = torch.empty_like(map_TE) if wanted.plain else None
    pool_T1 = None if u_TP is None or rule.pool else logits_TE.new_empty((tokens, 1), dtype=torch.int32)
    entropy_T = logits_TE.new_empty(tokens, dtype=torch.float32) if wanted.entropy else None
    balance_TE = torch.empty_like(logits_TE, dtype=torch.float32) if wanted.balance else None
    block = _block(log_groups + log_size)
    with torch.cuda.device_of(logits_TE):  # Triton launches on the current device, whatever the tensors say
        device.forward_kernel[(_blocks(tokens, block),)](
            logits_TE, bias_E, u_TP, probs_TE, _bytes(map_TE), _bytes(head_TE), _bytes(plain_TE), pool_T1, entropy_T,
            balance_TE, tokens, rule.k, rule.pool_max, rule.pool or 0, rule.keep, _first(rule),
            rule.k // rule.group_topk if rule.group_topk else 0, rule.prob, 1 / rule.prob, *_factors(rule),
            E=experts, GROUPS=groups, CHOSEN=rule.group_topk or 0, B=block,
            LOG=log_groups + log_size, LOG_G=log_groups, LOG_P=log_pool,
            SCORE=_score(rule), RANK=_rank(rule, bias_E), NORMALIZE=rule.normalize,
            SAMPLE=u_TP is not None, POOLS=pool_T1 is not None, HEAD=save_head, PLAIN=wanted.plain,
            ENTROPY=wanted.entropy, BALANCE=wanted.balance,
        )  # fmt: skip
    return probs_TE, map_TE, pool_T1, entropy_T, balance_TE, plain_TE, head_TE


def _backward(
    logits_TE: Tensor, map_TE: Tensor, head_TE: Tensor | None, rule: RoutingRule, grads: list[Tensor | None]
) -> Tensor:
    """Gradient of the logits; grads: of probabilities, entropy and balance scores."""
    tokens, experts = logits_TE.shape
    log = _log2(experts)
    block = _block(log)
    grad_TE = torch.empty_like(logits_TE)
    with torch.cuda.device_of(logits_TE):  # Triton launches on the current device, whatever the tensors say
        device.backward_kernel[(_blocks(tokens, block),)](
            logits_TE, _bytes(map_TE), _bytes(head_TE), *grads, grad_TE,
            tokens, *_factors(rule), E=experts, B=block, LOG=log, SCORE=_score(rule), NORMALIZE=rule.normalize,
            HEAD=head_TE is not None, PROBS=grads[0] is not None, ENTROPY=grads[1] is not None,
            BALANCE=grads[2] is not None,
        )  # fmt: skip
    return grad_TE


def _log2(size: int) -> int:
    """Of the smallest power of two that holds `size`."""
    return (size - 1).bit_length()


def _block(log_columns: int) -> int:
    return max(1, _TILE >> log_columns)


def _blocks(tokens: int, block: int) -> int:
    return -(-tokens // block)


def _bytes(map_TE: Tensor | None) -> Tensor | None:
    """The same memory as uint8, which Triton stores as bytes."""
    return None if map_TE is None else map_TE.view(torch.uint8)


def _score(rule: RoutingRule) -> int:
    functions = {"softmax": device.SOFTMAX, "sigmoid": device.SIGMOID, "sqrtsoftplus": device.SQRTSOFTPLUS}
    return functions[rule.score_function].value


def _rank(rule: RoutingRule, bias_E: Tensor | None) -> int:
    by_scores = device.BY_SCORES if rule.rank_by_scores else device.BY_LOGITS
    return (by_scores if bias_E is None else device.BY_BIASED).value


def _first(rule: RoutingRule) -> int:
    """How many of a token's experts come before the tail."""
    return 2**30 if rule.tail is None else rule.tail[0]


def _factors(rule: RoutingRule) -> tuple[float, float, float]:
    """Scaling factor, a, and log a."""
    a = 1.0 if rule.tail is None else rule.tail[1]
    return rule.scale or 1.0, a, math.log(a) if a > 0 else -math.inf


def bytes_moved(
    tokens: int, experts: int, pool_max: int, dtype: torch.dtype, *, sampled: bool = True, tail: bool = False,
    wanted: Wanted = NOTHING,
) -> tuple[int, int]:  # fmt: skip
    """Bytes that the forward and the backward kernel must move between memory and chip: (forward, backward).

    Each tensor counts once: logits in, probabilities and map out, random numbers where a pool is sampled, what is
    `wanted`; back: logits, map and gradients in, the logits' gradient out.
    """
    cells, size = tokens * experts, dtype.itemsize
    extras = 4 * tokens * wanted.entropy + 4 * cells * wanted.balance
    forward = cells * (2 * size + 1 + wanted.plain + tail) + extras
    if sampled:
        forward += 4 * tokens * (pool_max + 1) + 4 * tokens  # random numbers, and the pools' sizes
    return forward, cells * (3 * size + 1 + tail) + extras


@cache
def say_once(message: str) -> None:
    """Log a warning the first time: the reason why a step is slower than the flags say."""
    logging.getLogger(__name__).warning(message)
