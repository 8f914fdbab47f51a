"""One program, or one call of a function, in a fork of the server: to the end of the process."""

import atexit
import base64
import io
import multiprocessing.spawn
import os
import pickle
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, NoReturn


def run(request: Mapping[str, Any], streams: Sequence[int], interpreter: str) -> NoReturn:
    """Never returns. request: see client.py and programs.call. streams: what becomes stdin, stdout and stderr; of a
    call a pipe for its answer behind them."""
    status = 1
    try:
        _take_over(request, streams[:3])
        if request["kind"] == "call":
            status = _call(request["value"], *streams[3:])
        else:
            _take_names(request, interpreter)
            status = _status_of(request)
        threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        if status < 0:
            signal.signal(-status, signal.SIG_DFL)
            os.kill(os.getpid(), -status)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(status)


def _take_over(request: Mapping[str, Any], streams: Sequence[int]) -> None:
    """Signals, streams, environment and folder as the client had them."""
    os.setsid()
    for number in (signal.SIGCHLD, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    unbuffered = request["unbuffered"] or bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    sys.stdout = sys.__stdout__ = _writer(1, unbuffered)
    sys.stderr = sys.__stderr__ = _writer(2, unbuffered, errors="backslashreplace", line_buffering=True)


def _take_names(request: Mapping[str, Any], interpreter: str) -> None:
    """What an interpreter of that name would have in `sys`."""
    multiprocessing.spawn.set_executable(sys.executable)  # it hands more over than three streams
    words = [str(request["value"]), *request["words"]]
    option = {"m": ["-m"], "c": ["-c"], "script": []}[request["kind"]]
    sys.orig_argv = [interpreter, *["-u"] * request["unbuffered"], *option, *words]
    sys.executable = interpreter
    sys.argv = ["-c", *request["words"]] if option == ["-c"] else words
    first = os.path.dirname(os.path.realpath(words[0])) if request["kind"] == "script" else os.getcwd()
    sys.path.insert(0, first)


def _call(task: str, answer: int) -> int:
    """The function and its arguments, pickled and in base 64, with the pipe as its first argument."""
    function, args = pickle.loads(base64.b64decode(task))
    multiprocessing.set_start_method("fork", force=True)  # the default; data loaders rely on it
    function(Connection(answer, readable=False), *args)
    return 0


def _writer(number: int, unbuffered: bool, **options: Any) -> io.TextIOWrapper:
    binary = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    return io.TextIOWrapper(binary, write_through=unbuffered, **options)


def _status_of(request: Mapping[str, Any]) -> int:
    """Run it; the exit status, or less than 0: the signal to end by. An exception leaves its traceback."""
    try:
        if request["kind"] == "script":
            runpy.run_path(request["value"], run_name="__main__")
        elif request["kind"] == "m":
            runpy.run_module(request["value"], run_name="__main__", alter_sys=True)
        else:
            exec(compile(request["value"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as leaving:
        if leaving.code is None or isinstance(leaving.code, int):
            return (leaving.code or 0) & 255  # what the system would keep of it
        print(leaving.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
