"""Raw text in pieces of bounded size, and the documents in them.

A line of a JSONL file, or a row of a Parquet file, is a document; any other file is one document. Files are cut into
pieces at line ends, so that work is shared out by bytes and no process holds more than one piece: a text file larger
than PIECE_BYTES becomes several pieces of one document, each with some text of its neighbours (joints.py has the use).
"""

import codecs
import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_emoe.data.input_files import InputFile, open_stream

PIECE_BYTES = 2 << 20
MAX_LINE_SEARCH = 64 << 10  # how far past PIECE_BYTES a text file is searched for a line end
DIGEST_BYTES = 1 << 20  # of a document's beginning, for its digest
MARGIN_BYTES = 4 << 10  # of a neighbouring piece


@dataclass(frozen=True)
class Piece:
    """Some text of a file: whole lines of JSONL, or a part of a text with what is next to it."""

    path: str
    kind: str  # of InputFile
    data: bytes
    cost: int  # bytes of the file on disk that were read for it
    line: int  # number of its first line, or row, from 1
    offset: int  # in the text of the file
    digest: bytes = b""  # of the whole text
    before: bytes = b""  # up to MARGIN_BYTES in front of it; nothing where the text begins
    after: bytes = b""


@dataclass(frozen=True)
class Document:
    """A document, or the part of it that is in one piece."""

    texts: tuple[str, ...]  # one for each key
    digest: bytes  # SHA-256 of the beginning of the document: the same for all its parts
    origin: str  # for messages
    begin: tuple[str, str] | None = None  # text on both sides of the cut where the part begins; None: the document does
    end: tuple[str, str] | None = None


def cut(file: InputFile, keys: tuple[str, ...]) -> Iterator[Piece]:
    """The pieces of a file in order. An empty file has none.

    Raises:
        ValueError: it cannot be read or unpacked, or a Parquet file lacks one of the columns `keys`.
    """
    with open_stream(file, keys) as (stream, at):
        before, offset, line, paid, margin = b"", 0, 1, 0, min(MARGIN_BYTES, PIECE_BYTES // 2)
        data, paid_now = _take(stream, file.kind), at()
        digest = _digest(data.removeprefix(codecs.BOM_UTF8))
        while data:
            following, told = _take(stream, file.kind), at()
            if len(following) < margin and file.kind == "text":  # no piece is too small for a look behind its cut
                data, following, paid_now = data + following, b"", told
            cost, paid, paid_now = paid_now - paid, paid_now, told
            beside = (digest, before, following[:margin]) if file.kind == "text" else ()
            yield Piece(file.path, file.kind, data, cost, line, offset, *beside)
            offset, line, before = offset + len(data), line + data.count(b"\n"), data[-margin:]
            data = following


def _take(stream: io.BufferedReader, kind: str) -> bytes:
    """PIECE_BYTES and the rest of the line; of a text without near line ends as much as ends with a character."""
    data = stream.read(PIECE_BYTES)
    if len(data) < PIECE_BYTES or data.endswith(b"\n"):
        return data
    if kind != "text":
        return data + stream.readline()
    data += (line := stream.readline(MAX_LINE_SEARCH))
    rest = 0 if line.endswith(b"\n") else sum(1 for _ in _continuation(stream.peek(3)[:3]))
    return data + stream.read(rest)


def _continuation(data: bytes) -> Iterator[int]:
    """The bytes at the beginning of `data` that go on with a character."""
    for byte in data:
        if not 0x80 <= byte < 0xC0:
            return
        yield byte


def group(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Neighbouring pieces together until they make PIECE_BYTES: one task each."""
    task: list[Piece] = []
    for piece in pieces:
        task.append(piece)
        if sum(len(part.data) for part in task) >= PIECE_BYTES:
            yield tuple(task)
            task = []
    if task:
        yield tuple(task)


def read_documents(piece: Piece, keys: tuple[str, ...], errors: str = "strict") -> Iterator[Document]:
    """The documents in a piece, without empty ones.

    Args:
        piece: of a JSONL, Parquet or text file.
        keys: the JSON keys to take; a text file is the text of the only one.
        errors: what to do with bytes that are not UTF-8, as in bytes.decode.

    Raises:
        ValueError: invalid JSON, a missing key or one that is no string (with the line number), undecodable bytes.
    """
    data = piece.data.removeprefix(codecs.BOM_UTF8) if piece.offset == 0 else piece.data
    if piece.kind != "text":
        yield from _json_documents(piece, data, keys, errors)
    elif len(keys) > 1:
        raise ValueError(f"--json-keys {' '.join(keys)}: {piece.path} is a text file, it has one text")
    else:
        text = _decode(data, errors, piece.path, piece.offset)
        begin = _beside(piece.before, piece.data, errors) if piece.offset else None
        end = _beside(piece.data, piece.after, errors) if piece.after else None
        if text or begin or end:
            yield Document((text,), piece.digest, piece.path, begin, end)


def _beside(before: bytes, after: bytes, errors: str) -> tuple[str, str]:
    """The text on both sides of a cut, the same for both of its pieces. Bad bytes are for the piece they are in."""
    margin, errors = min(MARGIN_BYTES, PIECE_BYTES // 2), "replace" if errors == "strict" else errors
    left = before[-margin:]
    left = left[sum(1 for _ in _continuation(left[:3])) :]
    right = codecs.getincrementaldecoder("utf-8")(errors).decode(after[:margin])  # without half a character at its end
    return left.decode("utf-8", errors), right


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data[:DIGEST_BYTES]).digest()


def _decode(data: bytes, errors: str, path: str, begin: int) -> str:
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: byte {data[error.start]:#04x} at offset {begin + error.start} is not UTF-8: convert the file, or "
            "give --errors replace or --errors ignore"
        ) from error


def _json_documents(piece: Piece, data: bytes, keys: tuple[str, ...], errors: str) -> Iterator[Document]:
    offset = piece.offset
    for number, line in enumerate(data.split(b"\n"), piece.line):
        if line.strip():
            origin = f"{piece.path} {'row' if piece.kind == 'parquet' else 'line'} {number}"
            try:
                record = _record(_decode(line, errors, piece.path, offset))
                texts = tuple(_text(record, key, errors) for key in keys)
            except ValueError as error:
                raise ValueError(f"{origin}: {error}") from error
            if any(texts):
                yield Document(texts, _digest(texts[0].encode()), origin)
        offset += len(line) + 1


def _record(line: str) -> object:
    try:
        return json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = "too many brackets in each other" if isinstance(error, RecursionError) else error
        raise ValueError(f"not valid JSON: {reason}; --input-format text takes the file as plain text") from error


def _text(record: object, key: str, errors: str) -> str:
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, must be an object (JSONL has one object per line)")
    if key not in record:
        raise ValueError(f"no key {key!r}, there are {', '.join(map(repr, record)) or 'none'} (--json-keys)")
    if not isinstance(record[key], str):
        raise ValueError(f"the value of {key!r} is a {type(record[key]).__name__}, must be a string")
    try:  # JSON can spell half a character, "\ud800", which no file can hold
        return record[key].encode("utf-8", errors).decode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{key!r} has a lone surrogate {error.object[error.start]!r}: --errors replace") from error
