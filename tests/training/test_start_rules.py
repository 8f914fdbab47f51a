"""Plain mistakes of a training run's command line end before anything is built, with flag, value and rule."""

import contextlib
import io
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_emoe.training import start_rules
from tests import sweeps, tiny
from tests.distributed import run_ranks

DATA = {"mock_data": None, "data_path": "{folder}/tokens"}
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "warm-up": ({"lr_warmup_iters": 4}, "--lr-warmup-iters 4: must be below the 4 of --lr-decay-iters, or of the run"),
    "never evaluated": ({"eval_interval": 0}, "--eval-interval 0: must be at least 1"),
    "no step": ({"train_iters": 0}, "--train-iters 0: must be at least 1"),
    "steps below 0": ({"train_iters": -1}, "--train-iters -1: must be at least 1"),
    "no length": ({"train_iters": None}, "--train-iters is not given, nor --train-samples"),
    "no rate": ({"lr": None}, "--lr is not given: which learning rate?"),
    "no batch": ({"micro_batch_size": None}, "--micro-batch-size is not given, and Megatron demands it here"),
    "no interval": ({"save": "{folder}/new"}, "--save-interval is not given, and Megatron demands it here"),
    "no weight": (DATA | {"data_path": ["0", "{folder}/tokens"]}, "every weight must be a number above 0"),
    "a file to save in": ({"save": "{folder}/file", "save_interval": 2}, "/file is a file; must be a folder"),
    "events in a file": ({"tensorboard_dir": "{folder}/file/x"}, "--tensorboard-dir {folder}/file/x: {folder}/file is"),
    "events where nobody can write": (
        {"tensorboard_dir": "/proc/tb"},
        "--tensorboard-dir /proc/tb: /proc cannot be written",
    ),
    "a tokenizer that is not there": (
        DATA | {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "no/such/folder"},
        "--tokenizer-model no/such/folder: no such file or folder",
    ),
    "a cache in a file": (DATA | {"data_cache_path": "{folder}/file"}, "--data-cache-path {folder}/file: "),
    "no sequence parallelism": ({"tensor_model_parallel_size": 2}, "needs --sequence-parallel with it"),
    "one rank alone": (
        {"expert_model_parallel_size": 2},
        "--expert-model-parallel-size 2: needs a multiple of 2 ranks",
    ),
    "a vocabulary that is not divided": (
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "padded_vocab_size": 97},
        "--tensor-model-parallel-size 2: must divide --padded-vocab-size 97",
    ),
    "a project without a run": ({"wandb_project": "x"}, "--wandb-project x: needs --wandb-exp-name, the name of the"),
    "a project without a folder": (
        {"wandb_project": "x", "wandb_exp_name": "y"},
        "--wandb-project x: needs --save or --wandb-save-dir, the folder for what it keeps",
    ),
    "a project without a key": (
        {"wandb_project": "x", "wandb_exp_name": "y", "wandb_save_dir": "{folder}"},
        "--wandb-project x: No API key configured.",
    ),
    "another format": (
        {"save": "{folder}/new", "save_interval": 2, "ckpt_format": "torch"},
        "--ckpt-format torch: only torch_dist can be continued, evaluated and exported here",
    ),
}


def in_folder(value: Any, folder: Path) -> Any:
    if isinstance(value, list):
        return [in_folder(one, folder) for one in value]
    return value.replace("{folder}", str(folder)) if isinstance(value, str) else value


def session(folder: Path) -> dict[str, tuple[Any, str]]:
    """Status and error of every command line; to be called on a rank."""
    from megatron_emoe.host import mode as host_mode
    from megatron_emoe.training.arguments import parse

    (folder / "file").touch()
    os.environ |= {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(folder)}  # nobody has logged in
    sweeps.write_tokens(folder / "tokens", vocabulary=90)
    answers = {}
    for name, (change, _) in MISTAKES.items():
        words = tiny.flags(**{flag: in_folder(value, folder) for flag, value in change.items()})
        sys.argv = ["pretrain_emoe.py", *host_mode.setup(words)]
        status, err = 0, io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            try:
                parse()
            except SystemExit as leaving:
                status = leaving.code
            finally:
                sweeps._forget()
        answers[name] = status, err.getvalue()
    return answers


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[Path, dict[str, tuple[Any, str]]]:
    folder = tmp_path_factory.mktemp("mistakes")
    return folder, run_ranks(session, 1, folder)[0]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line(name, answers):
    folder, found = answers
    status, err = found[name]
    (line,) = [line for line in err.splitlines() if ": error: " in line]
    assert status == 2 and MISTAKES[name][1].replace("{folder}", str(folder)) in line
    assert not (folder / "new").exists()


@pytest.mark.parametrize(("given", "kernel", "left"), [(True, False, False), (True, True, True), (False, True, False)])
def test_gradients_are_accumulated_without_apex_where_it_is_not_installed(given, kernel, left, monkeypatch, capsys):
    monkeypatch.setattr(start_rules.layers, "_grad_accum_fusion_available", kernel)
    args = Namespace(gradient_accumulation_fusion=given)
    start_rules.settle_accumulation(args)
    assert args.gradient_accumulation_fusion is left
    assert ("--no-gradient-accumulation-fusion" in capsys.readouterr().out) == (given and not kernel)


def test_data_in_a_folder_that_cannot_be_written_need_a_cache(tmp_path, monkeypatch):
    prefix = sweeps.write_tokens(tmp_path / "tokens")
    args = Namespace(data_path=[str(prefix)], data_cache_path=None, mock_data=False)
    start_rules.check_cache(args)
    monkeypatch.setattr(start_rules, "why_not_written", lambda folder: "Read-only file system")
    with pytest.raises(ValueError, match=f"--data-path {prefix}: its folder cannot be written: .*--data-cache-path"):
        start_rules.check_cache(args)
    args.data_cache_path = "elsewhere"
    start_rules.check_cache(args)


def test_local_layers_on_a_gpu_have_no_sequence_parallelism(monkeypatch):
    args = Namespace(
        save=None, tensorboard_dir=None, data_cache_path=None, data_path=None, mock_data=True, skip_train=True
    )
    vars(args).update(ckpt_format="torch_dist", load=None, num_experts=8, sequence_parallel=True, padded_vocab_size=96)
    vars(args).update(tensor_model_parallel_size=2, transformer_impl="local", normalization="RMSNorm")
    with pytest.raises(ValueError, match="^--tensor-model-parallel-size 2: local layers have no --sequence-parallel"):
        start_rules.check_start(args)
    monkeypatch.setattr(start_rules.host_mode, "is_on", lambda: True)  # whose norms do
    start_rules.check_start(args)
