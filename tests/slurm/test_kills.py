"""Twenty times SIGKILL to a rank, ten of them in the middle of a save: the run ends as if nothing had happened."""

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.jobs import ITERATIONS, TinyJob, until
from tests.training.test_resume import assert_same_checkpoint

pytestmark = pytest.mark.slurm
KILLS = 20


def newest_folder(save: Path) -> int:
    return max((int(path.name[5:]) for path in save.glob("iter_*") if path.name[5:].isdecimal()), default=0)


def within(seconds: float, condition: Callable[[], object]) -> bool:
    """Whether the condition came true; asked so often that a save, a tenth of a second long, is not missed."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def finishes_a_save(job: TinyJob) -> bool:
    """Wait until this start of the job has saved once, so that the next one goes on from there."""
    before = job.checkpoint
    return within(120, lambda: job.checkpoint > before)


def kill_in_a_save(job: TinyJob) -> bool:
    """After a save of its own that ended: wait for a folder that no tracker names yet, and kill a rank then."""
    in_a_save = finishes_a_save(job) and within(60, lambda: newest_folder(job.save) > job.checkpoint)
    return in_a_save and job.kill_rank(random.randrange(2))


def kill_at_the_start(job: TinyJob) -> bool:
    time.sleep(random.uniform(0, 6))
    return job.kill_rank(random.randrange(2))


def kill_in_training(job: TinyJob) -> bool:
    """After a save of its own that ended, and up to four steps more."""
    saved = finishes_a_save(job)
    job.until_iteration(job.checkpoint + random.randrange(1, 5))
    return saved and job.kill_rank(random.randrange(2))


WAYS = (kill_in_a_save, kill_at_the_start, kill_in_a_save, kill_in_training)


def test_killed_twenty_times_it_ends_with_the_same_checkpoint(job, whole):
    random.seed(11)
    job.env["EMOE_DEATHS"] = "100"
    job.submit(train_iters=ITERATIONS, save_interval=5)
    done: Counter[str] = Counter()
    unfinished, lost, reached = 0, [], []
    while done.total() < KILLS:
        until(lambda: len(job.ranks()) == 2, 120, "ranks")
        way, start = WAYS[done.total() % len(WAYS)], job.restarts
        done[way.__name__] += way(job)
        until(lambda: not job.ranks(), 60, "end of the other rank")
        lost.append(max(0, job.logged(start) - job.checkpoint))
        reached.append(job.checkpoint)
        unfinished += newest_folder(job.save) > job.checkpoint
    print(f"kills: {dict(done)}; saves left unfinished: {unfinished}; restarts: {job.restarts}")
    print(f"steps lost: {lost}; checkpoint at each kill: {reached}")
    assert unfinished >= 3 and len(set(reached)) >= 10 and job.state != "COMPLETED"
    assert job.wait(400) == "COMPLETED", job.output[-3000:]
    print(f"signals: {job.signals()}; restarts in the end: {job.restarts}")
    assert_same_checkpoint(whole.save, job.save, ITERATIONS)
