"""What README.md, CONTRIBUTING.md and docs say of flags, files and targets is so."""

import argparse
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests import programs

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text()
TREE = README.split("## What is where")[1].split("```")[1]
PAGES = [REPO / "README.md", REPO / "CONTRIBUTING.md", *sorted((REPO / "docs").rglob("*.md"))]
TAKE_MEGATRON_S = ("pretrain_emoe.py", "tools/sweep_k.py", "tools/fit_tail_scale.py", "tools/eval_tasks.py")
TORCHRUN_S = {"--nproc-per-node"}

sys.path[:0] = [str(REPO / "tools"), str(REPO / "examples")]
import demo  # noqa: E402
import flag_table  # noqa: E402


def test_the_flag_table_is_the_one_that_the_settings_give():
    assert flag_table.written(README, flag_table.table()) == README


def test_the_map_has_every_wing_and_every_folder():
    lines = [line.split()[0] for line in TREE.splitlines() if re.match(r" {0,2}\w", line)]
    wings = {f"{path.parent.name}/" for path in (REPO / "megatron_emoe").glob("*/__init__.py")}
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    top = {f"{file.partition('/')[0]}/" for file in tracked.splitlines() if "/" in file and file[0] != "."}
    assert set(lines) == wings | top | {"pretrain_emoe.py"}
    assert len(lines) == len(set(lines))


FILE = re.compile(r"(?<![\w./{}$*<-])(?:[\w-]+/)*[\w-]+\.(?:py|sh|md|args|yaml|toml|svg|example)(?![\w(])")
WRITTEN_BY_PROGRAMS = {"model.args", "CHECKPOINT/model.args", "OUT/model.args", "layout.args"}


def homes(page: Path) -> list[Path]:
    """Folders that a page may name files from: its own, the repository's, those in it, and the package's wings."""
    package = REPO / "megatron_emoe"
    folders = [page.parent, REPO, package, *(path.parent for path in package.glob("*/__init__.py"))]
    return folders + [REPO / name for name in ("tools", "slurm", "examples", "benchmarks", "docs", "tests")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_file_that_is_named_exists(page):
    named = set(FILE.findall(page.read_text())) - WRITTEN_BY_PROGRAMS
    lost = [name for name in sorted(named) if not any((folder / name).exists() for folder in homes(page))]
    assert not lost


def test_every_file_that_a_program_or_module_names_exists():
    """By its name alone, as comments and docstrings give it: what was renamed is found, what moved only is not."""
    sources = [
        path for name in ("megatron_emoe", "tools", "benchmarks", "slurm") for path in (REPO / name).rglob("*.*")
    ]
    sources = [path for path in sources if path.suffix in (".py", ".sh")] + [
        REPO / "pretrain_emoe.py",
        REPO / "setup.py",
    ]
    known = {path.name for name in ("tests", "examples") for path in (REPO / name).rglob("*.*")}
    known |= {path.name for path in sources}
    lost = {
        f"{path.relative_to(REPO)}: {name}"
        for path in sources
        for name in re.findall(r"(?<![\w./{}$-])[a-z]\w*\.py\b", path.read_text())
        if name not in known
    }
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_target_that_is_named_exists(page):
    text = page.read_text()
    named = set(re.findall(r"`(?:[A-Z_]+=\S+ )*make ([a-z-]+)", text)) | set(re.findall(r"^make ([a-z-]+)", text, re.M))
    assert named <= set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))


@cache
def of_megatron() -> frozenset[str]:
    from megatron.training.arguments import add_megatron_arguments

    from megatron_emoe.training.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    return frozenset(option for action in parser._actions for option in action.option_strings)


@cache
def flags_of(program: str, *verb: str) -> set[str]:
    """The flags in the help that a program prints, and Megatron's where it says that it takes them."""
    done = subprocess.run([programs.python(), program, *verb, "--help"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", done.stdout))
    return own | of_megatron() if program in TAKE_MEGATRON_S else own


def commands(page: Path) -> list[str]:
    """Commands in blocks of a page."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL)
    return [line for block in blocks for line in joined(block)]


def joined(text: str) -> list[str]:
    """Its lines, those that go on joined."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("page", ["README.md", "the end of the demo"])
def test_every_flag_in_a_command_is_one_of_its_program(page):
    seen = set()
    for command in commands(REPO / page) if page == "README.md" else joined(demo.NEXT)[1:]:
        words = shlex.split(command, comments=True)
        program = next((word for word in words if word.endswith(".py")), None)
        if program is None:
            continue
        place = words.index(program) + 1
        verb = words[place : place + 1] if program.endswith("convert_checkpoint.py") else []
        flags = {word for word in words[place:] if word.startswith("--")}
        assert flags <= flags_of(program, *verb), command
        assert {word for word in words[:place] if word.startswith("--")} <= TORCHRUN_S, command
        seen.add(program)
    on_both = {"tools/convert_checkpoint.py", "pretrain_emoe.py", "tools/sweep_k.py"}
    assert seen >= on_both | {"tools/pick_k.py"} if page == "README.md" else seen == on_both


def test_every_flag_in_the_readme_s_words_is_one_of_ours_or_of_megatron():
    words = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    ours = [
        "tools/sweep_k.py",
        "tools/pick_k.py",
        "tools/flag_table.py",
        "tools/plan_job.py",
        "tools/eval_tasks.py",
        "examples/demo_convert.py",
    ]
    known = of_megatron().union(*map(flags_of, ours))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", words)) <= known
