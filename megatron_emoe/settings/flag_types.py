"""Values of flags, for argparse's `type`: each takes the word and raises what argparse prints."""

import os
from argparse import ArgumentTypeError
from collections.abc import Callable
from pathlib import Path

LONGEST_NAME = 255
"""Bytes of a file's name that file systems hold."""
LONGEST_PATH = 4095
"""Bytes of a path that Linux takes."""
MOST_WORKERS = 1024
"""Threads or processes of one program: more are a slip, and would fail after the work has begun."""


def whole(word: str) -> int:
    """A whole number above 0."""
    if not word.isdecimal() or int(word) < 1:
        raise ArgumentTypeError(f"{word}: must be a whole number of at least 1")
    return int(word)


def whole_to(most: int) -> Callable[[str], int]:
    """The type of a whole number from 1 to `most`."""

    def whole_number(word: str) -> int:
        if whole(word) > most:
            raise ArgumentTypeError(f"{word}: must be at most {most}")
        return int(word)

    return whole_number


def positive(word: str) -> float:
    """A finite number above 0."""
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ArgumentTypeError(f"{word}: must be a number above 0")
    return number


def copies(word: str) -> int:
    """2x is 2; from 2x to 16x."""
    number = word.removesuffix("x")
    if not word.endswith("x") or not number.isascii() or not number.isdigit() or not 2 <= int(number[:9]) <= 16:
        raise ArgumentTypeError(f"{word}: must be 2x to 16x")
    return int(number)


def share(word: str) -> float:
    """A number in [0, 1]."""
    try:
        value = float(word)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise ArgumentTypeError(f"{word}: must be a number in [0, 1]")
    return value


def per_layer(word: str) -> tuple[int, ...]:
    """Whole numbers with commas between them: `2,4,4` is (2, 4, 4)."""
    try:
        return tuple(int(part) for part in word.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{word!r}: must be whole numbers with commas between them, such as 2,4,4") from None


def path_word(word: str) -> str:
    """The path of a file or folder, as it was given; nothing need be there."""
    if not word:
        raise ArgumentTypeError("'': must be a path")
    if any(len(os.fsencode(name)) > LONGEST_NAME for name in word.split(os.sep)):
        raise ArgumentTypeError(f"{word}: no file's name has more than {LONGEST_NAME} bytes")
    if len(os.fsencode(word)) > LONGEST_PATH:
        raise ArgumentTypeError(f"{word}: no path has more than {LONGEST_PATH} bytes")
    return word


def a_path(word: str) -> Path:
    """The same, as a Path."""
    return Path(path_word(word))
