"""Time per token at a k': of one token alone, and in a full micro-batch. Medians of several runs, slowest rank."""

from __future__ import annotations

import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_model_config
from torch import Tensor, nn

from megatron_emoe.routing.active_k import get_active_k
from megatron_emoe.training.evaluation import Batches, Evaluator, current_device

ALONE_RUNS, LARGE_RUNS, WARM_UP = 20, 5, 2


def median_seconds(run: Callable[[], object], runs: int) -> float:
    """Median wall time of `run`, of the slowest rank each time, after `WARM_UP` runs that do not count. Collective."""
    seconds = [_seconds(run) for _ in range(WARM_UP + runs)]
    slowest = torch.tensor(seconds[WARM_UP:], dtype=torch.float64, device=current_device())
    torch.distributed.all_reduce(slowest, op=torch.distributed.ReduceOp.MAX)
    return statistics.median(slowest.tolist())


def _seconds(run: Callable[[], object]) -> float:
    torch.distributed.barrier()  # the ranks start together: the last pipeline stage's time is the whole way
    _synchronize()
    start = time.perf_counter()
    run()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Latency:
    """Latencies of a Megatron model in evaluation mode, through its own pipeline schedule.

    batches: held-out micro-batches of this rank, of which the first ones are used.
    """

    def __init__(self, args: Namespace, evaluator: Evaluator, model: list[nn.Module], batches: Batches) -> None:
        self.args, self.evaluator, self.model, self.batches = args, evaluator, model, batches

    @torch.no_grad()
    def fields(self, k: int | Mapping[int, int]) -> dict[str, float | None]:
        """The cell's latency fields, milliseconds per token. Collective.

        latency_ms_batch1 is the time of a decode step without attention to a cache; None in a layout that cannot run
        one token: sequence, context or interleaved pipeline parallelism, FP8.
        """
        with get_active_k().evaluating(k):
            return {"latency_ms_batch1": self._alone(), "latency_ms_large": self._large()}

    def _alone(self) -> float | None:
        config = get_model_config(self.model[0])
        split = config.sequence_parallel or parallel_state.get_context_parallel_world_size() > 1
        if split or len(self.model) > 1 or config.fp8 or config.fp4:
            return None
        shape = {"seq_length": 1, "micro_batch_size": 1, "decoder_seq_length": None}
        step = {"forward_step_func": _one_token, "collect_non_loss_data": True}
        return 1e3 * median_seconds(lambda: self.evaluator.forward(self.model, [None], 1, **shape, **step), ALONE_RUNS)

    def _large(self) -> float:
        # An interleaved pipeline takes as many micro-batches at once as it has stages.
        count = parallel_state.get_pipeline_model_parallel_world_size() if len(self.model) > 1 else 1
        tokens = count * self.args.eval_micro_batch_size * self.args.seq_length

        def run() -> None:
            iterators = [iter(self.batches[i][:count]) if i in self.batches else None for i in range(len(self.model))]
            self.evaluator.forward(self.model, iterators, count)

        return 1e3 * median_seconds(run, LARGE_RUNS) / tokens


def _one_token(_data: Any, model: nn.Module) -> tuple[Tensor, Callable[..., int]]:
    tokens_11 = torch.ones(1, 1, dtype=torch.int64, device=current_device())
    return model(tokens_11, torch.zeros_like(tokens_11), None), lambda _output, non_loss_data: 0
