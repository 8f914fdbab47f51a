"""The test cluster: where it does not run, these tests skip themselves and say how to start it."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.jobs import CLUSTER, ITERATIONS, TinyJob, slurm


def _is_up() -> bool:
    return subprocess.run([CLUSTER, "status"], capture_output=True).returncode == 0


@pytest.fixture(scope="session")
def cluster() -> None:
    """Points Slurm's commands to the test cluster."""
    if not _is_up():
        pytest.skip("needs the test cluster: make test-slurm (as root, on Debian or Ubuntu)")
    settings = subprocess.run([CLUSTER, "env"], capture_output=True, text=True, check=True).stdout
    os.environ["SLURM_CONF"] = settings.strip().partition("=")[2]


@pytest.fixture
def job(cluster: None, tmp_path: Path) -> Iterator[TinyJob]:
    """A job that is not submitted yet; whatever is left of it is cancelled."""
    made = TinyJob(tmp_path)
    yield made
    if made.number:
        slurm("scancel", "--quiet", made.number)


@pytest.fixture(scope="session")
def whole(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> TinyJob:
    """The run that was never disturbed, checkpoints at every fifth iteration: what the others are compared with."""
    made = TinyJob(tmp_path_factory.mktemp("whole"))
    made.submit(train_iters=ITERATIONS, save_interval=5)
    assert made.wait(400) == "COMPLETED", made.output[-3000:]
    return made
