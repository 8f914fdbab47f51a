"""Held-out loss at any number of active experts, with proof of the number that ran."""

from __future__ import annotations

import hashlib
import math
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch import nn

from megatron_emoe.routing.active_k import get_active_k
from megatron_emoe.routing.lora_mlp import LoraMLP
from megatron_emoe.routing.moe_layer import ElasticMoELayer
from megatron_emoe.routing.router import ElasticRouter
from megatron_emoe.settings.refusal import NoNumber

Batches = Mapping[int, Sequence[Any]]
"""Micro-batches on this rank, as the data loader gave them, by virtual pipeline chunk; a rank that reads none has no
entry."""


class OneMask:
    """Takes the attention masks out of batches that are kept: with one micro-batch's for all, where all are equal.

    A causal mask has sequence x sequence bytes, 16 MiB for every 4096 tokens. Masks differ where --reset-attention-mask
    (`differ`) keeps documents apart.
    """

    def __init__(self, differ: bool) -> None:
        self.differ = differ
        self._mask: torch.Tensor | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch to keep."""
        mask = batch.get("attention_mask")
        if mask is None or self.differ:
            return batch
        if self._mask is None or self._mask.shape != mask.shape:
            self._mask = mask
        return batch | {"attention_mask": self._mask}


@dataclass(frozen=True)
class HeldOutLoss:
    """loss: mean over the tokens that count, nats. tokens: how many those are, over all ranks. seconds: wall time on
    this rank. positions: tokens that went through the model, over all ranks. sums: of the token losses of each sequence
    in the order of the data, nats; empty where nobody asked."""

    loss: float
    tokens: int
    seconds: float
    positions: int
    sums: tuple[float, ...] = ()

    def checked(self) -> HeldOutLoss:
        """Itself. Raises `NoNumber` where the loss is none."""
        if math.isfinite(self.loss):
            return self
        bad = next((n for n, loss in enumerate(self.sums) if not math.isfinite(loss)), None)
        place = "" if bad is None else f" of held-out sequence {bad} (of {len(self.sums)}, counted from 0)"
        value = self.loss if bad is None else self.sums[bad]
        raise NoNumber(f"the loss{place} is {value}; nothing of it is stored")


class Evaluator:
    """Runs the same micro-batches through a model at one k' after another.

    forward_step: of one micro-batch, as Megatron's schedules take it. args: Megatron's namespace.
    """

    def __init__(self, args: Namespace, forward_step: Callable) -> None:
        self.args = args
        self.forward_step = forward_step

    def loss_at_k(
        self,
        model: list[nn.Module],
        batches: Batches,
        k: int | Sequence[int] | Mapping[int, int] | None,
        steps: int,
        *,
        by_sequence: bool = False,
    ) -> HeldOutLoss:
        """Evaluate `steps` global batches with k' = `k`: one number, one per layer, or the model's own (None).

        by_sequence: with the sum of each sequence. The model must be in evaluation mode. Collective; every rank gets
        the result, which may be no number (HeldOutLoss.checked).
        """
        iterators = [iter(batches[i]) if i in batches else None for i in range(len(model))]
        totals = torch.zeros(2, dtype=torch.float64, device=current_device())
        kept: list[torch.Tensor] | None = [] if by_sequence else None
        start = time.perf_counter()
        with get_active_k().evaluating(k), torch.no_grad():
            for _ in range(steps):
                for report in self._step(model, iterators, kept):
                    totals += report["lm loss"].double()
        if kept is not None:
            totals = torch.cat([totals, self._in_order(kept, steps)])
        if parallel_state.is_pipeline_last_stage():
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            torch.distributed.all_reduce(totals, group=group)
        torch.distributed.broadcast(totals, src=torch.distributed.get_world_size() - 1)  # it holds the last stage
        loss, tokens, *sums = totals.tolist()  # sync: evaluation only
        positions = steps * self.args.eval_global_batch_size * self.args.seq_length
        return HeldOutLoss(loss / tokens, int(tokens), time.perf_counter() - start, positions, tuple(sums))

    def _step(
        self, model: list[nn.Module], iterators: list[Iterator | None], kept: list[torch.Tensor] | None
    ) -> list[dict[str, torch.Tensor]]:
        batch, micro = self.args.eval_global_batch_size, self.args.eval_micro_batch_size
        changes = {} if kept is None else {"forward_step_func": self._keeping(kept)}
        return self.forward(model, iterators, batch // (micro * self.args.data_parallel_size), **changes)

    def _keeping(self, kept: list[torch.Tensor]) -> Callable:
        """The forward step, whose loss function puts the sum of each sequence of its micro-batch into `kept`."""
        sequences = self.args.eval_micro_batch_size

        def step(data_iterator: Iterator | None, model: nn.Module) -> tuple[torch.Tensor, Callable]:
            output, loss_function = self.forward_step(data_iterator, model)
            mask = loss_function.args[0]  # the first argument of every loss function of training/loop.py

            def loss(losses: torch.Tensor) -> Any:
                kept.append((losses.float() * mask.float()).view(sequences, -1).sum(dim=1).double())
                return loss_function(losses)

            return output, loss

        return step

    def _in_order(self, kept: list[torch.Tensor], steps: int) -> torch.Tensor:
        """The sums of this rank's sequences at their places among all, which Megatron's sampler deals out in
        micro-batches, rank by rank; zeros for those of other ranks. float64 [sequences]."""
        everyone = torch.zeros(steps * self.args.eval_global_batch_size, dtype=torch.float64, device=current_device())
        if kept:
            micro, ranks = self.args.eval_micro_batch_size, self.args.data_parallel_size
            everyone.view(-1, ranks, micro)[:, parallel_state.get_data_parallel_rank()] = torch.stack(kept)
        return everyone

    def forward(
        self, model: list[nn.Module], iterators: list[Iterator | None], micro_batches: int, **changes: Any
    ) -> Any:
        """Run micro-batches through the pipeline, forward only. changes: of what the core's schedule is called with."""
        args, config = self.args, get_model_config(model[0])
        call = {
            "forward_step_func": self.forward_step,
            "data_iterator": iterators if len(model) > 1 else iterators[0],
            "model": model,
            "num_microbatches": micro_batches,
            "seq_length": args.seq_length,
            "micro_batch_size": args.eval_micro_batch_size,
            "decoder_seq_length": args.decoder_seq_length,
            "forward_only": True,
        }
        timers, config.timers = config.timers, None  # evaluation is not timed, as in the core
        try:
            return get_forward_backward_func()(**call | changes)
        finally:
            config.timers = timers


@contextmanager
def counting_rows(model: list[nn.Module]) -> Iterator[Callable[[], dict[int, int]]]:
    """Count the rows that reach the experts inside; the value is a collective function giving rows by layer number.

    Rows, not flags, prove which k ran: tokens x k over all ranks. Shapes are read on the host: no sync. Rows that a
    dispatcher adds to fill the blocks of FP8 kernels do not count; see ElasticMoELayer.rows_of_tokens. Low-rank experts
    receive no rows: the tokens that each of them has a weight for count, on the device.
    """
    local: Counter[int] = Counter()
    hooks, copies = [], parallel_state.get_expert_tensor_parallel_world_size()
    for layer in (module for chunk in model for module in chunk.modules()):
        if isinstance(layer, ElasticMoELayer):
            hooks.append(layer.experts.register_forward_pre_hook(_row_counter(local, layer)))
        elif isinstance(layer, LoraMLP):
            hooks.append(layer.router.register_forward_hook(_pair_counter(local)))
            copies = 1 if layer.config.sequence_parallel else layer.tp_group.size()
    try:
        yield lambda: _sum_over_ranks(local, copies)
    finally:
        for hook in hooks:
            hook.remove()


def _row_counter(rows: Counter[int], layer: ElasticMoELayer) -> Callable[[nn.Module, tuple], None]:
    number, shards = layer.router.global_layer_number, parallel_state.get_expert_tensor_parallel_world_size()

    def count(_module: nn.Module, inputs: tuple) -> None:
        rows[number] += layer.rows_of_tokens(inputs[0].shape[0], shards)

    return count


def _pair_counter(rows: Counter[int]) -> Callable[[ElasticRouter, tuple, tuple], None]:
    def count(router: ElasticRouter, _inputs: tuple, output: tuple) -> None:
        rows[router.global_layer_number] += output[1].sum()

    return count


def _sum_over_ranks(local: Counter[int], copies: int) -> dict[int, int]:
    """Every rank's rows. copies: ranks that see the same rows, as those that share an expert by tensor parallelism do;
    they count once."""
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    mine = {layer: int(rows) for layer, rows in local.items()}  # sync: where counted on the device, once per evaluation
    torch.distributed.all_gather_object(everyone, mine)
    total = sum((Counter(rows) for rows in everyone), Counter())
    return {layer: total[layer] // copies for layer in sorted(total)}


_SAMPLES_UNIT = 64


def sequences_to_evaluate(available: int, batch: int) -> int:
    """How many of the available sequences are evaluated in whole global batches; 0 where there are fewer than one.

    A multiple of 64 where the data allow it, so that layouts with other batch sizes evaluate the same tokens.
    """
    unit = math.lcm(_SAMPLES_UNIT, batch)
    return available // unit * unit or available // batch * batch


class Digest(NamedTuple):
    """What losses are measured on. whole: see data_digest. sequences: the same of each sequence, its first digits."""

    whole: str
    sequences: tuple[str, ...]


DIGITS = 12
"""Of the digest of one sequence: two different ones of a million are equal with a probability below 1 %."""


def data_digest(dataset: Any, sequences: int) -> Digest:
    """SHA-256 of what a loss is measured on: of each of the first sequences the tokens, then the labels, both int64 in
    little-endian order, a label that does not count as -100."""
    digest, each = hashlib.sha256(), []
    for index in range(sequences):
        sample = dataset[index]
        labels = torch.as_tensor(sample["labels"]).masked_fill(torch.as_tensor(sample["loss_mask"]) == 0, -100)
        parts = [ids.numpy().astype("<i8").tobytes() for ids in (torch.as_tensor(sample["tokens"]), labels)]
        digest.update(b"".join(parts))
        each.append(hashlib.sha256(b"".join(parts)).hexdigest()[:DIGITS])
    return Digest(digest.hexdigest(), tuple(each))


def current_device() -> torch.device:
    """The GPU of this rank, or the CPU in host mode."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def device_name() -> str:
    """What this rank runs on: the name of its GPU, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
