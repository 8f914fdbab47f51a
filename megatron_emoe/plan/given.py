"""What the flags of a training run say of its plan: how long it is, what of the layout they fix, and elastic settings.

They come last on the run's command line, behind what a plan proposes, so a plan that did not know them would be another
run's. Nothing of Megatron is imported.
"""

from __future__ import annotations

import argparse
from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from megatron_emoe.plan.model import CHOICES, OF_THE_LAYOUT
from megatron_emoe.settings import flag_files

_LAYOUT = {flag: own[2:].replace("-", "_") for flag, own in OF_THE_LAYOUT.items() if own not in CHOICES}
"""Flag of Megatron's -> what it is called in a plan (search.Wanted): those that are numbers."""

_PRECISIONS = {"--fp8-format": "fp8", "--bf16": "bf16"}
_LENGTH = {"--train-iters": "steps", "--train-samples": "samples"}


@dataclass(frozen=True)
class Given:
    """layout: what the flags fix, by its name in a plan. steps: of the run; samples: its sequences, where those are
    given instead. Neither: its length is not among the flags. elastic: the elastic flags among them, with their values.
    precision: bf16 or fp8, where the flags say so."""

    layout: dict[str, int]
    steps: int | None = None
    samples: int | None = None
    elastic: tuple[str, ...] = ()
    precision: str | None = None

    def tokens(self, global_batch: int, seq: int) -> float | None:
        """Tokens of the whole run; None where its length is not given."""
        if self.steps is not None:
            return float(self.steps * global_batch * seq)
        return None if self.samples is None else float(self.samples * seq)


class _Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message.removeprefix("argument "))


def read_given(file: str) -> Given:
    """What the flags in `file` fix; of a flag that stands there twice the last counts, as in the run.

    Raises:
        ValueError: no such file, or a value that is no number of at least 1.
    """
    parser = _Words(add_help=False, allow_abbrev=False)
    for flag, name in {**_LAYOUT, **_LENGTH}.items():
        parser.add_argument(flag, dest=name, type=int)
    words = flag_files.expand([f"@{file}"])
    found: Namespace = parser.parse_known_args(words)[0]
    values = {name: value for name, value in vars(found).items() if value is not None}
    for flag, name in {**_LAYOUT, **_LENGTH}.items():
        if values.get(name, 1) < 1:
            raise ValueError(f"{flag} {values[name]}: must be at least 1")
    length = {name: values.pop(name, None) for name in _LENGTH.values()}
    names = {word.partition("=")[0] for word in words}
    precision = next((kind for flag, kind in _PRECISIONS.items() if flag in names), None)
    return Given(values, **length, elastic=tuple(_elastic(words)), precision=precision)


def _elastic(words: Sequence[str]) -> Iterator[str]:
    taken = False
    for word in words:
        if word.startswith("--"):
            taken = word.startswith("--emoe-")
        if taken:
            yield word
