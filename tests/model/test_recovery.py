"""Folders of checkpoints as dying runs leave them: what is chosen, what is touched, and that the run goes on."""

import errno
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from megatron_emoe.model.recovery import Recovery, carry_out, carry_out_together, damage, plan, write_tracker
from tests.distributed import run_ranks
from tests.tiny import arguments, flags, train

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


@pytest.mark.slow
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


def cut_off(folder: Path, iteration: int) -> Path:
    """Leave of a checkpoint what a save that is killed in the midst of its tensors leaves."""
    path = checkpoint(folder, iteration)
    (path / ".metadata").rename(path / ".metadata.tmp")
    (path / "metadata.json").unlink()
    cut(tensors(path))
    return path


def test_a_save_that_was_cut_off_is_removed_and_a_whole_one_that_someone_went_back_from_stays(folder):
    write_tracker(folder, 2)
    left = cut_off(folder, 6)
    recovery = plan(folder)
    assert recovery == Recovery(folder, None, (), (left,))
    carry_out(recovery, lambda line: None)
    assert sorted(path.name for path in folder.glob("iter_*")) == ["iter_0000002", "iter_0000004"]


def another_format(path: Path) -> None:
    shutil.rmtree(path)
    (path / "mp_rank_00").mkdir(parents=True)
    (path / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"weights")


LEFT = {
    "a cut file": lambda path: cut(tensors(path)),
    "no metadata, but the file that is written after it": lambda path: (path / ".metadata").unlink(),
    "another format": another_format,
}


@pytest.mark.parametrize("spoil", LEFT.values(), ids=LEFT)
@pytest.mark.parametrize("tracker", ["2", None], ids=["tracker", "no tracker"])
def test_what_more_than_a_cut_off_save_can_leave_is_set_aside_and_not_removed(spoil, tracker, folder):
    (folder / TRACKER).unlink() if tracker is None else (folder / TRACKER).write_text(tracker)
    spoil(checkpoint(folder, 6))
    held = sorted(path.name for path in checkpoint(folder, 6).rglob("*"))
    carry_out(plan(folder), lambda line: None)
    assert sorted(path.name for path in (folder / "iter_0000006.damaged").rglob("*")) == held
    assert plan(folder) == Recovery(folder, None, (), ())


@pytest.mark.parametrize("tracker", ["", "abc", None], ids=["empty", "garbage", "missing"])
def test_a_lost_tracker_is_written_anew(tracker, folder):
    if tracker is None:
        (folder / TRACKER).unlink()
    else:
        (folder / TRACKER).write_text(tracker)
    cut_off(folder, 6)
    carry_out(plan(folder), lambda line: None)
    assert (folder / TRACKER).read_text() == "4"
    assert not checkpoint(folder, 6).exists()


def test_a_named_folder_that_is_gone_counts_as_damaged_and_is_named(folder):
    shutil.rmtree(checkpoint(folder, 6))
    recovery, said = plan(folder), []
    carry_out(recovery, said.append)
    assert recovery.iteration == 4
    assert said == [
        f"{checkpoint(folder, 6)}: missing, although the tracker file names it",
        f"{folder}: going on from iteration 4",
    ]


@pytest.mark.parametrize("tracker", ["6", "", None], ids=["tracker", "empty tracker", "no tracker"])
def test_where_no_checkpoint_is_whole_each_is_named_and_none_is_touched(tracker, folder):
    (folder / TRACKER).unlink() if tracker is None else (folder / TRACKER).write_text(tracker)
    for iteration in (2, 4, 6):
        cut(tensors(checkpoint(folder, iteration)))
    with pytest.raises(ValueError, match=r"no whole checkpoint \(iter_0000006: .* of \d+; iter_0000004: .*; .*\)"):
        plan(folder)
    assert tracker is None or (folder / TRACKER).read_text() == tracker


@pytest.mark.slow
def test_a_run_in_a_folder_whose_checkpoints_are_all_damaged_is_refused_without_its_tracker_too(folder):
    (folder / TRACKER).unlink()
    for iteration in (2, 4, 6):
        cut(checkpoint(folder, iteration) / ".metadata")
    with pytest.raises(RuntimeError, match="SystemExit: 2"):
        run_ranks(train, 2, flags(**RUN | {"save": folder, "load": folder}))
    assert len(list(folder.glob("iter_*"))) == 3


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE], ids=["EIO", "ESTALE"])
@pytest.mark.parametrize("call", ["open .metadata", "size of a file"])
def test_what_cannot_be_read_now_is_no_damage(call, number, folder, monkeypatch):
    def fails(path, *args, **kwargs):
        if not isinstance(path, Path) or path.suffix == ".distcp":
            raise OSError(number, os.strerror(number))
        return stat(path, *args, **kwargs)

    stat = Path.stat
    if call == "open .metadata":
        monkeypatch.setattr(FileSystemReader, "read_metadata", fails)
    else:
        monkeypatch.setattr(Path, "stat", fails)
    with pytest.raises(OSError, match=rf"{os.strerror(number)} \(nothing is touched.*iter_0000006") as caught:
        plan(folder)
    assert caught.value.errno == number


def test_a_class_that_this_torch_lacks_is_no_damage(folder):
    path = checkpoint(folder, 6) / ".metadata"
    path.write_bytes(path.read_bytes().replace(b"TensorStorageMetadata", b"TensorStorageMetadat4"))
    with pytest.raises(ValueError, match=r"iter_0000006/.metadata: .*TensorStorageMetadat4.*another version of torch"):
        plan(folder)


def test_a_folder_without_any_checkpoint_is_a_first_start(tmp_path):
    assert plan(tmp_path) == Recovery(tmp_path, None, (), ())
    assert plan(tmp_path / "none") == Recovery(tmp_path / "none", None, (), ())
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
        cut_off(folder, 6)
    elif spoil == "lose the tracker":
        (folder / TRACKER).unlink()
        shutil.rmtree(checkpoint(folder, 6))
    else:
        for name in (TRACKER, "iter_0000004", "iter_0000006"):
            path = folder / name
            path.unlink() if path.is_file() else shutil.rmtree(path)
        cut_off(folder, 2)
    runs = run_ranks(train, 2, flags(**settings))
    for mine, one in zip(runs, finished[1], strict=True):
        assert mine.losses == one.losses[-len(mine.losses) :]
        assert all(torch.equal(mine.weights[name], one.weights[name]) for name in one.weights)
    assert len(runs[0].losses) == (6 if spoil == "cut the first save off" else 2)
    assert (folder / TRACKER).read_text() == "6"


@pytest.mark.slow
def test_where_few_are_retained_a_run_goes_on_from_the_last_of_them(finished, tmp_path):
    folder = tmp_path / "save"
    settings = flags(**RUN | {"save": folder, "load": folder, "save_interval": 1, "save_retain_interval": 4})
    run_ranks(train, 2, settings)
    assert [path.name for path in sorted(folder.glob("iter_*"))] == ["iter_0000004", "iter_0000006"]
    cut(tensors(checkpoint(folder, 6)))
    runs = run_ranks(train, 2, settings)
    for mine, one in zip(runs, finished[1], strict=True):
        assert mine.losses == one.losses[4:]
        assert all(torch.equal(mine.weights[name], one.weights[name]) for name in one.weights)


@pytest.mark.slow
def test_another_s_damaged_checkpoint_is_refused_and_not_touched(folder, tmp_path):
    cut(tensors(checkpoint(folder, 6)))
    words = flags(**RUN | {"load": folder, "save": tmp_path / "other", "finetune": True})
    with pytest.raises(RuntimeError, match="exit status 2|SystemExit"):
        run_ranks(train, 2, words)
    assert checkpoint(folder, 6).is_dir() and (folder / TRACKER).read_text() == "6"


def see_folder_late() -> None:
    """The last rank makes the folder when the first has looked, as a TensorBoard writer inside it does."""
    from megatron_emoe.model import layer_spec

    look = layer_spec.recovery_of

    def watched(args):
        looked = Path(f"{args.load}.looked")
        if os.environ["RANK"] == "0":
            found = look(args)
            looked.touch()
            return found
        while not looked.exists():
            time.sleep(0.01)
        Path(args.load).mkdir(exist_ok=True)  # or the first rank has: the lock of a run lies there
        return look(args)

    layer_spec.recovery_of = watched


@pytest.mark.slow
def test_ranks_that_see_the_folder_at_different_times_start_all_the_same(tmp_path):
    save = tmp_path / "save"
    words = flags(**RUN | {"save": save, "load": save, "train_iters": 2})
    assert len(run_ranks(train, 2, words, False, see_folder_late, timeout=100)[0].losses) == 2


def reads_at_a_start(words: list[str]) -> tuple[int, list[str]]:
    """How often this rank opens the .metadata, and the files of the checkpoint whose size it asks for."""
    from megatron_emoe.model import stored_files
    from megatron_emoe.model.layer_spec import elastic_model_config

    opened, sizes, size_of = [], [], stored_files._too_small
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
    stored_files._too_small = lambda path, size: sizes.append(path.name) or size_of(path, size)
    elastic_model_config(arguments(words))
    return sum(name.endswith("/.metadata") for name in opened), sizes


@pytest.mark.slow
def test_a_start_reads_the_metadata_once_and_asks_each_size_on_one_rank_of_a_machine(finished):
    """Once by us, and once by the core for the stored arguments; four times and three rounds in all ranks before."""
    save = finished[0]
    (opens, sizes), (opens_1, sizes_1) = run_ranks(reads_at_a_start, 2, flags(**RUN | {"save": save, "load": save}))
    assert opens == opens_1 == 2
    files = [path.name for path in checkpoint(save, 6).glob("*.distcp")]
    assert sorted(sizes) == sorted([*files, "metadata.json"]) and sizes_1 == []


def choose(folder: Path, chosen: list[Path]) -> None:
    os.environ["LOCAL_RANK"] = "0"  # two machines of one rank each
    carry_out_together(Recovery(folder, 4, (), (folder / "iter_0000006",)), chosen[torch.distributed.get_rank()])


def test_ranks_that_choose_differently_are_refused_before_anything_is_touched(tmp_path):
    (tmp_path / "iter_0000006").mkdir()
    four, six = checkpoint(tmp_path, 4), checkpoint(tmp_path, 6)
    with pytest.raises(RuntimeError, match=f"rank 0 goes on from {four}, rank 1 from {six}") as caught:
        run_ranks(choose, 2, tmp_path, [four, six])
    assert str(caught.value).count("start again when the file system") == 2  # both ranks end
    assert six.is_dir() and not (tmp_path / TRACKER).exists()


@pytest.mark.slow
def test_a_run_with_its_own_folder_and_a_base_keeps_the_base_s_companions(finished, tmp_path):
    base = Path(shutil.copytree(finished[0], tmp_path / "base"))
    (base / "hf").mkdir()
    (base / "hf" / "config.json").write_text("{}")
    save = tmp_path / "save"
    words = flags(**RUN | {"save": save, "load": save, "pretrained_checkpoint": base, "train_iters": 1})
    run_ranks(train, 2, words)
    assert (save / "hf" / "config.json").read_text() == "{}"
