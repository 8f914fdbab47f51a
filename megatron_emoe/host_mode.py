"""Host mode: the unmodified Megatron-Core training loop on CPU and gloo, for development and verification."""

import argparse
import contextlib
import functools
import importlib.metadata
import os
import sys
from collections import defaultdict
from collections.abc import Callable
from typing import Any

# Flags that host mode needs, added where the user did not give them. A value of None marks a switch.
_DEFAULT_FLAGS: dict[str, str | None] = {
    "--distributed-backend": "gloo",
    "--transformer-impl": "local",
    "--attention-backend": "unfused",
    "--num-workers": "0",
    "--use-cpu-initialization": None,
    "--no-gradient-accumulation-fusion": None,
    "--no-masked-softmax-fusion": None,
    "--no-persist-layer-norm": None,
    "--no-rope-fusion": None,
    "--no-bias-gelu-fusion": None,
    "--no-bias-swiglu-fusion": None,
    "--no-bias-dropout-fusion": None,
}

_enabled = False


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group "host mode" with its one flag and return the parser."""
    group = parser.add_argument_group(title="host mode")
    group.add_argument("--host-mode", action="store_true", help="Run on CPU and gloo even where CUDA is present.")
    return parser


def is_on() -> bool:
    """Whether enable() has installed the CPU device layer in this process."""
    return _enabled


def setup(argv: list[str]) -> list[str]:
    """Decide whether this process runs in host mode, install it, and return argv with the flags it needs."""
    asked = "--host-mode" in argv
    if not asked and _cuda_is_present():
        skip_dataset_helper_build()
        return argv
    enable(force=asked)
    skip_dataset_helper_build()
    if os.environ.get("RANK", "0") == "0":
        version = importlib.metadata.version("megatron-core")
        print(f"host mode: megatron-core {version} on CPU (gloo); for development and verification, not for speed")
    return argv + _missing_defaults(argv)


def _missing_defaults(argv: list[str]) -> list[str]:
    given = {word.split("=", 1)[0] for word in argv if word.startswith("--")}
    words = []
    for flag, value in _DEFAULT_FLAGS.items():
        if flag not in given:
            words += [flag] if value is None else [flag, value]
    return words


def _cuda_is_present() -> bool:
    import torch

    return torch.cuda.is_available()


def skip_dataset_helper_build() -> None:
    """Skip the core's build of its dataset helper where the compiled helper already imports (wheels lack the Makefile)."""
    try:
        import megatron.core.datasets.helpers_cpp
    except ImportError:
        return
    import megatron.core.datasets.utils

    megatron.core.datasets.utils.compile_helpers = lambda: None


def enable(*, force: bool = False) -> None:
    """Install the CPU device layer in this process. Raises RuntimeError where CUDA is present unless force."""
    global _enabled
    if _enabled:
        return
    if _cuda_is_present() and not force:
        raise RuntimeError(
            "host mode: CUDA is present; pass --host-mode (or enable(force=True)) to run on the CPU anyway"
        )
    _disable_compiler()
    _replace_cuda_module()
    _separate_random_streams()
    _enter_device_mode()
    _patch_core()
    _enabled = True


def _disable_compiler() -> None:
    """The core compiles its fused functions at import; without a GPU that only costs minutes."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    import torch

    torch.compiler.set_stance("force_eager")


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a device operation that has no meaning on the CPU."""


class _Stream:
    """A stream or event: work on the CPU is done when the call returns, so there is nothing to order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = "cpu"

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Stream") -> float:
        return 0.0


def _replace_cuda_module() -> None:
    """The core asks torch.cuda for a device, streams and statistics without asking whether CUDA is there."""
    import torch

    cpu = torch.device("cpu")
    cuda: Any = torch.cuda
    cuda.is_available = lambda: False
    cuda.current_device = lambda: cpu
    cuda.device_count = lambda: 1
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_capability = lambda device=None: (0, 0)
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = cuda.device = lambda *args: contextlib.nullcontext()
    cuda.memory_stats = lambda device=None: defaultdict(int)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda device=None: 0)
    for name in ("set_device", "set_stream", "synchronize", "empty_cache", "reset_peak_memory_stats", "_lazy_init"):
        setattr(cuda, name, _nothing)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing
    cuda.nvtx.range = lambda *args, **kwargs: contextlib.nullcontext()


def _separate_random_streams() -> None:
    """Make torch's default generator the "device" stream and give host-side calls a generator of their own."""
    import torch

    device_stream = torch._C.default_generator
    torch.random.default_generator = torch.Generator()
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: device_stream.get_state()
        module.set_rng_state = lambda state, device=None: device_stream.set_state(state)
        module.manual_seed = module.manual_seed_all = lambda seed: device_stream.manual_seed(int(seed))
        module.initial_seed = device_stream.initial_seed
    torch.manual_seed(torch.initial_seed())


def _enter_device_mode() -> None:
    import torch
    from torch.overrides import TorchFunctionMode

    def is_device(value: Any) -> bool:
        """True for what names a GPU where torch expects a device: "cuda:0", torch.device("cuda"), 0."""
        if isinstance(value, torch.device):
            return value.type == "cuda"
        return isinstance(value, str) and value.startswith("cuda") or type(value) is int

    host_draws = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.Tensor.random_}

    class DeviceOnCpu(TorchFunctionMode):
        """Runs what is meant for a GPU on the CPU, and draws host-side random numbers from the host stream."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if func in host_draws and kwargs.get("generator") is None and not is_device(kwargs.get("device")):
                kwargs["generator"] = torch.random.default_generator
            if is_device(kwargs.get("device")):
                kwargs["device"] = "cpu"
            kwargs.pop("pin_memory", None)
            if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
                return args[0]
            if func is torch.Tensor.record_stream:
                return None
            if func is torch.Tensor.to and len(args) > 1 and is_device(args[1]):
                args = (args[0], "cpu", *args[2:])
            if func is torch.Tensor.type and len(args) == 1 and not kwargs:
                return func(*args).replace("torch.", "torch.cuda.")
            return func(*args, **kwargs)

    mode = DeviceOnCpu()
    mode.__enter__()
    sys.modules[__name__]._mode = mode


def _patch_core() -> None:
    import torch
    from megatron.core.tensor_parallel import random as core_random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.training import training

    core_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.cuda.get_rng_state()
    core_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.cuda.set_rng_state(state)
    training.initialize_megatron = functools.partial(training.initialize_megatron, allow_no_cuda=True)

    def maybe_move_tensor_to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = maybe_move_tensor_to_cpu
