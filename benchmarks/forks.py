"""Entry points of this repository in forks of a process that has imported Megatron once: a run starts in a second.

Import this module first of all: it sets one thread per process, before torch is loaded.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import multiprocessing
import runpy
import socket
import sys
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_emoe.host import mode as host_mode

host_mode.setup(["--host-mode"])  # where CUDA is present too: a fork of a process that has asked for it cannot use it

import megatron_emoe.sweep.on_megatron  # noqa: E402
import megatron_emoe.sweep.tail_fit  # noqa: E402
import megatron_emoe.training.loop  # noqa: E402, F401

gc.freeze()  # what is here is never garbage: no fork need look at it
_CONTEXT = multiprocessing.get_context("fork")


def start(script: Path, words: list[str], log: Path) -> BaseProcess:
    """Run `python script words` as the only rank; both its streams go to `log`."""
    log.write_text("")
    (process,) = start_ranks(script, words, log, 1)
    return process


def start_ranks(script: Path, words: Sequence[str], log: Path, ranks: int) -> list[BaseProcess]:
    """The same on several ranks of this machine, as torchrun would; the streams of all are added to `log`."""
    with socket.socket() as holder:
        # The ranks inherit it, so nobody else is given its port before the first rank listens there.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        starts = [(script, list(words), log, rank, ranks, holder.getsockname()[1]) for rank in range(ranks)]
        processes: list[BaseProcess] = [_CONTEXT.Process(target=_run, args=args) for args in starts]
        for process in processes:
            process.start()
    return processes


def wait_for_one(processes: list[BaseProcess]) -> BaseProcess:
    """The first of the running processes to end."""
    ended = wait([process.sentinel for process in processes])[0]
    return next(process for process in processes if process.sentinel == ended)


def _run(script: Path, words: list[str], log: Path, rank: int, ranks: int, port: int) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()}, MASTER_ADDR="127.0.0.1")
    sys.argv = [str(script), *words]
    sys.path.insert(0, str(script.parent))  # where a script finds those beside it
    sys.orig_argv = ["python", *sys.argv]
    runpy.run_path(str(script), run_name="__main__")  # its SystemExit and its exceptions are the process's
