"""Which files an input means, what each of them is, and its text as one stream of bytes, whatever it is packed in.

What a file is comes from its content: its first bytes say how it is packed, its first line whether it is JSONL. A name
only ever leads to a refusal: a file that is named as JSONL must be JSONL. What content does not tell is asked for.
"""

import bz2
import codecs
import contextlib
import glob
import gzip
import importlib
import io
import json
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from megatron_emoe.data.json_list import ObjectLines

FORMATS = ("auto", "jsonl", "text", "parquet")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
PACKINGS = {  # how a packed file begins; none of it can begin a text in UTF-8, but bzip2's ten characters
    "gzip": re.compile(rb"\x1f\x8b"),
    "bzip2": re.compile(rb"BZh[1-9]1AY&SY"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd"),
}
PARQUET = b"PAR1"  # at both ends of a file
HEAD_BYTES = 64 << 10  # of the text, looked at to tell what it is
ROWS_AT_ONCE = 256  # of a Parquet file: bounds what is in memory
OBJECT = re.compile(rb'\{\s*["}]')  # nothing else can begin a JSON object
LIST_OF_RECORDS = re.compile(rb'\[\s*[{"]')
TOLD = "--input-format jsonl or text says what it is"


@dataclass(frozen=True)
class InputFile:
    """A file and what it is: kind is one of FORMATS but auto, or "list" (of JSON objects; for chats alone), packing one
    of PACKINGS or "", size bytes on disk. nested: columns of a Parquet file may hold more than strings."""

    path: str
    kind: str
    packing: str
    size: int
    nested: bool = False


def find_files(inputs: Iterable[str], suffixes: Iterable[str]) -> tuple[list[str], list[str]]:
    """The files that paths, folders and glob patterns mean, each once, and those of the folders that are not read.

    A folder's are in sorted order; those count whose name has one of the suffixes, in letters of either case, perhaps
    with one of PACKED_SUFFIXES behind it. Names that begin with a dot are passed over.

    Raises:
        ValueError: an input means no file at all.
    """
    endings, found, skipped = tuple(map(str.lower, suffixes)), dict[str, str](), list[str]()
    for path in inputs:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        files = [file for match in matches for file in _files_below(match, endings, skipped)]
        if not any(map(os.path.exists, matches)):
            raise ValueError(f"--input {path}: no such file or folder")
        if not files:
            raise ValueError(f"--input {path}: no file in it ends in {', '.join(endings)} (--suffix){_some(skipped)}")
        found |= {os.path.realpath(file): file for file in files}
    return list(found.values()), skipped


def _some(skipped: Sequence[str]) -> str:
    names = ", ".join(map(os.path.basename, skipped[:5])) + (", ..." if len(skipped) > 5 else "")
    return f"; it holds {names}" if skipped else ""


def not_read(skipped: Sequence[str]) -> str:
    """One line about files of folders that are passed over."""
    names = ", ".join(skipped[:5]) + (", ..." if len(skipped) > 5 else "")
    return f"{len(skipped)} {'file is' if len(skipped) == 1 else 'files are'} not read, by --suffix: {names}"


def _files_below(path: str, endings: tuple[str, ...], skipped: list[str]) -> Iterator[str]:
    if not os.path.isdir(path):
        yield path
        return
    for folder, folders, names in os.walk(path):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        skipped += (os.path.join(folder, name) for name in folders if os.path.islink(os.path.join(folder, name)))
        for name in sorted(name for name in names if not name.startswith(".")):
            file = os.path.join(folder, name)
            if os.path.isfile(file) and unpacked_name(name).endswith(endings) | name.lower().endswith(endings):
                yield file
            else:
                skipped.append(file)


def unpacked_name(name: str) -> str:
    """A name in small letters, without the suffix of a packing."""
    stem, ending = os.path.splitext(name.lower())
    return stem if ending in PACKED_SUFFIXES else name.lower()


def look(path: str, keys: tuple[str, ...], chosen: str = "auto") -> InputFile:
    """What a file is, by its first bytes, or as `chosen` from FORMATS.

    Args:
        path: of a file.
        keys: columns that a Parquet file must have.
        chosen: auto, or what it is said to be; how it is packed is seen in any case.

    Raises:
        ValueError: a file that cannot be read, is binary, or of which its content does not tell what it is.
    """
    if not os.path.isfile(path):
        raise ValueError(f"--input {path}: is no file that can be read from its beginning to its end")
    try:
        size = os.path.getsize(path)
        packing, is_parquet = _first_bytes(path)
    except OSError as error:
        raise ValueError(f"--input {path}: cannot be read ({error.strerror})") from error
    plain = InputFile(path, "text", packing, size)
    if chosen == "parquet" or (chosen == "auto" and is_parquet):
        file = InputFile(path, "parquet", packing, size)
        with open_stream(file, keys):
            return file
    if size == 0 or chosen != "auto":
        return InputFile(path, "text" if chosen == "auto" else chosen, packing, size)
    with open_stream(plain, keys) as (stream, _):
        return InputFile(path, _kind(path, stream), packing, size)


def _first_bytes(path: str) -> tuple[str, bool]:
    """How a file is packed, and whether it is Parquet."""
    with open(path, "rb") as file:
        head = file.read(16)
        file.seek(max(0, os.path.getsize(path) - len(PARQUET)))
        is_parquet = head.startswith(PARQUET) and file.read() == PARQUET and len(head) > 2 * len(PARQUET)
    return next((name for name, magic in PACKINGS.items() if magic.match(head)), ""), is_parquet


def _kind(path: str, stream: IO[bytes]) -> str:
    head = stream.read(HEAD_BYTES).removeprefix(codecs.BOM_UTF8)
    if head.startswith(PARQUET) and b"\0" in head:
        raise ValueError(f"--input {path}: is Parquet that was cut off or packed once more")
    if b"\0" in head:  # as git and grep tell binary files
        raise ValueError(f"--input {path}: is binary (byte {head.index(0)} is 0): convert it to text in UTF-8 or JSONL")
    text = head.lstrip()
    if OBJECT.match(text):
        line, end, _ = text.partition(b"\n")
        if _is_object(line if end else line + stream.readline()):
            return "jsonl"
    if unpacked_name(path).endswith(JSONL_SUFFIXES):
        return "jsonl"
    if OBJECT.match(text) or LIST_OF_RECORDS.match(text):
        raise ValueError(f"--input {path}: begins as JSON does, but has no object on its first line: {TOLD}")
    return "text"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


@contextlib.contextmanager
def open_stream(file: InputFile, keys: tuple[str, ...]) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    """The text of a file from its beginning on, and a function that says how many of its bytes on disk were read.

    Rows of a Parquet file are lines of JSON, with the columns `keys`; so are the objects of a list.

    Raises:
        ValueError: it cannot be read or unpacked (also while it is read), or a Parquet file lacks a column.
    """
    how = f" as {name}" if (name := "Parquet" if file.kind == "parquet" else file.packing) else ""
    try:
        with contextlib.ExitStack() as stack:
            if file.kind == "parquet":
                rows = _Rows(file, keys)
                yield stack.enter_context(io.BufferedReader(rows)), rows.at
                return
            raw = stack.enter_context(open(file.path, "rb"))
            stream = stack.enter_context(_unpacked(raw, file.packing) if file.packing else raw)
            if file.kind == "list":
                yield stack.enter_context(io.BufferedReader(ObjectLines(stream))), raw.tell
                return
            yield stream, (raw if file.packing else stream).tell
    except ValueError as error:
        if str(error).startswith((file.path, "--input")):
            raise
        raise ValueError(f"{file.path}: cannot be read{how} ({error})") from error
    except Exception as error:  # every library has its own kinds
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{file.path}: cannot be read{how} ({reason})") from error


def _unpacked(raw: IO[bytes], packing: str) -> io.BufferedReader:
    """zstd is read by pyarrow, which reads Parquet too."""
    if packing == "zstd":
        pyarrow = _pyarrow("pyarrow", raw.name)
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))
    openers: dict[str, Any] = {"gzip": gzip.GzipFile, "bzip2": bz2.BZ2File, "xz": lzma.LZMAFile}
    opened = openers[packing](fileobj=raw) if packing == "gzip" else openers[packing](raw)
    return io.BufferedReader(cast(Any, opened))


def _pyarrow(module: str, path: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{path}: Parquet and zstd need the Python package pyarrow: pip install pyarrow") from error


class _Rows(io.RawIOBase):
    """The rows of a Parquet file as lines of JSON; columns are checked when it is made."""

    def __init__(self, file: InputFile, keys: tuple[str, ...]) -> None:
        self._parquet = _pyarrow("pyarrow.parquet", file.path).ParquetFile(file.path, pre_buffer=False)
        self._size, self._all, self._done, self._rest = file.size, self._parquet.metadata.num_rows, 0, b""
        _check_columns(file, self._parquet.schema_arrow, keys)
        batches = self._parquet.iter_batches(ROWS_AT_ONCE, columns=list(keys), use_threads=False)
        self._lines = map(self._to_lines, batches)

    def _to_lines(self, batch: Any) -> bytes:
        self._done += batch.num_rows
        return "".join(f"{json.dumps(row)}\n" for row in batch.to_pylist()).encode()

    def at(self) -> int:
        """Bytes of the file that the rows so far stand for."""
        return self._size * self._done // max(1, self._all)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest and (lines := next(self._lines, None)) is not None:
            self._rest = lines
        taken = self._rest[: len(buffer)]
        buffer[: len(taken)], self._rest = taken, self._rest[len(taken) :]
        return len(taken)


def _check_columns(file: InputFile, schema: Any, keys: tuple[str, ...]) -> None:
    path = file.path
    for key in keys:
        if key not in schema.names:
            there = ", ".join(map(repr, schema.names)) or "none"
            raise ValueError(f"{path}: no column {key!r}, there are {there} (--json-keys)")
        kind = str(schema.field(key).type)
        if not file.nested and ("string" not in kind or "<" in kind.removeprefix("dictionary<values=")):
            raise ValueError(f"{path}: the column {key!r} is of {kind}, must be of strings")
