"""What slurm/job.sh and node.sh do inside a job, where there is no Slurm: stand-ins for its commands take notes.

srun runs what a test gives it to do; the real Slurm is in tests/slurm.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed import is_running, wait_until

REPO = Path(__file__).resolve().parents[2]
SETTINGS = {
    "EMOE_ACCOUNT": "none",
    "EMOE_PARTITION": "none",
    "EMOE_BASE": "none",
    "EMOE_DATA": "none",
    "EMOE_LAYOUT": "--micro-batch-size 1",
    "EMOE_PYTHON": sys.executable,
    "EMOE_CHECK_PYTHON": "none",
    "EMOE_GPUS_PER_NODE": "0",
    "EMOE_PROCS_PER_NODE": "1",
    "EMOE_REMIND_SECONDS": "1",
    "EMOE_SAVE_SECONDS": "3",
}
SCONTROL = """#!/bin/sh
case "$1 $2" in
  "show hostnames") echo n1 ;;
  "show node") echo "NodeAddr=127.0.0.1 Port=1" ;;
  requeue*) echo "$2" >>"$NOTES/requeued" ;;
esac
"""
SRUN = """#!/bin/bash
printf '%s\\n' "$@" >"$NOTES/srun"
trap 'exit 0' USR1
eval "$SRUN_DOES"
"""


class Job:
    """A job of emoe_21b.sh, number 77, that only believes to be one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.save = folder, folder / "save"
        (folder / "bin").mkdir()
        for name, text in {"scontrol": SCONTROL, "srun": SRUN}.items():
            self.program(name, text)
        self.program("squeue", '#!/bin/bash\neval "$SQUEUE_DOES"\n')

    def program(self, name: str, text: str) -> None:
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(0o755)

    def run(self, does: str, restart: int = 0, **env: str) -> subprocess.CompletedProcess:
        (self.folder / "cluster.env").write_text("")
        known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "EMOE_"))}
        slurm = {"SLURM_JOB_ID": "77", "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n1"}
        slurm |= {"SLURM_RESTART_COUNT": str(restart), "NOTES": str(self.folder), "SRUN_DOES": does}
        known |= slurm | SETTINGS | {"EMOE_SAVE": str(self.save), "EMOE_CLUSTER_ENV": str(self.folder / "cluster.env")}
        known |= {"PATH": f"{self.folder}/bin:{os.environ['PATH']}", "SQUEUE_DOES": ""}
        command = f"SLURM_TASK_PID=$$ exec bash {REPO}/slurm/emoe_21b.sh"
        return subprocess.run(["bash", "-c", command], env=known | env, capture_output=True, text=True, timeout=60)

    @property
    def requeued(self) -> bool:
        return (self.folder / "requeued").exists()


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(tmp_path)


SAVES = 'echo {} >"$EMOE_SAVE/latest_checkpointed_iteration.txt"'
SIGNALLED = 'echo TERM >"$EMOE_LOGS/signalled"'
FINISHED = 'touch "$EMOE_FINISHED"'
STOPPED = 'echo "dead experts" >"$EMOE_SAVE/emoe_stopped.txt"'
CASES = {
    "done": (f"{SAVES.format(9)}; {FINISHED}", 0, False, "finished"),
    "done, and signalled in the last save": (f"{SAVES.format(9)}; {SIGNALLED}; {FINISHED}", 0, False, "finished"),
    "signalled": (f"{SAVES.format(4)}; {SIGNALLED}", 0, True, "saved checkpoint 4 on a signal"),
    "signalled before anything was saved": (SIGNALLED, 0, True, "a signal came before there was anything to save (1"),
    "dead": ("exit 3", 0, True, "the run died with status 3 (1 of 3 since checkpoint none)"),
    "stopped by the router watch": (f"{STOPPED}; exit 1", 1, False, "stopped by --emoe-router-watch"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("does", "status", "requeued", "said"), CASES.values(), ids=CASES)
def test_what_comes_after_the_step_depends_on_why_it_ended(does, status, requeued, said, job):
    done = job.run(does)
    assert (done.returncode, job.requeued) == (status, requeued), done.stderr
    assert f"emoe_21b.sh: {said}" in done.stderr


@pytest.mark.slow
def test_deaths_and_signals_without_a_checkpoint_stop_the_job_and_a_checkpoint_starts_the_count_anew(job):
    assert "(1 of 3" in job.run("exit 1").stderr
    assert "(2 of 3" in job.run(SIGNALLED, restart=1).stderr
    assert "(1 of 3 since checkpoint 5)" in job.run(f"{SAVES.format(5)}; exit 1", restart=2).stderr
    assert "(2 of 3" in job.run("exit 1", restart=3).stderr
    done = job.run("exit 1", restart=4)
    assert done.returncode == 1 and "stopped: the run died 3 times in a row without a new checkpoint" in done.stderr


@pytest.mark.slow
def test_the_step_has_one_task_on_each_node_and_the_container_sees_the_logs(job):
    image = {"EMOE_CONTAINER": "/image.sqsh", "EMOE_MOUNTS": "/data", "EMOE_LOGS": f"{job.folder}/logs"}
    job.run(FINISHED, **image)
    words = (job.folder / "srun").read_text().splitlines()
    assert {"--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--container-image=/image.sqsh"} <= set(words)
    mounts = next(word for word in words if word.startswith("--container-mounts="))
    assert mounts == f"--container-mounts={REPO},{job.save},{job.folder}/logs/77.0,/data"


OWNERS = {
    "over": ("exit 0", 0, "finished"),
    "forgotten": ('echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1', 0, "finished"),
    "waiting": ("echo PENDING", 0, "finished"),
    "running": ("echo RUNNING", 2, "job 76, which is RUNNING, writes there"),
    "suspended": ("echo SUSPENDED", 2, "job 76, which is SUSPENDED, writes there"),
    "unknown": ('echo "Unable to contact slurm controller" >&2; exit 1', 2, "job 76, which is of unknown state"),
    "still saving": ("echo COMPLETING", 2, "job 76, which is COMPLETING, writes there"),
    "soon done saving": ('[ -e "$NOTES/n" ] || echo COMPLETING; touch "$NOTES/n"', 0, "finished"),
}


@pytest.mark.slow
@pytest.mark.parametrize(("squeue", "status", "said"), OWNERS.values(), ids=OWNERS)
def test_a_folder_is_taken_only_where_its_last_job_is_over(squeue, status, said, job):
    job.save.mkdir()
    (job.save / "running_job").write_text("76")
    done = job.run(FINISHED, SQUEUE_DOES=squeue)
    assert done.returncode == status and said in done.stderr, done.stderr
    assert (job.save / "running_job").read_text().strip() == ("77" if status == 0 else "76")


def start_node(job: Job, **env: str) -> subprocess.Popen:
    """node.sh as srun would start it; the interpreter is a stand-in that notes its words."""
    job.program(
        "python", '#!/bin/bash\n[ "$1" != -c ] || exit 0\necho "$@" >"$NOTES/torchrun"\neval "$TORCHRUN_DOES"\n'
    )
    known = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "EMOE_"))}
    known |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURMD_NODENAME": "n1", "NOTES": str(job.folder)}
    known |= SETTINGS | {"EMOE_HOME": str(REPO), "EMOE_SAVE": str(job.save), "EMOE_LOGS": str(job.folder / "logs")}
    known |= {"EMOE_RDZV_ADDRESS": "127.0.0.1", "EMOE_RDZV_PORT": "29511", "EMOE_RUN_ID": "77.0"}
    known |= {"EMOE_STAGE": "", "EMOE_CONTAINER": "", "EMOE_CONTAINER_KIND": "pyxis", "EMOE_MOUNTS": ""}
    known |= {"EMOE_PYTHON": f"{job.folder}/bin/python", "PATH": f"{job.folder}/bin:{os.environ['PATH']}"}
    command = ["bash", str(REPO / "slurm" / "node.sh"), "--lr", "1e-5"]
    return subprocess.Popen(command, env=known | env, text=True, stderr=subprocess.PIPE)


RANK = "env TORCHELASTIC_RUN_ID=77.0 sleep 300"


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0, 4], ids=["running", "started afterwards"])
def test_a_node_whose_neighbour_failed_ends_its_ranks(seconds, job):
    with start_node(job, TORCHRUN_DOES=f"sleep {seconds}; {RANK}; exit $?") as node:
        wait_until((job.folder / "torchrun").exists)
        (job.folder / "logs" / "first_failure").write_text("rank 0")
        node.communicate(timeout=30)
    assert node.returncode == 128 + signal.SIGKILL
    assert (job.folder / "logs" / "first_failure").read_text() == "rank 0"


@pytest.mark.slow
def test_what_a_rank_left_behind_ends_with_the_node_and_another_node_s_does_not(job):
    left = f"""  # without the pipe of standard error, as torchrun starts ranks
setsid {RANK} >/dev/null 2>&1 63>&- & ours=$!
SLURM_NODEID=0 setsid {RANK} >/dev/null 2>&1 63>&- & other=$!
until grep -qsx sleep /proc/$ours/comm && grep -qsx sleep /proc/$other/comm; do sleep 0.05; done
echo $ours >"$NOTES/ours"
echo $other >"$NOTES/other"
exit 3
"""
    with start_node(job, TORCHRUN_DOES=left) as node:
        node.communicate(timeout=30)
    ours, other = (int((job.folder / name).read_text()) for name in ("ours", "other"))
    os.kill(other, signal.SIGKILL)
    wait_until(lambda: not is_running(ours))


@pytest.mark.slow
def test_a_node_that_fails_says_so_for_the_others(job):
    with start_node(job, TORCHRUN_DOES="exit 3") as node:
        node.communicate(timeout=30)
    assert node.returncode == 3
    assert "rank unknown on node n1" in (job.folder / "logs" / "first_failure").read_text()


@pytest.mark.slow
def test_staging_may_move_the_data_and_is_not_killed_by_a_signal(job):
    stage = job.folder / "stage.sh"
    stage.write_text('touch "$NOTES/staging"\nsleep 2\nEMOE_DATA="0.5 /local/a 0.5 /local/b"\n')
    with start_node(job, EMOE_STAGE=str(stage), TORCHRUN_DOES="exit 0") as node:
        wait_until((job.folder / "staging").exists)
        subprocess.run(["pkill", "-USR1", "-P", str(node.pid)], check=True)
        node.send_signal(signal.SIGUSR1)
        _, said = node.communicate(timeout=30)
    assert node.returncode == 0, said
    assert "pretrain_emoe.py --data-path 0.5 /local/a 0.5 /local/b --lr 1e-5" in (job.folder / "torchrun").read_text()


def test_staging_that_fails_is_the_first_failure(job):
    stage = job.folder / "stage.sh"
    stage.write_text("return 7\n")
    with start_node(job, EMOE_STAGE=str(stage)) as node:
        node.communicate(timeout=30)
    assert node.returncode == 7 and not (job.folder / "torchrun").exists()
    assert f"EMOE_STAGE {stage} ended with status 7" in (job.folder / "logs" / "first_failure").read_text()


@pytest.mark.slow
def test_in_apptainer_torchrun_starts_with_the_signals_ignored(job):
    """apptainer itself sets them to their defaults; the stand-in does too."""
    job.program(
        "apptainer", '#!/bin/bash\necho "${@:1:7}" >>"$NOTES/apptainer"\nshift 5\nexec env --default-signal "$@"\n'
    )
    image = {"EMOE_CONTAINER": "/image.sif", "EMOE_CONTAINER_KIND": "apptainer", "EMOE_MOUNTS": "/data"}
    does = "kill -USR1 $$; kill -TERM $$; exit 4"
    with start_node(job, TORCHRUN_DOES=does, **image) as node:
        node.communicate(timeout=30)
    assert node.returncode == 4
    inside = f"exec --nv --bind {REPO},{job.save},{job.folder}/logs,/data /image.sif bash -c"
    assert (job.folder / "apptainer").read_text().splitlines() == [inside, inside]
