"""A disk that is full, a rank that is lost: the run ends at once, says so, and nothing that was saved is lost."""

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_emoe.model import recovery
from megatron_emoe.model.recovery import plan
from tests.distributed import run_ranks, start_torchrun, torchrun, wait_until
from tests.tiny import flags, train

pytestmark = pytest.mark.slow

RUN = {"expert_model_parallel_size": 2, "train_iters": 6, "save_interval": 2, "global_batch_size": 4}
TRACKER = "latest_checkpointed_iteration.txt"


def before_save(number: int, act) -> None:
    """Call `act` before checkpoint `number`, counted from 1, is written."""
    from megatron.core import dist_checkpointing

    save, seen = dist_checkpointing.save, []

    def watched(*args, **kwargs):
        seen.append(None)
        if len(seen) == number:
            act()
        return save(*args, **kwargs)

    dist_checkpointing.save = watched


def listen(said: Path) -> None:
    """From now on `said` gets what is said of a save that failed."""
    report = recovery.report_failed_save
    lines: list[str] = []

    def note(line: str) -> None:
        limit_files(resource.RLIM_INFINITY)
        lines.append(line)
        said.write_text("\n".join(lines))

    recovery.report_failed_save = partial(report, say=note)


def limit_files(size: int) -> None:
    """No file of this process may grow beyond `size` bytes, as on a disk that is full: then a write is an OSError."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def no_room(said: Path) -> None:
    """From the second save on there is room for small files alone."""
    listen(said)
    before_save(2, lambda: limit_files(20_000))


def no_room_for_metadata_json(said: Path) -> None:
    """In the second save the tensors still find room, but not the first file after them that rank 0 alone writes."""
    from megatron.core.dist_checkpointing import serialization

    listen(said)
    save_config, seen = serialization.save_config, []

    def watched(*args):
        seen.append(None)
        if len(seen) == 2:
            limit_files(0)
        save_config(*args)

    serialization.save_config = watched


def no_room_for_the_tracker(said: Path) -> None:
    """In the second save everything finds room but the tracker file, which is emptied by then."""
    from megatron.core import dist_checkpointing

    listen(said)
    save, seen = dist_checkpointing.save, []

    def watched(*args, **kwargs):
        seen.append(None)
        saved = save(*args, **kwargs)
        if len(seen) == 2:
            limit_files(0)
        return saved

    dist_checkpointing.save = watched


def assert_goes_on(folder: Path, from_iteration: int) -> None:
    """A new run with the same flags ends as one that was never interrupted."""
    assert plan(folder).unfinished == ()
    assert (folder / TRACKER).read_text() == str(from_iteration)
    words = flags(**RUN | {"save": folder, "load": folder})
    resumed, whole = run_ranks(train, 2, words), run_ranks(train, 2, flags(**RUN))
    for mine, one in zip(resumed, whole, strict=True):
        assert mine.losses == one.losses[from_iteration:]
        assert all(torch.equal(mine.weights[name], one.weights[name]) for name in one.weights)


def assert_said(said: Path, save: Path) -> None:
    failed, removed = said.read_text().splitlines()
    assert failed.startswith(
        f"--save {save}: a checkpoint could not be written; the checkpoint of iteration 2 is whole and is kept; "
    )
    assert removed == f"{save}/iter_0000004: the half-written checkpoint is removed"


@pytest.mark.parametrize(
    ("spoil", "error"), [(no_room, "CheckpointException"), (no_room_for_metadata_json, "File too large")]
)
def test_a_save_without_room_keeps_the_one_before_and_says_so(spoil, error, tmp_path):
    save, said = tmp_path / "save", tmp_path / "said"
    with pytest.raises(RuntimeError, match=error):
        run_ranks(train, 2, flags(**RUN | {"save": save}), False, partial(spoil, said))
    assert_said(said, save)
    assert_goes_on(save, 2)


def test_a_save_without_room_for_the_tracker_is_kept(tmp_path):
    save, said = tmp_path / "save", tmp_path / "said"
    with pytest.raises(RuntimeError, match="File too large"):
        run_ranks(train, 2, flags(**RUN | {"save": save}), False, partial(no_room_for_the_tracker, said))
    assert "a checkpoint could not be written; the checkpoint of iteration 4 is whole and is kept" in said.read_text()
    assert (save / TRACKER).read_text() == "" and plan(save).iteration == 4


def test_a_checkpoint_that_cannot_be_loaded_is_no_failed_save(tmp_path):
    save, said = tmp_path / "save", tmp_path / "said"
    words = flags(**RUN | {"save": save, "load": save})
    run_ranks(train, 2, words)
    for path in (save / "iter_0000006").glob("__1_*.distcp"):  # the other rank's hold the arguments
        path.write_bytes(bytes(path.stat().st_size))  # sizes do not show it
    with pytest.raises(RuntimeError, match="load_checkpoint(.|\n)*CheckpointException"):
        run_ranks(train, 2, words, False, partial(listen, said))
    assert not said.exists()


@pytest.mark.parametrize("kind", [OSError, CheckpointException, KeyError])
@pytest.mark.parametrize("place", ["save_checkpoint", "load_checkpoint"])
def test_only_an_error_of_the_disk_in_a_save_is_a_failed_save(kind, place):
    scope = {}
    exec(f"def {place}(error):\n    raise error", scope)
    with pytest.raises(RuntimeError) as caught:
        try:
            scope[place](kind("write", {}))
        except BaseException as cause:
            raise RuntimeError("what a caller makes of it") from cause
    counts = place == "save_checkpoint" and kind is not KeyError
    assert recovery.failed_save(caught.value) == recovery.failed_save(caught.value.__cause__) == counts


def flip_a_byte(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))


def test_flipped_bits_end_one_start_and_the_next_goes_on_from_the_checkpoint_before(tmp_path):
    run = RUN | {"save": tmp_path, "load": tmp_path, "verify_integrity": True}
    whole = run_ranks(train, 2, flags(**run))
    flip_a_byte(max((tmp_path / "iter_0000006").glob("*.distcp"), key=lambda file: file.stat().st_size))
    assert plan(tmp_path).damaged == ()  # sizes do not show it
    with pytest.raises(RuntimeError, match="hash mismatch"):
        run_ranks(train, 2, flags(**run))
    assert (tmp_path / TRACKER).read_text() == "4" and (tmp_path / "iter_0000006.damaged").is_dir()
    for mine, one in zip(run_ranks(train, 2, flags(**run)), whole, strict=True):
        assert mine.losses == one.losses[4:]
        assert all(torch.equal(mine.weights[name], one.weights[name]) for name in one.weights)


@pytest.mark.parametrize("error", ["Integrity manifest not found", "integrity verification failed"])
def test_only_flipped_bits_with_a_whole_checkpoint_before_are_set_aside(error, tmp_path):
    (tmp_path / TRACKER).write_text("2")
    (tmp_path / "iter_0000002").mkdir()
    recovery.set_aside_flipped(tmp_path, RuntimeError(error), lambda line: None)
    assert (tmp_path / TRACKER).read_text() == "2" and (tmp_path / "iter_0000002").is_dir()


def test_a_lost_rank_ends_the_others_at_once_and_the_next_run_goes_on(tmp_path):
    run = RUN | {"train_iters": 400, "save": tmp_path, "load": tmp_path, "log_interval": 100}
    words = flags(**run)
    log = tmp_path / "log"
    real = {"interpreter": sys.executable, "stderr": subprocess.STDOUT}  # whose children are its ranks
    with open(log, "w") as out, start_torchrun(2, "pretrain_emoe.py", *words, stdout=out, **real) as job:
        wait_until(lambda: (tmp_path / TRACKER).is_file() and int((tmp_path / TRACKER).read_text() or 0) >= 4, 240)
        victim = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True).stdout.split()[-1]
        os.kill(int(victim), signal.SIGKILL)
        assert job.wait(timeout=60) != 0
    with suppress(ProcessLookupError):  # the process that writes a rank's checkpoints outlives one that was killed
        os.killpg(int(victim), signal.SIGKILL)
    saved = plan(tmp_path).iteration or int((tmp_path / TRACKER).read_text())
    resumed = torchrun(2, "pretrain_emoe.py", *flags(**run | {"exit_interval": saved + 2}))
    assert f"successfully loaded checkpoint from {tmp_path}" in resumed.stdout
    assert (tmp_path / TRACKER).read_text() == str(saved + 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small file system: needs root")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    said = tmp_path / "said"
    size = 1_500_000  # one checkpoint of this model takes a megabyte
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("cannot mount a file system here")
    try:
        with pytest.raises(RuntimeError, match="CheckpointException|No space left"):
            run_ranks(train, 2, flags(**RUN | {"save": disk}), False, partial(listen, said))
        shutil.copytree(disk, tmp_path / "copy")
    finally:
        wait_until(lambda: subprocess.run(["umount", disk]).returncode == 0)  # a rank on its way out holds its folder
    assert_said(said, disk)
    assert_goes_on(tmp_path / "copy", 2)


def diverges(words: list[str]) -> tuple[int | str | None, str]:
    """How a run ends whose loss becomes no number, and what it says."""
    said = io.StringIO()
    with redirect_stderr(said):
        try:
            train(words)
        except SystemExit as left:
            return left.code, said.getvalue()
    return None, said.getvalue()


def test_a_loss_that_is_no_number_ends_a_run_that_saves_nothing_with_one_line():
    status, said = run_ranks(diverges, 1, flags(lr=1e30))[0]
    assert status == 16  # the core's: a result that it rejected
    why = 'a loss or gradient is no number, twice alike (the line "Unexpected result" says which)'
    assert f"pretrain_emoe.py: error: iteration 3: {why}; nothing is saved without --save\n" in said
    assert "Traceback" not in said
