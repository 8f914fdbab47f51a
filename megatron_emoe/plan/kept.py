"""Megatron's arguments for the flags of a plan, kept from one plan to the next.

Its parser takes eight seconds to import, the rest of a plan one or two. An entry holds for its key (the words), the
versions of Python, Megatron-Core, torch and Transformer Engine, and the source of this package; entries of others are
removed where one is written. It does not see other libraries, the environment, or what stands in files that the words
name. A file that holds no JSON object is as if it were not there; so is the folder where it cannot be made. Nothing is
kept of a Megatron-Core that is being worked on (an editable install).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import megatron_emoe
from megatron_emoe.settings.atomic_file import write_atomically
from megatron_emoe.settings.command_line import installed

_KIND = "arguments-"
"""What the names of our folders begin with."""

_LIBRARIES = ("megatron-core", "torch", "transformer-engine")


def arguments(key: list[str], make: Callable[[], Namespace], folder: Path | None) -> Namespace:
    """What `make` gives, from `folder` if it is kept there under `key`; made and kept otherwise. None: not kept.

    key: all that `make` follows from and that may differ from one call to the next.

    Only values that JSON can hold: no type and no enumeration, which no formula of a plan reads.

    Raises:
        Whatever `make` raises; then nothing is kept.
    """
    file = None if folder is None or _is_worked_on("megatron-core") else _file(key, folder)
    found = None if file is None else _read(file)
    if found is None:
        found = {name: value for name, value in vars(make()).items() if _is_plain(value)}
        if file is not None:
            _write(file, found)
    return Namespace(**found)


def user_folder() -> Path | None:
    """Where this user's programs keep what they can make again (XDG_CACHE_HOME); None: the user has no home."""
    with contextlib.suppress(RuntimeError):
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron-emoe"
    return None


def _file(key: list[str], folder: Path) -> Path:
    name = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    return folder / f"{_KIND}{_code_digest()}" / f"{name}.json"


def _code_digest() -> str:
    """Of what else the arguments follow from: versions and source."""
    versions = {name: installed(name) for name in _LIBRARIES} | {"python": sys.version}
    digest = hashlib.sha256(json.dumps(versions).encode())
    root = Path(megatron_emoe.__file__).parent
    for source in sorted(root.rglob("*.py")):
        digest.update(f"{source.relative_to(root)}\0".encode() + source.read_bytes())
    return digest.hexdigest()


def _is_worked_on(package: str) -> bool:
    """Whether the package's source may change while its version stays."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        origin = importlib.metadata.distribution(package).read_text("direct_url.json")
        return "editable" in (origin or "")
    return False


def _is_plain(value: Any) -> bool:
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _read(file: Path) -> dict[str, Any] | None:
    try:
        values = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def _write(file: Path, values: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a full disk, a home that is read-only: the next plan takes as long as this
        for other in set(file.parent.parent.glob(f"{_KIND}*")) - {file.parent}:
            shutil.rmtree(other, ignore_errors=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(values))
