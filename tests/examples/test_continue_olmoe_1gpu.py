"""The recipe for one GPU, where there is none: what it prints at 80 and 141 GiB, that Megatron takes those flags with a
GPU's eyes, and what it refuses."""

import contextlib
import io
import os
import shlex
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests import programs
from tests.distributed import REPO, run_ranks

SCRIPT = REPO / "examples/continue_olmoe_1gpu.sh"


def run(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess:
    (folder / "base").mkdir(exist_ok=True)
    own = {"BASE": str(folder / "base"), "DATA": "data", "SAVE": str(folder / "save"), "PYTHON": programs.python()}
    own |= {"GPU_MEMORY": "141", "OMP_NUM_THREADS": "1"}
    env = {name: value for name, value in (os.environ | own | settings).items() if value}
    return subprocess.run(["bash", SCRIPT, *words], env=env, capture_output=True, text=True, timeout=200)


def checked(folder: Path, words: list[str]) -> dict[str, str]:
    """Megatron's arguments of this command line on one GPU of the H100's kind; data and base are left out."""
    from megatron.core.transformer import transformer_config

    from megatron_emoe.host import engine
    from megatron_emoe.plan import preflight
    from megatron_emoe.settings.flag_files import expand

    engine.is_there = lambda: True
    if find_spec("transformer_engine") is None:  # Megatron asks for its version while it reads flags for FP8
        transformer_config.is_te_min_version = lambda *args, **kwargs: True
    preflight.shutil.disk_usage = lambda path: type("Usage", (), {"free": 1e15})
    for flag in ("--data-path", "--pretrained-checkpoint"):
        place = words.index(flag)
        del words[place : place + 2]
    with contextlib.redirect_stdout(io.StringIO()):
        words += ["--mock-data", "--tokenizer-type", "NullTokenizer"]
        words += [] if find_spec("transformer_engine") else ["--no-rope-fusion"]  # Megatron looks for it when it parses
        args = preflight.check(preflight.Job(nodes=1, processes=1, gpus=1, save=folder / "save"), expand(words))
    return {name: str(value) for name, value in vars(args).items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "memory", "state", "expected"),
    [
        ("bf16", "141", "", {"exp_avg_dtype": "torch.bfloat16", "main_grads_dtype": "torch.float32", "fp8": "None"}),
        ("bf16", "80", "bf16-grads", {"main_grads_dtype": "torch.bfloat16", "recompute_granularity": "full"}),
        ("fp8", "80", "fp8", {"exp_avg_dtype": "torch.uint8", "fp8": "hybrid", "fp8_recipe": "tensorwise"}),
    ],
)
def test_megatron_takes_the_printed_flags(precision, memory, state, expected, tmp_path):
    done = run(tmp_path, "--dry-run", "--lr", "1e-5", PRECISION=precision, GPU_MEMORY=memory, STATE=state)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:4] == [programs.python(), "-m", "torch.distributed.run", "--standalone"]
    (args,) = run_ranks(checked, 1, tmp_path, words[words.index(str(REPO / "pretrain_emoe.py")) + 1 :])
    always = {"use_precision_aware_optimizer": "True", "use_distributed_optimizer": "True", "moe_grouped_gemm": "True"}
    always |= {"transformer_impl": "transformer_engine", "main_params_dtype": "torch.float32", "lr": "1e-05"}
    always |= {"emoe_k_schedule": "stratified", "num_experts": "64", "global_batch_size": "32"}
    always |= {"micro_batch_size": "1"}
    for name, value in (always | expected).items():
        assert args[name] == value, name
    assert list((tmp_path / "base").iterdir()) == [] and not (tmp_path / "save").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"BASE": ""}, "BASE is not set"),
        ({"BASE": "/no/such"}, "BASE /no/such: no such folder"),
        ({"DATA": ""}, "DATA is not set"),
        ({"SAVE": ""}, "SAVE is not set"),
        ({"PRECISION": "fp4"}, "PRECISION fp4: must be bf16 or fp8"),
        ({"STATE": "int8"}, "STATE int8: must be bf16, bf16-grads or fp8"),
        ({"GLOBAL_BATCH": "0"}, "GLOBAL_BATCH 0: must be a whole number of at least 1"),
        ({"MICRO_BATCH": "half"}, "MICRO_BATCH half: must be a whole number of at least 1"),
        ({"RESERVE": "0"}, "RESERVE 0: must be a whole number of at least 1"),
        ({"GPU_MEMORY": "80GB"}, "GPU_MEMORY 80GB: must be a whole number of GiB"),
        ({"PYTHON": "/no/python"}, "PYTHON /no/python: no such program"),
    ],
)
def test_wrong_settings_are_refused(settings, told, tmp_path):
    done = run(tmp_path, "--dry-run", **settings)
    assert done.returncode == 2 and done.stderr.startswith(f"continue_olmoe_1gpu.sh: error: {told}"), done.stderr


@pytest.mark.slow
def test_too_small_a_gpu_is_refused_with_what_is_missing(tmp_path):
    done = run(tmp_path, "--dry-run", GPU_MEMORY="40", STATE="fp8")
    assert done.returncode == 2 and "no state fits" in done.stderr and "needs 54.6 GiB" in done.stderr
