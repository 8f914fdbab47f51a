"""Megatron in one process without torchrun, for the checks of a conversion: arguments, process groups, and no traces."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.training.global_vars import unset_global_variables
from megatron.training.initialize import initialize_megatron

from megatron_emoe import host_mode


@contextlib.contextmanager
def megatron(checkpoint: Path, *, length: int, bf16: bool = False, flags: Sequence[str] = ()) -> Iterator[Namespace]:
    """Megatron's arguments for evaluating a checkpoint folder, with everything initialised on this one process.

    The model's flags come from the checkpoint, as for every evaluation. On the way out the process groups and Megatron's
    global variables are gone, unless the caller had a process group already. length: tokens in a sequence. bf16: run
    in bf16, else fp32, whatever type the checkpoint is in. flags: how to run, such as --transformer-impl local.

    Raises:
        ValueError: more than one process, or a flag that host mode cannot serve.
        SystemExit: status 2 after one message on stderr (flags or checkpoint refused).
    """
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise ValueError(f"WORLD_SIZE {os.environ['WORLD_SIZE']}: a check runs in one process, without torchrun")
    words = ["--load", str(checkpoint), "--seq-length", str(length), "--micro-batch-size", "1", "--mock-data"]
    words += ["--tokenizer-type", "NullTokenizer", "--moe-token-dispatcher-type", "alltoall", *flags]
    fixed = {"skip_train": True, "no_load_optim": True, "no_load_rng": True, "exit_on_missing_checkpoint": True}
    had_groups = torch.distributed.is_initialized()
    with _quiet():
        args = _parse(words, {**fixed, "bf16": bf16, "fp16": False, "mtp_num_layers": None})
        _join_alone()
        initialize_megatron()
    try:
        yield args
    finally:
        unset_global_variables()
        destroy_rerun_state_machine()
        parallel_state.destroy_model_parallel()
        if not had_groups:
            torch.distributed.destroy_process_group()


def _parse(words: list[str], fixed: dict[str, object]) -> Namespace:
    from megatron_emoe.arguments import parse_evaluation

    before = sys.argv
    sys.argv = [before[0], *host_mode.setup(words)]
    try:
        return parse_evaluation(lambda parser: parser, **fixed)
    finally:
        sys.argv = before


def _join_alone() -> None:
    """A group of one process, which needs no port. Collectives of checkpoints are on the CPU, the model's on its
    device."""
    if torch.distributed.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Megatron prints its 800 arguments and more; nothing of that belongs in a report."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
