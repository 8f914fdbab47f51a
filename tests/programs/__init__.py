"""Programs start in milliseconds: forks of a server that has imported what they import.

`python()` names an interpreter for tests to start programs with, as sys.executable would be. It is a client (client.py)
that hands its command line, environment, folder and standard streams to the server (server.py), which forks a child
that runs the program; signals, exit status and death pass through. Whoever starts programs in turn, as torchrun does,
finds the same interpreter in sys.executable. Every program is also started once by a real interpreter.
"""

import atexit
import base64
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Pipe
from pathlib import Path
from select import select
from typing import Any

REPO = Path(__file__).resolve().parents[2]
_CLIENT = Path(__file__).with_name("client.py")
SHARED = "EMOE_TEST_PROGRAMS"
"""Names the folder of a server that several processes share (pytest's workers: tests/conftest.py)."""


def python() -> str:
    """An interpreter to start programs with; the server behind it is there on return."""
    return str(_server() / "python")


class Call:
    """A function in a fork of the server, in a process group of its own.

    answer: where what it sends to its first argument comes out.
    """

    def __init__(self, function: Callable[..., Any], args: tuple, env: Mapping[str, str]) -> None:
        self.answer, theirs = Pipe(duplex=False)
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(str(_server() / "server"))
        task = base64.b64encode(pickle.dumps((function, args))).decode()
        request = {"kind": "call", "value": task, "env": dict(env), "cwd": os.getcwd(), "ignored": []}
        words = json.dumps(request | {"unbuffered": 0}).encode(errors="surrogateescape")
        socket.send_fds(self._server, [len(words).to_bytes(8, "big")], [0, 1, 2, theirs.fileno()])
        self._server.sendall(words)
        theirs.close()
        self._said = self._server.makefile("r")
        self.pid = int(self._said.readline())

    def end(self, wait: float) -> None:
        """Give it `wait` seconds to end by itself, then end it, and all that it left running.

        It has ended on return: what it held, as a lock, is free.
        """
        select([self._server], [], [], wait)  # the server speaks when it has ended
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        select([self._server], [], [], 60)
        self._said.close()
        self._server.close()
        self.answer.close()


_own: list[Path] = []


def _server() -> Path:
    """The folder of the server: the shared one, or one of this process, started at the first call."""
    shared = os.environ.get(SHARED)
    if shared is None and not _own:
        _own.append(start())
    folder = Path(shared) if shared else _own[0]
    end = time.monotonic() + 300
    while not (folder / "ready").exists():
        lives = folder.is_dir() and not (folder / "failed").exists()
        assert lives and time.monotonic() < end, "the server of programs did not start: see above"
        time.sleep(0.05)
    return folder


def start() -> Path:
    """Start a server that ends with this process; its folder. `ready` or `failed` in there says how that went."""
    folder = Path(tempfile.mkdtemp(prefix="emoe-programs-"))
    interpreter = folder / "python"
    interpreter.write_text(f"#!{sys.executable} -IS\n{_CLIENT.read_text()}")
    interpreter.chmod(0o700)
    env = os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.programs.server", str(folder), sys.executable]
    server = subprocess.Popen(command, cwd=REPO, env=env, stdin=subprocess.PIPE)
    atexit.register(_end, server, folder, os.getpid())
    return folder


def _end(server: subprocess.Popen, folder: Path, owner: int) -> None:
    if os.getpid() != owner:  # a fork of this process
        return
    server.kill()
    server.wait()
    shutil.rmtree(folder, ignore_errors=True)
