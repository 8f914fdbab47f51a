"""A signal asks a training run to save and end: SIGTERM (Slurm's preemption, scancel) and SIGUSR1 (its time limit).

Megatron's --exit-signal-handler knows one signal, from the moment it has parsed its arguments, and looks at it after
whole steps. Here both count from the first moment of the process, and an evaluation in progress ends early.

Slurm signals every process of a step. So the signals are blocked, which every program that a rank starts inherits (a
compiler, a compile worker: a handler would leave them to die of it), and looked for where somebody asks. Children that
are forked without a new program, such as data loaders' workers, still end when their own rank terminates them.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from types import FrameType

from megatron_emoe.settings import flag_files

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_FLAG = "--exit-signal-handler"


class _Request:
    """Whether a signal came, and the signals that are listened for (none without the flag)."""

    came = False
    numbers: frozenset[int] = frozenset()


_request = _Request()


def start() -> None:
    """Call first of all, before imports that take seconds: from here on a signal is noted, not fatal.

    Without --exit-signal-handler on the command line, signals do what they always do.
    """
    try:
        words = flag_files.expand(sys.argv[1:])
    except ValueError:
        return  # the same file is read again and refused with a message
    if _FLAG in words:
        _listen(frozenset(SIGNALS))


def _listen(numbers: frozenset[int]) -> None:
    if not _request.numbers:
        os.register_at_fork(after_in_child=_hear_parent)
        atexit.register(_ignore)
    _request.numbers |= numbers
    for number in numbers:
        signal.signal(number, _note)  # where it is not blocked: in threads that are older than this
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


def _note(number: int, frame: FrameType | None) -> None:
    _request.came = True


def _ignore() -> None:
    """The interpreter's end restores the defaults: a repeat would kill where it is not blocked."""
    for number in _request.numbers:
        signal.signal(number, signal.SIG_IGN)


def _hear_parent() -> None:
    """In a forked child: a program that ends terminates those that are left by SIGTERM, and waits for them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _request.numbers)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)  # as torch's workers do


def hand_over() -> None:
    """Let Megatron know of both signals, also of one that came before; call it when its arguments are parsed."""
    from megatron.training import get_args, get_signal_handler

    if not get_args().exit_signal_handler:
        return
    handler = get_signal_handler()
    gather = handler.signals_received

    def look_and_gather() -> list[int]:
        handler._signal_received = came()
        return gather()

    handler.signals_received = look_and_gather
    _listen(frozenset({*SIGNALS, handler.sig}))


def came() -> bool:
    """Whether this process was asked to end; other ranks may not have been yet. System calls, no waiting."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _request.numbers)  # multiprocessing's resource tracker unblocks SIGTERM
    while signal.sigtimedwait(_request.numbers, 0) is not None:
        _request.came = True
    return _request.came
