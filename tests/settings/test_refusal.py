"""How a program that will not start ends, on each rank of a machine."""

import signal
import subprocess
import sys
import time

import pytest

from tests.distributed import REPO

REFUSE = "from megatron_emoe.settings import refusal; {}refusal.fail('--flag 9: too large')"


def refuse(local_rank: int, before: str = "") -> subprocess.Popen:
    env = {"LOCAL_RANK": str(local_rank), "PYTHONPATH": str(REPO)}
    # A job script has its ranks ignore SIGTERM, so that a checkpoint is written before the end.
    started = f"trap '' TERM; exec {sys.executable} -c \"$0\""
    command = ["bash", "-c", started, REFUSE.format(before)]
    return subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)


def test_the_first_rank_says_why_and_ends():
    ended = refuse(0)
    assert ended.communicate(timeout=60)[1] == "-c: error: --flag 9: too large\n"
    assert ended.returncode == 2


BLOCKED = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM}); "


@pytest.mark.slow
@pytest.mark.parametrize("before", ["", BLOCKED], ids=["ignored", "blocked too"])
def test_another_rank_leaves_the_word_to_the_first(before):
    waiting = refuse(1, before)
    with pytest.raises(subprocess.TimeoutExpired):  # torchrun would end the first rank, and its message, with this one
        waiting.wait(timeout=5)
    waiting.send_signal(signal.SIGTERM)
    assert waiting.communicate(timeout=10)[1] == ""
    assert waiting.returncode == -signal.SIGTERM


def test_another_rank_speaks_where_the_first_has_nothing_to_refuse():
    start = time.monotonic()
    ended = refuse(1, "refusal.PATIENCE = 0.1; ")
    assert ended.communicate(timeout=60)[1] == "-c: error: --flag 9: too large\n"
    assert ended.returncode == 2 and time.monotonic() - start >= 0.1
