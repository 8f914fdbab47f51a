"""Jobs of the real scripts on the test cluster: a tiny model in host mode, one rank on each of two nodes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.tiny import COACTIVATION, flags

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "slurm" / "emoe_21b.sh"
CLUSTER = REPO / "tests" / "slurm" / "cluster.sh"
SEVERAL = {"moe_router_topk": 3, "emoe_k_schedule": "uniform", "emoe_k_min": 1, "emoe_k_max": 4}
RUN = COACTIVATION | SEVERAL | {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 1e-2}

ITERATIONS = 240  # of the undisturbed run, and of the one that is killed: more than it gets to between twenty kills

# As a user's file; settings of one test come from its environment.
CLUSTER_ENV = """
: "${{EMOE_ACCOUNT:=none}}" "${{EMOE_PARTITION:=none}}" "${{EMOE_DATA:=none}}" "${{EMOE_BASE:=none}}"
: "${{EMOE_GPUS_PER_NODE:=0}}" "${{EMOE_PROCS_PER_NODE:=1}}"
: "${{EMOE_LAYOUT:=--expert-model-parallel-size 2}}"
: "${{EMOE_MODEL_FLAGS:=@{folder}/tiny.args}}" "${{EMOE_RECIPE=}}" "${{EMOE_TRAIN_FLAGS=}}"
: "${{EMOE_SAVE:={folder}/save}}" "${{EMOE_PYTHON:={python}}}"
: "${{EMOE_REMIND_SECONDS:=2}}"
"""


def write_settings(folder: Path, **changes: object) -> Path:
    """cluster.env and tiny.args in `folder`; changes: to the flags of the tiny model."""
    (folder / "tiny.args").write_text("\n".join(flags(**RUN | changes)))
    path = folder / "cluster.env"
    path.write_text(CLUSTER_ENV.format(folder=folder, python=sys.executable))
    return path


def slurm(*words: str) -> str:
    """What a command of Slurm prints; CalledProcessError where it fails."""
    return subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


def until(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Wait for a condition; TimeoutError says what did not come."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"not within {seconds} seconds: {what}")
        time.sleep(0.3)


def words_of(pid: int) -> list[str]:
    """Command line of a process; nothing where there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return []


def parent_of(pid: int) -> int:
    """Process id of the parent; 0 where there is no such process."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


@dataclass
class TinyJob:
    """A job in a folder of its own. env: settings of this job; number: Slurm's, once it is submitted."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    number: str = ""

    @property
    def save(self) -> Path:
        return self.folder / "save"

    @property
    def output(self) -> str:
        path = self.folder / "job.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def submit(self, *options: str, words: tuple[str, ...] = (), **changes: object) -> "TinyJob":
        """With sbatch itself; options: its own; words: after --; changes: to the model's flags."""
        self.env["EMOE_CLUSTER_ENV"] = str(write_settings(self.folder, **changes))
        self.env.setdefault("EMOE_CHECK_PYTHON", "none")  # seconds of every start; one test is about the check
        command = ["sbatch", "--parsable", f"--output={self.folder}/job.out", *options, str(SCRIPT)]
        asked = [*command, "--", *words] if words else command
        done = subprocess.run(asked, env=os.environ | self.env, capture_output=True, text=True, cwd=REPO, timeout=60)
        assert done.returncode == 0, done.stderr
        self.number = done.stdout.strip()
        return self

    def show(self, name: str) -> str:
        """One field of `scontrol show job`."""
        found = re.search(rf"\b{name}=(\S*)", slurm("scontrol", "show", "job", self.number))
        assert found is not None, name
        return found[1]

    @property
    def state(self) -> str:
        return self.show("JobState")

    @property
    def restarts(self) -> int:
        return int(self.show("Restarts"))

    @property
    def checkpoint(self) -> int:
        """Iteration of the newest checkpoint; 0: none."""
        tracker = self.save / "latest_checkpointed_iteration.txt"
        text = tracker.read_text() if tracker.exists() else ""
        return int(text or 0)

    def wait(self, seconds: float = 300) -> str:
        """Wait for the end of the job; its last state."""
        ends = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"}
        try:
            until(lambda: self.state in ends, seconds, f"end of job {self.number}")
        except TimeoutError as error:
            raise TimeoutError(f"{error}; it is {self.state}:\n{self.output[-3000:]}") from error
        return self.state

    def until_iteration(self, iteration: int, seconds: float = 120) -> None:
        """Wait until the current start of the job has logged an iteration from this one on."""

        until(lambda: self.logged(self.restarts) >= iteration, seconds, f"iteration {iteration}")

    def logged(self, start: int) -> int:
        """The newest iteration that a start of the job, counted from 0, has logged; -1: none."""
        logs = self.save.glob(f"logs/{self.number}.{start}/node*/*/attempt_0/*/stdout.log")
        return max((int(n) for log in logs for n in re.findall(r"iteration +(\d+)/", log.read_text())), default=-1)

    def signals(self) -> dict[int, list[str]]:
        """Names of the signals that the nodes of each start of the job noted, in their order."""
        marks = self.save.glob(f"logs/{self.number}.*/signalled")
        return {int(mark.parent.name.partition(".")[2]): mark.read_text().split() for mark in marks}

    def ranks(self) -> list[int]:
        """Process ids of the ranks that run now: torchrun's children, not the processes that they fork to write."""
        pids = [int(entry.name) for entry in Path("/proc").glob("[0-9]*")]
        ours = [pid for pid in pids if str(self.save) in words_of(pid) and "-u" in words_of(pid)[1:2]]
        return sorted(pid for pid in ours if "torch.distributed.run" in words_of(parent_of(pid)))

    def kill_rank(self, which: int) -> bool:
        """SIGKILL to one rank, if there is one."""
        ranks = self.ranks()
        if not ranks:
            return False
        os.kill(ranks[which % len(ranks)], signal.SIGKILL)
        return True
