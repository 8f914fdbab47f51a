"""Every option of Megatron's parser has its place: served or refused by one declaration, and so on docs/flags.md."""

import re
import subprocess
import sys
from argparse import Action
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import megatron.training.arguments  # noqa: F401  # before the first test, which would take seconds
import pytest

from megatron_emoe.settings import flag_files
from megatron_emoe.training import megatron_flags, megatron_notes
from megatron_emoe.training.first_look import check_training_words, look_at_training
from megatron_emoe.training.megatron_flags import NEEDS, PACKAGES, REFUSED, REFUSED_VALUES, refuse_unserved, why_refused
from tests.distributed import REPO
from tests.programs import python

sys.path.insert(0, str(REPO / "tools"))
import flags_page

PAGE = (REPO / "docs" / "flags.md").read_text()
ARGS = [REPO / "slurm" / "train.args", *sorted((REPO / "examples").rglob("*.args"))]


@cache
def options() -> list[Action]:
    """Every option of the installed parser."""
    return [option for group in flags_page.megatron_options().values() for option in group]


def names() -> set[str]:
    return {name for option in options() for name in option.option_strings}


def test_the_page_is_that_of_the_installed_parser():
    rows = re.findall(r"^\| (`--.*?`) \| (.*?) \|", PAGE, flags=re.MULTILINE)
    listed = [name for row, _ in rows for name in re.findall(r"`(.*?)`", row)]
    assert len(listed) == len(set(listed)) and set(listed) == names()
    assert {kind for _, kind in rows} == set(flags_page.CLASSES)
    assert flags_page.page() == PAGE


@pytest.mark.parametrize("reason", REFUSED)
def test_every_refused_name_is_megatron_s_and_is_refused_by_itself(reason):
    for pattern in REFUSED[reason].split():
        meant = [name for name in names() if fnmatchcase(name, pattern)]
        assert meant, f"{pattern} is no flag of this Megatron-Core"
        for name in meant:
            for words, shown in (([name], name), ([name, "x"], f"{name} x"), ([f"{name}=x"], f"{name} x")):
                with pytest.raises(ValueError, match=f"^{re.escape(f'{shown}: {why_refused(name)}')}$"):
                    refuse_unserved(["--lr", "1", *words, "--bf16"])


def test_every_other_option_is_accepted(monkeypatch):
    monkeypatch.setattr(megatron_flags, "find_spec", lambda name: name)
    for option in options():
        for name in option.option_strings:
            if why_refused(name) is None:
                needed = NEEDS[name].split()[:1] if name in NEEDS else []
                refuse_unserved([name, "SIGTERM", *needed])


@pytest.mark.parametrize("file", ARGS, ids=lambda path: path.name)
def test_what_is_shipped_is_accepted(file):
    refuse_unserved(flag_files.expand([f"@{file}"]))


TOGETHER = {
    **{given: f"{given}: {why}" for given, why in REFUSED_VALUES.items()},
    "--exit-signal 15": "--exit-signal 15: must be the name of a signal, such as SIGTERM",
    **{flag: f"{flag}: needs {needed}, which is not given" for flag, needed in NEEDS.items()},
    "--exit-signal-handler-for-training --exit-signal-handler": "--exit-signal-handler-for-training excludes "
    "--exit-signal-handler: it ends without saving",
}


@pytest.mark.parametrize("words", TOGETHER)
def test_values_and_neighbours_that_are_refused(words):
    with pytest.raises(ValueError, match=f"^{re.escape(TOGETHER[words])}$"):
        refuse_unserved(words.split())


@pytest.mark.parametrize("flag", PACKAGES)
def test_a_package_that_is_not_installed_is_named(flag, monkeypatch):
    monkeypatch.setattr(megatron_flags, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"^{flag}: needs the package {PACKAGES[flag]}, which is not installed$"):
        refuse_unserved([flag])
    monkeypatch.setattr(megatron_flags, "find_spec", lambda name: name)
    refuse_unserved([flag])


@pytest.mark.parametrize("reason", REFUSED)
def test_training_and_job_checks_end_with_one_line(reason, monkeypatch, capsys):
    name = next(name for name in sorted(names()) if why_refused(name) == reason)
    monkeypatch.setattr(sys, "argv", ["pretrain_emoe.py", "--num-experts", "8", name])
    for look in (lambda: look_at_training("help"), lambda: check_training_words(sys.argv[1:])):
        with pytest.raises(SystemExit) as left:
            look()
        assert left.value.code == 2
        assert capsys.readouterr().err == f"pretrain_emoe.py: error: {name}: {reason}\n"


PROGRAMS = {
    "pretrain_emoe.py": [],
    "tools/check_job.py": ["--nodes", "1", "--processes", "1", "--save", "OUT", "--"],
    "tools/sweep_k.py": ["--load", "OUT", "--k", "2", "--out", "sweep.json"],
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_refuse(program, tmp_path):
    words = (
        ["--load", "OUT", "--save", "OUT", "--save-interval", "5", "--exit-signal-handler"]
        if "check" in program
        else []
    )
    (tmp_path / "OUT").mkdir()
    command = [python(), str(REPO / program), *PROGRAMS[program], *words, "--mask-prob", "0.2"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    rule = "--mask-prob 0.2: it is about BERT, T5 or retrieval"
    assert (ended.returncode, ended.stderr) == (2, f"{Path(program).name}: error: {rule}\n")


# The notes.


def test_every_note_is_about_an_option():
    needed = [pattern for patterns in megatron_notes.ONLY_WITH.values() for pattern in patterns.split()]
    for pattern in [*megatron_notes.ELASTIC, *megatron_notes.REFUSED_TOGETHER, *needed]:
        assert any(fnmatchcase(name, pattern) for name in names()), pattern


def test_every_flag_of_megatron_s_in_our_rules_has_a_note():
    rules = (REPO / "megatron_emoe" / "routing" / "combinations.py").read_text()
    named = set(re.findall(r"--[a-z0-9-]+[a-z0-9]", rules)) & names()
    advised = {"--num-experts", "--moe-router-topk", "--save"}
    noted = {*megatron_notes.REFUSED_TOGETHER, *advised}
    assert len(named) > 20
    assert {name for name in named if why_refused(name) is None} <= noted


BY_PREFIX = "muon_"  # the core asks for these as `f"{prefix}_{name}"`


@pytest.mark.slow
def test_what_is_served_is_read_by_somebody():
    """By name alone: an attribute that is read or a string, in Megatron-Core or here. A flag that is only defined would
    do nothing."""
    import megatron.core

    roots = [Path(megatron.core.__file__).parents[1], REPO / "megatron_emoe"]
    text = "\n".join(path.read_text(errors="replace") for root in roots for path in sorted(root.rglob("*.py")))
    text = re.sub(r"dest=['\"]\w+['\"]|^\s*#.*$", "", text, flags=re.MULTILINE)
    read = set(re.findall(r"\.([A-Za-z_]\w*)\b(?!\s*=[^=])", text)) | set(re.findall(r"['\"]([a-z_]\w*)['\"]", text))
    served = [option for option in options() if not any(why_refused(name) for name in option.option_strings)]
    assert len(served) > 500
    assert [o.dest for o in served if o.dest not in read and not o.dest.startswith(BY_PREFIX)] == []
    assert "apply_residual_connection_post_layernorm" not in read  # as for every flag that nothing reads
