"""Megatron in one process without torchrun, for the checks of a conversion; on the way out nothing of it is left."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.rerun_state_machine import destroy_rerun_state_machine
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import unset_global_variables
from megatron.training.initialize import initialize_megatron
from transformers.utils import logging as hf_logging

from megatron_emoe.model.checkpoint import stored_args
from megatron_emoe.model.stored_model import model_flags
from megatron_emoe.training.arguments import add_arguments, command_line, parse_evaluation


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Process groups of this one process inside; the caller's default group stays, if there is one.

    Raises:
        ValueError: this is one of several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) != 1:
        raise ValueError(f"WORLD_SIZE {os.environ['WORLD_SIZE']}: a check runs in one process, without torchrun")
    had_group = torch.distributed.is_initialized()
    if not had_group:
        _make_group()
    with quiet():
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(1)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        if not had_group:
            torch.distributed.destroy_process_group()


def _make_group() -> None:
    """Without a port: the store is in this process. What checkpoints say to each other is on the CPU."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(0)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


@contextlib.contextmanager
def evaluating(folder: Path, *, length: int, bf16: bool, flags: Sequence[str] = ()) -> Iterator[Namespace]:
    """Megatron initialised to evaluate the checkpoint in `folder`, exactly as tools/sweep_k.py has it; its arguments.

    length: tokens in a sequence. bf16: run in bf16, else in fp32, whatever the checkpoint is in. flags: how to run.

    Raises:
        ValueError: as `alone`; a flag that host mode cannot serve.
        SystemExit: status 2, after one message on stderr (flags or checkpoint refused).
    """
    fixed: dict[str, Any] = {
        "skip_train": True,
        "no_load_optim": True,
        "no_load_rng": True,
        "bf16": bf16,
        "fp16": False,
    }
    with command_line(["--load", str(folder), *_RUN, "--seq-length", str(length), *flags]), quiet():
        args = parse_evaluation(lambda parser: parser, needs_experts=False, **fixed, mtp_num_layers=None)
    with alone(), quiet():
        try:
            initialize_megatron()
            yield args
        finally:
            unset_global_variables()
            destroy_rerun_state_machine()


def model_arguments(checkpoint: Path, *, length: int, flags: Sequence[str]) -> Namespace:
    """Arguments for the model of a checkpoint's own folder (iter_..., release), in fp32; for `completed`.

    Raises:
        ValueError: not a torch_dist checkpoint, or a flag that host mode cannot serve.
    """
    stored = model_flags(stored_args(checkpoint, "checkpoint"))
    with command_line([*_RUN, "--seq-length", str(length), *flags]), quiet():
        args = parse_args(add_arguments)
    fixed = {"bf16": False, "fp16": False, "mtp_num_layers": None, "seq_length": length, "micro_batch_size": 1}
    vars(args).update({**stored, **fixed})
    return args


def completed(args: Namespace, **changes: Any) -> Namespace:
    """A copy with these changes, completed and checked by the core (AssertionError)."""
    args = copy.copy(args)
    vars(args).update(changes)
    with quiet():
        validate_args(args)
    return args


_RUN = "--micro-batch-size 1 --mock-data --tokenizer-type NullTokenizer --moe-token-dispatcher-type alltoall".split()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Megatron prints its 800 arguments and warns of itself; nothing of that belongs in a report."""
    logging.getLogger("megatron").setLevel(logging.ERROR)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """transformers without its progress bars and warnings (of weights that are not there: here they are meant not to
    be)."""
    before = hf_logging.get_verbosity()
    bars = hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        hf_logging.set_verbosity(before)
        if bars:
            hf_logging.enable_progress_bar()
