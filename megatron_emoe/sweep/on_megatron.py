"""Runs a k' sweep on a Megatron checkpoint: builds the model, reads the held-out data once, measures the cells."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training.initialize import initialize_megatron
from torch import nn

from megatron_emoe.data.datasets import get_batch
from megatron_emoe.model.flops import flops_per_token, is_gated, lora_products, moe_layer_numbers
from megatron_emoe.model.layer_spec import elastic_model_config
from megatron_emoe.routing.active_k import get_active_k
from megatron_emoe.routing.lora_mlp import LoraMLP
from megatron_emoe.routing.moe_layer import ElasticMoELayer
from megatron_emoe.settings.command_line import say
from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.refusal import fail
from megatron_emoe.sweep.agreement import compared
from megatron_emoe.sweep.agreement import fields as agreement_fields
from megatron_emoe.sweep.curve import expert_flops_per_token
from megatron_emoe.sweep.evidence import training_pairs, watching_routers
from megatron_emoe.sweep.fill import fill, finish
from megatron_emoe.sweep.latency import Latency
from megatron_emoe.sweep.request import Budget, by_layer, unfinished
from megatron_emoe.sweep.result import SweepCell, SweepResult
from megatron_emoe.sweep.uncertainty import block_losses
from megatron_emoe.training.evaluation import (
    Evaluator,
    HeldOutLoss,
    counting_rows,
    current_device,
    device_name,
)
from megatron_emoe.training.held_out import load_model, micro_batches, read_batches, read_digest
from megatron_emoe.training.loop import ElasticLoop, model_inputs


def run_sweep(args: Namespace, result: SweepResult) -> SweepResult:
    """Measure what is missing of what `args` ask for; --out is rewritten after every cell, from rank 0. Collective."""
    if not unfinished(args, result):
        initialize_megatron()
        return finish(args, result, read_digest(args), writes=torch.distributed.get_rank() == 0)
    try:
        folder = Path(args.load)
        training = training_pairs(folder, args.num_experts, result.iteration, say) if args.evidence else None
    except ValueError as error:
        fail(error)
    initialize_megatron()
    config = elastic_model_config(args)
    model = load_model(args, config)
    swept = MegatronSweep(args, ElasticLoop(args, config.transformer), model, training)
    result = fill(args, result, swept, writes=torch.distributed.get_rank() == 0)
    torch.distributed.barrier()
    return result


class MegatronSweep:
    """A Megatron model with its held-out data (see request.Model). Collective to construct.

    training: co-activation matrices of training by layer, or None.
    """

    def __init__(
        self, args: Namespace, loop: ElasticLoop, model: list[nn.Module], training: Mapping[int, torch.Tensor] | None
    ) -> None:
        self.args, self.model, self.training = args, model, training
        self.layers = moe_layer_numbers(args)
        self.batches, self.steps, self.digest = read_batches(args)
        self.evaluator = Evaluator(args, loop.forward)
        self.cost = CostModel(args, model)
        first = {i: part[: micro_batches(args)] for i, part in self.batches.items()}
        self.evaluator.loss_at_k(model, first, None, 1)  # warm-up

    def cell(self, k: Budget) -> SweepCell:
        """Loss, speed, rows and cost at k'."""
        with counting_rows(self.model) as rows:
            ks = by_layer(k, self.layers)
            measured = self.evaluator.loss_at_k(self.model, self.batches, ks, self.steps, by_sequence=True).checked()
            return self.cost.cell(k, measured, rows())

    def evidence(self, k: Budget) -> tuple[dict[str, Any], Mapping[int, torch.Tensor]]:
        """Router entropy, load, coverage; co-activation matrices."""
        with watching_routers(self.model, self.layers) as evidence:
            self.evaluator.loss_at_k(self.model, self.batches, by_layer(k, self.layers), self.steps)
        evidence.reduce()
        return evidence.fields(self.training, self.args.coverage_at_least), evidence.matrices()

    def agreement(self, k: Budget) -> dict[str, float]:
        """Next-token agreement with, and divergence from, the k of training."""
        sums = torch.zeros(3, dtype=torch.float64, device=current_device())
        iterators: list[Iterator | None] = [iter(self.batches[0]) if self.batches else None]
        step = partial(_both_budgets, by_layer(k, self.layers))
        with torch.no_grad():
            for _ in range(self.steps):
                micro = micro_batches(self.args)
                for report in self.evaluator.forward(self.model, iterators, micro, forward_step_func=step):
                    sums += report["agreement"]
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        torch.distributed.all_reduce(sums, group=group)
        return agreement_fields(sums)

    def latency(self, k: Budget) -> dict[str, float | None]:
        """Milliseconds per token, alone and in a full micro-batch."""
        latency = Latency(self.args, self.evaluator, self.model, self.batches)
        return latency.fields(by_layer(k, self.layers))


def _both_budgets(
    k: int | Mapping[int, int], data_iterator: Iterator | None, model: nn.Module
) -> tuple[torch.Tensor, Callable]:
    """A micro-batch at the k of training and at k', as Megatron's schedules take a forward step."""
    batch = get_batch(data_iterator)
    inputs = model_inputs(batch) | {"labels": None, "loss_mask": None}
    with get_active_k().evaluating(None):
        at_k_BSV = model(**inputs)
    with get_active_k().evaluating(k):
        logits_BSV = model(**inputs)
    mask_BS = batch["loss_mask"]
    sums = compared(logits_BSV, at_k_BSV, mask_BS, parallel_state.get_tensor_model_parallel_group())
    return logits_BSV, lambda _output: (sums[1].float(), mask_BS.sum().int(), {"agreement": sums})


class CostModel:
    """Active parameters and FLOPs at each k', counted on the built model. Collective to construct."""

    def __init__(self, args: Namespace, model: list[nn.Module]) -> None:
        self.args = args
        modules = [module for chunk in model for module in chunk.modules()]
        experts = [m.experts for m in modules if isinstance(m, ElasticMoELayer)]
        low_rank = [m.lora for m in modules if isinstance(m, LoraMLP)]
        routed = {id(p) for part in (*experts, *low_rank) for p in part.parameters()}
        spread = routed if experts else set()  # over expert-parallel ranks
        counts = torch.zeros(2, dtype=torch.float64, device=current_device())
        for chunk in model:
            for parameter in chunk.parameters():
                counts[int(id(parameter) in routed)] += _whole_size(parameter, id(parameter) in spread)
        torch.distributed.all_reduce(counts, group=parallel_state.get_pipeline_model_parallel_group())
        self.shared, self.routed = (int(count) for count in counts.tolist())

    def cell(self, k: Budget, measured: HeldOutLoss, rows: Mapping[int, int]) -> SweepCell:
        """The plain cell of one k'."""
        return costed_cell(self.args, k, measured, rows, shared=self.shared, routed=self.routed)


def costed_cell(
    args: Namespace, k: Budget, measured: HeldOutLoss, rows: Mapping[int, int], *, shared: int, routed: int
) -> SweepCell:
    """The plain cell of one k'. shared, routed: parameters of the whole model outside of, and in, routed experts.

    Where every token has its own number of experts (top-p, null experts), costs are those of the mean that ran.
    """
    layers = len(moe_layer_numbers(args))
    ks: list[float] = [k] * layers if isinstance(k, int) else list(k)
    if ElasticConfig(emoe_selection=args.emoe_selection).counts_vary:
        ks = [count / measured.positions for count in rows.values()]
    return SweepCell(
        k=k,
        loss=measured.loss,
        tokens=measured.tokens,
        seconds=measured.seconds,
        tokens_per_second=measured.tokens / measured.seconds,
        rows_per_layer={str(layer): count for layer, count in rows.items()},
        expert_flops_per_token=_expert_flops(args, ks),
        active_params=shared + int(routed * sum(ks) // (args.num_experts * layers)),
        flops_per_token=flops_per_token(args, ks),
        block_losses=block_losses(measured.sums, measured.tokens),
        device=device_name(),
        ranks=torch.distributed.get_world_size(),
    )


def _expert_flops(args: Namespace, ks: list[float]) -> float:
    """Of one token, forward; low-rank experts are all computed, whatever k' is."""
    if args.emoe_lora_experts is not None:
        return 2.0 * len(ks) * lora_products(args)
    expert = expert_flops_per_token(
        hidden_size=args.hidden_size,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size,
        num_moe_layers=1,
        k=1,
        gated=is_gated(args),
    )
    return float(expert * sum(ks))


def _whole_size(parameter: nn.Parameter, routed: bool) -> int:
    """Elements of a parameter over the ranks that share it: expert and tensor parallel. A tied copy counts as
    nothing."""
    if getattr(parameter, "shared_embedding", False) and not parallel_state.is_pipeline_first_stage():
        return 0
    if routed:
        split = parallel_state.get_expert_tensor_parallel_world_size() if _is_split(parameter) else 1
        return parameter.numel() * parallel_state.get_expert_model_parallel_world_size() * split
    return parameter.numel() * (parallel_state.get_tensor_model_parallel_world_size() if _is_split(parameter) else 1)


def _is_split(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))
