"""The tail scale a(k'): how much the experts beyond the trained k weigh at a larger k'. Pure, no tensors.

At k' > k the weights of the selected experts past the best k are multiplied by a(k') before they are renormalised:
a = 1 gives the output of plain top-k', a = 0 that of plain top-k, except where k' changes more than which experts are
added: with group-limited routing (a group's score is the sum of its best k' / groups experts), with a capacity factor
(places are reckoned with k'), and at k = 1 with sigmoid or sqrtsoftplus scores (the core normalises above 1 only). A
model that renormalises otherwise lets every added expert take weight from the k it was trained with, which is most of
the loss past the wall.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

TAIL_SCALE_FILE = "emoe_tail_scale.json"
"""Beside a checkpoint's weights: the tail scale that was fitted to them (tools/fit_tail_scale.py)."""


@dataclass(frozen=True)
class TailScale:
    """a as a function of k': one number (`table` has the key 0 alone), or a table of k' and a in ascending k'."""

    table: tuple[tuple[int, float], ...]

    def at(self, k: int) -> float:
        """a(k): linear between the entries of the table, and constant before the first and after the last."""
        ks = [key for key, _ in self.table]
        after = bisect_left(ks, k)
        if after == len(ks):
            return self.table[-1][1]
        if after == 0 or ks[after] == k:
            return self.table[after][1]
        (low, first), (high, last) = self.table[after - 1 : after + 1]
        return first + (last - first) * (k - low) / (high - low)


def given_tail_scale(given: float | Mapping[int, float]) -> TailScale:
    """One number for every k', or a by k' (`{0: a}`: one number, too; `{}`: 1, plain top-k').

    Raises:
        ValueError: a k' below 0, or a factor that is negative or not finite.
    """
    table = dict(given) if isinstance(given, Mapping) else {0: given}
    for k, scale in table.items():
        if k < 0 or (k == 0 and len(table) > 1) or not 0 <= scale < math.inf:
            raise ValueError(f"tail_scale {given}: must be one number, or numbers by k', finite and at least 0")
    return TailScale(tuple(sorted(table.items())) or ((0, 1.0),))


def parse_tail_scale(words: Sequence[str]) -> TailScale:
    """`["0.25"]`, or `["6:0.25", "8:0.1"]` for k' = 6 and k' = 8.

    Raises:
        ValueError: what is wrong with the first bad word, without the name of a flag.
    """
    return _parse(tuple(words))


@lru_cache(maxsize=64)
def _parse(words: tuple[str, ...]) -> TailScale:
    if len(words) == 1 and ":" not in words[0]:
        return TailScale(((0, _number(words[0], words[0])),))
    table: dict[int, float] = {}
    for word in words:
        k, colon, scale = word.partition(":")
        if not colon or not k.isdecimal():
            raise ValueError(f"{word}: must be one number, or pairs k':a such as 6:0.25 8:0.1")
        if int(k) in table:
            raise ValueError(f"{word}: k' = {k} is given twice")
        table[int(k)] = _number(scale, word)
    if not table:
        raise ValueError("must be one number, or pairs k':a such as 6:0.25 8:0.1")
    return TailScale(tuple(sorted(table.items())))


def _number(text: str, word: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"{word}: must be a finite number of at least 0")
    return value


def tail_scale_words(table: Mapping[int, float]) -> list[str]:
    """The flag's words for a table of k' and a: `{6: 0.25}` gives `["6:0.25"]`."""
    return [f"{k}:{scale:.6g}" for k, scale in sorted(table.items())]
