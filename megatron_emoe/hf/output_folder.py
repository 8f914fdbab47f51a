"""A folder that appears whole or not at all, and whose making can be interrupted and taken up again."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

WORKERS = 2  # one reads while the other writes; each has a group of tensors in memory
_JOURNAL = "journal.jsonl"


class OutputFolder:
    """Work goes on in a folder beside the one asked for, which is renamed at the end.

    A journal in it tells which parts are finished. Run again with the same inputs, they are kept; with other inputs the
    work starts anew.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.path = out.with_name(out.name + ".unfinished")
        self.done: dict[str, Any] = {}
        self._writing = threading.Lock()

    @contextmanager
    def making(self, inputs: Mapping[str, Any]) -> Iterator[OutputFolder]:
        """Open the folder, and publish it at the end of the block.

        inputs: what the result depends on, as JSON values. A ValueError in the block removes what was begun, as it will
        not get better; after any other interruption, and where the disk failed, it is there for the next attempt.

        Raises:
            ValueError: `out` is in use, not a folder, not empty, its parent is missing, or it cannot be written.
        """
        with self._open() as journal:
            self._lock(journal)
            self._take_up(journal, json.loads(json.dumps(inputs)))
            try:
                yield self
                self._publish()
            except ValueError:
                shutil.rmtree(self.path)
                raise
            except OSError as error:
                what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
                raise ValueError(f"{self.out}: not made ({what}); the same command goes on where it stopped") from error

    def _open(self) -> TextIO:
        """The journal; nothing is left where it cannot be written."""
        found = os.path.lexists(self.path)
        try:
            self._check()
            self.path.mkdir(exist_ok=True)
            return (self.path / _JOURNAL).open("a+", encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            if not found and os.path.isdir(self.path):  # False for a name that is too long, too
                self.path.rmdir()
            raise ValueError(f"{self.out}: cannot be written ({error.strerror})") from error

    def check_space(self, needed: int) -> None:
        """Raises ValueError where the disk has less than `needed` bytes for the whole, finished parts included."""
        here = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        free = shutil.disk_usage(self.path).free + here
        if free < needed:
            raise ValueError(f"{self.out}: {needed / 1e9:.2f} GB are needed, {free / 1e9:.2f} GB are free on that disk")

    def finished(self, part: str, result: Any) -> None:
        """Note in the journal that a part is on the disk; any thread may call it.

        result: whatever is needed to go on without making the part again, as JSON values.
        """
        line = json.dumps({"part": part, "result": result}) + "\n"
        with self._writing:
            self._journal.write(line)
            self._journal.flush()
            os.fsync(self._journal.fileno())
            self.done[part] = result

    def _check(self) -> None:
        if not self.out.parent.is_dir():
            raise ValueError(f"{self.out}: the folder {self.out.parent} does not exist")
        if os.path.lexists(self.out) and not self.out.is_dir():
            raise ValueError(f"{self.out}: exists, and is not a folder")
        if self.out.is_dir() and any(self.out.iterdir()):
            raise ValueError(f"{self.out}: is not empty; nothing is overwritten")
        if os.path.exists(self.path) and not (self.path / _JOURNAL).is_file():
            raise ValueError(f"{self.path}: is in the way, and was not begun by this program; remove it")

    def _lock(self, journal: Any) -> None:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ValueError(f"{self.path}: another process is writing to it") from error
        self._journal = journal

    def _take_up(self, journal: Any, inputs: Mapping[str, Any]) -> None:
        """Read which parts are finished; where the inputs are other ones, or nobody can read it, begin anew."""
        journal.seek(0)
        lines = [line for line in journal if line.endswith("\n")]  # the last one may be torn
        done = _finished(lines, inputs)
        self.done = done or {}
        if done is None:
            for path in self.path.iterdir():
                if path.name != _JOURNAL:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
            lines = [json.dumps(inputs) + "\n"]
        journal.seek(0)
        journal.truncate()
        journal.writelines(lines)
        journal.flush()

    def _publish(self) -> None:
        """From here on the folder is complete, and has its name. (Renaming onto an empty folder replaces it.)"""
        (self.path / _JOURNAL).unlink()
        os.rename(self.path, self.out)
        parent = os.open(self.out.parent, os.O_RDONLY)
        try:
            os.fsync(parent)
        finally:
            os.close(parent)


def _finished(lines: list[str], inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """Results by part, from the lines of a journal. None: it is of other inputs, or damaged, as after a power cut."""
    try:
        first, *entries = [json.loads(line) for line in lines] or [None]
        return {entry["part"]: entry["result"] for entry in entries} if first == inputs else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def state_of(files: Iterable[Path]) -> dict[str, list[int]]:
    """Name, size and time of change (ns) of files: enough to see that an input is another one."""
    return {str(file): [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(files)}


def in_parallel(work: Callable[..., None], calls: list[tuple[Any, ...]], workers: int) -> None:
    """Make the calls on some threads. After an error the rest is cancelled, and what has begun is waited for."""
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(work, *call) for call in calls]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
