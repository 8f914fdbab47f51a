"""Host mode: the unmodified Megatron-Core training loop on CPU and gloo, for development and verification.

The core asks torch.cuda for a device before it asks for anything else. enable() answers with the CPU: tensors meant
for a GPU stay where they are, streams and events do nothing, and random numbers "of the device" have a stream of
their own. Routing, dispatch, losses, pipeline and checkpoints are the core's. Written for megatron-core 0.19.
"""

import argparse
import contextlib
import copy
import functools
import importlib.metadata
import inspect
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from megatron_emoe.host import device as host_device
from megatron_emoe.host import engine
from megatron_emoe.host import flags as host_flags
from megatron_emoe.settings import flag_files
from megatron_emoe.settings.command_line import say
from megatron_emoe.settings.refusal import fail

_is_on = False  # whether enable() has been called


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group "host mode" with its one flag and return the parser, whose help can be printed (see below)."""
    group = parser.add_argument_group(title="host mode")
    group.add_argument("--host-mode", action="store_true", help="Run on CPU and gloo even where CUDA is present.")
    for action in parser._actions:  # the core's help texts have bare per cent signs, on which argparse stops
        if action.help and action.help.count("%") > action.help.count("%("):
            action.help = action.help.replace("%%", "%").replace("%", "%%")
    return parser


def is_on() -> bool:
    """Whether enable() has installed the CPU device layer in this process."""
    return _is_on


def setup(argv: list[str]) -> list[str]:
    """Enter host mode where CUDA is absent or --host-mode is given, and return argv with the flags it needs.

    Call it with sys.argv[1:] before Megatron is used. With CUDA and without --host-mode, and for a call for help,
    argv comes back unchanged. Raises ValueError for a flag that only a GPU can serve.
    """
    if {"-h", "--help"} & set(argv):
        return argv
    asked = "--host-mode" in argv
    if not asked and _cuda_is_present():
        skip_dataset_helper_build()
        return argv
    host_flags.refuse_gpu_flags(argv)
    enable(force=asked)
    skip_dataset_helper_build()
    version = importlib.metadata.version("megatron-core")
    say(f"host mode: megatron-core {version} on CPU (gloo); for development and verification, not for speed")
    argv, lines = host_flags.without_gpu_kernels(argv)
    for line in lines:
        say(line)
    return argv + host_flags.missing_defaults(argv)


def start() -> None:
    """setup() for this program's own command line, with the words that @FILE stands for. On a GPU without Transformer
    Engine, engine.settle() for it.

    What is refused ends the program with status 2 and one message.
    """
    try:
        sys.argv[1:] = setup(flag_files.expand(sys.argv[1:]))
        if not is_on() and not {"-h", "--help"} & set(sys.argv):
            sys.argv[1:] = engine.settle(sys.argv[1:])
            _use_adam_of_the_gpu()
    except ValueError as error:
        fail(error)


def enable(*, force: bool = False) -> None:
    """Install the CPU device layer in this process, once. Raises RuntimeError where CUDA is present, unless force."""
    global _is_on
    if is_on():
        return
    if not force and _cuda_is_present():
        raise RuntimeError("host mode: CUDA is present; --host-mode, or enable(force=True), runs on the CPU anyway")
    _set_environment()
    host_device.replace_devices()
    host_device.replace_streams()
    host_device.separate_random_streams()
    _adapt_core()
    host_device.keep_tensors_on_the_cpu()
    _is_on = True


def skip_dataset_helper_build() -> None:
    """Skip the core's build of its dataset helper where the compiled one imports: wheels lack the Makefile."""
    with contextlib.suppress(ImportError):
        import megatron.core.datasets.helpers_cpp
        import megatron.core.datasets.utils

        megatron.core.datasets.utils.compile_helpers = host_device.nothing


def _use_adam_of_the_gpu() -> None:
    from megatron_emoe.host import adam

    adam.use_torch_adam_on_a_gpu()


def _cuda_is_present() -> bool:
    import torch

    return torch.cuda.is_available()


def _set_environment() -> None:
    """The core compiles small functions at import (minutes without a GPU), and demands one CUDA queue for TP > 1."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch

    torch.compiler.set_stance("force_eager")  # for what was compiled before this call


def _adapt_core() -> None:
    """Replace the few functions of the core that reach past torch.cuda's public names."""
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.training import initialize

    from megatron_emoe.host import adam as host_adam

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.cuda.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.cuda.set_rng_state(new_state)
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_to_numpy
    # Without a CUDA context to protect, the checkpoint writer's queue need not import the program anew (ten seconds).
    queue = functools.partial(filesystem_async.get_write_results_queue, mp_mode="fork")
    filesystem_async.get_write_results_queue = queue
    _allow_no_cuda(initialize.initialize_megatron)
    _recompute_without_engine(random)
    _replace_norm()
    host_adam.use_torch_adam(fused=True)


def _splits_to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The dispatcher wants its splits as numpy; the core converts only what comes from a GPU."""
    import torch

    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _allow_no_cuda(initialize_megatron: Callable[..., Any]) -> None:
    """pretrain() and others call initialize_megatron without allow_no_cuda: make True its default for all of them."""
    assert next(iter(inspect.signature(initialize_megatron).parameters)) == "allow_no_cuda"
    initialize_megatron.__defaults__ = (True, *(initialize_megatron.__defaults__ or ())[1:])


def _recompute_without_engine(random: Any) -> None:
    """Selective recomputation of norms asks Transformer Engine about FP8, and compiles C++ to hand over storage."""

    def refill(released: Any, recomputed: Any) -> None:
        storage, source = released.untyped_storage(), recomputed.untyped_storage()
        storage.resize_(source.nbytes())
        storage.copy_(source)

    random.FP8GlobalStateManager = SimpleNamespace(is_fp8_enabled=lambda: False, get_fp8_recipe=host_device.nothing)
    random.fp8_autocast = random.activation_recompute_forward = lambda **kwargs: contextlib.nullcontext()
    random._get_share_storage = lambda: refill


def _replace_norm() -> None:
    """The local spec's norm refuses sequence parallelism, which the core demands for MoE with TP > 1.

    Each rank then sees a part of the sequence: the core sums the gradients of parameters that say so.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    build = WrappedTorchNorm.__new__

    def build_and_mark(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        unsharded = copy.copy(config)
        unsharded.sequence_parallel = False
        norm = build(cls, unsharded, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm

    WrappedTorchNorm.__new__ = build_and_mark
