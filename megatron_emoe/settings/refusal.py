"""The end of a program that will not start: one message, status 2."""

import os
import signal
import sys
import time
from typing import NoReturn

PATIENCE = 60.0
"""Seconds by which the ranks of a machine may reach the same refusal one after the other."""


def fail(error: object) -> NoReturn:
    """End this process with status 2, after one message on stderr from each machine: data may be missing on one.

    torchrun ends all ranks when one has ended. So the others wait for the machine's first rank, which gives the
    message, and speak themselves where it does not: what they refuse was then theirs alone.
    """
    if os.environ.get("LOCAL_RANK", "0") != "0":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun's, which a job script has its ranks ignore
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # as --exit-signal-handler has it blocked
        time.sleep(PATIENCE)
    print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
    sys.exit(2)
