"""One run at a time writes to a folder of checkpoints."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from typing import BinaryIO

from megatron_emoe.settings.refusal import fail

LOCK = ".run.lock"
"""In the folder: held by the first rank of the run that writes there, and tells who that is."""

_held: list[BinaryIO] = []
"""Open until the process ends: closing any handle of the file would give the lock up. A forked child has no part in the
lock, and lets go of the file, so that it does not keep the disk in use."""

os.register_at_fork(after_in_child=lambda: [file.close() for file in _held])


def take_folder(save: str) -> None:
    """Hold `save` for this process. A lock of POSIX: it goes with the process, however that ends, reaches over NFS, and
    is not passed on to the processes that write checkpoints. A file system without locks takes no part.

    Raises:
        SystemExit: another run holds it: status 2 and one line.
    """
    path = Path(save) / LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")  # noqa: SIM115 - stays open
    file.seek(0)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):  # POSIX allows either
        fail(f"--save {save}: another run writes to it ({file.read().decode(errors='replace').strip()})")
    except OSError:  # no locks here
        return
    job = os.environ.get("SLURM_JOB_ID")
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}{f', Slurm job {job}' if job else ''}\n".encode())
    file.flush()
    _held.append(file)
