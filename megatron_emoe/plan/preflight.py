"""What a job's command line must satisfy before it waits in a queue: Megatron's rules and ours at the job's world size,
those of a job that is requeued, and room for its checkpoints. Nothing is built or started.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import shutil
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from megatron_emoe.host import engine
from megatron_emoe.host import mode as host_mode
from megatron_emoe.model.flops import moe_layer_numbers
from megatron_emoe.plan.job import Job, check_writable, existing
from megatron_emoe.plan.layout import Layout, expert_rules, layout_of, megatron_rules
from megatron_emoe.plan.model import OF_THE_LAYOUT
from megatron_emoe.plan.parameters import router_parameters, stage_parameters
from megatron_emoe.settings.elastic_config import flag
from megatron_emoe.settings.flag_types import a_path
from megatron_emoe.settings.paths import same_folder
from megatron_emoe.training.arguments import parse

WRITERS: dict[str, Any] = {"tensorboard_dir": None, "wandb_project": "", "exit_signal_handler": False}
"""Set for the check alone: it opens no log and leaves signals as they are."""


def check(job: Job, words: list[str]) -> Namespace:
    """Megatron's arguments of a run with these flags, checked for this job.

    words: flags of pretrain_emoe.py, flag files already read, of which job.check_given has nothing to say.

    Raises:
        ValueError: with flag or path, value and rule.
        SystemExit: status 2 after a message of the same kind, for what pretrain_emoe.py itself refuses.
    """
    os.environ |= {"WORLD_SIZE": str(job.world_size), "RANK": "0", "LOCAL_RANK": "0"}
    with contextlib.redirect_stdout(io.StringIO()), _device(job):  # Megatron prints every argument
        sys.argv[1:] = _on_device(job, words)
        args = parse(**WRITERS)
    _demand(_run_rules(args))
    _demand(_folder_rules(job, args))
    _demand(_layout_rules(job, args))
    logs = _tensorboard_dir(words)
    if logs is not None:
        check_writable("--tensorboard-dir", logs)
    check_room(Path(args.save), checkpoint_bytes(args))
    return args


def _on_device(job: Job, words: list[str]) -> list[str]:
    """A machine for submitting need not have the GPUs that the flags are for; host mode would refuse them there."""
    if job.gpus and "--host-mode" not in words:
        host_mode.skip_dataset_helper_build()
        return engine.settle(words)
    return host_mode.setup(words)


@contextlib.contextmanager
def _device(job: Job) -> Iterator[None]:
    """Megatron asks which GPU it has before it checks flags: where there is none, one of the H100's kind is assumed."""
    if job.gpus == 0 or torch.cuda.is_available():
        yield
        return
    hopper = SimpleNamespace(major=9, minor=0)
    with (
        mock.patch.object(torch.cuda, "get_device_capability", lambda *_: (9, 0)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda *_: hopper),
    ):
        yield


def _demand(broken: Iterator[str]) -> None:
    """ValueError with the first broken rule, if there is one."""
    for rule in broken:
        raise ValueError(rule)


def _run_rules(args: Namespace) -> Iterator[str]:
    """What Megatron asks for only when the optimizer is built."""
    if args.lr is None:
        yield "--lr is not given: the learning rate"
    if args.train_iters is None and args.train_samples is None:
        yield "--train-iters is not given, nor --train-samples: the length of the run"


def _folder_rules(job: Job, args: Namespace) -> Iterator[str]:
    """What makes a job that is stopped and requeued lose its work."""
    if not same_folder(args.save, job.save):
        yield f"--save {args.save}: must be the job's folder {job.save} (EMOE_SAVE), where it looks for checkpoints"
    if not same_folder(args.load, job.save):
        rule = "a requeued job goes on from there; weights to start from are EMOE_BASE (--pretrained-checkpoint)"
        yield f"--load {args.load}: must be the job's folder {job.save} (EMOE_SAVE): {rule}"
    if args.finetune:
        yield "--finetune: a requeued job would start over; weights to start from are EMOE_BASE"
    if args.ckpt_step is not None:
        yield f"--ckpt-step {args.ckpt_step}: a requeued job would start from that iteration again; leave it out"
    for name in ("no_save_optim", "no_load_optim", "no_save_rng", "no_load_rng"):
        if getattr(args, name):
            state = "optimizer state" if "optim" in name else "random numbers"
            yield f"{flag(name)}: a requeued job would go on without its {state}; leave it out"


def _layout_rules(job: Job, args: Namespace) -> Iterator[str]:
    """Rules of which Megatron checks most only once the ranks have started, in its own words."""
    layout = layout_of(args, job.processes)
    rules = expert_rules if args.context_parallel_size > 1 else megatron_rules  # the others count without it
    for rule in rules(args, layout):
        for name, short in {**OF_THE_LAYOUT, "the world size": "--gpus"}.items():
            rule = rule.replace(f"{short} ", f"{name} ")
        yield rule


def checkpoint_bytes(args: Namespace) -> int:
    """Size of one checkpoint: every parameter, and the optimizer state of those that are trained.

    Adam keeps two fp32 values (as much is planned for other optimizers, half of it for SGD), and a third, the parameter
    itself, where that is of 16 bits.
    """
    whole = Layout(1, 1, 1, 1, 1, 1, 1, 1, args.seq_length)
    held = stage_parameters(args, whole, 0)
    parameters, trained = held.total, held.trained
    if args.emoe_train == "router":
        trained = len(moe_layer_numbers(args)) * router_parameters(args)
    half = args.bf16 or args.fp16
    state = (4 if args.optimizer == "sgd" else 8) + (4 if half else 0)
    return parameters * (2 if half else 4) + trained * state


def _tensorboard_dir(words: list[str]) -> Path | None:
    """As given: WRITERS has taken it out of the arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tensorboard-dir", type=a_path)
    return parser.parse_known_args(words)[0].tensorboard_dir


def check_room(folder: Path, needed: int) -> None:
    """ValueError unless the file system of `folder` has `needed` bytes left."""
    free = shutil.disk_usage(existing(folder)).free
    if free < needed:
        raise ValueError(
            f"--save {folder}: {free / 2**30:.1f} GiB are free there, one checkpoint takes {needed / 2**30:.1f} GiB"
        )
