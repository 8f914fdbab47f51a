"""Result files that are none, read by every program that reads one: one line, status 2, nothing written."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.exported import measured_in
from megatron_emoe.tasks import results as task_results
from tests.distributed import REPO
from tests.sweep_results import make_result
from tests.tasks.test_results import cell, result

sys.path.insert(0, str(REPO / "tools"))  # the programs


def cut(text: str) -> bytes:
    return text[: len(text) // 2].encode()


def changed(text: str, **changes: object) -> bytes:
    return json.dumps(json.loads(text) | changes).encode()


def first_cell(text: str, **changes: object) -> bytes:
    cells = json.loads(text)["cells"]
    return changed(text, cells=[cells[0] | changes, *cells[1:]])


def odd_key(text: str) -> bytes:
    """A key with a line separator; a fuzzer found that the message had two lines."""
    return changed(text, **{"a\x1eb": 1})


BROKEN = {
    "empty": lambda _: b"",
    "cut off": cut,
    "no JSON": lambda _: b"\x89PNG\r\n",
    "byte order mark": lambda text: b"\xef\xbb\xbf" + text.encode(),
    "UTF-16": lambda text: text.encode("utf-16"),
    "a list": lambda text: f"[{text}]".encode(),
    "nested": lambda _: b"[" * 100_000,
    "twice": lambda text: text.encode() * 2,
    "unknown key": lambda text: changed(text, surprise=1),
    "odd key": odd_key,
    "odd label": lambda text: changed(text, label="two\nlines"),
    "cell twice": lambda text: changed(text, cells=json.loads(text)["cells"][:1] * 2),
    "text for k'": lambda text: first_cell(text, k="4"),
    "NaN": lambda text: first_cell(text, seconds=float("nan")),
    "infinite": lambda text: first_cell(text, seconds=float("inf")),
    "huge": lambda text: first_cell(text, tokens=10**400),
}


@pytest.fixture
def sweeps_of(tmp_path):
    """A good file and a function that writes a broken one."""
    good = tmp_path / "good.json"
    sweep.save(make_result("good", {4: 1.5, 8: 1.4}), good)

    def broken(kind: str) -> Path:
        bad = tmp_path / "bad.json"
        bad.write_bytes(BROKEN[kind](good.read_text()))
        return bad

    return good, broken


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_sweep_is_one_line_from_every_reader(sweeps_of, tmp_path, monkeypatch, capsys, kind):
    good, broken = sweeps_of
    bad, before = broken(kind), sorted(tmp_path.iterdir())
    calls = {
        "pick_k": [bad, "--max-flops", 2],
        "join_sweeps": [good, bad, "--out", tmp_path / "all.json"],
        "plot_sweep": [good, bad, "--out", tmp_path / "a.png"],
        "report": [good, "--baseline", bad, "--out", tmp_path / "a.html"],
    }
    for name, words in calls.items():
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            importlib.import_module(name).main()
        (line,) = capsys.readouterr().err.splitlines()
        assert left.value.code == 2 and line.startswith(f"{name}.py: error: {bad}: ")
    for read in (
        sweep.load,
        lambda path: sweep.resume(path, make_result("good", {})),
        lambda path: measured_in(path, {}),
    ):
        with pytest.raises(ValueError) as refused:
            read(bad)
        assert str(refused.value).startswith(f"{bad}: ") and len(str(refused.value).splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_of_scores_is_one_line(tmp_path, kind):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    task_results.save(result(cell(), cell(8)), good)
    bad.write_bytes(BROKEN[kind](good.read_text()))
    with pytest.raises(ValueError) as refused:
        task_results.resume(bad, result())
    assert str(refused.value).startswith(f"{bad}: ") and len(str(refused.value).splitlines()) == 1
