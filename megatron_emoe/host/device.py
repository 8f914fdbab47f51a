"""torch.cuda as host mode has it: one device, and it is the CPU. Streams, events and barriers do nothing."""

import contextlib
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a device operation that has no meaning on the CPU."""


def replace_devices() -> None:
    """The core sets, counts and queries devices without asking whether CUDA is there. It meets one empty CPU."""
    import torch

    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    cuda.is_available = lambda: False
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: cpu
    cuda.set_device = nothing
    cuda._is_in_bad_fork = lambda: False  # a forked process has no CUDA context to fear; torch.manual_seed asks
    # Asked for by rules about GPU generations only. Grouped GEMM, which a GPU's checkpoint may name, wants 8.0.
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(major=8, minor=0, name="cpu")
    cuda.memory_stats = lambda device=None: defaultdict(int)
    cuda.device_memory_used = lambda device=None: 0
    cuda.empty_cache = nothing


class _Stream:
    """Stream and event: work on the CPU is done when the call returns, so there is nothing to order or to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record = self.wait = self.synchronize = self.wait_stream = self.wait_event = nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Stream") -> float:
        return 0.0


def replace_streams() -> None:
    """The dispatcher, the timers and the gradient buckets order their work with streams, events and barriers."""
    import torch

    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.set_stream = cuda.synchronize = nothing
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = nothing


def separate_random_streams() -> None:
    """The core keeps the random states of CPU and device apart, saves both, and forks that of the device.

    torch's own default generator becomes the device stream: dropout and all else that draws without naming a generator
    uses it. Host-side draws, such as a data loader's base seed, go to a second generator (see device_mode), which
    torch.get_rng_state, torch.set_rng_state and torch.manual_seed address from now on.
    """
    import torch

    device_stream = torch._C.default_generator
    host_stream = torch.Generator().manual_seed(device_stream.initial_seed())
    torch.random.default_generator = torch.default_generator = host_stream
    cuda: Any = torch.cuda
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: device_stream.get_state()
        module.set_rng_state = lambda new_state, device=None: device_stream.set_state(new_state)
        module.manual_seed = module.manual_seed_all = lambda seed: device_stream.manual_seed(int(seed))


def device_mode() -> Any:
    """The mode that keeps tensors on the CPU where the core says cuda, and gives host-side draws their own stream."""
    import torch
    from torch.overrides import TorchFunctionMode

    tensor = torch.Tensor
    stay = {tensor.cuda, tensor.pin_memory, tensor.record_stream}
    host_draws = {torch.rand, torch.randn, torch.randint, torch.randperm, tensor.random_}
    functions = {*stay, *host_draws, tensor.to, tensor.type}
    keywords = {"device", "pin_memory"}

    def to_cpu(device: Any) -> Any:
        named = isinstance(device, str | torch.device) and str(device).startswith("cuda")
        return "cpu" if named or type(device) is int else device

    def on_cpu(func: Callable, args: tuple, kwargs: dict[str, Any]) -> Any:
        if func in stay:
            return args[0]
        if func in host_draws and kwargs.get("device") is None and kwargs.get("generator") is None:
            kwargs["generator"] = torch.random.default_generator
        if "device" in kwargs:
            kwargs["device"] = to_cpu(kwargs["device"])
        if func is tensor.to and len(args) > 1:
            args = (args[0], to_cpu(args[1]), *args[2:])
        kwargs.pop("pin_memory", None)
        result = func(*args, **kwargs)
        # The optimizer and the gradient clipper know a parameter's kind by the name of its GPU type.
        return result.replace("torch.", "torch.cuda.") if func is tensor.type and type(result) is str else result

    class DeviceMode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            # Called for every operation and attribute of a tensor, so those that name no device leave at once.
            if func in functions:
                return on_cpu(func, args, dict(kwargs or {}))
            if not kwargs:
                return func(*args)
            return on_cpu(func, args, dict(kwargs)) if kwargs.keys() & keywords else func(*args, **kwargs)

    return DeviceMode()
