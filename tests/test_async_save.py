"""Megatron's asynchronous saves with elastic training: same checkpoints, none lost."""

import signal
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_emoe.recovery import damage, plan
from tests.distributed import run_ranks
from tests.test_exit_signals import in_save, in_step
from tests.test_resume import assert_same_checkpoint
from tests.tiny import COACTIVATION, Run, flags, train

RUN = COACTIVATION | {
    "expert_model_parallel_size": 2,
    "train_iters": 6,
    "save_interval": 2,
    "global_batch_size": 4,
    "exit_signal_handler": True,
}
ASYNC = {"async_save": True, "use_persistent_ckpt_worker": True, "async_strategy": "mcore"}
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, list[Run]]:
    """A run whose saves are synchronous."""
    folder = tmp_path_factory.mktemp("synchronous")
    return folder, run_ranks(train, 2, flags(**RUN | {"save": folder}))


@pytest.mark.slow
def test_checkpoints_saved_beside_training_are_those_saved_in_it(whole, tmp_path):
    run_ranks(train, 2, flags(**RUN | ASYNC | {"save": tmp_path}))
    assert (tmp_path / TRACKER).read_text() == "6"
    for iteration in (2, 4, 6):
        assert_same_checkpoint(whole[0], tmp_path, iteration)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("interrupt", "saved"),
    [(partial(in_step, signal.SIGUSR1, True, 3), 3), (partial(in_save, signal.SIGTERM), 3)],
    ids=["in a training step", "when a save has begun"],
)
def test_a_signal_waits_for_the_save_that_is_under_way(interrupt, saved, whole, tmp_path):
    words = flags(**RUN | ASYNC | {"save": tmp_path, "load": tmp_path})
    run_ranks(train, 2, words, False, interrupt)
    assert (tmp_path / TRACKER).read_text() == str(saved)
    assert damage(tmp_path / f"iter_{saved:07d}") is None and plan(tmp_path).unfinished == ()
    resumed = run_ranks(train, 2, words)
    for mine, one in zip(resumed, whole[1], strict=True):
        assert mine.losses == one.losses[saved:]
        assert all(torch.equal(mine.weights[name], one.weights[name]) for name in one.weights)
    assert_same_checkpoint(whole[0], tmp_path, 6)
