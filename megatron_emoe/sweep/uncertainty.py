"""How sure a difference of two held-out losses is: both were measured on the same blocks of the data, so it is paired.

Pure functions over numbers and cells. Losses in nats per token.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from megatron_emoe.sweep.result import SweepCell

MOST_BLOCKS = 64
"""A file holds no more numbers than this for each k'."""

_DIGITS = 7  # after the point, in a file


def block_losses(sums: Sequence[float], tokens: int) -> tuple[float, ...] | None:
    """A cell's `block_losses`: as many blocks of equally many sequences as can be had, at most MOST_BLOCKS.

    sums: of the token losses of each sequence, nats. tokens: that count, in all. None for less than two blocks.
    """
    count = max((n for n in range(1, MOST_BLOCKS + 1) if len(sums) % n == 0), default=1)
    if count < 2 or not sums:
        return None
    size, mean_tokens = len(sums) // count, tokens / count
    return tuple(
        round(math.fsum(sums[first : first + size]) / mean_tokens, _DIGITS) for first in range(0, len(sums), size)
    )


@dataclass(frozen=True)
class Difference:
    """A loss less another. error: standard error of it over the blocks of the data; None where they are not stored."""

    value: float
    error: float | None

    @property
    def is_sure(self) -> bool:
        """Whether it is further from 0 than twice its error; one without an error is taken as it is."""
        return self.value != 0 if self.error is None else abs(self.value) > 2 * self.error

    def text(self) -> str:
        """`-0.0210 ± 0.0008`, the error as far as it is known; that of a loss to itself is none."""
        return signed(self.value) + ("" if not self.error else f" ± {self.error:.4f}")


def signed(value: float, digits: int = 4) -> str:
    """With a sign, which is + for what is rounded to 0."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def difference(one: SweepCell, other: SweepCell) -> Difference:
    """Loss of `one` less that of `other`; both of the same held-out data."""
    ours, theirs = one.block_losses, other.block_losses
    error = None
    if ours and theirs and len(ours) == len(theirs):
        error = stdev(a - b for a, b in zip(ours, theirs, strict=True)) / math.sqrt(len(ours))
    return Difference(one.loss - other.loss, error)
