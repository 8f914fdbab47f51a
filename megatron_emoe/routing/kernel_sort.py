"""Ranking inside a Triton program: a bitonic top-k of integer keys that hold a number and its place.

With the place in the key every order is unique: equal numbers are told apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

NEVER: tl.constexpr = tl.constexpr(-(2**63))  # the key of padding: below that of every number


@triton.jit
def ordered(x):
    """int32 in the order of the fp32 numbers `x`; -0 and 0 are the same number."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def unordered(keys):
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def packed(x, low):
    """int64 keys, all different: in the order of `x`, and where numbers are equal in that of `low` (int32, >= 0)."""
    return (ordered(x).to(tl.int64) << 32) | low.to(tl.int64)


@triton.jit
def _merge(h, STAGE: tl.constexpr, N: tl.constexpr):
    """Sort bitonic runs of 2**STAGE columns in a tile [rows, 2, ..., 2] with N twos, the bits of a column's number.

    Larger numbers go last where bit STAGE is 0, and first where it is 1 or where one run is all there is.
    """
    down = 1
    if STAGE < N:
        down = tl.reshape(tl.arange(0, 2), [1] * (N - STAGE) + [2] + [1] * STAGE)
    for step in tl.static_range(STAGE):  # columns that differ in one bit, from the highest bit of a run to the lowest
        bit = tl.reshape(tl.arange(0, 2), [1] * (N - STAGE + 1 + step) + [2] + [1] * (STAGE - 1 - step))
        other = tl.sum(h, N - STAGE + 1 + step, keep_dims=True) - h  # exact, also where a sum of integers wraps around
        h = tl.where((h > other) != ((bit ^ down) != 0), other, h)
    return h


@triton.jit
def largest(x, ROWS: tl.constexpr, LOG: tl.constexpr, LOG_TOP: tl.constexpr):
    """The 2**LOG_TOP largest integers of each row of `x` [ROWS, 2**LOG], largest first: a bitonic top-k.

    Runs of that length are sorted up and down in turn; the larger of each pair of neighbours' elements are the largest
    of both, and bitonic again. tl.topk does the same; this one also runs in Triton's interpreter in reasonable time.
    Every step is code: where the pool is nearly all of many experts, the kernel takes long to compile, once for each
    number of experts and padded pool (1024 of 1024: about 15 seconds).
    """
    h = tl.reshape(x, [ROWS] + [2] * LOG)
    for stage in tl.static_range(1, LOG_TOP + 1):
        h = _merge(h, stage, LOG)
    for halved in tl.static_range(LOG - LOG_TOP):
        h = tl.max(h, LOG - halved - LOG_TOP)
        h = _merge(h, LOG_TOP, LOG - halved - 1)
    return tl.reshape(h, [ROWS, 2**LOG_TOP])


@triton.jit
def key_at(keys, columns, place):
    """The keys in the column numbered `place`, [rows, 1]."""
    return tl.sum(tl.where(columns == place, keys, 0), 1, keep_dims=True)
