"""What plans keep of Megatron's arguments: used only where nothing has changed that they follow from."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest

import megatron_emoe
from megatron_emoe.plan import kept
from tests.distributed import REPO

WORDS = ["--num-layers", "4", "--lr", "1e-3"]
VALUES = {"num_layers": 4, "lr": 0.1 + 0.2, "swiglu": True, "recipe": None, "freq": [0, 1], "kind": "adam"}


class Maker:
    """Makes the arguments, and counts how often it was asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Namespace:
        self.calls += 1
        return Namespace(**VALUES, dtype=float, pair=(1, 2))


@pytest.fixture
def make() -> Maker:
    return Maker()


def test_the_second_time_is_the_first_again(tmp_path, make):
    first = kept.arguments(WORDS, make, tmp_path / "new" / "folder")
    assert vars(first) == VALUES  # no type, no tuple: what JSON gives back as something else
    assert kept.arguments(WORDS, make, tmp_path / "new" / "folder") == first
    assert make.calls == 1


def test_without_a_folder_nothing_is_kept(make):
    assert kept.arguments(WORDS, make, None) == kept.arguments(WORDS, make, None) == Namespace(**VALUES)
    assert make.calls == 2


def test_another_key_is_another_entry(tmp_path, make):
    for key in (WORDS, [*WORDS, "--bf16"], WORDS[:-1], [" ".join(WORDS)]):
        kept.arguments(key, make, tmp_path)
    assert make.calls == 4 == len(list(tmp_path.glob("*/*.json")))


@pytest.mark.parametrize("library", ["megatron-core", "torch", "transformer-engine"])
def test_another_version_of_a_library_is_another_entry(tmp_path, make, monkeypatch, library):
    kept.arguments(WORDS, make, tmp_path)
    version = kept.installed
    monkeypatch.setattr(kept, "installed", lambda name: "99.0" if name == library else version(name))
    kept.arguments(WORDS, make, tmp_path)
    assert make.calls == 2


def test_another_source_of_this_package_is_another_entry(tmp_path, make, monkeypatch):
    copy = tmp_path / "megatron_emoe"
    shutil.copytree(Path(megatron_emoe.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(megatron_emoe, "__file__", str(copy / "__init__.py"))
    kept.arguments(WORDS, make, tmp_path / "kept")
    kept.arguments(WORDS, make, tmp_path / "kept")
    assert make.calls == 1
    with (copy / "host" / "flags.py").open("a") as source:
        source.write("# another default\n")
    another = tmp_path / "kept/of another program"
    another.mkdir()
    kept.arguments(WORDS, make, tmp_path / "kept")
    assert make.calls == 2
    assert another.exists() and len(list((tmp_path / "kept").glob("*/*.json"))) == 1  # the older one is removed


def test_a_megatron_that_is_worked_on_is_asked_each_time(tmp_path, make, monkeypatch):
    editable = json.dumps({"url": "file:///src/megatron", "dir_info": {"editable": True}})
    found = SimpleNamespace(read_text={"direct_url.json": editable}.get)
    monkeypatch.setattr(importlib.metadata, "distribution", {"megatron-core": found}.get)
    for _ in range(2):
        kept.arguments(WORDS, make, tmp_path)
    assert make.calls == 2 and not list(tmp_path.iterdir())


def damages(text: str) -> list[str | bytes]:
    """Cut short, empty, no text, no object."""
    return [text[:-9], "", b"\xff\xfe\x00", "[4]", "null"]


@pytest.mark.parametrize("case", range(5))
def test_a_damaged_file_is_made_again(tmp_path, make, case):
    kept.arguments(WORDS, make, tmp_path)
    (file,) = tmp_path.glob("*/*.json")
    whole = file.read_bytes()
    damaged = damages(whole.decode())[case]
    file.write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    assert file.read_bytes() != whole
    assert kept.arguments(WORDS, make, tmp_path) == Namespace(**VALUES)
    assert make.calls == 2 and file.read_bytes() == whole


def test_a_folder_that_cannot_be_made_is_no_hindrance(tmp_path, make):
    (tmp_path / "file").write_text("in the way")
    assert kept.arguments(WORDS, make, tmp_path / "file" / "folder") == Namespace(**VALUES)


def test_what_is_refused_is_not_kept(tmp_path):
    def refuse() -> Namespace:
        raise ValueError("--num-layers 0: must be at least 1")

    with pytest.raises(ValueError, match="--num-layers 0"):
        kept.arguments(WORDS, refuse, tmp_path)
    assert not list(tmp_path.iterdir())


def test_where_a_user_s_folder_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.user_folder() == tmp_path / "megatron-emoe"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert kept.user_folder() == tmp_path / ".cache" / "megatron-emoe"

    def homeless(cls: type) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", classmethod(homeless))
    assert kept.user_folder() is None


@pytest.mark.slow
def test_the_program_gives_the_same_plan_from_what_is_kept_and_without_megatron(tmp_path):
    command = [sys.executable, str(REPO / "tools/plan_job.py"), "--model", "deepseek-v2-lite-16b", "--gpus", "8"]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(REPO)}
    plans, imported = [], []
    for _ in range(2):
        start = [command[0], "-X", "importtime", *command[1:], "--json", "--recipe", str(REPO / "examples/recipe.args")]
        done = subprocess.run(start, capture_output=True, text=True, check=True, env=env)
        plans.append(json.loads(done.stdout))
        imported.append("| torch\n" in done.stderr)
    assert plans[0] == plans[1] and plans[0]["steps"] > 0
    assert imported == [True, False]
