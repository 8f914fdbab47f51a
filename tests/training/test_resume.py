"""A stopped and resumed run equals an uninterrupted one, bit by bit; what may change on the way and what may not."""

import contextlib
import io
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.distributed import run_ranks, torchrun
from tests.tiny import Run, arguments, flags, stored_tensors, train

pytestmark = pytest.mark.slow

ELASTIC = {
    "moe_router_topk": 3,
    "emoe_selection": "coactivation",
    "emoe_pool_k": 6,
    "emoe_k_schedule": "uniform",
    "emoe_k_min": 1,
    "emoe_k_max": 4,
}
RUN = ELASTIC | {
    "expert_model_parallel_size": 2,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 1e-2,
    "seq_length": 64,
    "max_position_embeddings": 64,
    "train_iters": 4,
    "save_interval": 2,
    "lr_decay_style": "cosine",
    "hidden_dropout": 0.1,
    "emoe_eval_k": [1, 4],
    "eval_interval": 4,
    "eval_iters": 1,
}
# Stored by parameter: buffers of shards would come with the arbitrary memory between parameters.
DISTRIBUTED = {"use_distributed_optimizer": True, "dist_ckpt_optim_fully_reshardable": True}


def assert_same_checkpoint(one: Path, other: Path, iteration: int) -> None:
    mine, theirs = stored_tensors(one, iteration), stored_tensors(other, iteration)
    assert mine.keys() == theirs.keys()
    assert any("router.weight" in name for name in mine) and any("exp_avg" in name for name in mine)
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def iteration_lines(log: str) -> list[tuple[int, str]]:
    """What the log says of each iteration, but for times.

    The second line of a start is without losses: there the core averages over the first iteration too. A line goes up
    to its last field: two ranks write to one stream, each the end of a line apart from the line.
    """
    lines = [
        (int(number), line) for number, line in re.findall(r"iteration +(\d+)/ +\d+ \|(.*?nan iterations: +\d+)", log)
    ]
    lines = [(number, re.sub(r"elapsed time per iteration \(ms\): [\d.]+", "", line)) for number, line in lines]
    lines[1] = (lines[1][0], re.sub(r"(lm |balancing_)loss: \S+", "", lines[1][1]))
    return lines


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, str]:
    """An uninterrupted run of four iterations under torchrun, saved after two and four; its folder and log."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    more = DISTRIBUTED | {"save": folder, "tensorboard_dir": folder / "tensorboard"}
    return folder, torchrun(2, "pretrain_emoe.py", *flags(**RUN | more), timeout=280).stdout


def test_a_resumed_torchrun_job_with_the_distributed_optimizer_repeats_the_tail_bit_by_bit(saved, tmp_path):
    folder, log = saved
    more = DISTRIBUTED | {"load": folder, "ckpt_step": 2, "save": tmp_path}
    more["tensorboard_dir"] = tmp_path / "tensorboard"
    resumed = torchrun(2, "pretrain_emoe.py", *flags(**RUN | more), timeout=280).stdout
    assert_short(resumed)
    whole, tail = iteration_lines(log), iteration_lines(resumed)
    assert [number for number, _ in whole] == [1, 2, 3, 4] and [number for number, _ in tail] == [3, 4]
    assert tail[0] == whole[2] and "lm loss:" in tail[0][1]
    assert tail[1][1] == re.sub(r"(lm |balancing_)loss: \S+", "", whole[3][1]) and "grad norm:" in tail[1][1]
    drawn = re.findall(r"active k: (\d)", log)
    assert len(drawn) == 4 and len(set(drawn)) > 1
    expected, got = scalars(folder / "tensorboard"), scalars(tmp_path / "tensorboard")
    assert {"lm loss", "emoe/router entropy", "emoe/validation loss at k=4"} <= got.keys()
    for tag in got:
        if "time" not in tag and "vs samples" not in tag:
            assert got[tag] == [(step, value) for step, value in expected[tag] if step > 2], tag
    assert_same_checkpoint(folder, tmp_path, 4)


def assert_short(log: str) -> None:
    """Of 900 arguments those that are no defaults are listed, and no parameter of the model."""
    listed = re.search(
        r"-- arguments \((\d+) more have Megatron's defaults\) --+\n(.*?)\n--+ end of arg", log, re.DOTALL
    )
    names = [line.split()[0] for line in listed[2].splitlines()]
    assert {"emoe_pool_k", "moe_router_topk", "load"} <= set(names) and "fp16" not in names
    assert len(names) + int(listed[1]) > 800 and len(names) < 120
    assert "router.weight (param.main_grad" not in log and "UserWarning" not in log


def test_a_stopped_and_resumed_run_with_the_plain_optimizer_repeats_the_tail_bit_by_bit(tmp_path):
    whole_folder, folder = tmp_path / "whole", tmp_path / "stopped"
    settings = RUN | {"emoe_eval_k": None, "eval_iters": 0, "seq_length": 16, "max_position_embeddings": 16}
    whole = run_ranks(train, 2, flags(**settings | {"save": whole_folder, "save_interval": 4}))
    stopped = run_ranks(train, 2, flags(**settings | {"save": folder, "exit_interval": 2}))
    assert not (folder / "iter_0000004").exists()
    resumed = run_ranks(train, 2, flags(**settings | {"save": folder, "load": folder}))
    for one, first, second in zip(whole, stopped, resumed, strict=True):
        assert first.losses + second.losses == one.losses and len(second.losses) == 2 * 2
        assert second.routes[0].step == 2
        assert all(torch.equal(one.weights[name], second.weights[name]) for name in one.weights)
        pairs = zip(first.routes + second.routes, one.routes, strict=True)
        assert all(torch.equal(mine.map_TE, theirs.map_TE) for mine, theirs in pairs)
    assert_same_checkpoint(whole_folder, folder, 4)
    stored = random_states(folder / "iter_0000004")  # of this package's own, none, which stock Megatron would not load
    assert "model-parallel-rng" in stored and not any("emoe" in name for name in stored)


def random_states(checkpoint: Path) -> list[str]:
    """Names of the random states of the devices in a checkpoint of one pipeline stage."""
    state: dict[str, Any] = {"rng_state/shard_0.0_1.1": None}
    dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    stored = state["rng_state/shard_0.0_1.1"]
    while isinstance(stored, list):  # of data-parallel ranks, in a list of the writer
        (stored,) = stored
    return list(stored["rng_tracker_states"])


def load(changes: dict[str, Any]) -> tuple[int | str | None, str]:
    """Exit status and everything printed when a command line is parsed and checked."""
    text, status = io.StringIO(), None
    from megatron_emoe.training import arguments as module

    module.say = lambda message: text.write(message + "\n")
    with contextlib.redirect_stderr(text):
        try:
            arguments(flags(**changes))
        except SystemExit as leave:
            status = leave.code
    return status, text.getvalue()


CHANGES = [
    ({"emoe_pool_k": 5}, "--emoe-pool-k: stored 6, now 5"),
    ({"emoe_k_max": 3}, "--emoe-k-max: stored 4, now 3"),
    ({"emoe_hr_loss_coeff": 0.5}, "--emoe-hr-loss-coeff: stored None, now 0.5"),
    ({"moe_router_topk": 2}, "--moe-router-topk: stored 3, now 2"),
]


@pytest.mark.parametrize(("change", "told"), CHANGES, ids=[next(iter(change)) for change, _ in CHANGES])
def test_a_changed_elastic_setting_is_refused_on_resume_and_told_when_finetuning(change, told, saved):
    resume = RUN | {"expert_model_parallel_size": None, "load": saved[0]} | change
    status, text = run_ranks(load, 1, resume)[0]
    assert status == 2 and text.count("error:") == 1
    assert told in text and "--finetune" in text
    status, text = run_ranks(load, 1, resume | {"finetune": True})[0]
    assert status is None and told in text


def test_settings_that_only_measure_may_change_on_resume(saved):
    resume = RUN | DISTRIBUTED | {"load": saved[0]}
    status, text = run_ranks(load, 2, resume | {"emoe_eval_k": [2], "emoe_coactivation_interval": 5})[0]
    assert status is None and "elastic setting changed" not in text, text[-500:]


@pytest.mark.parametrize(("asked", "k"), [(None, 3), (4, 4), (2, 2)])
def test_with_use_checkpoint_args_the_rows_prove_that_the_k_asked_for_ran(asked, k, saved):
    """The checkpoint was saved with k = 3, the core's default is 2, and the core would let the stored value win."""
    plain = {"emoe_selection": "topk", "emoe_pool_k": None, "emoe_k_schedule": None, "emoe_k_min": None}
    more = plain | {"emoe_k_max": None, "moe_router_topk": asked, "emoe_eval_k": None, "save_interval": None}
    load_it = {"load": saved[0], "finetune": True, "use_checkpoint_args": True, "train_iters": 1, "eval_interval": 1}
    runs: list[Run] = run_ranks(train, 2, flags(**RUN | more | load_it))
    rows: dict[bool, int] = defaultdict(int)
    for seen in (seen for run in runs for seen in run.rows):
        rows[seen.training] += seen.rows
    assert rows[True] == 8 * 64 * 2 * k  # sequences x length x layers x k
    assert rows[False] == 3 * 8 * 64 * 2 * k  # evaluated after the step, and at the end on both held-out sets
    assert (f"--moe-router-topk {asked} as asked" in runs[0].log) == (asked is not None)
