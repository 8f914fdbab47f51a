"""From records of chats to token ids and which of them count: what a worker process does."""

import codecs
import hashlib
import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_emoe.data.chat_records import Message, Schema, messages_of, record_of
from megatron_emoe.data.chat_request import ANSWER_TOKENS, BAD, CHATS, CUT, LONG
from megatron_emoe.data.chat_template import ChatTemplate, RenderedChat, runs
from megatron_emoe.data.corpus import Piece
from megatron_emoe.data.encoder import HASH_BYTES, Encoded, Part
from megatron_emoe.data.files import ChatSidecar
from megatron_emoe.data.preprocess import TokenWriter


@dataclass(frozen=True)
class ChatEncoder:
    """Encodes pieces of chat files.

    template: of one tokenizer. dtype: of the ids. schemas: of each file, by its path. longest: tokens that a chat may
    have. cuts: whether a longer one is cut off there; else it is left out. skips: whether records that are no chats are
    left out; else they end the work. holdout: share of the chats, by a hash of each.
    """

    template: ChatTemplate
    dtype: type[np.integer]
    schemas: Mapping[str, Schema]
    longest: int
    cuts: bool
    skips: bool
    holdout: float

    def encode(self, task: Sequence[Piece]) -> Encoded:
        """What is in a task. The part of what is not held out counts what was left out of both."""
        parts: Encoded = {(CHATS, False): Part()}
        counts = parts[CHATS, False].counts
        for piece in task:
            for origin, line in _records(piece):
                try:
                    messages = messages_of(record_of(line), self.schemas[piece.path])
                    chat = self._fitted(self.template.encode(messages), counts)
                except ValueError as error:
                    if not self.skips:
                        raise ValueError(f"{origin}: {error}") from error
                    counts[BAD] += 1
                    parts[CHATS, False].first_left_out = parts[CHATS, False].first_left_out or f"{origin}: {error}"
                    continue
                if chat is not None:
                    _add(parts.setdefault((CHATS, self._is_held_out(messages)), Part()), chat, self.dtype)
        return parts

    def _is_held_out(self, messages: Sequence[Message]) -> bool:
        digest = hashlib.sha256(json.dumps(messages).encode()).digest()
        return int.from_bytes(digest[:HASH_BYTES]) < self.holdout * 256**HASH_BYTES

    def _fitted(self, chat: RenderedChat, counts: Counter[str]) -> RenderedChat | None:
        if len(chat.ids) <= self.longest:
            return chat
        short = RenderedChat(chat.ids[: self.longest], chat.is_answer[: self.longest])
        if not self.cuts or not short.is_answer[1:].any():
            counts[LONG] += 1
            return None
        counts[CUT] += 1
        return short


def _records(piece: Piece) -> Iterator[tuple[str, bytes]]:
    """Each line of a piece that is not blank, with its place for messages."""
    data = piece.data.removeprefix(codecs.BOM_UTF8) if piece.offset == 0 else piece.data
    unit = {"parquet": "row", "list": "record"}.get(piece.kind, "line")
    for number, line in enumerate(data.split(b"\n"), piece.line):
        if line.strip():
            yield f"{piece.path} {unit} {number}", line


def _add(part: Part, chat: RenderedChat, dtype: type[np.integer]) -> None:
    """One document: a sequence for each stretch of tokens that count, or do not; the mode of the sequence says it."""
    stretches = runs(chat.is_answer)
    for begin, end, counts in stretches:
        part.ids.append(chat.ids[begin:end].astype(dtype))
        part.lengths.append(end - begin)
        part.ends.append(end == len(chat.ids))
        part.modes.append(int(counts))
    part.counts[ANSWER_TOKENS] += int(chat.is_answer[1:].sum())


def chat_tokenizer(model: str, trust_remote_code: bool) -> Any:
    """transformers' tokenizer of a folder or a name on the hub.

    Raises:
        ValueError: it cannot be loaded, or is none that says where in the text a token stands.
    """
    from transformers import AutoTokenizer

    named = f"--tokenizer-model {model}"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # every tokenizer library has its own kinds
        raise ValueError(f"{named}: cannot be loaded ({type(error).__name__}: {error})") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{named}: is no fast tokenizer (tokenizer.json), which tells where answers begin and end")
    return tokenizer


def make_chat_encoder(args: Namespace, schemas: Mapping[str, Schema]) -> ChatEncoder:
    """What one worker process encodes with, from the flags of tools/preprocess_data.py; chat_text is the template."""
    from megatron.core.datasets.indexed_dataset import DType

    tokenizer = chat_tokenizer(args.tokenizer_model, args.trust_remote_code)
    return ChatEncoder(
        template=ChatTemplate(tokenizer, args.chat_text),
        dtype=DType.optimal_dtype(len(tokenizer)),
        schemas=schemas,
        longest=args.seq_length + 1,
        cuts=args.long_chats == "cut",
        skips=args.bad_chats == "drop",
        holdout=args.holdout,
    )


def chat_sidecar(about: Mapping[str, Any], template: str, writer: TokenWriter) -> ChatSidecar:
    """What is told of chats that were written. about: what every sidecar says. template: what --chat-template said."""
    counts = writer.counts
    return ChatSidecar(
        **about,
        chat_template=template,
        answer_tokens=counts[ANSWER_TOKENS],
        longest=writer.longest,
        too_long=counts[LONG],
        cut=counts[CUT],
        bad=counts[BAD],
    )
