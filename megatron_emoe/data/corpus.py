"""Raw text on disk: which files an input means, and their documents, read in pieces of bounded size.

A line of a JSONL file is a document; any other file is one document. Files are cut into pieces at line ends, so that
work is shared out by bytes and no process holds more than one piece: a text file larger than PIECE_BYTES becomes
several pieces of one document.
"""

import codecs
import glob
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

PIECE_BYTES = 2 << 20
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
MAX_LINE_SEARCH = 64 << 10  # how far past PIECE_BYTES a text file is searched for a line end
DIGEST_BYTES = 1 << 20  # of a document's beginning, for its digest


@dataclass(frozen=True)
class Piece:
    """The bytes [begin, end) of a file of `size` bytes; whole lines of a JSONL file."""

    path: str
    begin: int
    end: int
    size: int


@dataclass(frozen=True)
class Document:
    """A document, or the part of it that is in one piece."""

    texts: tuple[str, ...]  # one for each key
    digest: bytes  # SHA-256 of the beginning of the document: the same for all its parts
    begins: bool
    ends: bool
    origin: str  # for messages


def find_files(inputs: Iterable[str], suffixes: Iterable[str]) -> list[str]:
    """The files that paths, folders and glob patterns mean, each once, folders in sorted order.

    In folders only names with one of the suffixes count, and names that begin with a dot are passed over.

    Raises:
        ValueError: an input means no file at all.
    """
    suffixes, found = tuple(suffixes), dict[str, str]()
    for path in inputs:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        if not matches:
            raise ValueError(f"--input {path}: no such file or folder")
        files = [file for match in matches for file in _files_below(match, suffixes)]
        if not files:
            raise ValueError(f"--input {path}: no file in it ends in {', '.join(suffixes)} (--suffix)")
        found |= {os.path.realpath(file): file for file in files}
    return list(found.values())


def _files_below(path: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            file = os.path.join(folder, name)
            if name.endswith(suffixes) and not name.startswith(".") and os.path.isfile(file):
                yield file


def cut(path: str) -> Iterator[Piece]:
    """The pieces of a file in order; each byte is looked at once at most. An empty file has none."""
    size, begin = os.path.getsize(path), 0
    with open(path, "rb") as file:
        while begin < size:
            end = _line_end(file, begin + PIECE_BYTES, size, is_jsonl(path))
            yield Piece(path, begin, end, size)
            begin = end


def _line_end(file, offset: int, size: int, must_be_line: bool) -> int:
    """The first offset from `offset` on where a line begins; in text without near line ends, where a character does."""
    if offset >= size:
        return size
    file.seek(offset - 1)
    line = first = file.readline(MAX_LINE_SEARCH)
    while must_be_line and line and not line.endswith(b"\n"):
        line = file.readline(MAX_LINE_SEARCH)
    if line.endswith(b"\n") or file.tell() == size:
        return file.tell()
    inside_character = (0x80 <= byte < 0xC0 for byte in first[1:4])
    return offset + sum(itertools.takewhile(bool, inside_character))


def is_jsonl(path: str) -> bool:
    """Whether a file holds one JSON object per line, by its name."""
    return path.endswith(JSONL_SUFFIXES)


def group(pieces: Iterable[Piece]) -> Iterator[tuple[Piece, ...]]:
    """Neighbouring pieces together until they make PIECE_BYTES: one task each."""
    task: list[Piece] = []
    for piece in pieces:
        task.append(piece)
        if sum(part.end - part.begin for part in task) >= PIECE_BYTES:
            yield tuple(task)
            task = []
    if task:
        yield tuple(task)


def read_documents(piece: Piece, keys: tuple[str, ...], errors: str = "strict") -> Iterator[Document]:
    """The documents in a piece, without empty ones.

    Args:
        piece: of a JSONL or a text file.
        keys: the JSON keys to take; a text file is the text of the only one.
        errors: what to do with bytes that are not UTF-8, as in bytes.decode.

    Raises:
        ValueError: invalid JSON, a missing key or one that is no string (with the line number), undecodable bytes.
    """
    with open(piece.path, "rb") as file:
        file.seek(piece.begin)
        data = file.read(piece.end - piece.begin)
    if piece.begin == 0:
        data = data.removeprefix(codecs.BOM_UTF8)
    if is_jsonl(piece.path):
        yield from _json_documents(piece, data, keys, errors)
    elif len(keys) > 1:
        raise ValueError(f"--json-keys {' '.join(keys)}: {piece.path} is a text file, it has one text")
    else:
        text = _decode(data, errors, piece.path, piece.begin)
        begins, ends = piece.begin == 0, piece.end == piece.size
        head = data if begins and ends else _head(piece.path)
        if text or not (begins and ends):
            yield Document((text,), _digest(head), begins, ends, piece.path)


def _head(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(DIGEST_BYTES + len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8)


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
    offset = piece.begin
    for line in data.split(b"\n"):
        if line.strip():
            try:
                record = json.loads(_decode(line, errors, piece.path, offset))
                texts = tuple(_text(record, key, errors) for key in keys)
            except ValueError as error:
                reason = f"not valid JSON: {error}" if isinstance(error, json.JSONDecodeError) else error
                raise ValueError(f"{piece.path} line {_line_number(piece.path, offset)}: {reason}") from error
            if any(texts):
                origin = f"{piece.path} at byte {offset}"
                yield Document(texts, _digest(texts[0].encode()), True, True, origin)
        offset += len(line) + 1


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


def _line_number(path: str, offset: int) -> int:
    """The number of the line that begins at an offset, counted from 1; read again, only for a message."""
    with open(path, "rb") as file:
        return 1 + sum(file.read(min(PIECE_BYTES, offset - at)).count(b"\n") for at in range(0, offset, PIECE_BYTES))
