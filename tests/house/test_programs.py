"""The interpreter of tests.programs: what a program sees, and what is seen of it, is as with a real interpreter."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest

from tests import programs
from tests.distributed import REPO, is_running, wait_until

pytestmark = pytest.mark.slow

SEEN = """
import json, os, signal, sys
seen = {name: getattr(sys, name) for name in ("argv", "orig_argv", "executable")}
seen |= {"cwd": os.getcwd(), "env": dict(os.environ), "stdin": sys.stdin.read(), "name": __name__}
seen["signals"] = {int(number): str(signal.getsignal(number)) for number in signal.valid_signals()}
print(json.dumps(seen, indent=1, sort_keys=True))
print("on the other stream", file=sys.stderr)
"""
WORDS = ("--flag", "two words", "", "caf\u00e9\n", "\udcff", "-c")
WAIT = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "seen.py").write_text(SEEN)
    (tmp_path / "in here").mkdir()
    return tmp_path


def both(command: Sequence[str], **options: Any) -> list[subprocess.CompletedProcess]:
    """What a real interpreter makes of it, and what a program of the server does: all of it that can be seen."""
    defaults = {"capture_output": True, "text": True, "input": "text on stdin\n", "timeout": 120}
    return [
        subprocess.run([interpreter, *command], **(defaults | options))
        for interpreter in (sys.executable, programs.python())
    ]


def assert_same(real: subprocess.CompletedProcess, program: subprocess.CompletedProcess) -> None:
    assert program.stdout.replace(programs.python(), sys.executable) == real.stdout
    assert (program.stderr, program.returncode) == (real.stderr, real.returncode)


@pytest.mark.parametrize("start", [["in here/../seen.py"], ["-m", "seen"], ["-c", SEEN], ["-u", "seen.py"], ["-"]])
def test_a_program_finds_what_a_real_interpreter_would_give_it(start, folder):
    """Its words and names, its folder, its environment, its signals, its three streams. `-`: a real one it is."""
    env = os.environ | {"A_NAME": "its\nvalue", "PYTHONPATH": str(folder)}
    stdin = {"input": SEEN} if start == ["-"] else {}
    real, program = both([*start, *WORDS], cwd=folder, env=env, **stdin)
    assert '"A_NAME": "its\\nvalue"' in real.stdout and real.stderr == "on the other stream\n" and real.returncode == 0
    assert_same(real, program)
    assert start == ["-"] or f'"executable": "{programs.python()}"' in program.stdout


def test_ignored_signals_stay_ignored(folder):
    ignored = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.signal(number, signal.SIG_IGN) for number in ignored]
    try:
        real, program = both(["seen.py"], cwd=folder)
    finally:
        for number, handler in zip(ignored, before, strict=True):
            signal.signal(number, handler)
    assert f'"{int(signal.SIGTERM)}": "{int(signal.SIG_IGN)}"' in real.stdout.replace("Handlers.SIG_IGN", "1")
    assert_same(real, program)


@pytest.mark.parametrize(
    "code",
    [
        "print('said')",
        "import sys; sys.exit(7)",
        "import sys; sys.exit(300)",  # the system keeps its last eight bits
        "import sys; sys.exit(-1)",
        "import sys; sys.exit('why')",
        "import os; os._exit(5)",
        "import atexit, sys; atexit.register(print, 'at the end'); sys.exit(3)",
        "import threading, time; threading.Thread(target=lambda: (time.sleep(0.2), print('later'))).start()",
        "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
        "import os, signal; os.kill(os.getpid(), signal.SIGABRT)",
    ],
)
def test_its_end_is_the_program_s(code):
    real, program = both(["-c", code])
    assert_same(real, program)


@pytest.mark.parametrize("code", ["1 / 0", "raise SystemError('what')", "no python"])
def test_an_exception_ends_it_with_status_1_and_the_traceback(code):
    real, program = both(["-c", code])
    assert real.returncode == program.returncode == 1
    assert program.stderr.splitlines()[-1] == real.stderr.splitlines()[-1]


@contextmanager
def started(interpreter: str, code: str, **options: Any) -> Iterator[tuple[subprocess.Popen, int]]:
    """A program that says its process id first, and that id; ended afterwards."""
    process = subprocess.Popen(
        [interpreter, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    with process:
        try:
            assert process.stdout is not None
            yield process, int(process.stdout.readline())
        finally:
            process.kill()


HANDLED = """
import os, signal, sys, time
signal.signal(signal.SIG{name}, lambda number, frame: (os.write(1, b"caught %d" % number), sys.exit(9)))
print(os.getpid(), flush=True)
while True:  # a signal between two instructions and a long sleep would be handled after it
    time.sleep(0.01)
"""
BUFFERED = r"""
import os, time
print("in the buffer")
os.write(1, b"%d\n" % os.getpid())
while True:
    time.sleep(0.01)
"""


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "HUP"])
@pytest.mark.parametrize("code", [HANDLED, BUFFERED], ids=["handled", "not handled"])
def test_a_signal_to_it_is_one_to_the_program(name, code):
    number = getattr(signal, f"SIG{name}")
    seen = []
    for interpreter in (sys.executable, programs.python()):
        with started(interpreter, code.format(name=name)) as (process, _):
            process.send_signal(number)
            output, errors = process.communicate(timeout=60)
            seen.append((output, errors.splitlines()[-1:], process.returncode))
    assert seen[1] == seen[0]
    assert seen[0][2] == (9 if code == HANDLED else -number)


DEAF = """
import os, signal, subprocess, sys
from tests import conftest
for number in conftest.HEARD:
    signal.signal(number, signal.SIG_IGN)
conftest.hear_signals()
for number in conftest.HEARD:
    program = subprocess.run([sys.executable, "-c", f"import os; os.kill(os.getpid(), {number})"], stderr=-3)
    os.kill(os.getpid(), number)
    print(program.returncode == -number)
"""


def test_programs_of_tests_hear_signals_that_the_tests_were_started_to_ignore():
    """As under nohup; what ran the tests goes on when such a signal comes."""
    done = subprocess.run([programs.python(), "-c", DEAF], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 6, done.stderr


def test_its_death_is_the_program_s_too():
    with started(programs.python(), WAIT) as (process, pid):
        assert pid != process.pid and is_running(pid)
        process.kill()
        wait_until(lambda: not is_running(pid))


def test_the_program_s_death_is_its_own():
    with started(programs.python(), WAIT) as (process, pid):
        os.kill(pid, signal.SIGKILL)
        assert process.wait(60) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("head", "sent"),
    [(b"", b""), (b"\0\0\0", b""), ((1000).to_bytes(8, "big"), b'{"kind": "c", ')],
    ids=["nothing", "part of the size", "part of the words"],
)
def test_a_client_that_is_killed_within_its_request_is_gone_and_the_server_goes_on(head, sent):
    reader, writer = os.pipe()
    with socket.socket(socket.AF_UNIX) as client, open(reader, "rb") as answers:
        client.connect(str(Path(programs.python()).with_name("server")))
        if head:
            socket.send_fds(client, [head], [0, writer, writer])
        if sent:
            client.sendall(sent)
        os.close(writer)
        client.close()
        assert select([reader], [], [], 60)[0] and answers.read() == b""  # the server has closed what it was given
    assert subprocess.run([programs.python(), "-c", "print('there')"], capture_output=True).stdout == b"there\n"


def test_a_server_that_cannot_start_is_not_waited_for(tmp_path, monkeypatch, capfd):
    (tmp_path / "megatron").mkdir()
    (tmp_path / "megatron/__init__.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(programs.SHARED, str(programs.start()))
    wait_until((Path(os.environ[programs.SHARED]) / "failed").exists)
    with pytest.raises(AssertionError, match="the server of programs did not start"):
        programs.python()
    assert "ImportError: a broken installation" in capfd.readouterr().err
