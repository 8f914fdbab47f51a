"""A signal at any moment of a run: it saves, ends with status 0, and goes on bit by bit."""

import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.distributed import run_ranks
from tests.tiny import Run, flags, train

RUN = {
    "expert_model_parallel_size": 2,
    "train_iters": 6,
    "save_interval": 2,
    "eval_interval": 3,
    "eval_iters": 4,
    "emoe_eval_k": [1, 4],
    "global_batch_size": 4,
    "exit_signal_handler": True,
}


def signal_rank(number: int, rank: int = 1) -> None:
    if os.environ["RANK"] == str(rank):
        os.kill(os.getpid(), number)


def in_step(number: int, training: bool, call: int) -> None:
    """Send the signal to one rank in its forward pass `call`, counted from 1, of training or of evaluation."""
    from megatron_emoe.training import ElasticLoop

    forward, seen = ElasticLoop.forward_step, []

    def watched(self, data_iterator, model):
        if model.training == training:
            seen.append(None)
            if len(seen) == call:
                signal_rank(number)
        return forward(self, data_iterator, model)

    ElasticLoop.forward_step = watched


def in_save(number: int) -> None:
    """Send it while the first checkpoint is being written."""
    from megatron.core import dist_checkpointing

    save, seen = dist_checkpointing.save, []

    def watched(*args, **kwargs):
        if not seen:
            signal_rank(number)
        seen.append(None)
        return save(*args, **kwargs)

    dist_checkpointing.save = watched


def at_each_k(number: int) -> None:
    """Send it while the held-out losses at each k' are measured."""
    from megatron_emoe.evaluation import Evaluator

    measure = Evaluator.loss_at_k

    def watched(self, *args):
        signal_rank(number)
        return measure(self, *args)

    Evaluator.loss_at_k = watched


def while_building(number: int) -> None:
    """Send it while the model is built."""
    from megatron_emoe.layer_spec import ElasticGPTModelBuilder

    build = ElasticGPTModelBuilder.build_model

    def watched(self, *args, **kwargs):
        signal_rank(number)
        return build(self, *args, **kwargs)

    ElasticGPTModelBuilder.build_model = watched


def before_parsing(number: int) -> None:
    """Send it before Megatron has a handler: when its arguments are about to be read."""
    from megatron_emoe import arguments

    parse_args = arguments.parse_args

    def watched(*args, **kwargs):
        signal_rank(number)
        return parse_args(*args, **kwargs)

    arguments.parse_args = watched


USR1, TERM = signal.SIGUSR1, signal.SIGTERM
MOMENTS = {
    "before arguments are read": (partial(before_parsing, USR1), 1),
    "while the model is built": (partial(while_building, TERM), 1),
    "in a training step": (partial(in_step, USR1, True, 2), 2),
    "in an evaluation": (partial(in_step, USR1, False, 2), 3),
    "in an evaluation, terminated": (partial(in_step, TERM, False, 2), 3),
    "between two k'": (partial(at_each_k, USR1), 3),
    "while a checkpoint is written": (partial(in_save, TERM), 3),
}


@pytest.fixture(scope="module")
def whole() -> list[Run]:
    return run_ranks(train, 2, flags(**RUN))


@pytest.mark.slow
@pytest.mark.parametrize(("interrupt", "saved"), MOMENTS.values(), ids=MOMENTS)
def test_a_signal_saves_and_the_next_run_ends_as_if_none_had_come(
    interrupt: Callable, saved: int, whole: list[Run], tmp_path: Path
):
    words = flags(**RUN | {"save": tmp_path, "load": tmp_path})
    stopped = run_ranks(train, 2, words, False, interrupt)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(saved)
    resumed = run_ranks(train, 2, words)
    for first, second, one in zip(stopped, resumed, whole, strict=True):
        assert first.losses + second.losses == one.losses
        assert all(torch.equal(second.weights[name], one.weights[name]) for name in one.weights)


def test_an_evaluation_ends_early(whole: list[Run], tmp_path: Path):
    batches = len(whole[0].valid_losses)
    words = flags(**RUN | {"save": tmp_path, "eval_iters": 50})
    run = run_ranks(train, 2, words, False, partial(in_step, USR1, False, 2))[0]
    assert len(run.valid_losses) <= 2 < batches
    assert not (tmp_path / "validation_k.jsonl").exists()  # half an evaluation is none


@pytest.mark.parametrize("number", [USR1, TERM], ids=["USR1", "TERM"])
def test_without_the_flag_a_signal_ends_the_run_as_ever(number: int):
    words = flags(**RUN | {"exit_signal_handler": None})
    with pytest.raises(RuntimeError, match="rank 1 died without a word"):
        run_ranks(train, 2, words, False, partial(in_step, number, True, 1))
