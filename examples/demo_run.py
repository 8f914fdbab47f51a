"""Runs the demo's steps: lanes of them side by side, each step's output in a log, one line of progress for all."""

import contextlib
import os
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from tqdm import tqdm

REPO = Path(__file__).resolve().parent.parent
tqdm.monitor_interval = 0  # no thread of its own: processes are forked here


@dataclass(frozen=True)
class Step:
    """One command of this repository; `done` tells whether it has succeeded. script: its path in the repository.
    ranks: 0 where it is no distributed program. iterations: what its log counts up to. prepare: called before it is
    started; it removes what the step left when it was ended before, which the command would refuse to write over."""

    name: str
    script: str
    words: list[str]
    done: Callable[[], bool]
    ranks: int = 0
    iterations: int = 0
    prepare: Callable[[], None] = lambda: None

    @property
    def command(self) -> str:
        """As it is typed in the repository's folder."""
        launcher = ["torchrun", "--standalone", "--nproc-per-node", str(self.ranks)] if self.ranks else ["python"]
        return shlex.join([*launcher, self.script, *self.flags]).replace(f"{REPO}/", "")

    @property
    def flags(self) -> list[str]:
        """What the program is given: Megatron's run on the CPU where there is a GPU too, as forks cannot share it."""
        return [*self.words, "--host-mode"] if self.ranks else self.words


Lane = Iterator[Step]
"""Steps in order. The next one is asked for only once a step is done: some read what the steps before them wrote."""


@dataclass(frozen=True)
class Spent:
    """What a step took, seconds: wall time, and processor time of all its processes."""

    step: str
    wall: float
    processor: float


class Running:
    """A step at work, in forks of this process, which has imported Megatron once for all of them."""

    def __init__(self, step: Step, lane: Lane, logs: Path) -> None:
        from forks import start_ranks

        step.prepare()
        self.step, self.lane = step, lane
        self.log = logs / f"{re.sub('[^a-z]+', '_', step.name)}.log"
        self.log.write_text(f"$ {step.command}\n")
        self.began, self.processor = time.perf_counter(), 0.0
        self.left: list[BaseProcess] = start_ranks(REPO / step.script, step.flags, self.log, max(step.ranks, 1))

    def has_ended(self) -> bool:
        """Whether all its processes have. SystemExit with the log's end if it failed."""
        for process in list(self.left):
            before = _processor_of_ended()
            if not process.is_alive():
                self.left.remove(process)
                self.processor += _processor_of_ended() - before
                if process.exitcode != 0:
                    self._fail()
        if not self.left and not self.step.done():
            self._fail()
        return not self.left

    def _fail(self) -> None:
        end = "".join(self.log.read_text().splitlines(True)[-20:])
        sys.exit(f"{self.step.name} failed; the end of {self.log}:\n{end}")

    def progress(self) -> str:
        """The step, and the iteration that it has reached."""
        if not self.step.iterations:
            return self.step.name
        reached = re.findall(r"iteration +(\d+)/ *\d+ \|", self.log.read_text())
        return f"{self.step.name} {reached[-1] if reached else 0}/{self.step.iterations}"

    def spent(self) -> Spent:
        return Spent(self.step.name, round(time.perf_counter() - self.began, 1), round(self.processor, 1))


@contextlib.contextmanager
def _streams_in(log: Path) -> Iterator[None]:
    """What is written to either stream inside goes to `log`, that of handlers which outlive it too."""
    kept = [os.dup(stream) for stream in (1, 2)]
    sys.stdout.flush()
    with open(log, "a") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    try:
        yield
    finally:
        sys.stdout.flush()
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)


def _processor_of_ended() -> float:
    """Processor seconds of all processes that were started here and have been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(lanes: Sequence[Lane], logs: Path, note: Callable[[Spent], None]) -> None:
    """Bring all lanes to their end, side by side; what is done already is not run again. note: called after each step.

    SystemExit, with nothing left at work, where a step fails.
    """
    first = [(step, lane) for lane in lanes if (step := _next(lane))]
    if not first:
        return
    with _streams_in(logs / "imports.log"):
        import forks  # noqa: F401  # Megatron is imported here
    running: list[Running] = []
    every = {"mininterval": 0.5 if sys.stderr.isatty() else 60, "miniters": 0}
    with tqdm(bar_format="[{elapsed}] {desc}", **every) as bar:
        try:
            for step, lane in first:
                running.append(Running(step, lane, logs))
            while running:
                bar.set_description_str("   ".join(one.progress() for one in running), refresh=False)
                bar.update()
                wait([process.sentinel for one in running for process in one.left], timeout=1)
                for one in [one for one in running if one.has_ended()]:
                    running.remove(one)
                    spent = one.spent()
                    bar.write(f"{spent.step}: {spent.wall:.0f} s")
                    note(spent)
                    if step := _next(one.lane):
                        running.append(Running(step, one.lane, logs))
        finally:
            for process in (process for one in running for process in one.left):
                process.kill()


def _next(lane: Lane) -> Step | None:
    """The lane's next step that is not done, if there is one."""
    return next((step for step in lane if not step.done()), None)
