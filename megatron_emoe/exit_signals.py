"""A signal asks a training run to save and end: SIGTERM (Slurm's preemption, scancel) and SIGUSR1 (its time limit).

Megatron's --exit-signal-handler knows one signal, from the moment it has parsed its arguments, and looks at it after
whole steps. Here both count from the first moment of the process, and an evaluation in progress ends early.
"""

from __future__ import annotations

import atexit
import signal
import sys
from collections.abc import Callable
from types import FrameType

from megatron_emoe import flag_files

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_FLAG = "--exit-signal-handler"


class _Request:
    """Whether a signal came. Handlers run between two instructions of this thread, so they set a flag and no more."""

    came = False


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
        _handle(_note)
        atexit.register(_handle, signal.SIG_IGN)  # the interpreter's end restores the defaults: a repeat would kill


def _handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in SIGNALS:
        signal.signal(number, handler)


def _note(number: int, frame: FrameType | None) -> None:
    _request.came = True


def hand_over() -> None:
    """Let Megatron know of both signals, also of one that came before; call it when its arguments are parsed."""
    from megatron.training import get_args, get_signal_handler

    if not get_args().exit_signal_handler:
        return
    core, core_number = signal.getsignal(get_signal_handler().sig), get_signal_handler().sig
    assert callable(core)

    def note_for_both(number: int, frame: FrameType | None) -> None:
        _note(number, frame)
        core(core_number, frame)

    for number in {*SIGNALS, core_number}:
        signal.signal(number, note_for_both)
    if _request.came:
        signal.raise_signal(core_number)


def came() -> bool:
    """Whether this process was asked to end; other ranks may not have been yet."""
    return _request.came
