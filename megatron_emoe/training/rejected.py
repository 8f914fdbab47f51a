"""How a run ends whose loss is no number, and that has no folder for checkpoints."""

from __future__ import annotations

import os
import sys
from argparse import Namespace

from megatron.core.rerun_state_machine import RerunStateMachine

from megatron_emoe.settings.command_line import is_first_rank

_decide = RerunStateMachine.should_checkpoint_and_exit  # the core's own, before any loop replaced it


def end_without_checkpoint(args: Namespace) -> None:
    """Have Megatron end a run without --save whose result it rejects: it would save a checkpoint first, nowhere."""

    def decide(machine: RerunStateMachine) -> tuple[bool, bool, int]:
        save, leave, status = _decide(machine)
        if not save or args.save is not None:
            return save, leave, status
        if is_first_rank():
            program, step = os.path.basename(sys.argv[0]), machine.current_iteration + 1
            why = 'a loss or gradient is no number, twice alike (the line "Unexpected result" says which)'
            print(f"{program}: error: iteration {step}: {why}; nothing is saved without --save", file=sys.stderr)
        return False, leave, status

    RerunStateMachine.should_checkpoint_and_exit = decide
