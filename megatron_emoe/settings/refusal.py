"""The end of a program that will not start, with status 2, or cannot go on, with status 1: one message."""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

PATIENCE = 60.0
"""Seconds by which the ranks of a machine may reach the same refusal one after the other."""


class NoNumber(ArithmeticError):
    """A measurement that is NaN or infinite. The message says at which k' and where; nothing of it is stored."""


def fail(error: object, status: int = 2) -> NoReturn:
    """End this process, after one message on stderr from each machine: data may be missing on one.

    status: 2 for what was asked, 1 for what came of it (NoNumber).

    torchrun ends all ranks when one has ended. So the others wait for the machine's first rank, which gives the
    message, and speak themselves where it does not: what they refuse was then theirs alone.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, which a job script has its ranks ignore
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # as --exit-signal-handler has it blocked
        time.sleep(PATIENCE)
    _close_bars()
    message = f"{os.path.basename(sys.argv[0])}: error: {one_line(error)}"
    print(message, file=sys.stderr, flush=True)
    _tell_torchrun(message)
    sys.exit(status)


def _tell_torchrun(message: str) -> None:
    """Leave the message where torchrun looks for why a rank has failed: it ends its own report, of some 30 lines."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": message, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))


def one_line(error: object) -> str:
    """A message as one line: a library's reason may have several."""
    return " ".join(str(error).split("\n"))


def _close_bars() -> None:
    """End the lines of tqdm's progress bars, so that the message has a line of its own."""
    if bars := sys.modules.get("tqdm"):
        for bar in list(getattr(bars.tqdm, "_instances", ())):
            bar.close()
