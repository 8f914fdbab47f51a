"""Host mode: the unmodified Megatron-Core training loop on CPU and gloo, for development and verification.

The core asks torch.cuda for a device before it asks for anything else. enable() answers with the CPU: tensors meant
for a GPU stay where they are, streams and events do nothing, and random numbers "of the device" have a stream of
their own. Routing, dispatch, losses, pipeline and checkpoints are the core's. Written for megatron-core 0.19.
"""

import argparse
import contextlib
import importlib.metadata
import inspect
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from itertools import pairwise
from typing import Any

# Flags that host mode needs, added where the user did not give them. None marks a switch.
_DEFAULTS: dict[str, str | None] = {
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

# Flags that ask for what only a GPU has: the values that still work (none for a switch), and the reason.
_TRANSFORMER_ENGINE = "Transformer Engine computes on GPUs only"
_KERNEL = "the fused kernel runs on GPUs only"
_OVERLAP = "overlap needs the streams of a GPU"
_OFFLOAD = "weights and activations are in host memory already"
_GRAPH = "CUDA graphs need a GPU"
_LIMITS: dict[str, tuple[tuple[str, ...], str]] = {
    "--transformer-impl": (("local",), _TRANSFORMER_ENGINE),
    "--distributed-backend": (("gloo",), "NCCL communicates between GPUs only"),
    "--pipeline-model-parallel-comm-backend": ((), "gloo carries the pipeline's messages"),
    "--attention-backend": (("unfused", "local", "auto"), _KERNEL),
    "--moe-token-dispatcher-type": (("alltoall", "allgather"), "the flex dispatcher's kernels run on GPUs only"),
    "--cross-entropy-fusion-impl": (("native",), _TRANSFORMER_ENGINE),
    "--cuda-graph-impl": (("none",), _GRAPH),
    "--context-parallel-size": (("1",), "context parallelism needs Transformer Engine's attention"),
    "--cpu-offloading-num-layers": (("0",), _OFFLOAD),
    "--fp8-format": ((), _TRANSFORMER_ENGINE),
    "--fp4-format": ((), _TRANSFORMER_ENGINE),
    "--fp8-param-gather": ((), _TRANSFORMER_ENGINE),
    "--fp4-param-gather": ((), _TRANSFORMER_ENGINE),
    "--te-rng-tracker": ((), _TRANSFORMER_ENGINE),
    "--use-precision-aware-optimizer": ((), _TRANSFORMER_ENGINE),
    "--moe-permute-fusion": ((), _KERNEL),
    "--moe-router-fusion": ((), _KERNEL),
    "--moe-grouped-gemm": ((), _KERNEL),
    "--use-flash-attn": ((), _KERNEL),
    "--moe-enable-deepep": ((), _KERNEL),
    "--enable-cuda-graph": ((), _GRAPH),
    "--external-cuda-graph": ((), _GRAPH),
    "--optimizer-cuda-graph": ((), _GRAPH),
    "--optimizer-cpu-offload": ((), _OFFLOAD),
    "--fine-grained-activation-offloading": ((), _OFFLOAD),
    "--tp-comm-overlap": ((), _OVERLAP),
    "--overlap-grad-reduce": ((), _OVERLAP),
    "--overlap-param-gather": ((), _OVERLAP),
    "--overlap-moe-expert-parallel-comm": ((), _OVERLAP),
    "--moe-shared-expert-overlap": ((), _OVERLAP),
    "--use-megatron-fsdp": ((), "FSDP places its shards by CUDA device"),
    "--use-torch-fsdp2": ((), "FSDP places its shards by CUDA device"),
    "--use-nccl-ub": ((), "NCCL communicates between GPUs only"),
}

_mode: Any = None


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the group "host mode" with its one flag and return the parser."""
    group = parser.add_argument_group(title="host mode")
    group.add_argument("--host-mode", action="store_true", help="Run on CPU and gloo even where CUDA is present.")
    return parser


def is_on() -> bool:
    """Whether enable() has installed the CPU device layer in this process."""
    return _mode is not None


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
    _refuse_gpu_flags(argv)
    enable(force=asked)
    skip_dataset_helper_build()
    if os.environ.get("RANK", "0") == "0":
        version = importlib.metadata.version("megatron-core")
        print(f"host mode: megatron-core {version} on CPU (gloo); for development and verification, not for speed")
    return argv + _missing_defaults(argv)


def enable(*, force: bool = False) -> None:
    """Install the CPU device layer in this process, once. Raises RuntimeError where CUDA is present, unless force."""
    global _mode
    if is_on():
        return
    if not force and _cuda_is_present():
        raise RuntimeError("host mode: CUDA is present; --host-mode, or enable(force=True), runs on the CPU")
    _set_environment()
    _replace_devices()
    _replace_streams()
    _replace_memory_statistics()
    _separate_random_streams()
    _adapt_core()
    _mode = _device_mode()
    _mode.__enter__()


def skip_dataset_helper_build() -> None:
    """Skip the core's build of its dataset helper where the compiled one imports: wheels lack the Makefile."""
    with contextlib.suppress(ImportError):
        import megatron.core.datasets.helpers_cpp
        import megatron.core.datasets.utils

        megatron.core.datasets.utils.compile_helpers = _nothing


def _given(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """Each flag of argv with its value, from `--flag value` as from `--flag=value`; None where no value follows."""
    for word, after in pairwise([*argv, "--"]):
        flag, equals, value = word.partition("=")
        if flag.startswith("--"):
            yield flag, value if equals else None if after.startswith("--") else after


def _missing_defaults(argv: list[str]) -> list[str]:
    missing = _DEFAULTS.keys() - dict(_given(argv)).keys()
    return [word for flag in _DEFAULTS if flag in missing for word in (flag, _DEFAULTS[flag]) if word is not None]


def _refuse_gpu_flags(argv: list[str]) -> None:
    for flag, value in _given(argv):
        works, reason = _LIMITS.get(flag, ((value,), ""))
        if value not in works:
            shown = flag if value is None else f"{flag} {value}"
            rule = f"it must be {' or '.join(works)}" if works else "leave it out"
            raise ValueError(f"{shown}: not possible in host mode, {reason}; {rule}")


def _cuda_is_present() -> bool:
    import torch

    return torch.cuda.is_available()


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a device operation that has no meaning on the CPU."""


def _set_environment() -> None:
    """The core compiles small functions at import (minutes without a GPU), and demands one CUDA queue for TP > 1."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    import torch

    torch.compiler.set_stance("force_eager")  # for what was compiled before this call


def _replace_devices() -> None:
    """The core sets, counts and queries devices without asking whether CUDA is there. It meets one CPU."""
    import torch

    cuda: Any = torch.cuda
    cpu = torch.device("cpu")
    cuda.is_available = lambda: False
    cuda.device_count = lambda: 1
    cuda.current_device = lambda: cpu
    cuda.set_device = _nothing
    cuda.device = lambda device=None: contextlib.nullcontext()
    # Asked for by rules about GPU generations only. Grouped GEMM wants 8.0; the local spec does without it.
    cuda.get_device_capability = lambda device=None: (8, 0)
    cuda.get_device_properties = lambda device=None: SimpleNamespace(major=8, minor=0, name="cpu")


class _Stream:
    """Stream and event: work on the CPU is done when the call returns, so there is nothing to order or to wait for."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.record = self.wait = self.synchronize = self.wait_stream = self.wait_event = _nothing

    def record_event(self, event: Any = None) -> Any:
        return event or _Stream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Stream") -> float:
        return 0.0


def _replace_streams() -> None:
    """The dispatcher, the timers and the gradient buckets order their work with streams, events and barriers."""
    import torch

    cuda: Any = torch.cuda
    cuda.Stream = cuda.Event = _Stream
    cuda.current_stream = cuda.default_stream = lambda device=None: _Stream()
    cuda.stream = lambda stream: contextlib.nullcontext()
    cuda.set_stream = cuda.synchronize = _nothing
    cuda.is_current_stream_capturing = lambda: False
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing


def _replace_memory_statistics() -> None:
    """The training log reports device memory; in host mode it is zero."""
    import torch

    cuda: Any = torch.cuda
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda device=None: 0)
    cuda.device_memory_used = lambda device=None: 0
    cuda.memory_stats = lambda device=None: defaultdict(int)
    cuda.empty_cache = cuda.reset_peak_memory_stats = _nothing


def _separate_random_streams() -> None:
    """The core keeps the random states of CPU and device apart, saves both, and forks that of the device.

    torch's own default generator becomes the device stream: dropout and all else that draws without naming a generator
    uses it. Host-side draws, such as a data loader's base seed, go to a second generator (see _device_mode), which
    torch.get_rng_state, torch.set_rng_state and torch.manual_seed address from now on.
    """
    import torch

    device_stream = torch._C.default_generator
    host_stream = torch.Generator().manual_seed(device_stream.initial_seed())
    torch.random.default_generator = torch.default_generator = host_stream
    cuda: Any = torch.cuda
    cuda.default_generators = (device_stream,)
    for module in (cuda, cuda.random):
        module.get_rng_state = lambda device=None: device_stream.get_state()
        module.set_rng_state = lambda new_state, device=None: device_stream.set_state(new_state)
        module.manual_seed = module.manual_seed_all = lambda seed: device_stream.manual_seed(int(seed))
        module.initial_seed = device_stream.initial_seed


def _names_gpu(value: Any) -> bool:
    """True for what names a GPU where torch expects a device: "cuda:0", torch.device("cuda"), 0."""
    return type(value) is int or str(value).startswith("cuda")


def _device_mode() -> Any:
    """The mode that keeps tensors on the CPU where the core says cuda, and gives host-side draws their own stream."""
    import torch
    from torch.overrides import TorchFunctionMode

    tensor = torch.Tensor
    stay = {tensor.cuda, tensor.pin_memory, tensor.record_stream}
    host_draws = {torch.rand, torch.randn, torch.randint, torch.randperm, tensor.random_}

    class DeviceMode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            if func in stay:
                return args[0]
            if func in host_draws and kwargs.get("device") is None and kwargs.get("generator") is None:
                kwargs["generator"] = torch.random.default_generator
            if kwargs.get("device") is not None and _names_gpu(kwargs["device"]):
                kwargs["device"] = "cpu"
            if func is tensor.to and len(args) > 1 and _names_gpu(args[1]):
                args = (args[0], "cpu", *args[2:])
            kwargs.pop("pin_memory", None)
            result = func(*args, **kwargs)
            # The optimizer and the gradient clipper know a parameter's kind by the name of its GPU type.
            return result.replace("torch.", "torch.cuda.") if func is tensor.type and type(result) is str else result

    return DeviceMode()


def _adapt_core() -> None:
    """Replace the few functions of the core that reach past torch.cuda's public names."""
    import torch
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.training import initialize

    random._get_cuda_rng_state = lambda *args, **kwargs: torch.cuda.get_rng_state()
    random._set_cuda_rng_state = lambda new_state, *args, **kwargs: torch.cuda.set_rng_state(new_state)
    token_dispatcher.maybe_move_tensor_to_cpu = _splits_to_numpy
    _allow_no_cuda(initialize.initialize_megatron)
    _widen_attention()
    _replace_norm()
    _replace_adam()


def _splits_to_numpy(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """The dispatcher wants its splits as numpy; the core converts only what comes from a GPU."""
    import torch

    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor


def _allow_no_cuda(initialize_megatron: Callable[..., Any]) -> None:
    """pretrain() and others call initialize_megatron without allow_no_cuda: make True its default for all of them."""
    assert next(iter(inspect.signature(initialize_megatron).parameters)) == "allow_no_cuda"
    initialize_megatron.__defaults__ = (True, *(initialize_megatron.__defaults__ or ())[1:])


def _widen_attention() -> None:
    """Multi-latent attention tells its core attention the width of the values; the local one does not listen."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    build = DotProductAttention.__init__

    def build_with_widths(self, *args, k_channels: int | None = None, v_channels: int | None = None, **kwargs):
        build(self, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    DotProductAttention.__init__ = build_with_widths


def _replace_norm() -> None:
    """The local spec's norm refuses sequence parallelism, which the core demands for MoE with TP > 1."""
    import torch
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from torch.nn import functional

    class HostNorm(torch.nn.Module):
        """LayerNorm or RMSNorm whose parameters tell the core to sum their gradients over the sequence's shards."""

        def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
            super().__init__()
            self.eps, self.shape, self.rms = eps, (hidden_size,), config.normalization == "RMSNorm"
            self.zero_centered = config.layernorm_zero_centered_gamma
            self.weight = torch.nn.Parameter(torch.full(self.shape, 0.0 if self.zero_centered else 1.0))
            self.bias = None if self.rms else torch.nn.Parameter(torch.zeros(self.shape))
            for parameter in self.parameters():
                parameter.sequence_parallel = config.sequence_parallel

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weight = self.weight + 1 if self.zero_centered else self.weight
            if self.rms:
                return functional.rms_norm(x, self.shape, weight, self.eps)
            return functional.layer_norm(x, self.shape, weight, self.bias, self.eps)

    def build(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **unused: Any) -> HostNorm:
        return HostNorm(config, hidden_size, eps)

    WrappedTorchNorm.__new__ = build


def _replace_adam() -> None:
    """The distributed optimizer looks for Adam's step where Apex and Transformer Engine keep it: in the group.

    torch's Adam keeps one step per parameter. The core asks for it before the first step, when a checkpoint is loaded,
    and finds none; and it gives all parameters one and the same tensor, which each of them then advances.
    """
    import torch
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from torch.optim.adam import adam

    class HostAdam(torch.optim.Optimizer):
        """torch's Adam with the state layout of the fused Adams: `step` in the group, two moments per parameter."""

        def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode=True, capturable=False):
            super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
            self.decoupled = adam_w_mode

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                if group["params"]:
                    group["step"] = group.get("step", 0) + 1
                    self._step_group(group, [p for p in group["params"] if p.grad is not None])

        def _step_group(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
            for p in params:
                for moment in ("exp_avg", "exp_avg_sq"):
                    if moment not in self.state[p]:
                        self.state[p][moment] = torch.zeros_like(p)
            moments = [[self.state[p][moment] for p in params] for moment in ("exp_avg", "exp_avg_sq")]
            steps = [torch.tensor(group["step"] - 1.0) for _ in params]
            keys = {key: group[key] for key in ("lr", "weight_decay", "eps")}
            adam(
                params, [p.grad for p in params], *moments, [], steps, foreach=False, amsgrad=False, maximize=False,
                beta1=group["betas"][0], beta2=group["betas"][1], decoupled_weight_decay=self.decoupled, **keys,
            )  # fmt: skip

    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = HostAdam, False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_APEX_OPTIMIZER = True
    # The default checkpoint layout copies into shards that are views of fp32 weights; only this loader lacks no_grad.
    sharded = distrib_optimizer.DistributedOptimizer
    load = sharded.load_parameter_state_from_dp_reshardable
    sharded.load_parameter_state_from_dp_reshardable = torch.no_grad()(load)
