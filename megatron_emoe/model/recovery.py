"""Start again from what a run that died left behind: the newest checkpoint that is whole.

Megatron writes a checkpoint's tensors, then its .metadata, then the name of its iteration into the tracker file. A
run that is killed on the way leaves a folder that no tracker names; a disk that fails may damage one that is named.
The first rank of every machine comes to the same choice by reading alone, before any process group exists; folders are
touched by one rank when training has begun, and so all have chosen.
"""

from __future__ import annotations

import os
import re
import shutil
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.training.checkpointing import get_checkpoint_tracker_filename
from torch.distributed.checkpoint.api import CheckpointException

from megatron_emoe.model.stored_files import contents, first_bad_file, looks_at_sizes
from megatron_emoe.settings.atomic_file import write_atomically

_FOLDER = re.compile(r"iter_(\d{7,})")
_LEFT_BY_A_SAVE = re.compile(r"__\d+_\d+\.distcp|\.metadata\.tmp")  # what torch_dist writes before .metadata
_SAVING = ("save_checkpoint", "maybe_finalize_async_save")  # of Megatron
_SET_ASIDE = ".damaged"
_FLIPPED = "integrity verification failed"  # in the core's message where hashes differ; a lost manifest has another


@dataclass(frozen=True)
class Recovery:
    """What to do about a folder of checkpoints. iteration: to start from; None: nothing needs to be done about that.
    damaged: newer checkpoints that are not whole, with what is wrong. unfinished: left by saves that were cut off, and
    of use to nobody. lost: the checkpoint that the tracker file names, where its folder is gone."""

    folder: Path
    iteration: int | None
    damaged: tuple[tuple[Path, str], ...]
    unfinished: tuple[Path, ...]
    lost: Path | None = None

    @property
    def checkpoint(self) -> Path:
        """The folder of `iteration`."""
        return self.folder / f"iter_{self.iteration:07d}"

    def trouble(self) -> str:
        """What is wrong with each checkpoint that should be whole."""
        gone = [f"{self.lost.name}: missing, although the tracker file names it"] if self.lost else []
        return "; ".join([*gone, *(f"{path.name}: {what}" for path, what in self.damaged)])

    def messages(self) -> list[str]:
        """One line for each folder that will be touched."""
        lines = [f"{path}: damaged ({what}); set aside as {path.name}{_SET_ASIDE}" for path, what in self.damaged]
        if self.lost is not None:
            lines.append(f"{self.lost}: missing, although the tracker file names it")
        if self.iteration is not None:
            lines.append(f"{self.folder}: going on from iteration {self.iteration}")
        return lines + [f"{path}: left by a save that was cut off; removed" for path in self.unfinished]


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """An error of the file system says nothing about what is stored there: it ends this start with the path in it."""
    try:
        yield
    except OSError as error:
        what = f"{error.strerror or error} (nothing is touched; start again when it can be read)"
        raise OSError(error.errno, what, str(error.filename or path)) from error


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a torch_dist checkpoint, from its .metadata and the sizes of its files; None: nothing.

    Every file must hold the bytes that .metadata says are in it: the first rank of each machine looks, for the others
    it is enough that the file is there. Flipped bits are not seen here: set_aside_flipped.

    Raises:
        OSError: it cannot be read now; a path that does not exist is damage.
        ValueError: .metadata holds a class that this version of torch lacks.
    """
    with _reading(checkpoint):
        try:
            contents(checkpoint)
        except FileNotFoundError:
            return ".metadata is missing"
        except OSError:
            raise
        except (AttributeError, ImportError) as error:
            rule = "was it written by another version of torch? Nothing is touched"
            raise ValueError(f"{checkpoint / '.metadata'}: cannot be read ({error}): {rule}") from error
        except (Exception, CheckpointException) as error:  # of unpickling damaged bytes: any
            return f".metadata cannot be read ({type(error).__name__})"
        return first_bad_file(checkpoint)


def plan(folder: Path) -> Recovery:
    """What a run that goes on from `folder` has to do first; nothing is touched. A folder that does not exist, or holds
    nothing but what cut-off saves left, is that of a first start.

    Raises:
        ValueError: there are checkpoints, none of them whole; each is named with what is wrong.
        OSError: they cannot be read now.
    """
    newest = _named(folder)
    if newest == 0:
        return Recovery(folder, None, (), ())
    kept, passed = _newest_whole(folder, newest)
    # Without the tracker nobody knows which saves had ended.
    finished, others = ([], passed) if newest is None else (passed, _later(folder, newest))
    unfinished = tuple(sorted(path for path, _ in others if _cut_off(path)))
    damaged = (*finished, *((path, what) for path, what in others if path not in unfinished))
    lost = folder / f"iter_{newest:07d}" if newest is not None and newest not in _checkpoints(folder) else None
    found = Recovery(folder, None if kept == newest else kept, damaged, unfinished, lost)
    if kept is None and (damaged or lost):
        raise ValueError(f"--load {folder}: no whole checkpoint ({found.trouble()})")
    return found


def _named(folder: Path) -> int | None:
    """The iteration that the tracker file names, 0 for a release; None where the file is lost or holds no such name."""
    tracker = Path(get_checkpoint_tracker_filename(str(folder)))
    with _reading(tracker):
        name = tracker.read_text(errors="replace").strip() if tracker.is_file() else ""
    return 0 if name == "release" else int(name) if name.isdecimal() else None


def _newest_whole(folder: Path, newest: int | None) -> tuple[int | None, list[tuple[Path, str]]]:
    """The newest whole checkpoint up to `newest` (None: of all), and those newer than it that are not whole."""
    passed: list[tuple[Path, str]] = []
    for iteration, path in sorted(_checkpoints(folder).items(), reverse=True):
        if newest is not None and iteration > newest:
            continue
        what = damage(path)
        if what is None:
            return iteration, passed
        passed.append((path, what))
    return None, passed


def newest_whole(folder: Path) -> int | None:
    """Iteration of the newest whole checkpoint, whether or not the tracker file names it; None: there is none."""
    return _newest_whole(folder, None)[0]


def _later(folder: Path, newest: int) -> list[tuple[Path, str]]:
    """What is newer than the tracker's iteration and not whole. A whole one stays: someone may have gone back."""
    found = ((path, damage(path)) for iteration, path in _checkpoints(folder).items() if iteration > newest)
    return [(path, what) for path, what in sorted(found, reverse=True) if what is not None]


def _cut_off(path: Path) -> bool:
    """Whether the folder holds nothing but what a save writes before .metadata: no tensor of it can be read again."""
    with _reading(path):
        return all(_LEFT_BY_A_SAVE.fullmatch(name) for name in os.listdir(path))


def _checkpoints(folder: Path) -> dict[int, Path]:
    """The iter_ folders by their iteration; none where `folder` does not exist."""
    with _reading(folder):
        try:
            paths = [folder / name for name in os.listdir(folder)]
        except FileNotFoundError:
            return {}
        found = ((_FOLDER.fullmatch(path.name), path) for path in paths)
        return {int(match[1]): path for match, path in found if match and path.is_dir()}


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


def carry_out_together(recovery: Recovery, chosen: Path | None) -> Path | None:
    """The same on the first rank while the others wait; returns what all will load. chosen: what this rank would: one
    that has not looked at sizes follows the first. Collective.

    Raises:
        RuntimeError: on every rank, before anything is touched, where machines have chosen different checkpoints.
    """
    seen: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(seen, (chosen, looks_at_sizes()))
    first, _ = seen[0]
    other = next((rank for rank, (path, looked) in enumerate(seen) if looked and path != first), None)
    if other is not None:
        raise RuntimeError(
            f"--load {recovery.folder}: rank 0 goes on from {first}, rank {other} from {seen[other][0]}: they do not "
            "see the same files; start again when the file system shows every node the same"
        )
    if torch.distributed.get_rank() == 0:
        carry_out(recovery)
    torch.distributed.barrier()
    return first


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


def failed_save(error: BaseException) -> bool:
    """Whether `error` is of the disk, or of torch's writer, and ended the writing of a checkpoint (not a reading)."""
    found = [each for each in _chain(error) if isinstance(each, OSError | CheckpointException)]
    frames = (frame for each in found for frame, _ in traceback.walk_tb(each.__traceback__))
    return any(frame.f_code.co_name in _SAVING for frame in frames)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def report_failed_save(folder: Path, error: BaseException, iteration: int, say: Callable[[str], None] = print) -> None:
    """Say what the failed save of `iteration` leaves, and remove it where it is not whole: a full disk needs the room.
    So is what earlier saves left half-written."""
    kept = newest_whole(folder)
    free = shutil.disk_usage(folder).free / 2**30
    last = f"the checkpoint of iteration {kept} is whole and is kept" if kept is not None else "there is none before it"
    say(f"--save {folder}: a checkpoint could not be written; {last}; {free:.1f} GiB are free there. {_cause(error)}")
    named = _named(folder)
    for path, _ in _later(folder, (kept or 0) if named is None else named):
        if _cut_off(path) or path == _checkpoints(folder).get(iteration):
            shutil.rmtree(path, ignore_errors=True)
            say(f"{path}: the half-written checkpoint is removed")


def _cause(error: BaseException) -> str:
    """The last line of an error's text: torch's gives the traceback of every rank above it."""
    return (str(error) or type(error).__name__).strip().splitlines()[-1]


def write_tracker(folder: Path, iteration: int) -> None:
    """Name `iteration` as the newest checkpoint of `folder`, atomically."""
    tracker = Path(get_checkpoint_tracker_filename(str(folder)))
    write_atomically(tracker, str(iteration))


def _free_name(path: Path) -> Path:
    """`iter_0000020.damaged`, or with a number where that is taken."""
    names = [f"{path.name}{_SET_ASIDE}", *(f"{path.name}{_SET_ASIDE}.{number}" for number in range(2, 1000))]
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())
