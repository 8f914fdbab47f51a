"""The order of documents and samples that Megatron-Core keeps on disk: not used for data that was replaced since.

The core finds what it kept by the name of the data and the settings, whatever the data now holds: with other documents
under the same name it would read the old places in the new files.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

from megatron_emoe.settings.command_line import say
from megatron_emoe.settings.paths import why_not_written

_END = "-description.txt"


def check_kept_order(args: Namespace, prefixes: list[str]) -> None:
    """ValueError where an order that is older than its data can be neither used nor removed. Reads names and times:
    enough for the first rank to do, before anything is built."""
    for description, prefix in _outdated(args.data_cache_path, prefixes):
        kept = f"{description}: was kept before {prefix}.idx was written"
        if args.dataloader_fast_cache_load:
            raise ValueError(f"{kept}: leave out --dataloader-fast-cache-load once, which takes it without a look")
        if why := why_not_written(description.parent):
            raise ValueError(f"{kept}, and cannot be removed ({why}): name another folder with --data-cache-path")


def remove_outdated(args: Namespace, prefixes: list[str]) -> None:
    """Remove what was kept before the data at one of `prefixes` was written, and say so. Call on the first rank, before
    datasets are built."""
    for description, prefix in _outdated(args.data_cache_path, prefixes):
        say(f"{description}: was kept before {prefix}.idx was written; made anew")
        for kept in description.parent.glob(f"{description.name.removesuffix(_END)}-*"):
            kept.unlink(missing_ok=True)


def _outdated(folder: str | None, prefixes: list[str]) -> Iterator[tuple[Path, str]]:
    """Descriptions of kept orders that are older than the data they describe, each with the prefix of the data."""
    for prefix in prefixes:
        index = Path(f"{prefix}.idx")
        if not index.is_file():
            continue
        written = index.stat().st_mtime_ns
        for description in Path(folder or f"{prefix}/cache").rglob(f"*{_END}"):
            if description.stat().st_mtime_ns < written and (not folder or _names(description, prefix)):
                yield description, prefix


def _names(description: Path, prefix: str) -> bool:
    try:
        return Path(json.loads(description.read_text())["dataset_path"]).resolve() == Path(prefix).resolve()
    except (OSError, ValueError, KeyError, TypeError):
        return False
