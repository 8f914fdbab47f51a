"""Stock top-k against elastic on one device, in turn, in one process: steps, memory, router, sweep. See bench_gpu.py.

    python benchmarks/measure_gpu.py CELL.json RESULT.json

CELL: flags, and the numbers of pairs. The device is the GPU, or with --host-mode among the flags the CPU.
"""

import gc
import json
import sys
import weakref
from argparse import Namespace
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_emoe.host import mode as host_mode

CELL, OUT = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
sys.argv[1:] = host_mode.setup(CELL["flags"])

import torch  # noqa: E402
from megatron.core.rerun_state_machine import RerunDataIterator  # noqa: E402
from megatron.core.transformer.moe.router import TopKRouter  # noqa: E402
from megatron.training.argument_utils import gpt_config_from_args  # noqa: E402
from megatron.training.initialize import initialize_megatron  # noqa: E402
from paired import Step, take_turns  # noqa: E402
from paired_models import build, random_batches  # noqa: E402

from megatron_emoe.model.flops import flops_per_token, moe_layer_numbers  # noqa: E402
from megatron_emoe.model.layer_spec import elastic_model_config  # noqa: E402
from megatron_emoe.routing.active_k import Place, draw_for, get_active_k  # noqa: E402
from megatron_emoe.routing.transformer_config import ElasticTransformerConfig  # noqa: E402
from megatron_emoe.settings.atomic_file import write_atomically  # noqa: E402
from megatron_emoe.training.arguments import parse  # noqa: E402
from megatron_emoe.training.evaluation import Evaluator, counting_rows, current_device  # noqa: E402
from megatron_emoe.training.loop import ElasticLoop  # noqa: E402

WARM_UP = 5
TRAINING = 3  # a training step's FLOPs, as a multiple of its forward pass


def wait() -> None:
    """Sync: until the device has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes of tensors on the GPU; 0 in host mode."""
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


class Pair:
    """The stock and the elastic model of one command line, both on the device."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        elastic = elastic_model_config(args)
        self.config: ElasticTransformerConfig = elastic.transformer
        self.loop = ElasticLoop(args, self.config)
        self.batches = RerunDataIterator(random_batches(args, args.vocab_size))
        self.models: dict[str, list[Any]] = {}
        self.steps: dict[str, Step] = {}
        self.held: dict[str, int] = {}  # bytes: weights, gradients, optimizer
        stock = gpt_config_from_args(args)
        self._make_common_buffers(stock)
        self._add("stock", stock, self.loop.forward)
        self._add("elastic", elastic, self.loop.forward_step)

    def _make_common_buffers(self, config: object) -> None:
        """A step of a model that is thrown away: what the process makes once for all is charged to neither variant."""
        model, step = build(self.args, config, self.loop.forward, self.batches)
        step(0)
        ended = [weakref.ref(chunk) for chunk in model]
        # gc does not see circles through autograd's nodes, whose hooks hold the model: through the core's list of them,
        # and through what a dispatcher remembers of its last pass.
        for chunk in model:
            with torch.no_grad():
                self.loop.forward(self.batches, chunk)
            chunk.grad_accs.clear()
        del model, chunk, step
        gc.collect()
        if any(chunk() for chunk in ended):  # peaks stay right, but memory may not suffice
            print("measure_gpu.py: the model that was thrown away is still in memory", file=sys.stderr)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _add(self, name: str, config: object, forward_step: Callable) -> None:
        before = allocated()
        self.models[name], self.steps[name] = build(self.args, config, forward_step, self.batches)
        self.steps[name](0)  # the optimizer makes its state in the first step
        self.held[name] = allocated() - before

    @property
    def micro_batches(self) -> int:
        return self.args.global_batch_size // self.args.micro_batch_size

    def drawn(self, iterations: range) -> list[int]:
        """The elastic model's k in each of these iterations, their micro-batches and layers."""
        k, layers = self.args.moe_router_topk, moe_layer_numbers(self.args)
        places = product(iterations, range(self.micro_batches), layers)
        return [draw_for(self.config, k, Place(*place)).k if self.config.draws else k for place in places]

    def flops(self, k: float) -> float | None:
        """Forward FLOPs of one token at k active experts in every MoE layer."""
        return flops_per_token(self.args, [k] * len(moe_layer_numbers(self.args)))


def peak_bytes(pair: Pair) -> dict[str, int] | None:
    """The most that each variant holds in a step, as if the other were not there; None in host mode.

    At the largest of a few draws: the elastic model's need follows its k.
    """
    if not torch.cuda.is_available():
        return None
    peaks = dict.fromkeys(pair.steps, 0)
    for iteration, name in product(range(5), pair.steps):
        others = allocated() - pair.held[name]
        torch.cuda.reset_peak_memory_stats()
        pair.steps[name](iteration)
        peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated() - others)
    return peaks


def routers_of(model: list[Any]) -> list[TopKRouter]:
    return [module for chunk in model for module in chunk.modules() if isinstance(module, TopKRouter)]


def loads(pair: Pair, iteration: int) -> dict[str, float]:
    """Rows of the busiest expert over the mean of all, in a step: mean over layers and micro-batches."""
    found: dict[str, float] = {}
    for name, model in pair.models.items():
        counts: list[torch.Tensor] = []

        def count(_: object, __: object, routed: Any, counts: list[torch.Tensor] = counts) -> None:
            counts.append(routed[1].sum(0).float())

        hooks = [router.register_forward_hook(count) for router in routers_of(model)]
        pair.steps[name](iteration)
        for hook in hooks:
            hook.remove()
        found[name] = mean(float(rows.max() / rows.mean()) for rows in counts)  # sync: after the step, not timed
    return found


def router_times(pair: Pair, pairs: int) -> dict[str, list[float]]:
    """Seconds of one router's forward and backward pass on the hidden states of a micro-batch, timed alone."""
    args, device = pair.args, current_device()
    shape = (args.seq_length, args.micro_batch_size, args.hidden_size)
    hidden = torch.randn(shape, device=device, dtype=args.params_dtype).requires_grad_()
    weight = torch.randn(args.seq_length * args.micro_batch_size, args.num_experts, device=device)

    def of(router: TopKRouter) -> Step:
        def work(iteration: int) -> None:
            get_active_k().begin_microbatch(iteration, 0)
            (router(hidden)[0] * weight).sum().backward()

        return work

    routers = {name: of(routers_of(model)[0]) for name, model in pair.models.items()}
    return take_turns(routers, pairs, WARM_UP, wait)


def sweep(pair: Pair, ks: list[int], rounds: int) -> dict[str, dict[str, Any]]:
    """Forward passes of the elastic model at each k', in turn: seconds, tokens, rows per token and MoE layer."""
    model, args = pair.models["elastic"], pair.args
    for chunk in model:
        chunk.eval()
    evaluator = Evaluator(args, pair.loop.forward)
    batches = {0: list(islice(random_batches(args, args.vocab_size), pair.micro_batches))}
    found: dict[str, dict[str, Any]] = {str(k): {"seconds": [], "flops": pair.flops(k)} for k in ks}
    for round_number, k in product(range(1 + rounds), ks):
        with counting_rows(model) as rows:
            held_out = evaluator.loss_at_k(model, batches, k, 1)
        per_token = mean(rows().values()) / held_out.positions
        found[str(k)] |= {"tokens": held_out.positions, "rows": per_token}
        if round_number:  # the first round warms up
            found[str(k)]["seconds"].append(held_out.seconds)
    return found


def measured_steps(pair: Pair, pairs: int) -> dict[str, Any]:
    """Seconds of the steps, and what was done in them: tokens, and FLOPs of one at the mean k of the measured steps."""
    args, first = pair.args, 1
    times = take_turns(pair.steps, pairs, WARM_UP, wait, first)
    mean_k = mean(pair.drawn(range(first + WARM_UP, first + WARM_UP + pairs)))
    flops = {"stock": pair.flops(args.moe_router_topk), "elastic": pair.flops(mean_k)}
    tokens = args.global_batch_size * args.seq_length
    return {
        "step": times,
        "tokens": tokens,
        "flops": {name: value and TRAINING * tokens * value for name, value in flops.items()},
        "mean_k": mean_k,
        "load": loads(pair, first + WARM_UP + pairs),
    }


def parts(args: Namespace) -> Iterator[dict[str, Any]]:
    """Everything the cell asks for, piece by piece."""
    pair, pairs = Pair(args), CELL["pairs"]
    yield measured_steps(pair, pairs)
    yield {"peak_bytes": peak_bytes(pair)}
    yield {
        "router": router_times(pair, pairs),
        "routers_per_step": len(moe_layer_numbers(args)) * pair.micro_batches,
    }
    if CELL["sweep"]:
        yield {"sweep": sweep(pair, CELL["sweep"], CELL["rounds"])}


def main() -> None:
    args = parse()
    initialize_megatron()
    found: dict[str, Any] = {}
    for part in parts(args):  # written as it comes: running out of memory later takes nothing away
        found |= part
        write_atomically(OUT, json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
