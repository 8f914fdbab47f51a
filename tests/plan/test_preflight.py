"""What is refused before a job waits in a queue: flag or path, value and rule, and nothing is left behind."""

import contextlib
import io
import os
import subprocess
from pathlib import Path

import pytest

from tests import programs
from tests.distributed import REPO, run_ranks
from tests.tiny import COACTIVATION, flags, train

JOB = {"load": "{save}", "save": "{save}", "save_interval": 2, "exit_signal_handler": True}


def refusal(folder: Path, changes: dict, nodes: int, processes: int, gpus: int, free: int | None = None) -> str | None:
    """What the check of a tiny job says, on a rank of its own; None: nothing. free: bytes of disk that are left."""
    from megatron_emoe.host import engine
    from megatron_emoe.plan import preflight
    from megatron_emoe.plan.job import check_given

    engine.is_there = lambda: True
    if free is not None:
        preflight.shutil.disk_usage = lambda path: type("Usage", (), {"free": free})
    given = {
        name: value.format(save=folder / "save") if isinstance(value, str) else value for name, value in changes.items()
    }
    job = preflight.Job(nodes=nodes, processes=processes, gpus=gpus, save=folder / "save")
    said, words = io.StringIO(), flags(**given)
    with contextlib.redirect_stderr(said):
        try:
            check_given(job, words)
            preflight.check(job, words)
        except ValueError as error:
            return str(error)
        except SystemExit:
            return said.getvalue().strip()
    return None


def check(
    folder: Path, nodes: int = 2, processes: int = 1, gpus: int = 0, free: int | None = None, **changes
) -> str | None:
    return run_ranks(refusal, 1, folder, JOB | changes, nodes, processes, gpus, free)[0]


def test_a_job_that_can_run_passes_and_nothing_is_written(tmp_path):
    assert check(tmp_path, expert_model_parallel_size=2, tensorboard_dir="{save}/tensorboard", **COACTIVATION) is None
    assert list(tmp_path.iterdir()) == []


def test_flags_for_gpus_are_checked_on_a_machine_without_one(tmp_path):
    gpu = {
        "moe_grouped_gemm": True,
        "bf16": True,
        "no_rope_fusion": True,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
    }
    assert (
        check(tmp_path, nodes=2, processes=8, gpus=8, global_batch_size=32, expert_model_parallel_size=8, **gpu) is None
    )


LOSES_WORK = [
    ({"save": "{save}/a", "load": "{save}/a"}, "must be the job's folder"),
    ({"load": "{save}/other"}, "/save/other: no such folder"),
    ({"ckpt_step": 3}, "--ckpt-step 3: a requeued job would start from that iteration again"),
    ({"load": None}, "--load None: must be the job's folder"),
    ({"save_interval": None}, "--save-interval is not given: a run that dies would start over"),
    ({"exit_signal_handler": None}, "--exit-signal-handler is not given"),
    ({"no_save_optim": True}, "--no-save-optim: a requeued job would go on without its optimizer state"),
    ({"no_load_optim": True}, "--no-load-optim: a requeued job would go on without its optimizer state"),
    ({"no_save_rng": True}, "--no-save-rng: a requeued job would go on without its random numbers"),
    ({"no_load_rng": True}, "--no-load-rng: a requeued job would go on without its random numbers"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "told"), LOSES_WORK, ids=[told for _, told in LOSES_WORK])
def test_what_would_lose_work_when_the_job_is_requeued_is_refused(change, told, tmp_path):
    assert told in str(check(tmp_path, **change))


# Of GPUs alone: host mode has no context parallelism.
ON_GPUS = {"nodes": 1, "processes": 4, "gpus": 4, "bf16": True, "no_rope_fusion": True, "expert_model_parallel_size": 8}
IMPOSSIBLE = [
    (
        {"nodes": 3, "tensor_model_parallel_size": 2, "sequence_parallel": True},
        "needs a multiple of 2 ranks, here are 3",
    ),
    (
        {"nodes": 4, "expert_model_parallel_size": 3},
        "--expert-model-parallel-size 3: needs a multiple of 3 ranks, here are 4",
    ),
    ({"nodes": 2, "expert_model_parallel_size": 8}, "needs a multiple of 8 ranks, here are 2"),
    ({"nodes": 2, "processes": 8, "gpus": 4}, "8 processes on a node: at most one for each of its 4 GPUs"),
    ({"nodes": 3}, "global_batch_size (8) must be divisible by"),
    (ON_GPUS | {"context_parallel_size": 2}, "needs a multiple of 8 ranks, here are 4"),
    ({"moe_layer_freq": "[1]"}, "--moe-layer-freq [1]: 1 entries; must be one for each of 2 layers"),
    ({"moe_layer_freq": "[1,1,1]"}, "--moe-layer-freq [1, 1, 1]: 3 entries"),
    ({"hidden_size": 0}, "--hidden-size 0: must be at least 1"),
    ({"lr": None}, "--lr is not given"),
    ({"train_iters": None}, "--train-iters is not given, nor --train-samples"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("change", "told"), IMPOSSIBLE, ids=[told for _, told in IMPOSSIBLE])
def test_a_layout_that_the_job_s_world_cannot_have_is_refused(change, told, tmp_path):
    assert told in str(check(tmp_path, **change))


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "save").write_text("a file in the way")
    said = str(check(tmp_path))
    assert f"--save {tmp_path}/save: cannot be written" in said


def test_logs_that_cannot_be_written_and_a_link_that_leads_nowhere_are_named(tmp_path):
    (tmp_path / "logs").write_text("a file in the way")
    logs = tmp_path / "logs" / "tensorboard"
    assert f"--tensorboard-dir {logs}: cannot be written" in str(check(tmp_path, tensorboard_dir=str(logs)))
    (tmp_path / "save").symlink_to(tmp_path / "gone")
    assert f"--save {tmp_path}/save: cannot be written" in str(check(tmp_path))


def test_what_megatron_takes_though_a_plan_does_not(tmp_path):
    """More ranks than groups of keys and values; an odd width of dense layers where there are none."""
    tensor = {"tensor_model_parallel_size": 4, "sequence_parallel": True, "expert_tensor_parallel_size": 1}
    odd = {"group_query_attention": True, "num_query_groups": 2, "ffn_hidden_size": 66}
    assert check(tmp_path, nodes=4, expert_model_parallel_size=4, **tensor, **odd) is None


def test_too_little_disk_for_one_checkpoint_is_refused_with_both_sizes(tmp_path):
    said = str(check(tmp_path, free=1000))
    assert "0.0 GiB are free there, one checkpoint takes" in said


@pytest.mark.slow
def test_missing_data_and_another_model_s_checkpoint_are_refused(tmp_path):
    said = str(check(tmp_path, mock_data=None, data_path=str(tmp_path / "none")))
    assert f"--data-path: {tmp_path}/none" in said
    run_ranks(train, 1, flags(save=tmp_path / "save", save_interval=4))
    assert "--hidden-size 64: the checkpoint in --load" in str(check(tmp_path, nodes=1, hidden_size=64))
    assert check(tmp_path, nodes=1) is None


@pytest.mark.slow
def test_a_resubmission_in_another_layout_is_refused_and_really_dies(tmp_path):
    """DP 1 to 2 goes on; EP 2 to 1 is refused, and is what Megatron cannot load."""
    run = {"use_distributed_optimizer": True, "bf16": True, "save": tmp_path / "save", "save_interval": 2}
    run_ranks(train, 2, flags(**run, exit_interval=2, expert_model_parallel_size=2))
    optimizer = {"use_distributed_optimizer": True, "bf16": True}
    told = "--expert-model-parallel-size 1: the optimizer state in --load"
    assert told in str(check(tmp_path, nodes=2, **optimizer))
    assert check(tmp_path, nodes=4, expert_model_parallel_size=2, **optimizer) is None
    with pytest.raises(RuntimeError, match="CheckpointException"):
        run_ranks(without_check, 2, flags(**run, load=tmp_path / "save"))
    run_ranks(train, 4, flags(**run, load=tmp_path / "save", expert_model_parallel_size=2))


def without_check(words: list[str]) -> None:
    from megatron_emoe.model import checkpoint

    checkpoint.check_layout = lambda *args: None
    train(words)


def stored_and_planned(folder: Path, changes: dict) -> tuple[int, int]:
    from megatron_emoe.plan.preflight import checkpoint_bytes
    from tests.tiny import arguments

    words = flags(**changes)
    stored = sum(path.stat().st_size for path in (folder / "iter_0000001").glob("*.distcp"))
    return stored, checkpoint_bytes(arguments(words))


@pytest.mark.slow
@pytest.mark.parametrize(
    "precision",
    [{}, {"bf16": True}, {"bf16": True, "optimizer": "sgd"}, {"bf16": True, "emoe_train": "router"}],
    ids=["fp32", "bf16", "sgd", "routers"],
)
def test_the_size_of_a_checkpoint_is_what_one_takes_on_disk(precision, tmp_path):
    """Weights and optimizer; a tiny model's headers come on top, a few hundred bytes for each of its 1 KiB tensors."""
    shape = precision | {"hidden_size": 128, "ffn_hidden_size": 256, "moe_ffn_hidden_size": 128, "train_iters": 1}
    run_ranks(train, 1, flags(save=tmp_path, save_interval=1, **shape))
    stored, planned = run_ranks(stored_and_planned, 1, tmp_path, shape)[0]
    assert 1.0 <= stored / planned < 1.15


def test_the_tool_takes_the_flags_after_two_dashes_and_ends_with_status_2(tmp_path):
    env = os.environ | {"PYTHONPATH": str(REPO)}
    tool = [programs.python(), str(REPO / "tools" / "check_job.py"), "--nodes", "2", "--processes", "1", "--gpus", "0"]
    words = [str(word).format(save=tmp_path / "save") for word in flags(**JOB | {"save_interval": None})]
    done = subprocess.run([*tool, "--save", tmp_path / "save", "--", *words], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("check_job.py: error: --save-interval is not given")
    wrong = subprocess.run([*tool, "--nodes", "none", "--save", "x"], capture_output=True, text=True, env=env)
    assert wrong.returncode == 2 and "none: must be a whole number of at least 1" in wrong.stderr
