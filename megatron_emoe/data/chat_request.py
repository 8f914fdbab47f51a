"""What `preprocess_data.py --chat` is asked for: its flags, what is refused before work starts, and what the files are.

Imports nothing slow: a program that refuses answers at once.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_emoe.data.chat_records import OWN, Schema, record_of, schema_of
from megatron_emoe.data.input_files import HEAD_BYTES, LIST_OF_RECORDS, InputFile, look, open_stream
from megatron_emoe.settings.flag_types import whole_to

if TYPE_CHECKING:
    from megatron_emoe.data.preprocess import TokenWriter

CHATS = "chats"
"""The one key of what is encoded."""
BAD, LONG, CUT, ANSWER_TOKENS = "bad", "too long", "cut", "answer tokens"
"""What is counted."""

TEMPLATE_HELP = "with --chat: own (default: the tokenizer's), tulu, alpaca, chatml, a Jinja file, or Jinja itself"
"""Of a flag that is Megatron's."""

MOST_TOKENS = 2**31 - 2  # of a chat: Megatron's index counts in 32 bits
FIRST_LINES = 1000  # looked at for a chat, where records that are none are left out
TOGETHER = ("seq_length", "long_chats", "bad_chats")
"""Settings that mean something with --chat alone."""


def add_chat_flags(parser: argparse.ArgumentParser) -> None:
    """The group "chats"."""
    add = parser.add_argument_group("chats").add_argument
    add("--chat", action="store_true", help="the input is chats: only what the assistant says counts in the loss")
    add("--seq-length", type=whole_to(MOST_TOKENS), help="that of the training: the longest chat has a token more")
    add("--long-chats", choices=["drop", "cut"], help="what to do with longer ones (default: drop); either is counted")
    add("--bad-chats", choices=["stop", "drop"], help="what to do with records that are no chats (default: stop)")


def check_chat(args: argparse.Namespace) -> None:
    """ValueError for flags that cannot work together; without --chat for those that need it."""
    if not args.chat:
        for name in TOGETHER:
            if getattr(args, name, None) is not None:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: has no effect without --chat")
        return
    from megatron_emoe.data.chat_template import check_template

    rules = [
        (
            args.tokenizer_type != "HuggingFaceTokenizer",
            f"--chat: needs --tokenizer-type HuggingFaceTokenizer, not {args.tokenizer_type}: it has chat templates",
        ),
        (
            args.tokenizer_model is None,
            "--chat: needs --tokenizer-model, the folder of a model, or its name on the hub",
        ),
        (
            args.seq_length is None,
            "--chat: needs --seq-length, that of the training: a longer chat fits in no sequence",
        ),
        (args.append_eod, "--chat excludes --append-eod: the chat template ends turns"),
        (args.errors != "strict", f"--chat excludes --errors {args.errors}: --bad-chats drop leaves such records out"),
        (
            args.json_keys and len(args.json_keys) > 2,
            f"--json-keys {' '.join(args.json_keys or [])}: with --chat one column of turns, or question and answer",
        ),
        (args.input_format == "text", "--input-format text: chats are JSONL, a JSON list or Parquet"),
    ]
    for broken, message in rules:
        if broken:
            raise ValueError(message)
    args.chat_template = args.chat_template or OWN
    args.long_chats, args.bad_chats = args.long_chats or "drop", args.bad_chats or "stop"
    check_template(args.chat_template)


def check_template_file(prefix: str, inputs: Sequence[str], overwrite: bool) -> None:
    """<prefix>.jinja, where the template goes, takes the place of nothing (ValueError)."""
    path = f"{prefix}.jinja"
    if os.path.isdir(path):
        raise ValueError(f"--output-prefix {prefix}: {path} is a folder")
    if os.path.exists(path) and os.path.realpath(path) in set(map(os.path.realpath, inputs)):
        raise ValueError(f"--output-prefix {prefix}: {path} is one of the inputs")
    if os.path.exists(path) and not overwrite:
        raise ValueError(f"--output-prefix {prefix}: {path} exists (--overwrite replaces it)")


def look_at_chats(path: str, chosen: str) -> InputFile:
    """What a file of chats is. chosen: what --input-format says.

    Raises:
        ValueError: it cannot be read, or is plain text.
    """
    file = look(path, (), "text" if chosen == "auto" and _is_list(path) else chosen)
    if file.size and file.kind == "text":
        if not _is_list(path):
            raise ValueError(f"--input {path}: is plain text; chats are JSONL, a JSON list or Parquet")
        file = replace(file, kind="list")
    return replace(file, nested=True)


def _is_list(path: str) -> bool:
    """Whether a file begins as a JSON list of objects does."""
    plain = look(path, (), "text")
    with open_stream(plain, ()) as (stream, _):
        return LIST_OF_RECORDS.match(stream.read(HEAD_BYTES).removeprefix(b"\xef\xbb\xbf").lstrip()) is not None


def schemas_of(args: argparse.Namespace, files: Sequence[InputFile]) -> dict[str, Schema]:
    """Of what kind the records of each file are that is not empty, by its path (ValueError as schema_of_file)."""
    return {file.path: schema_of_file(file, args.json_keys, args.bad_chats) for file in files if file.size}


def told_of_chats(writer: TokenWriter, length: int) -> str:
    """What a data set holds, in one line. length: --seq-length."""
    answers, sequences = writer.counts[ANSWER_TOKENS], -(-writer.tokens // length)
    held = f"{writer.documents} chats, {writer.tokens} tokens, {answers} of them answers"
    return f"{held}; the longest has {writer.longest}; about {sequences} sequences of {length}"


def left_out(writer: TokenWriter) -> list[str]:
    """Lines about chats that were left out or cut off, none where there are none. writer: of what is not held out."""
    counts = writer.counts
    lines = [f"{counts[LONG]} chats left out, longer than --seq-length + 1 tokens"] if counts[LONG] else []
    lines += [f"{counts[CUT]} chats cut off at --seq-length + 1 tokens"] if counts[CUT] else []
    if counts[BAD]:
        lines += [f"{counts[BAD]} records left out that are no chats, the first of them {writer.first_left_out}"]
    return lines


def schema_of_file(file: InputFile, chosen: Sequence[str] | None, bad_chats: str) -> Schema:
    """Of what kind the records of a file are. chosen: what --json-keys says, if anything.

    Raises:
        ValueError: the first record is no chat; with --bad-chats drop, none of the first ones is.
    """
    keys = tuple(chosen or ())
    if file.kind == "parquet":
        import pyarrow.parquet

        try:
            return schema_of(pyarrow.parquet.read_schema(file.path).names, keys)
        except ValueError as error:
            raise ValueError(f"{file.path}: {error}") from error
    first: ValueError | None = None
    with open_stream(file, ()) as (stream, _):
        for number in range(1, FIRST_LINES + 1):
            line = stream.readline()
            if line.strip():
                try:
                    return _schema_of_line(line, keys, number)
                except ValueError as error:
                    first = first or ValueError(f"{file.path} {_unit(file)} {number}: {error}")
                    if bad_chats == "stop":
                        break
            elif not line:
                break
    raise first or ValueError(f"{file.path}: no record in it")


def _schema_of_line(line: bytes, keys: tuple[str, ...], number: int) -> Schema:
    record = record_of(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, must be an object")
    return schema_of(record, keys)


def _unit(file: InputFile) -> str:
    return "record" if file.kind == "list" else "line"
