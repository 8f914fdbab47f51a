"""Start again from what a run that died left behind: the newest checkpoint that is whole.

Megatron writes a checkpoint's tensors, then its .metadata, then the name of its iteration into the tracker file. A
run that is killed on the way leaves a folder that no tracker names; a disk that fails may damage one that is named.
Every rank comes to the same choice by reading alone, before any process group exists; folders are touched by one rank
when training has begun, and so all have chosen.
"""

from __future__ import annotations

import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.training.checkpointing import get_checkpoint_tracker_filename
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

_FOLDER = re.compile(r"iter_(\d{7,})")
_SET_ASIDE = ".damaged"
_FLIPPED = "integrity verification failed"  # in the core's message where hashes differ; a lost manifest has another


@dataclass(frozen=True)
class Recovery:
    """What to do about a folder of checkpoints. iteration: to start from; None: nothing needs to be done about that.
    damaged: newer checkpoints that were named as finished, with what is wrong. unfinished: left by saves that were cut
    off."""

    folder: Path
    iteration: int | None
    damaged: tuple[tuple[Path, str], ...]
    unfinished: tuple[Path, ...]

    @property
    def checkpoint(self) -> Path:
        """The folder of `iteration`."""
        return self.folder / f"iter_{self.iteration:07d}"

    def messages(self) -> list[str]:
        """One line for each folder that will be touched."""
        lines = [f"{path}: damaged ({what}); set aside as {path.name}{_SET_ASIDE}" for path, what in self.damaged]
        if self.iteration is not None:
            lines.append(f"{self.folder}: going on from iteration {self.iteration}")
        return lines + [f"{path}: left by a save that was cut off; removed" for path in self.unfinished]


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a torch_dist checkpoint, from its .metadata and the sizes of its files; None: nothing.

    Every file must hold the bytes that .metadata says are in it. Flipped bits are not seen here: set_aside_flipped.
    """
    if not (checkpoint / ".metadata").is_file():
        return ".metadata is missing"
    try:
        metadata = FileSystemReader(checkpoint).read_metadata()
    except (Exception, CheckpointException) as error:  # of unpickling damaged bytes: any
        return f".metadata cannot be read ({type(error).__name__})"
    needed: dict[str, int] = defaultdict(int)
    for stored in (metadata.storage_data or {}).values():
        needed[stored.relative_path] = max(needed[stored.relative_path], stored.offset + stored.length)
    needed["metadata.json"] = 1
    for name, size in sorted(needed.items()):
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size < size:
            return f"{name} has {path.stat().st_size} bytes, of {size}"
    return None


def plan(folder: Path) -> Recovery:
    """What a run that goes on from `folder` has to do first; nothing is touched.

    Raises:
        ValueError: there are checkpoints, none of them whole; each is named with what is wrong.
    """
    newest = _named(folder)
    if newest == 0:
        return Recovery(folder, None, (), ())
    kept, damaged = _newest_whole(folder, newest)
    unfinished = _unfinished(folder, newest if newest is not None else kept)
    if kept is None and (damaged or newest is not None):
        found = "; ".join(f"{path.name}: {what}" for path, what in damaged) or f"iter_{newest:07d} is missing"
        raise ValueError(f"--load {folder}: no whole checkpoint ({found})")
    return Recovery(folder, None if kept == newest else kept, tuple(damaged), unfinished)


def _named(folder: Path) -> int | None:
    """The iteration that the tracker file names, 0 for a release; None where the file is lost or holds no such name."""
    tracker = Path(get_checkpoint_tracker_filename(str(folder)))
    name = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    return 0 if name == "release" else int(name) if name.isdecimal() else None


def _newest_whole(folder: Path, newest: int | None) -> tuple[int | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint up to `newest` (None: of all), and the damaged ones that are newer than it."""
    damaged: list[tuple[Path, str]] = []
    for iteration, path in sorted(_checkpoints(folder).items(), reverse=True):
        if newest is not None and iteration > newest:
            continue
        what = damage(path)
        if what is None:
            return iteration, damaged
        if newest is not None:  # else the tracker is lost, and with it which saves had ended
            damaged.append((path, what))
    return None, damaged


def newest_whole(folder: Path) -> int | None:
    """Iteration of the newest whole checkpoint, whether or not the tracker file names it; None: there is none."""
    return _newest_whole(folder, None)[0]


def _unfinished(folder: Path, newest: int | None) -> tuple[Path, ...]:
    """Folders newer than the tracker's iteration that are not whole. A whole one stays: someone may have gone back."""
    later = (path for iteration, path in _checkpoints(folder).items() if newest is None or iteration > newest)
    return tuple(sorted(path for path in later if damage(path) is not None))


def _checkpoints(folder: Path) -> dict[int, Path]:
    found = ((_FOLDER.fullmatch(path.name), path) for path in folder.glob("iter_*") if path.is_dir())
    return {int(match[1]): path for match, path in found if match}


def carry_out(recovery: Recovery, say: Callable[[str], None] = print) -> None:
    """Set damaged folders aside, name the iteration in use, remove what was never finished. One process does it."""
    if recovery.iteration is not None:
        write_tracker(recovery.folder, recovery.iteration)
    for path, _ in recovery.damaged:
        path.rename(_free_name(path))
    for path in recovery.unfinished:
        shutil.rmtree(path, ignore_errors=True)
    for line in recovery.messages():
        say(line)


def carry_out_together(recovery: Recovery) -> None:
    """The same on the first rank while the others wait. Collective."""
    if torch.distributed.get_rank() == 0:
        carry_out(recovery)
    torch.distributed.barrier()


def set_aside_flipped(folder: Path, error: BaseException, say: Callable[[str], None] = print) -> None:
    """After Megatron's --verify-integrity found bits that flipped in the newest checkpoint: the next start does not.

    It is set aside and the one before is named. Another error of reading touches nothing; nor does this one where no
    checkpoint before is whole. One process does it, when every rank has the error.
    """
    newest = _named(folder)
    if _FLIPPED not in str(error) or not newest:
        return
    kept, damaged = _newest_whole(folder, newest - 1)
    if kept is None:
        say(f"{folder}: iter_{newest:07d} is damaged (its hashes differ), and none before it is whole")
        return
    flipped = (folder / f"iter_{newest:07d}", "its hashes differ")
    carry_out(Recovery(folder, kept, (flipped, *damaged), ()), say)


def report_failed_save(folder: Path, error: BaseException, say: Callable[[str], None] = print) -> None:
    """Say what a save that failed leaves, and remove it where it is not whole: a full disk needs the room."""
    kept = newest_whole(folder)
    free = shutil.disk_usage(folder).free / 2**30
    last = f"the checkpoint of iteration {kept} is whole and is kept" if kept is not None else "there is none before it"
    say(f"--save {folder}: a checkpoint could not be written; {last}; {free:.1f} GiB are free there. {_cause(error)}")
    named = _named(folder)
    for path in _unfinished(folder, kept if named is None else named):
        shutil.rmtree(path, ignore_errors=True)
        say(f"{path}: the half-written checkpoint is removed")


def _cause(error: BaseException) -> str:
    """The last line of an error's text: torch's gives the traceback of every rank above it."""
    return (str(error) or type(error).__name__).strip().splitlines()[-1]


def write_tracker(folder: Path, iteration: int) -> None:
    """Name `iteration` as the newest checkpoint of `folder`, atomically."""
    tracker = Path(get_checkpoint_tracker_filename(str(folder)))
    draft = tracker.with_name(f"{tracker.name}.tmp")
    draft.write_text(str(iteration))
    os.replace(draft, tracker)


def _free_name(path: Path) -> Path:
    """`iter_0000020.damaged`, or with a number where that is taken."""
    names = [f"{path.name}{_SET_ASIDE}", *(f"{path.name}{_SET_ASIDE}.{number}" for number in range(2, 1000))]
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())
