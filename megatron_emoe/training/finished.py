"""A finished run that is started again: nothing is trained, and its newest checkpoint stays as it is."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron.training import training as core_training

from megatron_emoe.settings.command_line import say
from megatron_emoe.settings.paths import same_folder

_save = core_training.save_checkpoint_and_time  # the core's own, before any run replaced it


def keep_finished(args: Namespace) -> None:
    """Have Megatron leave out the save of an iteration that it has just loaded from the same folder: the core writes
    it anew over the only good one, which a kill in that moment would cost."""

    def save(iteration: int, *rest: Any, **settings: Any) -> None:
        loaded = iteration == args.iteration and same_folder(args.load, args.save) and not args.finetune
        if loaded and (Path(args.save) / f"iter_{iteration:07d}/.metadata").is_file():
            say(f"--save {args.save}: iteration {iteration} is there, and nothing was trained: not saved anew")
            return
        _save(iteration, *rest, **settings)

    core_training.save_checkpoint_and_time = save
