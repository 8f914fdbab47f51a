"""Values of flags, for argparse's `type`: each takes the word and raises what argparse prints."""

from argparse import ArgumentTypeError


def whole(word: str) -> int:
    """A whole number above 0."""
    if not word.isdecimal() or int(word) < 1:
        raise ArgumentTypeError(f"{word}: must be a whole number of at least 1")
    return int(word)


def positive(word: str) -> float:
    """A finite number above 0."""
    try:
        number = float(word)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ArgumentTypeError(f"{word}: must be a number above 0")
    return number


def per_layer(word: str) -> tuple[int, ...]:
    """Whole numbers with commas between them: `2,4,4` is (2, 4, 4)."""
    try:
        return tuple(int(part) for part in word.split(","))
    except ValueError:
        raise ArgumentTypeError(f"{word!r}: must be whole numbers with commas between them, such as 2,4,4") from None
