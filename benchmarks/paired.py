"""Variants that take turns within one process, and the ratio of their times."""

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

Step = Callable[[int], None]


def take_turns(
    variants: dict[str, Step],
    pairs: int,
    warm_up: int,
    wait: Callable[[], Any],
    first: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each variant's call in every pair after the warm-up; who begins alternates.

    wait: blocks until the work of all that was called is done. first: number of the first call, counted up from there.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for pair in range(warm_up + pairs):
        for name in sorted(variants, reverse=bool(pair % 2)):
            wait()
            start = clock()
            variants[name](first + pair)
            wait()
            if pair >= warm_up:
                times[name].append(clock() - start)
    return times


def ratio_with_interval(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Median of the paired ratios ours / theirs and its 95 % bootstrap interval (2000 resamples, fixed seed)."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]
