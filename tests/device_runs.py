"""Training runs and layers that do the same on the CPU in host mode and on a GPU: tests/gpu compares with them there,
test_device_runs.py here. A run is a process of its own, with the flags that its device needs and no compiler.
"""

import contextlib
import functools
import os
import pickle
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from itertools import cycle
from typing import Any

from megatron_emoe.host import flags as host_flags
from megatron_emoe.host import mode as host_mode
from tests.distributed import ALONE, REPO, run_ranks

sys.path.insert(0, str(REPO / "benchmarks"))
ON_CUDA = "--distributed-backend nccl --num-workers 0 --use-cpu-initialization".split()
ON_CUDA += host_flags.words_of(host_flags.LOCAL_LAYERS)
ON_DEVICE = {"cpu": ["--host-mode"], "cuda": ON_CUDA}
WAITS = (
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "cudaStreamSynchronize",
    "cudaDeviceSynchronize",
    "cudaEventSynchronize",
)
"""What the profiler calls an operation that makes the host wait; copies to the host are called Memcpy DtoH ..."""


def on(device: str, function: Callable[..., Any], *args: Any) -> Any:
    """What function(*args) returned as the only rank on the device: cpu (host mode) or cuda."""
    return run_ranks(function, 1, *args)[0] if device == "cpu" else in_process(device, function, *args)


def in_process(device: str, function: Callable[..., Any], *args: Any) -> Any:
    """The same in a new interpreter. `function` is one of a module's; args and result are pickled (tensors: CPU)."""
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    env = ALONE | {"PYTHONPATH": path}
    env |= {"TORCHDYNAMO_DISABLE": "1", "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    env |= {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NCCL_ALGO": "Ring"}  # --deterministic-mode demands them
    env |= {"NVIDIA_TF32_OVERRIDE": "0", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "0"}  # fp32 is fp32, whatever is set here
    command = [sys.executable, "-m", "tests.device_runs", device]
    task = pickle.dumps((function.__module__, function.__name__, args))
    done = subprocess.run(command, input=task, capture_output=True, cwd=REPO, env=os.environ | env, timeout=900)
    if done.returncode != 0:
        raise RuntimeError(f"{function.__name__} on {device} failed:\n{done.stderr.decode()[-6000:]}")
    return pickle.loads(done.stdout)


def main(device: str) -> None:
    module, name, args = pickle.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    os.dup2(2, 1)  # whatever prints must not end up in the answer
    import torch

    if device == "cpu":
        host_mode.enable(force=True)
    elif not torch.cuda.is_available():
        sys.exit("no CUDA device")
    result = getattr(import_module(module), name)(*args)
    with os.fdopen(answer, "wb") as out:
        out.write(pickle.dumps(result))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def trained(words: list[str], stock: bool = False, same_weights: bool = False, nudge: float = 0.0) -> dict[str, Any]:
    """A tiny training run: losses of its micro-batches, last gradients, weights; tensors on the CPU.

    same_weights: the ones that follow from their names, and random numbers drawn on the CPU, so that devices can be
    compared. nudge: relative noise on these weights, to see what rounding does to a run.
    """
    from tests.tiny import train

    run = train(words, stock=stock, prepare=functools.partial(make_equal, nudge) if same_weights else None)
    return {
        "losses": run.losses,
        "gradients": [gradient.cpu() for gradient in run.gradients[-1]],
        "weights": {name: weight.cpu() for name, weight in run.weights.items()},
        "routed": [int(route.map_TE.sum()) for route in run.routes],
    }


def make_equal(nudge: float) -> None:
    """From now on models start with the same weights, and selection draws the same numbers, on every device.

    The draws of a device are a function of the seed, but another one on the CPU than on a GPU.
    """
    import torch

    from megatron_emoe.routing import selection
    from tests import tiny

    numbers = selection.uniform_numbers
    selection.uniform_numbers = lambda rows, columns, seed, device: numbers(
        rows, columns, seed, torch.device("cpu")
    ).to(device)
    tiny.fill_weights()
    if nudge:
        from megatron_emoe.model.layer_spec import ElasticGPTModelBuilder

        build = ElasticGPTModelBuilder.build_model

        def build_and_nudge(self: Any, *args: Any, **kwargs: Any) -> Any:
            model = build(self, *args, **kwargs)
            for weight in model.parameters():
                weight.data *= 1 + nudge * torch.randn_like(weight)
            return model

        ElasticGPTModelBuilder.build_model = build_and_nudge


def waits(words: list[str]) -> dict[str, Counter[str]]:
    """How often the host waits for the device in one unlogged training step: of stock Megatron, and of the elastic
    model of these flags. Both with Megatron's own train_step; stock has a forward step without anything of ours."""
    sys.argv = ["device_runs.py", *host_mode.setup(words)]
    from megatron.core.rerun_state_machine import RerunDataIterator
    from megatron.training.argument_utils import gpt_config_from_args
    from megatron.training.initialize import initialize_megatron
    from paired_models import build

    from megatron_emoe.model.layer_spec import elastic_model_config
    from megatron_emoe.training.arguments import parse
    from megatron_emoe.training.loop import ElasticLoop

    with contextlib.redirect_stdout(sys.stderr):
        args = parse()
        initialize_megatron()
        config = elastic_model_config(args)
        loop = ElasticLoop(args, config.transformer)
        batches = RerunDataIterator(cycle(_device_batches(args)))
        steps = {
            "stock": build(args, gpt_config_from_args(args), _stock_step, batches)[1],
            "elastic": build(args, config, loop.forward_step, batches)[1],
        }
    return {name: _waits_of(step) for name, step in steps.items()}


def _device_batches(args: Any) -> list[dict[str, Any]]:
    import torch
    from paired_models import random_batches

    from megatron_emoe.training.evaluation import current_device

    batches = random_batches(args, args.vocab_size, distinct=2)
    made = [next(batches) for _ in range(2)]
    assert all(isinstance(tensor, torch.Tensor) for batch in made for tensor in batch.values())
    return [{name: tensor.to(current_device()) for name, tensor in batch.items()} for batch in made]


def _stock_step(batches: Any, model: Any) -> tuple[Any, Any]:
    batch = next(batches)
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"])
    return output, functools.partial(_stock_loss, batch["loss_mask"])


def _stock_loss(mask: Any, losses: Any) -> tuple[Any, Any, dict[str, Any]]:
    import torch

    total, count = (losses.float() * mask).sum(), mask.sum().int()
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


def _waits_of(step: Callable[[int], None]) -> Counter[str]:
    """Counted in the fifth step, after everything that happens once."""
    import torch

    for iteration in range(1, 4):
        step(iteration)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    for iteration in (4, 5):  # the first profile of a process waits for its own sake: it is thrown away
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            step(iteration)
    found = Counter({event.key: event.count for event in profile.key_averages()})
    assert found["aten::mm"], "the profiler saw no step"
    return Counter({name: n for name, n in found.items() if name in WAITS or name.startswith("Memcpy DtoH")})


def layer_waits(elastic: dict[str, Any] | None, **changes: Any) -> list[str]:
    """What torch says each time that a layer's forward and backward pass makes the host wait for the GPU.

    elastic: settings of the elastic layer; None: the stock layer.
    """
    import torch

    from megatron_emoe.training.evaluation import current_device
    from tests.tiny import begin, build_layer, hidden_states, layer_config, start

    device = current_device()
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    start()
    layer = build_layer(layer_config(stock=elastic is None, **changes, **(elastic or {}))).to(device)
    hidden = hidden_states().detach().to(device).requires_grad_()

    def work(iteration: int) -> None:
        begin(iteration)
        output, _ = layer(hidden)
        output.backward(torch.ones_like(output))

    for iteration in range(2):
        work(iteration)
    found = _waits_in(lambda: work(2))
    assert hidden.grad is not None and bool(hidden.grad.abs().sum() > 0)
    assert device.type != "cuda" or _waits_in(lambda: hidden.sum().item()), "torch sees no wait"
    return found


def _waits_in(work: Callable[[], Any]) -> list[str]:
    """Warnings of torch's sync debug mode; none where there is no GPU to wait for."""
    import torch

    present = torch.cuda.is_available()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        if present:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            if present:
                torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in found if "synchronizing CUDA operation" in str(warning.message)]


if __name__ == "__main__":
    main(sys.argv[1])
