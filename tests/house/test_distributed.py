"""The test helpers themselves: a rank that fails must fail the test."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.distributed import is_running, run_ranks, torchrun, wait_until


def summed(offset: int) -> float:
    import torch
    import torch.distributed as dist

    total = torch.tensor([float(dist.get_rank() + offset)], device="cuda")
    dist.all_reduce(total)
    return total.item() + dist.get_rank()


def one_fails() -> None:
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("a rank's own words")
    dist.barrier()


def one_dies() -> None:
    import torch.distributed as dist

    if os.environ["RANK"] == "0":
        os._exit(3)
    dist.barrier()


def test_each_rank_answers():
    assert run_ranks(summed, 2, 10) == [21, 22]


def surroundings() -> dict[str, str]:
    return dict(os.environ)


def test_ranks_see_no_gpu_and_change_nothing_here(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    before = dict(os.environ)
    seen = run_ranks(surroundings, 1)[0]
    assert (seen["CUDA_VISIBLE_DEVICES"], seen["TORCHDYNAMO_DISABLE"], seen["OMP_NUM_THREADS"]) == ("", "1", "1")
    assert os.environ == before


def test_a_failing_rank_is_reported_with_its_traceback_and_ends_the_others():
    with pytest.raises(RuntimeError, match="rank 1 failed:(?s:.*)one_fails(?s:.*)ValueError: a rank's own words"):
        run_ranks(one_fails, 2)


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RuntimeError, match="rank 0 died without a word"):  # rank 1 fails as well, perhaps first
        run_ranks(one_dies, 2)


@pytest.mark.slow
def test_a_rank_that_hangs_is_ended():
    begin = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks \[0\] gave no result in time"):
        run_ranks(time.sleep, 1, 300, timeout=6)
    assert time.monotonic() - begin < 60


def fork_and_fail(note: str) -> None:
    pid = os.fork()
    if pid == 0:
        time.sleep(300)
    Path(note).write_text(str(pid))
    raise ValueError("lost")


def test_what_a_failed_rank_had_forked_is_ended(tmp_path):
    with pytest.raises(RuntimeError, match="lost"):
        run_ranks(fork_and_fail, 1, str(tmp_path / "forked"))
    forked = int((tmp_path / "forked").read_text())
    wait_until(lambda: not is_running(forked))


@pytest.mark.slow
def test_torchrun_returns_the_output_or_raises_with_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "words = ['rank', os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], *sys.argv[1:]]\n"
        "os.write(1, f'{' '.join(words)}\\n'.encode())\n"  # in one piece: ranks share the stream
    )
    output = torchrun(2, script, "--flag", "value").stdout
    assert "rank 0 of 2 --flag value" in output and "rank 1 of 2 --flag value" in output
    script.write_text("import sys\nprint('last words')\nsys.exit(5)\n")
    with pytest.raises(RuntimeError, match="script.py ended with 1:(?s:.*)last words"):
        torchrun(1, script)
    assert torchrun(1, script, check=False).returncode == 1


@pytest.mark.slow
def test_torchrun_ends_its_ranks_when_time_is_over(tmp_path):
    pid = tmp_path / "pid"
    script = tmp_path / "script.py"
    script.write_text(f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)\n")
    with pytest.raises(subprocess.TimeoutExpired):
        torchrun(1, script, timeout=12)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
