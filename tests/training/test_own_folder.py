"""A run's own folder: one run at a time writes there, and a finished one leaves it as it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_emoe.training import one_run
from tests.distributed import torchrun
from tests.tiny import flags

HOLD = """
import sys
from megatron_emoe.training.one_run import take_folder
take_folder(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process holds, and that process."""
    save = tmp_path / "save"
    command = [sys.executable, "-c", HOLD, str(save)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "held\n"
        yield save, other


def test_a_second_run_is_refused_until_the_first_has_ended(held, capsys):
    save, other = held
    with pytest.raises(SystemExit) as left:
        one_run.take_folder(str(save))
    message = f"--save {save}: another run writes to it (process {other.pid} on "
    assert left.value.code == 2 and message in capsys.readouterr().err
    other.kill()
    other.wait()
    one_run.take_folder(str(save))


def test_a_folder_that_knows_no_locks_is_taken(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(one_run.fcntl, "lockf", none)
    one_run.take_folder(str(tmp_path))


@pytest.mark.slow
def test_the_program_refuses_and_writes_nothing(held):
    save, _ = held
    ended = torchrun(1, "pretrain_emoe.py", *flags(save=save, save_interval=2), check=False)
    assert ended.returncode != 0 and f"error: --save {save}: another run writes to it" in ended.stdout
    assert [path.name for path in save.iterdir()] == [one_run.LOCK]


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_keeps_its_newest_checkpoint(tmp_path):
    words = flags(save=tmp_path, load=tmp_path, save_interval=2, train_iters=3)
    torchrun(1, "pretrain_emoe.py", *words)
    newest = tmp_path / "iter_0000003"

    def state() -> dict[str, tuple[int, int]]:
        files = {**{path.name: path for path in newest.iterdir()}, "folder": newest}
        return {name: (path.stat().st_ino, path.stat().st_mtime_ns) for name, path in files.items()}

    before = state()
    again = torchrun(1, "pretrain_emoe.py", *words).stdout
    assert f"--save {tmp_path}: iteration 3 is there, and nothing was trained: not saved anew" in again
    assert state() == before and Path(tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"
