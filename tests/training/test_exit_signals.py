"""A signal at any moment of a run: it saves, ends with status 0, and goes on bit by bit."""

import multiprocessing
import os
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests import programs
from tests.distributed import ALONE, REPO, run_ranks
from tests.tiny import Run, flags, tiny_datasets, train

pytestmark = pytest.mark.slow

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
    from megatron_emoe.training.loop import ElasticLoop

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
    from megatron_emoe.training.evaluation import Evaluator

    measure = Evaluator.loss_at_k

    def watched(self, *args):
        signal_rank(number)
        return measure(self, *args)

    Evaluator.loss_at_k = watched


def while_building(number: int) -> None:
    """Send it while the model is built."""
    from megatron_emoe.model.layer_spec import ElasticGPTModelBuilder

    build = ElasticGPTModelBuilder.build_model

    def watched(self, *args, **kwargs):
        signal_rank(number)
        return build(self, *args, **kwargs)

    ElasticGPTModelBuilder.build_model = watched


def before_parsing(number: int) -> None:
    """Send it before Megatron has a handler: when its arguments are about to be read."""
    from megatron_emoe.training import arguments

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


def signal_group(number: int) -> None:
    """Send the signal to every process of this group, as Slurm does to a step: from outside the group."""
    kill = ["kill", f"-{signal.Signals(number).name}", "--", f"-{os.getpgrp()}"]
    subprocess.run(["setsid", "--wait", *kill], check=True)


def signalled_with_programs(number: int, said: Path) -> None:
    """Train; in the second step every process of the group gets the signal. said: gets what lived through it."""
    import pretrain_emoe
    from megatron_emoe.training.loop import ElasticLoop

    forward, seen = ElasticLoop.forward_step, []

    def watched(self, data_iterator, model):
        seen.append(None)
        if len(seen) == 3:  # two micro-batches a step
            program = subprocess.Popen(["sleep", "300"])
            workers = multiprocessing.active_children()
            signal_group(number)
            time.sleep(0.5)  # what dies of it takes a moment
            said.write_text(f"{program.poll()} {[worker.is_alive() for worker in workers]}")
            program.kill()
        return forward(self, data_iterator, model)

    ElasticLoop.forward_step = watched
    pretrain_emoe.build_datasets = tiny_datasets
    pretrain_emoe.main()


def run_alone(code: str, *words: str) -> subprocess.CompletedProcess:
    """Run the program in a session of its own, as the only rank."""
    env = os.environ | ALONE | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])}
    command = [programs.python(), "-c", code, *words]
    return subprocess.run(
        command, cwd=REPO, env=env, start_new_session=True, timeout=200, capture_output=True, text=True
    )


@pytest.mark.parametrize("number", [USR1, TERM], ids=["USR1", "TERM"])
def test_a_signal_to_every_process_kills_neither_programs_nor_workers_and_the_run_saves(number: int, tmp_path: Path):
    said = tmp_path / "said"
    code = (
        "import pretrain_emoe; from pathlib import Path; "
        "from tests.training.test_exit_signals import signalled_with_programs; "
        f"signalled_with_programs({int(number)}, Path({str(said)!r}))"
    )
    one_rank = {"expert_model_parallel_size": 1, "eval_iters": 0, "emoe_eval_k": None, "num_workers": 2}
    words = flags(**RUN | one_rank | {"save": tmp_path})
    ended = run_alone(code, "--host-mode", *words)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    assert said.read_text() == f"None {[True] * 6}"  # no status yet; two workers for each of the three data sets
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"


def test_a_worker_that_never_ends_is_ended_by_its_rank_and_by_nobody_else():
    code = """
import multiprocessing, signal, time
from megatron_emoe.training import exit_signals
exit_signals.start()
from tests.training.test_exit_signals import signal_group
worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(3600,), daemon=True)
worker.start()
for number in exit_signals.SIGNALS:
    signal_group(number)
worker.join(timeout=0.5)
print(worker.is_alive(), exit_signals.came())
"""  # the end of the program terminates its daemons and waits for them
    ended = run_alone(code, "--exit-signal-handler")
    assert (ended.returncode, ended.stdout) == (0, "True True\n"), ended.stderr


def test_a_signal_is_heard_where_something_unblocked_it():
    code = """
import os, signal
from megatron_emoe.training import exit_signals
exit_signals.start()
signal.pthread_sigmask(signal.SIG_UNBLOCK, exit_signals.SIGNALS)
os.kill(os.getpid(), signal.SIGTERM)
print(exit_signals.came(), set(exit_signals.SIGNALS) <= signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
    ended = run_alone(code, "--exit-signal-handler")
    assert (ended.returncode, ended.stdout) == (0, "True True\n"), ended.stderr
