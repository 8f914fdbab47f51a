"""The files of one tokenised data set, <prefix>.bin, <prefix>.idx and <prefix>.json, read without Megatron.

.bin holds the token ids and .idx says where each sequence starts: both are Megatron-Core's IndexedDataset format. .json
is the sidecar that tools/preprocess_data.py adds: which tokenizer made the ids, and how many there are. Everything here
reads a bounded number of bytes, whatever the size of the data set.
"""

import hashlib
import json
import os
import struct
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
TOKEN_DTYPES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
SCAN_TOKENS = 1 << 20  # tokens read at each end of a .bin without a sidecar
SCAN_ENTRIES = 1 << 20  # sequences and documents of an index that are looked at one by one, from its beginning
# The files of a Hugging Face tokenizer folder that decide which id a piece of text gets.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class Sidecar:
    """What tools/preprocess_data.py says about a data set, in <prefix>.json."""

    tokenizer_type: str  # Megatron's --tokenizer-type
    tokenizer_model: str | None  # the path or name it was given, for the reader only
    tokenizer_sha256: str | None  # of the files behind --tokenizer-model; None where there are none on disk
    vocab_size: int  # ids the tokenizer can give, without padding
    max_token_id: int
    documents: int
    tokens: int  # end-of-document tokens included
    source_files: int
    source_bytes: int
    append_eod: bool


@dataclass(frozen=True)
class ChatSidecar(Sidecar):
    """The same of chats (preprocess_data.py --chat), which are the documents."""

    chat_template: str  # what --chat-template said; the template itself is in <prefix>.jinja
    answer_tokens: int  # that count in the loss
    longest: int  # tokens of the longest chat
    too_long: int  # chats left out for their length
    cut: int  # chats that were cut off
    bad: int  # records left out that are no chats


@dataclass(frozen=True)
class TokenFiles:
    """A data set whose .bin and .idx belong together. has_modes: the index says of each sequence whether its tokens
    count in the loss, as it does of chats."""

    prefix: str
    dtype: type[np.integer]
    sequences: int
    documents: int
    tokens: int
    has_modes: bool = False

    def sequence_lengths(self) -> np.ndarray:
        """int32 [sequences], tokens in each; mapped, not read."""
        return np.memmap(f"{self.prefix}.idx", np.int32, "r", INDEX_HEADER.size, (self.sequences,))

    def document_lengths(self) -> np.ndarray:
        """int64 [documents], tokens in each."""
        offset = INDEX_HEADER.size + 12 * self.sequences
        ends = np.fromfile(f"{self.prefix}.idx", np.int64, self.documents + 1, offset=offset)
        return np.diff(np.concatenate([[0], np.cumsum(self.sequence_lengths(), dtype=np.int64)])[ends])

    def max_token_id_at_the_ends(self) -> int:
        """Largest token id among the first and the last SCAN_TOKENS tokens."""
        tokens = np.memmap(f"{self.prefix}.bin", self.dtype, "r")
        return int(max(tokens[:SCAN_TOKENS].max(), tokens[-SCAN_TOKENS:].max()))


def read_token_files(prefix: str) -> TokenFiles:
    """Check that <prefix>.bin and <prefix>.idx are whole and belong together.

    Raises:
        ValueError: a file is missing, empty, cut off, of another format, or not of the same run as the other.
    """
    _require_files(prefix)
    index_path, index_bytes = f"{prefix}.idx", os.path.getsize(f"{prefix}.idx")
    if index_bytes < INDEX_HEADER.size:
        raise ValueError(f"{index_path} has {index_bytes} bytes, its header alone takes {INDEX_HEADER.size}: cut off")
    with open(index_path, "rb") as index:
        magic, version, dtype_code, sequences, document_ends = INDEX_HEADER.unpack(index.read(INDEX_HEADER.size))
        if magic != INDEX_MAGIC or version != 1 or dtype_code not in TOKEN_DTYPES:
            raise ValueError(f"{index_path} is not an index of token ids (magic {magic!r}, version {version})")
        expected = INDEX_HEADER.size + 12 * sequences + 8 * document_ends
        has_modes = sequences > 0 and index_bytes == expected + sequences
        if index_bytes != expected and not has_modes:
            raise ValueError(f"{index_path} has {index_bytes} bytes, its header asks for {expected}: half-written")
        if sequences == 0:
            raise ValueError(f"{index_path} lists no sequences: the data set is empty")
        last_length, last_start, last_document_end = _last_entries(index, sequences, document_ends)
    dtype = TOKEN_DTYPES[dtype_code]
    token_bytes, indexed = os.path.getsize(f"{prefix}.bin"), last_start + last_length * dtype().itemsize
    if token_bytes != indexed or last_document_end != sequences:
        raise ValueError(
            f"{prefix}.bin has {token_bytes} bytes, {index_path} describes {indexed}: one of them is half-written"
        )
    _check_entries(index_path, dtype().itemsize, sequences, document_ends)
    tokens = token_bytes // dtype().itemsize
    return TokenFiles(prefix, dtype, sequences, document_ends - 1, tokens, has_modes)


def _check_entries(path: str, token_bytes: int, sequences: int, document_ends: int) -> None:
    """ValueError unless the first SCAN_ENTRIES sequences follow each other, and so do the documents."""

    def entries(kind: type[np.integer], offset: int, count: int) -> np.ndarray:
        return np.fromfile(path, kind, min(count, SCAN_ENTRIES), offset=INDEX_HEADER.size + offset)

    lengths, starts = entries(np.int32, 0, sequences), entries(np.int64, 4 * sequences, sequences)
    expected = np.cumsum(lengths[:-1], dtype=np.int64) * token_bytes
    if lengths.min() < 0 or starts[0] != 0 or not np.array_equal(starts[1:], expected):
        raise ValueError(f"{path} is damaged: its sequences do not follow each other")
    ends = entries(np.int64, 12 * sequences, document_ends)
    if ends[0] != 0 or ends.max() > sequences or (np.diff(ends) < 0).any():
        raise ValueError(f"{path} is damaged: its documents do not follow each other")


def _require_files(prefix: str) -> None:
    """Raise ValueError unless both files exist with something in them; say what was meant where that can be seen."""
    missing = [path for path in (f"{prefix}.bin", f"{prefix}.idx") if not os.path.isfile(path)]
    if missing and os.path.isdir(prefix):
        inside = sorted(name[:-4] for name in os.listdir(prefix) if name.endswith(".idx"))
        found = f"it holds {', '.join(inside[:5])}" if inside else "it holds no .idx file"
        raise ValueError(f"{prefix} is a folder, not the prefix of a .bin and .idx pair ({found})")
    stem, extension = os.path.splitext(prefix)
    if missing and extension in (".bin", ".idx"):
        raise ValueError(f"{prefix} is one file of a data set: give the prefix of both, {stem}")
    if missing:
        raise ValueError(f"{missing[0]} does not exist: a data set is a .bin and an .idx file with the same prefix")
    for path in (f"{prefix}.bin", f"{prefix}.idx"):
        if os.path.getsize(path) == 0:
            raise ValueError(f"{path} is empty")
        if not os.access(path, os.R_OK):
            raise ValueError(f"{path} cannot be read: no permission")


def _last_entries(index, sequences: int, document_ends: int) -> tuple[int, int, int]:
    """Length in tokens and start in bytes of the last sequence, and the number of sequences in all documents."""

    def number(offset: int, fmt: str) -> int:
        index.seek(INDEX_HEADER.size + offset)
        return struct.unpack(fmt, index.read(struct.calcsize(fmt)))[0]

    length = number(4 * (sequences - 1), "<i")
    start = number(4 * sequences + 8 * (sequences - 1), "<q")
    return length, start, number(12 * sequences + 8 * (document_ends - 1), "<q") if document_ends else 0


def read_sidecar(prefix: str) -> Sidecar | None:
    """The sidecar of a data set, or None where it has none (data made by another tool).

    Raises:
        ValueError: the file is there but is not a sidecar.
    """
    path = f"{prefix}.json"
    if not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        kind = ChatSidecar if "answer_tokens" in content else Sidecar
        told = {field.name: content[field.name] for field in fields(kind)}
        for field in fields(kind):
            _check_told(field.name, told[field.name], field.type)
        return kind(**told)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not the sidecar of a data set ({type(error).__name__}: {error})") from error


def _check_told(name: str, value: object, kind: Any) -> None:
    """ValueError for a value of another type than its field, or a number below 0."""
    if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
        raise ValueError(f"{name} is {value!r:.40}, must be of {getattr(kind, '__name__', kind)}")
    if kind is int and isinstance(value, int) and value < 0:
        raise ValueError(f"{name} is {value}, must be at least 0")


def write_sidecar(path: str, sidecar: Sidecar) -> None:
    """Write the sidecar as indented JSON."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(asdict(sidecar), file, indent=2)
        file.write("\n")


def tokenizer_digest(tokenizer_model: str | None) -> str | None:
    """SHA-256 (hex) of the tokenizer behind a path: of the file, or of the TOKENIZER_FILES in a folder.

    None where nothing on disk decides the ids: no path, the name of a model on a hub, or a folder without such files.
    """
    if tokenizer_model is None or not os.path.exists(tokenizer_model):
        return None
    if os.path.isfile(tokenizer_model):
        return _file_digest(tokenizer_model)
    paths = {name: os.path.join(tokenizer_model, name) for name in TOKENIZER_FILES}
    parts = [f"{name} {_file_digest(path)}" for name, path in paths.items() if os.path.isfile(path)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest() if parts else None


def _file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
