"""From documents to token ids: what a worker process does with pieces of the input."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from megatron_emoe.data.corpus import Document, Piece, read_documents
from megatron_emoe.data.joints import encode_part

HASH_BYTES = 8  # bytes of a document's digest that decide on which side of the holdout it is


@dataclass
class Part:
    """Encoded sequences of one output in order: ids in a row, the length of each, and whether it ends a document.

    Of chats also the mode of each (1 where its tokens count in the loss), and counts of what was encoded and left out,
    with place and reason of the first that was.
    """

    ids: list[np.ndarray] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    ends: list[bool] = field(default_factory=list)
    modes: list[int] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    first_left_out: str = ""


Encoded = dict[tuple[str, bool], Part]  # by key and whether it is held out


class Encodes(Protocol):
    """What a worker process calls."""

    def encode(self, task: Sequence[Piece]) -> Encoded:
        """What is in a task. ValueError for what cannot be encoded."""


@dataclass(frozen=True)
class Encoder:
    """Encodes pieces of the input with one tokenizer."""

    tokenizer: Any  # Megatron's: tokenize, eod, vocab_size
    dtype: type[np.integer]
    keys: tuple[str, ...]
    errors: str
    append_eod: bool
    holdout: float

    def encode(self, task: Sequence[Piece]) -> Encoded:
        """What is in a task. Whole documents are held out, chosen by a hash of their content."""
        parts: Encoded = {}
        for piece in task:
            for document in read_documents(piece, self.keys, self.errors):
                is_held_out = int.from_bytes(document.digest[:HASH_BYTES]) < self.holdout * 256**HASH_BYTES
                for key, text in zip(self.keys, document.texts, strict=True):
                    self._add(parts.setdefault((key, is_held_out), Part()), document, text)
        return parts

    def _add(self, part: Part, document: Document, text: str) -> None:
        ids = self._ids(document, text)
        if not ids and document.begin is document.end is None:
            return
        if document.end is None and self.append_eod:
            ids = [*ids, self.tokenizer.eod]
        array = np.asarray(ids, dtype=np.int64)
        if len(array) and not 0 <= array.min() <= array.max() < self.tokenizer.vocab_size:
            span = f"token ids {array.min()} to {array.max()}"
            raise ValueError(f"{document.origin}: {span}, the tokenizer has 0 to {self.tokenizer.vocab_size - 1}")
        part.ids.append(array.astype(self.dtype))
        part.lengths.append(len(array))
        part.ends.append(document.end is None)

    def _tokenize(self, text: str) -> list[int]:
        return list(self.tokenizer.tokenize(text))

    def _ids(self, document: Document, text: str) -> list[int]:
        try:
            if document.begin or document.end:
                return encode_part(self._tokenize, text, document.begin, document.end)
            return self._tokenize(text) if text else []
        except Exception as error:  # every tokenizer library has its own kinds
            raise ValueError(f"{document.origin}: cannot be tokenized ({type(error).__name__}: {error})") from error
