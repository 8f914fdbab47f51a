"""An output folder is whole or not there; an interrupted one is taken up again."""

import errno
import json
import re
from pathlib import Path

import pytest

from megatron_emoe.hf import output_folder
from megatron_emoe.hf.output_folder import OutputFolder

INPUTS = {"files": {"a": [1, 2]}, "k": 4}


def interrupted(out: Path, *parts: str) -> None:
    """An attempt that finishes some parts and is then killed, as far as the disk can tell."""
    with pytest.raises(KeyboardInterrupt), OutputFolder(out).making(INPUTS) as folder:
        for part in parts:
            (folder.path / part).write_text(part)
            folder.finished(part, len(part))
        raise KeyboardInterrupt


def test_the_folder_appears_at_the_end(tmp_path):
    out = tmp_path / "out"
    with OutputFolder(out).making(INPUTS) as folder:
        (folder.path / "file").write_text("content")
        assert not out.exists()
    assert [path.name for path in out.iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_may_stand_in_its_place(tmp_path):
    (tmp_path / "out").mkdir()
    with OutputFolder(tmp_path / "out").making(INPUTS) as folder:
        (folder.path / "file").write_text("content")
    assert (tmp_path / "out/file").read_text() == "content"


def test_an_error_in_the_input_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="bad"), OutputFolder(tmp_path / "out").making(INPUTS) as folder:
        (folder.path / "file").write_text("content")
        raise ValueError("bad")
    assert not any(tmp_path.iterdir())


def test_finished_parts_are_kept_over_an_interruption(tmp_path):
    out = tmp_path / "out"
    interrupted(out, "one", "two")
    assert not out.exists()
    with OutputFolder(out).making(INPUTS) as folder:
        assert folder.done == {"one": 3, "two": 3}
        folder.finished("three", None)
    assert sorted(path.name for path in out.iterdir()) == ["one", "two"]


def test_a_torn_last_line_of_the_journal_is_an_unfinished_part(tmp_path):
    out = tmp_path / "out"
    interrupted(out, "one", "two")
    journal = tmp_path / "out.unfinished/journal.jsonl"
    journal.write_text(journal.read_text()[:-5])
    with OutputFolder(out).making(INPUTS) as folder:
        assert folder.done == {"one": 3}
        folder.finished("two", 3)
        assert [json.loads(line).get("part") for line in journal.read_text().splitlines()] == [None, "one", "two"]


@pytest.mark.parametrize("damage", [b"\0\0\0\n", b"7\n", b'{"part": 1}\n', b"[" * 10**5 + b"\n", b"\xff\n"])
def test_a_journal_that_nobody_can_read_is_begun_anew(damage, tmp_path):
    out = tmp_path / "out"
    interrupted(out, "one")
    journal = tmp_path / "out.unfinished/journal.jsonl"
    journal.write_bytes(journal.read_bytes() + damage)
    with OutputFolder(out).making(INPUTS) as folder:
        assert folder.done == {} and [path.name for path in folder.path.iterdir()] == ["journal.jsonl"]
    assert out.is_dir()


def test_other_inputs_begin_anew(tmp_path):
    out = tmp_path / "out"
    interrupted(out, "one")
    with OutputFolder(out).making(INPUTS | {"k": 8}) as folder:
        assert folder.done == {}
        assert [path.name for path in folder.path.iterdir()] == ["journal.jsonl"]


def test_two_processes_do_not_write_to_one_folder(tmp_path):
    with OutputFolder(tmp_path / "out").making(INPUTS):
        refused(tmp_path / "out", f"{tmp_path}/out.unfinished: another process is writing to it")


def refused(out: Path, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), OutputFolder(out).making(INPUTS):
        pass


def test_a_folder_that_cannot_be_written_is_refused_and_nothing_is_left(tmp_path):
    (tmp_path / "link").symlink_to("nowhere")
    refused(tmp_path / "link", f"{tmp_path}/link: exists, and is not a folder")
    long = "x" * 250  # and .unfinished: longer than a name may be
    refused(tmp_path / long, f"{tmp_path}/{long}: cannot be written (File name too long)")
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_journal_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder, "_JOURNAL", "x" * 300)
    refused(tmp_path / "out", f"{tmp_path}/out: cannot be written (File name too long)")
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fails_is_one_line_and_the_work_goes_on(tmp_path):
    full = f"{tmp_path}/out: not made (No space left on device); the same command goes on where it stopped"
    with (
        pytest.raises(ValueError, match=f"^{re.escape(full)}$"),
        OutputFolder(tmp_path / "out").making(INPUTS) as folder,
    ):
        folder.finished("one", 3)
        raise OSError(errno.ENOSPC, "No space left on device")
    with OutputFolder(tmp_path / "out").making(INPUTS) as folder:
        assert folder.done == {"one": 3}


def test_what_is_in_the_way_is_refused_and_kept(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("mine")
    refused(tmp_path / "full", f"{tmp_path}/full: is not empty; nothing is overwritten")
    refused(tmp_path / "full/file", f"{tmp_path}/full/file: exists, and is not a folder")
    refused(tmp_path / "no/out", f"{tmp_path}/no/out: the folder {tmp_path}/no does not exist")
    (tmp_path / "new.unfinished").mkdir()
    refused(tmp_path / "new", f"{tmp_path}/new.unfinished: is in the way, and was not begun by this program; remove it")
    assert (tmp_path / "full/file").read_text() == "mine"


def test_a_disk_that_is_too_small_is_refused_and_what_is_there_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(output_folder.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with OutputFolder(tmp_path / "out").making(INPUTS) as folder:
        (folder.path / "half").write_bytes(b"x" * 1500)
        folder.check_space(2400)
        with pytest.raises(ValueError, match=r"out: 0\.00 GB are needed, 0\.00 GB are free on that disk"):
            folder.check_space(3000)
