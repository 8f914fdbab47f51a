"""torch.cuda as host mode has it: one device, and it is the CPU. Streams, events and barriers do nothing."""

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable
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
    uses it. Host-side draws, such as a data loader's base seed, go to a second generator (see below), which
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


def keep_tensors_on_the_cpu() -> None:
    """Let every function of torch that is told where a tensor is to be take "cuda" for the CPU; give host-side draws a
    stream of their own.

    The functions themselves are replaced: a mode of torch would be asked at every operation and attribute, 20,000 times
    in a small training step.
    """
    import torch
    from torch.utils._device import _device_constructors

    tensor = torch.Tensor
    _replace(tensor, ("cuda", "pin_memory", "record_stream"), lambda function: lambda self, *args, **kwargs: self)
    _replace(tensor, ("to",), _to_cpu)
    _replace(tensor, ("type",), _named_as_on_cuda)
    _replace(tensor, (name for name in dir(tensor) if name == "new" or name.startswith("new_")), _told_cpu)
    makers = {function.__name__ for function in _device_constructors()}
    _replace(torch, (name for name in dir(torch) if name in makers or name.endswith("_like")), _told_cpu)
    _replace(torch, ("rand", "randn", "randint", "randperm"), _from_host_stream)
    _replace(tensor, ("random_",), _from_host_stream)


def _replace(owner: Any, names: Iterable[str], by: Callable[[Callable], Callable]) -> None:
    for name in list(names):
        setattr(owner, name, by(getattr(owner, name)))


def _on_cpu(device: Any) -> Any:
    """The CPU in place of a GPU's name or number; anything else as it is."""
    import torch

    named = isinstance(device, str | torch.device) and str(device).startswith("cuda")
    return "cpu" if named or type(device) is int else device


def _told_cpu(function: Callable) -> Callable:
    @functools.wraps(function)
    def told(*args: Any, **kwargs: Any) -> Any:
        if kwargs:
            if "device" in kwargs:
                kwargs["device"] = _on_cpu(kwargs["device"])
            kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return told


def _to_cpu(function: Callable) -> Callable:
    """Tensor.to takes the device first, or by name."""
    told = _told_cpu(function)
    return functools.wraps(function)(
        lambda self, *args, **kwargs: told(self, *(_on_cpu(arg) for arg in args[:1]), *args[1:], **kwargs)
    )


def _named_as_on_cuda(function: Callable) -> Callable:
    """The optimizer and the gradient clipper know a parameter's kind by the name of its GPU type."""

    @functools.wraps(function)
    def named(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return result.replace("torch.", "torch.cuda.") if type(result) is str else result

    return named


def _from_host_stream(function: Callable) -> Callable:
    import torch

    @functools.wraps(function)
    def drawn(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") is None and kwargs.get("generator") is None:
            kwargs["generator"] = torch.random.default_generator
        return function(*args, **kwargs)

    return drawn
