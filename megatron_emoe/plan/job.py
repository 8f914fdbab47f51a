"""A job, and what its command line must satisfy before Megatron reads it. Nothing of Megatron or torch is imported."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """nodes: of the job. processes: ranks on each node. gpus: on each node; 0: the run is one in host mode. save: the
    folder in which the job looks for the newest checkpoint, and counts how often the run died."""

    nodes: int
    processes: int
    gpus: int
    save: Path

    @property
    def world_size(self) -> int:
        """Ranks of the run."""
        return self.nodes * self.processes


def check_given(job: Job, words: list[str]) -> None:
    """What can be said before Megatron reads the flags, and whether checkpoints can be written.

    Raises:
        ValueError: with flag or path, value and rule.
    """
    for rule in _broken(job, {word.partition("=")[0] for word in words}):
        raise ValueError(rule)
    check_writable("--save", job.save)


def _broken(job: Job, given: set[str]) -> Iterator[str]:
    if job.gpus and job.processes > job.gpus:
        yield f"{job.processes} processes on a node: at most one for each of its {job.gpus} GPUs"
    if "--save-interval" not in given:
        yield "--save-interval is not given: a run that dies would start over; give iterations between checkpoints"
    if "--exit-signal-handler" not in given:
        yield "--exit-signal-handler is not given: the run would not save before its time ends"


def check_writable(name: str, folder: Path) -> None:
    """ValueError unless a file can be made in `folder`, or in the nearest folder above it that exists."""
    place = existing(folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return
    except OSError as error:
        raise ValueError(f"{name} {folder}: cannot be written ({error.strerror}: {place})") from error


def existing(folder: Path) -> Path:
    """`folder`, or the nearest path above it that exists. A link that leads nowhere does: it is in a folder's way."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
