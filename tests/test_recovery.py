"""Folders of checkpoints as dying runs leave them: what is chosen, what is touched, and that the run goes on."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from megatron_emoe.recovery import Recovery, carry_out, damage, plan, write_tracker
from tests.distributed import run_ranks
from tests.tiny import flags, train

RUN = {"expert_model_parallel_size": 2, "train_iters": 6, "save_interval": 2, "global_batch_size": 4}
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list]:
    """A folder with whole checkpoints of iterations 2, 4 and 6, and what the run saw."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_ranks(train, 2, flags(**RUN | {"save": folder}))


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished[0], tmp_path / "save"))


def checkpoint(folder: Path, iteration: int) -> Path:
    return folder / f"iter_{iteration:07d}"


def cut(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def tensors(path: Path) -> Path:
    """The largest file: it holds tensors."""
    return max(path.glob("*.distcp"), key=lambda file: file.stat().st_size)


DAMAGES = {
    "a cut file": (lambda path: cut(tensors(path)), r"__\d_\d.distcp has \d+ bytes, of \d+"),
    "a missing file": (lambda path: tensors(path).unlink(), r"__\d_\d.distcp is missing"),
    "an empty file": (lambda path: cut(tensors(path), 0), r"__\d_\d.distcp has 0 bytes, of \d+"),
    "no metadata": (lambda path: (path / ".metadata").unlink(), r"\.metadata is missing"),
    "cut metadata": (lambda path: cut(path / ".metadata"), r"\.metadata cannot be read \(\w+\)"),
    "empty metadata": (lambda path: cut(path / ".metadata", 0), r"\.metadata cannot be read \(\w+\)"),
    "no metadata.json": (lambda path: (path / "metadata.json").unlink(), r"metadata\.json is missing"),
}


@pytest.mark.parametrize(("spoil", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damage_is_seen(spoil, message, folder):
    path = checkpoint(folder, 6)
    assert damage(path) is None
    spoil(path)
    assert re.fullmatch(message, damage(path))


def test_a_whole_folder_needs_nothing(folder):
    assert plan(folder) == Recovery(folder, None, (), ())


def test_a_damaged_newest_is_set_aside_and_the_one_before_named(folder):
    cut(tensors(checkpoint(folder, 6)))
    recovery = plan(folder)
    assert recovery.iteration == 4 and [path for path, _ in recovery.damaged] == [checkpoint(folder, 6)]
    said = []
    carry_out(recovery, said.append)
    assert (folder / TRACKER).read_text() == "4"
    assert (folder / "iter_0000006.damaged" / ".metadata").is_file()  # nothing is lost
    assert plan(folder) == Recovery(folder, None, (), ())
    assert "iter_0000006: damaged" in said[0] and said[1] == f"{folder}: going on from iteration 4"


def test_a_second_damaged_one_gets_another_name(folder):
    checkpoint(folder, 2).rename(folder / "iter_0000006.damaged")
    cut(tensors(checkpoint(folder, 6)))
    carry_out(plan(folder), lambda line: None)
    assert (folder / "iter_0000006.damaged.2").is_dir()


def test_two_damaged_ones_are_passed_over(folder):
    for iteration in (4, 6):
        cut(tensors(checkpoint(folder, iteration)))
    assert plan(folder).iteration == 2


def test_a_save_that_was_cut_off_is_removed_and_a_whole_one_that_someone_went_back_from_stays(folder):
    write_tracker(folder, 2)
    cut(tensors(checkpoint(folder, 6)))
    recovery = plan(folder)
    assert recovery == Recovery(folder, None, (), (checkpoint(folder, 6),))
    carry_out(recovery, lambda line: None)
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000002", "iter_0000004"]


@pytest.mark.parametrize("tracker", ["", "abc", None], ids=["empty", "garbage", "missing"])
def test_a_lost_tracker_is_written_anew(tracker, folder):
    if tracker is None:
        (folder / TRACKER).unlink()
    else:
        (folder / TRACKER).write_text(tracker)
    cut(tensors(checkpoint(folder, 6)))  # who knows whether that save had ended
    carry_out(plan(folder), lambda line: None)
    assert (folder / TRACKER).read_text() == "4"
    assert not checkpoint(folder, 6).exists()


def test_a_named_folder_that_is_gone_counts_as_damaged(folder):
    shutil.rmtree(checkpoint(folder, 6))
    assert plan(folder).iteration == 4


def test_where_no_checkpoint_is_whole_each_is_named(folder):
    for iteration in (2, 4, 6):
        cut(tensors(checkpoint(folder, iteration)))
    with pytest.raises(ValueError, match=r"no whole checkpoint \(iter_0000006: .* of \d+; iter_0000004: .*; .*\)"):
        plan(folder)
    assert (folder / TRACKER).read_text() == "6"


def test_a_folder_without_any_checkpoint_is_a_first_start(tmp_path):
    assert plan(tmp_path) == Recovery(tmp_path, None, (), ())
    (tmp_path / "iter_0000002").mkdir()  # the very first save was cut off
    assert plan(tmp_path) == Recovery(tmp_path, None, (), (tmp_path / "iter_0000002",))


@pytest.mark.slow
@pytest.mark.parametrize("spoil", ["cut a file", "empty the tracker", "lose the tracker", "cut the first save off"])
def test_a_run_goes_on_from_what_is_whole_and_ends_alike(spoil, finished, folder):
    settings = RUN | {"save": folder, "load": folder}
    if spoil == "cut a file":
        cut(tensors(checkpoint(folder, 6)))
    elif spoil == "empty the tracker":
        (folder / TRACKER).write_text("")
        cut(checkpoint(folder, 6) / ".metadata")
    elif spoil == "lose the tracker":
        (folder / TRACKER).unlink()
        shutil.rmtree(checkpoint(folder, 6))
    else:
        for name in (TRACKER, "iter_0000004", "iter_0000006"):
            path = folder / name
            path.unlink() if path.is_file() else shutil.rmtree(path)
        (checkpoint(folder, 2) / ".metadata").unlink()
    runs = run_ranks(train, 2, flags(**settings))
    for mine, one in zip(runs, finished[1], strict=True):
        assert mine.losses == one.losses[-len(mine.losses) :]
        assert all(torch.equal(mine.weights[name], one.weights[name]) for name in one.weights)
    assert len(runs[0].losses) == (6 if spoil == "cut the first save off" else 2)
    assert (folder / TRACKER).read_text() == "6"


@pytest.mark.slow
def test_another_s_damaged_checkpoint_is_refused_and_not_touched(folder, tmp_path):
    cut(tensors(checkpoint(folder, 6)))
    words = flags(**RUN | {"load": folder, "save": tmp_path / "other", "finetune": True})
    with pytest.raises(RuntimeError, match="exit status 2|SystemExit"):
        run_ranks(train, 2, words)
    assert checkpoint(folder, 6).is_dir() and (folder / TRACKER).read_text() == "6"
