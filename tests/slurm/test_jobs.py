"""Jobs on a real Slurm of two nodes: signals, time limit, preemption, a lost node, cancellation, deaths.

A disturbed run must end with the same checkpoint, bit by bit, as one that was left alone: weights and optimizer.
"""

import os
import subprocess

import pytest

from tests.slurm.jobs import SCRIPT, TinyJob, slurm, until, write_settings
from tests.training.test_resume import assert_same_checkpoint

pytestmark = pytest.mark.slurm
LENGTH = {"train_iters": 60, "save_interval": 50}


def assert_undisturbed(job: TinyJob, whole: TinyJob, state: str) -> None:
    assert state == "COMPLETED", job.output[-3000:]
    assert job.output.rstrip().endswith("emoe_21b.sh: finished")
    assert_same_checkpoint(whole.save, job.save, 60)


def test_a_job_submitted_by_the_script_itself_is_checked_first_and_finishes_once(job, whole):
    env = os.environ | {"EMOE_CLUSTER_ENV": str(write_settings(job.folder, **LENGTH))}
    command = [SCRIPT, f"--output={job.folder}/job.out", "--", "--seed", "7"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=job.folder, timeout=120)
    assert done.returncode == 0 and "checked: 2 nodes x 1 processes" in done.stdout, done.stderr
    job.number = done.stdout.split()[-1]
    assert_undisturbed(job, whole, job.wait())
    assert job.restarts == 0 and not (job.save / "deaths").exists()
    logs = list(job.save.glob(f"logs/{job.number}.0/node*/*/attempt_0/0/stdout.log"))
    assert len(logs) == 2 and any("iteration       60/" in log.read_text() for log in logs)


def test_signalled_it_saves_goes_back_into_the_queue_and_ends_as_if_nothing_had_happened(job, whole):
    job.submit(**LENGTH)
    job.until_iteration(5)
    slurm("scancel", "--signal=USR1", "--batch", job.number)
    until(lambda: job.restarts == 1, 60, "requeue")
    assert 5 <= job.checkpoint < 50  # not one of the regular checkpoints
    assert_undisturbed(job, whole, job.wait())
    assert f"saved checkpoint {job.checkpoint} on a signal" not in job.output
    assert job.output.count("goes back into the queue") == 1


def test_signalled_before_the_ranks_have_started_it_saves_its_first_step(job, whole):
    job.submit(**LENGTH)
    until((job.save / "running_job").exists, 60, "start of the script")
    slurm("scancel", "--signal=USR1", "--batch", job.number)
    until(lambda: job.restarts == 1, 120, "requeue")
    assert 1 <= job.checkpoint <= 3
    assert_undisturbed(job, whole, job.wait())


def test_slurm_s_own_signal_before_the_time_limit_does_the_same(job, whole):
    """Slurm knows whole minutes and its signal comes up to half a minute early; the run would take several minutes."""
    job.submit("--time=1", "--signal=B:USR1@35", train_iters=3000, save_interval=60)
    until(lambda: job.restarts == 1, 120, "requeue")
    first = job.checkpoint
    assert 1 <= first < 120
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=10")
    until(lambda: job.checkpoint >= 120, 240, "checkpoint 120")
    assert f"saved checkpoint {first} on a signal" in job.output
    assert_same_checkpoint(whole.save, job.save, 120)


@pytest.mark.parametrize("partition", ["batch", "graceful"])
def test_preempted_it_saves_and_goes_on_when_the_nodes_are_free(partition, job, whole):
    """batch: Slurm requeues it at once. graceful: it signals the ranks alone, and the job requeues itself."""
    job.submit(f"--partition={partition}", **LENGTH)
    job.until_iteration(5)
    options = ["--partition=urgent", "--nodes=2", "--exclusive", f"--output={job.folder}/urgent.out"]
    slurm("sbatch", *options, "--wrap=sleep 3")
    until(lambda: job.restarts == 1 and job.checkpoint, 90, "checkpoint and requeue")
    assert 5 <= job.checkpoint < 50
    assert_undisturbed(job, whole, job.wait())
    assert not (job.save / "deaths").exists()


def test_a_lost_node_brings_it_back_into_the_queue(job, whole):
    job.submit(**LENGTH | {"save_interval": 5})
    until(lambda: job.checkpoint >= 10, 120, "checkpoint")
    slurm("scontrol", "update", "nodename=n2", "state=down", "reason=test")
    until(lambda: job.restarts == 1 and job.state == "PENDING", 90, "requeue")  # Slurm ends the other node's part first
    subprocess.run(["scontrol", "update", "nodename=n2", "state=resume"], timeout=60)  # unless it is back by itself
    assert_undisturbed(job, whole, job.wait())


def test_cancelled_it_saves_and_stays_out_of_the_queue(job):
    job.submit(**LENGTH)
    job.until_iteration(5)
    slurm("scancel", job.number)
    assert job.wait(60) == "CANCELLED"
    until(lambda: "ended by SIGTERM at checkpoint" in job.output, 40, "the last message")
    assert 5 <= job.checkpoint < 50 and job.restarts == 0
    until(lambda: not job.ranks(), 40, "end of the ranks")


def test_a_job_that_dies_three_times_without_a_checkpoint_stops_and_says_why(job):
    job.submit(words=("--num-experts", "7"), **LENGTH)
    assert job.wait() == "FAILED"
    assert job.restarts == 2 and (job.save / "deaths").read_text() == "none 3\n"
    assert "stopped: the run died 3 times in a row without a new checkpoint (newest: none)" in job.output
    end = job.output[job.output.index("stopped:") :]
    assert "its end:" in end and "pretrain_emoe.py: error: Number of experts should be a multiple" in end


def test_a_job_that_dies_when_it_starts_is_refused_before_it_is_submitted(job):
    env = os.environ | {"EMOE_CLUSTER_ENV": str(write_settings(job.folder, **LENGTH))}
    done = subprocess.run([SCRIPT, "--", "--num-experts", "7"], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "error: Number of experts should be a multiple" in done.stderr
    assert slurm("squeue", "-h", "-o", "%j") == "" and not job.save.exists()
