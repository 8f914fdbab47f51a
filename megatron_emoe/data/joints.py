"""The ids of one long text from the ids of its parts, as if it were encoded at once.

A tokenizer adds to every text what belongs to a whole document (<s>, </s>, a blank in front), and cares for what
stands on both sides of a cut. So a part is encoded behind the text in front of it, whose own ids are then taken away,
and a cut is moved on to where that changes nothing: the ids of the text in front are then those that the text as a
whole begins with. Both parts find the same place, since they look at the same text.
"""

from collections.abc import Callable, Iterator
from itertools import takewhile

Encode = Callable[[str], list[int]]
Cut = tuple[str, str]
MOST_PLACES = 200  # that are tried for one cut


def encode_part(encode: Encode, text: str, begin: Cut | None, end: Cut | None) -> list[int]:
    """The ids that belong to a part of a text; those of all parts in a row are those of the whole text.

    Args:
        encode: from text to ids, with all that the tokenizer adds.
        text: the part.
        begin: text on both sides of the cut in front of the part; None where the whole text begins.
        end: the same behind it.

    Raises:
        ValueError: there is no place to cut.
    """
    added, before, start = ids_behind(encode), "", 0
    if begin:
        start = place_to_cut(encode, added, *begin)
        before = begin[0] + begin[1][:start]
    behind = end[1][: place_to_cut(encode, added, *end)] if end else ""
    ids, front = encode(before + text[start:] + behind), encode(before) if before else []
    front = front[: len(front) - added]
    if ids[: len(front)] != front:
        raise ValueError("encoded in parts it gives other ids: split the file into documents")
    return ids[len(front) : len(ids) - added if end else None]


def ids_behind(encode: Encode) -> int:
    """How many ids a tokenizer puts behind every text: those of no text at all, without those in front of a text.

    Raises:
        ValueError: it puts others behind other texts.
    """
    try:
        nothing, some = encode(""), encode("a")
    except Exception:  # as NullTokenizer, which knows numbers alone and adds nothing
        return 0
    added = nothing[_alike(nothing, some) :]
    if some[len(some) - len(added) :] != added:
        raise ValueError("what the tokenizer puts behind a text differs: split the file into documents")
    return len(added)


def _alike(one: list[int], other: list[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def place_to_cut(encode: Encode, added: int, left: str, right: str) -> int:
    """How many characters of `right` belong in front of the cut between `left` and `right`.

    Raises:
        ValueError: wherever it is cut, the ids change.
    """
    whole = encode(left + right)
    for place in _places(left, right):
        front = _try(encode, left + right[:place])
        if front is not None and front[: len(front) - added] == whole[: len(front) - added]:
            return place
    raise ValueError(f"no place to cut behind {left[-20:]!r} that changes no ids: split the file into documents")


def _try(encode: Encode, text: str) -> list[int] | None:
    try:
        return encode(text)
    except Exception:  # half a number, for NullTokenizer
        return None


def _places(left: str, right: str) -> Iterator[int]:
    """Where a line begins with a word, then where a word begins, then anywhere; half of `right` is left to look at."""
    text, first = left[-1:] + right, len(left[-1:])
    cuts = range(first, first + len(right) // 2)
    lines = [at for at in cuts if text[at - 1 : at] == "\n" and not text[at].isspace()]
    words = [at for at in cuts if text[at] == " " and not text[at - 1 : at].isspace()]
    tried = dict.fromkeys([*lines[:MOST_PLACES], *words[:MOST_PLACES], *cuts[:MOST_PLACES]])
    yield from (at - first for at in tried)
