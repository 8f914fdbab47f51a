"""The demo's runner: lanes side by side, each in order, and nothing left at work after a failure. The steps are tiny
programs of the test, forked from it; the last test forks real ranks from a process that has imported Megatron."""

import multiprocessing
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "examples"))
import demo_run  # noqa: E402
from demo_run import Spent, Step  # noqa: E402

from tests import programs  # noqa: E402

WAIT = """
import pathlib, sys, time
until = time.monotonic() + 60
while not pathlib.Path(sys.argv[1]).exists():
    if time.monotonic() > until: sys.exit("nobody wrote " + sys.argv[1])
    time.sleep(0.05)
"""
WRITE = "import pathlib, sys\npathlib.Path(sys.argv[1]).write_text('x')\n"
SLEEP = "import os, pathlib, sys, time\npathlib.Path(sys.argv[1]).write_text(str(os.getpid()))\ntime.sleep(600)\n"
FAIL = WAIT + "print('what went wrong')\nsys.exit(3)\n"
BURN = "import time\nwhile time.process_time() < 0.5: pass\n"
FORK = multiprocessing.get_context("fork")


def _run(script: Path, words: list[str], log: Path) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.execv(sys.executable, [sys.executable, str(script), *words])


def start_ranks(script: Path, words: list[str], log: Path, ranks: int) -> list:
    processes = [FORK.Process(target=_run, args=(script, words, log)) for _ in range(ranks)]
    for process in processes:
        process.start()
    return processes


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setitem(sys.modules, "forks", SimpleNamespace(start_ranks=start_ranks))
    monkeypatch.setattr(demo_run, "REPO", tmp_path)
    for name, text in {"wait": WAIT, "write": WRITE, "sleep": SLEEP, "fail": FAIL, "burn": BURN}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def make_step(name: str, script: str, *words: Path, done=lambda: True, ranks: int = 0) -> Step:
    """A step that counts as done once it has been asked twice: before it runs and after."""
    answers = iter([False])
    return Step(name, f"{script}.py", [str(word) for word in words], lambda: next(answers, done()), ranks)


@pytest.mark.slow
def test_lanes_run_side_by_side_and_each_in_order(folder):
    ours, theirs = folder / "ours", folder / "theirs"

    def first() -> Iterator[Step]:
        yield make_step("wait", "wait", theirs)  # ends only while the other lane is at work
        assert theirs.exists()
        yield make_step("write", "write", ours, done=ours.exists)

    def second() -> Iterator[Step]:
        yield make_step("write theirs", "write", theirs, done=theirs.exists)
        yield make_step("wait for ours", "wait", ours)

    noted: list[Spent] = []
    demo_run.run([first(), second()], folder, noted.append)
    order = [one.step for one in noted]
    assert order.index("wait") < order.index("write") and order.index("write theirs") < order.index("wait for ours")
    assert len(order) == 4


def test_what_is_done_is_not_run_again(folder, monkeypatch):
    """Nor is Megatron imported for it."""
    monkeypatch.setitem(sys.modules, "forks", None)
    target = folder / "target"
    demo_run.run([iter([Step("write", "write.py", [str(target)], lambda: True)])], folder, lambda spent: None)
    assert not target.exists()


def test_a_step_is_prepared_only_where_it_is_started(folder):
    target, left = folder / "target", folder / "left"
    left.write_text("of a run that was ended")
    step = Step("write", "write.py", [str(target)], target.exists, prepare=left.unlink)
    demo_run.run([iter([step])], folder, lambda spent: None)
    assert target.exists() and not left.exists()
    left.write_text("again")
    demo_run.run([iter([step])], folder, lambda spent: None)
    assert left.exists()


def test_a_failure_ends_all_lanes_with_the_end_of_its_log(folder):
    pid = folder / "pid"
    lanes = [iter([make_step("sleep", "sleep", pid)]), iter([make_step("fail", "fail", pid)])]
    with pytest.raises(SystemExit) as failure:
        demo_run.run(lanes, folder, lambda spent: None)
    assert str(failure.value).startswith("fail failed; the end of") and "what went wrong" in str(failure.value)
    for process in multiprocessing.active_children():
        process.join(10)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_a_step_that_leaves_nothing_has_failed(folder):
    target = folder / "target"
    lane = iter([make_step("write", "write", folder / "another", done=target.exists)])
    with pytest.raises(SystemExit, match="write failed"):
        demo_run.run([lane], folder, lambda spent: None)


@pytest.mark.slow
def test_processor_time_is_that_of_all_ranks(folder):
    noted: list[Spent] = []
    demo_run.run([iter([make_step("burn", "burn", ranks=2)])], folder, noted.append)
    assert noted[0].processor >= 1.0  # a fork's own time begins at 0


@pytest.mark.slow
def test_ranks_are_forked_from_one_process_and_reach_each_other(tmp_path):
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts/beside.py").write_text("")
    (tmp_path / "scripts/rank.py").write_text(
        textwrap.dedent("""
            import os, sys, torch
            import beside
            torch.distributed.init_process_group("gloo")
            total = torch.tensor([10 ** int(os.environ["RANK"])])
            torch.distributed.all_reduce(total)
            print(f"{sys.argv[1]} {total.item()} of {os.environ['WORLD_SIZE']}", flush=True)
        """)
    )
    program = f"""
        import sys
        sys.path.insert(0, {str(REPO / "benchmarks")!r})
        import forks
        from pathlib import Path
        ranks = forks.start_ranks(Path("scripts/rank.py"), ["sum"], Path("log"), 3)
        [rank.join() for rank in ranks]
        sys.exit(any(rank.exitcode for rank in ranks))
    """
    subprocess.run([programs.python(), "-c", textwrap.dedent(program)], cwd=tmp_path, check=True, timeout=300)
    assert (tmp_path / "log").read_text().count("sum 111 of 3") == 3  # ranks share the stream: two may share a line


def test_what_an_import_says_goes_to_a_log_and_not_to_the_terminal(tmp_path, capfd):
    log = tmp_path / "log"
    with demo_run._streams_in(log):
        os.write(1, b"of stdout\n")
        os.write(2, b"of stderr\n")
    os.write(1, b"after\n")
    assert log.read_text() == "of stdout\nof stderr\n"
    assert capfd.readouterr() == ("after\n", "")
