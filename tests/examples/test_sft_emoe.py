"""Instruction tuning on one node: the command that the script prints, which Megatron takes, and what it refuses."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from megatron_emoe.settings.flag_files import expand
from tests import hf_models, programs, tiny
from tests.data.test_packed_chats import random_chats, write_chats
from tests.distributed import REPO, run_ranks

SCRIPT = REPO / "examples/sft_emoe.sh"


def run(folder: Path, *words: str, **settings: str) -> subprocess.CompletedProcess:
    own = {"BASE": str(folder / "base"), "DATA": "a", "SAVE": str(folder / "save"), "PYTHON": programs.python()}
    own |= {"GPUS": "1", "SEQ": "128", "LAYOUT": str(REPO / "examples/cpu.args"), "OMP_NUM_THREADS": "1"}
    env = {name: value for name, value in (os.environ | own | settings).items() if value}
    return subprocess.run(["bash", SCRIPT, *words], env=env, capture_output=True, text=True, timeout=200)


@pytest.fixture
def base(tmp_path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/model.args").write_text("--num-experts 64\n--moe-router-topk 8\n--hidden-size 32\n")
    return tmp_path


def printed(folder: Path, **settings: str) -> list[str]:
    done = run(folder, "--dry-run", "--lr", "2e-5", **settings)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    return words[words.index(str(REPO / "pretrain_emoe.py")) + 1 :]


def test_each_method_has_its_flags(base):
    assert f"@{REPO}/examples/recipe.args" in printed(base)
    words = printed(base, METHOD="emoe", DATA="1 a 2 b")
    place = words.index("--emoe-selection")
    assert words[place : place + 4] == ["--emoe-selection", "coactivation", "--emoe-pool-k", "24"]
    place = words.index("--data-path")
    assert words[place : place + 5] == ["--data-path", "1", "a", "2", "b"] and words[-2:] == ["--lr", "2e-5"]
    assert "16" in printed(base, METHOD="emoe", POOL="16")
    assert printed(base, METHOD="topk")[1:3] == ["--emoe-selection", "topk"]


def test_the_mix_is_a_blend_of_the_paper_s_three():
    mix = expand([f"@{REPO}/examples/sft_mix.args"])
    assert mix == ["--data-path", "1", "data/slimorca", "1", "data/magicoder", "1", "data/metamath"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"BASE": ""}, "BASE is not set"),
        ({"BASE": "/no/such"}, "BASE /no/such: no model.args in it"),
        ({"DATA": ""}, "DATA is not set"),
        ({"SAVE": ""}, "SAVE is not set"),
        ({"METHOD": "best"}, "METHOD best: must be recipe, emoe or topk"),
        ({"METHOD": "emoe", "POOL": "many"}, "POOL many: must be a whole number of at least 1"),
        ({"BATCH": "0.5"}, "BATCH 0.5: must be a whole number of at least 1"),
        ({"SEQ": "0"}, "SEQ 0: must be a whole number of at least 1"),
        ({"GPUS": "two"}, "GPUS two: must be a whole number of at least 1"),
        ({"LAYOUT": "/no/such"}, "LAYOUT /no/such: no such file"),
        ({"PYTHON": "/no/python"}, "PYTHON /no/python: no such program"),
    ],
)
def test_wrong_settings_are_refused(base, settings, told):
    done = run(base, "--dry-run", **settings)
    assert done.returncode == 2 and done.stderr.startswith(f"sft_emoe.sh: error: {told}"), done.stderr


def imported(folder: Path) -> None:
    import torch

    from megatron_emoe.hf.import_model import import_model

    torch.distributed.destroy_process_group()
    import_model(folder / "hf", folder / "base", report=lambda _: None)


def taken(words: list[str]) -> dict:
    """Megatron's arguments of this command line in host mode, after all checks."""
    return {name: str(value) for name, value in vars(tiny.arguments(words)).items()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["recipe", "emoe"])
def test_megatron_takes_what_it_prints(tmp_path, method):
    hf_models.save("olmoe", tmp_path / "hf")
    run_ranks(imported, 1, tmp_path)
    data = write_chats(tmp_path / "chats", random_chats(200))
    words = printed(tmp_path, METHOD=method, DATA=f"1 {data} 2 {data}")
    (args,) = run_ranks(taken, 1, [*expand(words), "--tokenizer-type", "NullTokenizer", "--vocab-size", "128"])
    expected = {"sft": "True", "seq_length": "128", "lr": "2e-05", "create_attention_mask_in_dataloader": "False"}
    expected["emoe_selection"] = {"recipe": "prefix", "emoe": "coactivation"}[method]
    assert {name: args[name] for name in expected} == expected
