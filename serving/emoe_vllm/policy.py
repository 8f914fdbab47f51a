"""The k' of decoding by load: which levels there are, and when a server goes from one to another. Pure.

The load of a step is the number of requests that wait or run. A higher load counts at once: the level of that load
applies in the very step. A lower one counts when it has been there for a while: when `hold` steps in a row had fewer
requests than the level's start less `margin`, the next step has one level above, and so on. So a load that swings
around a start changes nothing, and every level lasts `hold` steps at least before a better one. An engine without
requests takes no steps; it is at the first level when work comes.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from emoe_vllm.budgets import Ks

HOLD = 16
"""Steps, by default: a second or less of decoding."""


@dataclass(frozen=True)
class LoadTable:
    """starts: the requests from which on each level applies, ascending from 0; ks: its k', falling. left_out: starts
    and k' below the floor `min_quality`; the level before them stands in."""

    starts: tuple[int, ...]
    ks: tuple[Ks, ...]
    hold: int
    margin: int
    min_quality: float | None = None
    left_out: tuple[tuple[int, Ks], ...] = ()


class Policy:
    """now: the number of the level, 0 that of no load. calm: steps in a row with a load low enough to leave it upwards.
    changes: since the start."""

    def __init__(self, starts: Sequence[int], hold: int, margin: int) -> None:
        self.starts, self.hold, self.margin = tuple(starts), hold, margin
        self.now = self.calm = self.changes = 0

    def step(self, requests: int) -> int:
        """The level of a step that begins with so many requests."""
        wanted = bisect_right(self.starts, requests) - 1
        if wanted > self.now:
            self._go(wanted)
        elif self._is_calm(requests) and self.calm >= self.hold:
            self._go(self.now - 1)
        self.calm = self.calm + 1 if self._is_calm(requests) else 0
        return self.now

    def rest(self) -> None:
        """There are no requests."""
        if self.now:
            self._go(0)

    def _is_calm(self, requests: int) -> bool:
        return requests < self.starts[self.now] - self.margin

    def _go(self, level: int) -> None:
        self.now, self.calm, self.changes = level, 0, self.changes + 1


def read_load_table(
    asked: Mapping[str, Any], where: str, resolve: Callable[[Any, str], Ks], quality: Callable[[Ks], float | None]
) -> LoadTable | None:
    """What `follow`, `hold`, `margin` and `min_quality` of the flag say; None where nothing is followed.

    resolve: a k' or name, and where it stands, to a k' that is served, or ValueError. quality: of a k', where known.

    Raises:
        ValueError: key, value and rule.
    """
    if asked.get("follow") in (None, False):
        for key in ("hold", "margin", "min_quality"):
            if key in asked:
                raise ValueError(f"{where}.{key} {asked[key]!r}: only with follow")
        return None
    levels = _levels(asked["follow"], f"{where}.follow", resolve)
    floor = asked.get("min_quality")
    if floor is not None and (type(floor) not in (int, float) or not 0 < floor < float("inf")):
        raise ValueError(f"{where}.min_quality {floor!r}: must be a number above 0")
    kept = levels if floor is None else _above(floor, levels, f"{where}.follow", quality)
    starts = tuple(kept)
    gap = min((high - low for low, high in zip(starts, starts[1:], strict=False)), default=1)
    return LoadTable(
        starts=starts,
        ks=tuple(kept.values()),
        hold=_whole(asked, "hold", HOLD, where, None),
        margin=_whole(asked, "margin", gap // 4, where, gap - 1),
        min_quality=floor,
        left_out=tuple((start, k) for start, k in levels.items() if start not in kept),
    )


def experts(k: Ks, layers: int) -> int:
    """Of a token, in all layers together."""
    return k * layers if isinstance(k, int) else sum(k)


def _levels(found: Any, where: str, resolve: Callable[[Any, str], Ks]) -> dict[int, Ks]:
    if not isinstance(found, Mapping) or not all(isinstance(key, str) and key.isdecimal() for key in found):
        raise ValueError(f'{where} {found!r}: must be an object of requests and k\', such as {{"0": 8, "16": 4}}')
    starts = sorted(map(int, found))
    if len(set(starts)) < len(starts) or starts[:1] != [0]:
        raise ValueError(f"{where} {', '.join(found)}: must have 0 among the requests, and none twice")
    named = {int(key): (key, value) for key, value in found.items()}
    levels = {start: resolve(named[start][1], f"{where}.{named[start][0]}") for start in starts}
    layers = max(len(k) if isinstance(k, tuple) else 1 for k in levels.values())
    for low, high in zip(starts, starts[1:], strict=False):
        if experts(levels[high], layers) >= experts(levels[low], layers):
            raise ValueError(
                f"{where}.{high} {named[high][1]!r}: must need fewer experts than {named[low][1]!r} from {low} on"
            )
    return levels


def _above(floor: float, levels: Mapping[int, Ks], where: str, quality: Callable[[Ks], float | None]) -> dict[int, Ks]:
    """The levels whose quality is no less than the floor; the first must be one."""
    kept = {}
    for start, k in levels.items():
        found = quality(k)
        if found is None:
            raise ValueError(f"{where}.{start} {k!r}: its quality is not known; with min_quality it must be in budgets")
        if found >= floor:
            kept[start] = k
        elif not start:
            raise ValueError(f"{where}.0 {k!r}: has a quality of {found:g}; must be at least min_quality, {floor:g}")
    return kept


def _whole(asked: Mapping[str, Any], key: str, default: int, where: str, most: int | None) -> int:
    value = asked.get(key, default)
    if type(value) is not int or value < 0 or (most is not None and value > most):
        rule = "0 or more" if most is None else f"in [0, {most}], less than the starts are apart"
        raise ValueError(f"{where}.{key} {value!r}: must be a whole number {rule}")
    return value
