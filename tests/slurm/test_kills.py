"""Twenty times SIGKILL to a rank, ten of them in the middle of a save: the run ends as if nothing had happened."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.slurm.jobs import ITERATIONS, TinyJob, until
from tests.test_resume import assert_same_checkpoint

pytestmark = pytest.mark.slurm
KILLS = 20


def newest_folder(save: Path) -> int:
    return max((int(path.name[5:]) for path in save.glob("iter_*") if path.name[5:].isdecimal()), default=0)


def kill_in_a_save(job: TinyJob) -> bool:
    """Wait for a folder that no tracker names yet, and kill a rank then."""
    job.until_iteration(1)
    before, end = newest_folder(job.save), time.monotonic() + 60
    while newest_folder(job.save) <= max(before, job.checkpoint):
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return job.kill_rank(random.randrange(2))


def kill_at_the_start(job: TinyJob) -> bool:
    time.sleep(random.uniform(0, 6))
    return job.kill_rank(random.randrange(2))


def kill_in_training(job: TinyJob) -> bool:
    job.until_iteration(job.checkpoint + random.randrange(1, 7))
    return job.kill_rank(random.randrange(2))


WAYS = (kill_in_a_save, kill_at_the_start, kill_in_a_save, kill_in_training)


def test_killed_twenty_times_it_ends_with_the_same_checkpoint(job, whole):
    random.seed(11)
    job.env["EMOE_DEATHS"] = "100"
    job.submit(train_iters=ITERATIONS, save_interval=5)
    done: Counter[str] = Counter()
    unfinished, lost = 0, []
    while done.total() < KILLS:
        until(lambda: len(job.ranks()) == 2, 120, "ranks")
        way, start = WAYS[done.total() % len(WAYS)], job.restarts
        done[way.__name__] += way(job)
        until(lambda: not job.ranks(), 60, "end of the other rank")
        lost.append(max(0, job.logged(start) - job.checkpoint))
        unfinished += newest_folder(job.save) > job.checkpoint
    print(f"kills: {dict(done)}; saves left unfinished: {unfinished}; restarts: {job.restarts}; steps lost: {lost}")
    assert unfinished >= 3 and job.state != "COMPLETED"
    assert job.wait(400) == "COMPLETED", job.output[-3000:]
    assert_same_checkpoint(whole.save, job.save, ITERATIONS)
