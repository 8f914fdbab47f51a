"""What a torch_dist checkpoint's .metadata says is in it: read once in a process, however many ask.

At a thousand ranks it is the start of a run that costs the file system most: every rank reads the .metadata, and only
the first of each machine asks for the size of every file.
"""

from __future__ import annotations

import functools
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from torch.distributed.checkpoint import FileSystemReader


@dataclass(frozen=True)
class Contents:
    """keys: names of the tensors and objects. sizes: bytes that each file holds at least, by its name."""

    keys: frozenset[str]
    sizes: dict[str, int]


def contents(checkpoint: Path) -> Contents:
    """What .metadata says, read again only where the file is another by now (what torch's reader raises)."""
    found = (checkpoint / ".metadata").stat()
    return _contents(checkpoint, found.st_ino, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=4)
def _contents(checkpoint: Path, *_of_the_file: int) -> Contents:
    stored = FileSystemReader(checkpoint).read_metadata()
    sizes: dict[str, int] = defaultdict(int)
    for place in (stored.storage_data or {}).values():
        sizes[place.relative_path] = max(sizes[place.relative_path], place.offset + place.length)
    return Contents(frozenset(stored.state_dict_metadata), sizes | {"metadata.json": 1})


def first_bad_file(checkpoint: Path) -> str | None:
    """The first file of `checkpoint` that is missing or, where this rank looks at sizes, too small: what is wrong."""
    needed = contents(checkpoint).sizes
    if not looks_at_sizes():
        there = set(os.listdir(checkpoint))
        return next((f"{name} is missing" for name in sorted(needed) if name not in there), None)
    return next((what for name in sorted(needed) if (what := _too_small(checkpoint / name, needed[name]))), None)


def looks_at_sizes() -> bool:
    """Whether this is the first rank of its machine. Where its verdict is another, the others follow it."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _too_small(path: Path, size: int) -> str | None:
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{path.name} is missing"
    return f"{path.name} has {found} bytes, of {size}" if found < size else None
