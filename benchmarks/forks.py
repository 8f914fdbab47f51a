"""Entry points of this repository in forks of a process that has imported Megatron once: a run starts in a second.

Import this module first of all: it sets one thread per process, before torch is loaded.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import gc
import multiprocessing
import runpy
import sys
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from megatron_emoe.host import mode as host_mode

host_mode.setup([])

import megatron_emoe.sweep.on_megatron  # noqa: E402
import megatron_emoe.sweep.tail_fit  # noqa: E402
import megatron_emoe.training.loop  # noqa: E402, F401

gc.freeze()  # what is here is never garbage: no fork need look at it
_CONTEXT = multiprocessing.get_context("fork")


def start(script: Path, words: list[str], log: Path) -> BaseProcess:
    """Run `python script words` as the only rank; both its streams go to `log`."""
    process = _CONTEXT.Process(target=_run, args=(script, words, log))
    process.start()
    return process


def wait_for_one(processes: list[BaseProcess]) -> BaseProcess:
    """The first of the running processes to end."""
    ended = wait([process.sentinel for process in processes])[0]
    return next(process for process in processes if process.sentinel == ended)


def _run(script: Path, words: list[str], log: Path) -> None:
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ.update(rank, MASTER_ADDR="127.0.0.1", MASTER_PORT="0")  # any port that is free
    sys.argv = [str(script), *words]
    sys.orig_argv = ["python", *sys.argv]
    runpy.run_path(str(script), run_name="__main__")  # its SystemExit and its exceptions are the process's
