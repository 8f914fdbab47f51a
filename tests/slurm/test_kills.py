"""Twenty times SIGKILL to a rank, ten of them in the middle of a save: the run ends as if nothing had happened."""

import random
import time
from pathlib import Path

import pytest

from tests.slurm.jobs import TinyJob, until
from tests.test_resume import assert_same_checkpoint

pytestmark = pytest.mark.slurm
KILLS = 20


def newest_folder(save: Path) -> int:
    return max((int(path.name[5:]) for path in save.glob("iter_*") if path.name[5:].isdecimal()), default=0)


def kill_in_a_save(job: TinyJob) -> bool:
    """Wait for a folder that no tracker names yet, and kill a rank then. False: the save was too quick, or the end."""
    job.until_iteration(1)
    before = newest_folder(job.save)
    end = time.monotonic() + 60
    while time.monotonic() < end and job.ranks():
        started = newest_folder(job.save)
        if started > max(before, job.checkpoint):
            job.kill_rank(random.randrange(2))
            return job.checkpoint < started
        time.sleep(0.005)
    return False


def kill_at_any_time(job: TinyJob, delay: float) -> bool:
    time.sleep(delay)
    return job.kill_rank(random.randrange(2))


def test_killed_twenty_times_it_ends_with_the_same_checkpoint(job, whole):
    random.seed(11)
    job.env["EMOE_DEATHS"] = "100"
    job.submit(train_iters=300, save_interval=5)
    in_save = kills = 0
    for number in range(100):
        if kills == KILLS or job.state == "COMPLETED":
            break
        until(lambda: len(job.ranks()) == 2 or job.state == "COMPLETED", 90, "ranks")
        saving = number % 2 == 0 and in_save < KILLS // 2
        killed = kill_in_a_save(job) if saving else kill_at_any_time(job, random.uniform(0, 14))
        kills += killed
        in_save += saving and killed
        until(lambda: not job.ranks(), 60, "end of the other rank")
    print(f"kills: {kills}, of them in a save: {in_save}; restarts: {job.restarts}")
    assert kills == KILLS and in_save >= 3
    assert job.wait(400) == "COMPLETED", job.output[-3000:]
    assert_same_checkpoint(whole.save, job.save, 300)
