"""Runs a k' sweep on a folder of transformers, on the very tokens that a Megatron sweep of the same flags evaluates.

Megatron's datasets cut the data; transformers runs the model by its own code, in one process. Shape suffixes: B
sequences, S positions, T tokens of a micro-batch, E experts, K active experts, V vocabulary.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import PreTrainedModel

from megatron_emoe.data.datasets import build_datasets
from megatron_emoe.hf.active_experts import counting_rows, set_active_experts, trained_k
from megatron_emoe.hf.architecture import experts_in
from megatron_emoe.hf.comparison import gate_of
from megatron_emoe.hf.one_process import alone, quiet
from megatron_emoe.hf.verify import load_hf
from megatron_emoe.model.flops import moe_layer_numbers
from megatron_emoe.settings.refusal import fail
from megatron_emoe.settings.tail_scale import parse_tail_scale
from megatron_emoe.sweep.agreement import compared
from megatron_emoe.sweep.agreement import fields as agreement_fields
from megatron_emoe.sweep.evidence import Evidence, hooked, training_pairs
from megatron_emoe.sweep.fill import fill, finish
from megatron_emoe.sweep.latency import ALONE_RUNS, LARGE_RUNS, median_seconds
from megatron_emoe.sweep.on_megatron import costed_cell
from megatron_emoe.sweep.request import Budget, unfinished
from megatron_emoe.sweep.result import SweepCell, SweepResult
from megatron_emoe.training.evaluation import Digest, HeldOutLoss, current_device, data_digest
from megatron_emoe.training.held_out import check_enough, wanted_sequences


def run_sweep_hf(args: Namespace, result: SweepResult) -> SweepResult:
    """Measure what is missing of what `args` ask for; --out is rewritten after every cell."""
    if not unfinished(args, result):
        with alone():
            return finish(args, result, read_batches(args)[1], writes=True)
    with alone():
        try:
            iteration = (args.hf_settings or {}).get("iteration")
            training = training_pairs(Path(args.hf), args.num_experts, iteration) if args.evidence else None
            model = load_hf(Path(args.hf), args.params_dtype, eager=False)
        except ValueError as error:
            fail(f"--hf {error}")
        return fill(args, result, TransformersSweep(args, model, training), writes=True)


class TransformersSweep:
    """A transformers model with its held-out data (see request.Model)."""

    def __init__(self, args: Namespace, model: PreTrainedModel, training: Mapping[int, Tensor] | None) -> None:
        self.args, self.model, self.training = args, model, training
        self.layers = moe_layer_numbers(args)
        tail = args.emoe_tail_scale
        self.tail = dict(parse_tail_scale(tail).table) if tail is not None else None
        self.batches, self.digest = read_batches(args)
        self.shared, self.routed = parameters(model)
        self._losses(self.batches[0])  # warm-up

    def cell(self, k: Budget) -> SweepCell:
        """Loss, speed, rows and cost at k'."""
        set_active_experts(self.model, k, self.tail)
        with counting_rows(self.model) as rows:
            measured = self._loss().checked()
        return costed_cell(self.args, k, measured, rows, shared=self.shared, routed=self.routed)

    def evidence(self, k: Budget) -> tuple[dict[str, Any], Mapping[int, Tensor]]:
        """Router entropy, load, coverage; co-activation matrices."""
        set_active_experts(self.model, k, self.tail)
        with watching_gates(self.model, self.layers) as evidence:
            self._loss()
        return evidence.fields(self.training, self.args.coverage_at_least), evidence.matrices()

    def agreement(self, k: Budget) -> dict[str, float]:
        """Next-token agreement with, and divergence from, the k of training."""
        sums = torch.zeros(3, dtype=torch.float64, device=current_device())
        for batch in self.batches:
            set_active_experts(self.model, trained_k(self.model.config), self.tail)
            at_k_BSV = self._logits(batch["tokens"])
            set_active_experts(self.model, k, self.tail)
            logits_BSV = self._logits(batch["tokens"])
            sums += compared(logits_BSV, at_k_BSV, batch["loss_mask"], get_tensor_model_parallel_group())
        return agreement_fields(sums)

    def latency(self, k: Budget) -> dict[str, float | None]:
        """Milliseconds per token, alone and in a full micro-batch, without a cache."""
        set_active_experts(self.model, k, self.tail)
        alone_11 = self.batches[0]["tokens"][:1, :1]
        one = median_seconds(lambda: self._logits(alone_11), ALONE_RUNS)
        full = median_seconds(lambda: self._losses(self.batches[0]), LARGE_RUNS) / self.batches[0]["tokens"].numel()
        return {"latency_ms_batch1": 1e3 * one, "latency_ms_large": 1e3 * full}

    def _loss(self) -> HeldOutLoss:
        start = time.perf_counter()
        sums_B2 = torch.cat([self._losses(batch) for batch in self.batches])
        loss, tokens = sums_B2.sum(dim=0).tolist()  # sync
        positions = sum(batch["tokens"].numel() for batch in self.batches)
        seconds = time.perf_counter() - start
        return HeldOutLoss(loss / tokens, int(tokens), seconds, positions, tuple(sums_B2[:, 0].tolist()))

    def _losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Of each sequence the sum of the token losses in nats, and the number of tokens that count, float64 [B, 2]."""
        logits_TV = self._logits(batch["tokens"]).flatten(end_dim=1).float()
        losses_T = nn.functional.cross_entropy(logits_TV, batch["labels"].flatten(), reduction="none")
        mask_BS = batch["loss_mask"].float()
        return torch.stack([(losses_T.view_as(mask_BS) * mask_BS).sum(dim=1), mask_BS.sum(dim=1)], dim=1).double()

    @torch.no_grad()
    def _logits(self, tokens_BS: Tensor) -> Tensor:
        return self.model(tokens_BS, use_cache=False).logits


def read_batches(args: Namespace) -> tuple[list[dict[str, Tensor]], Digest]:
    """The held-out micro-batches on this device (tokens, labels int64 [B, S]; loss_mask [B, S]), and their digest.

    Inside `alone`. SystemExit where the data do not fill one batch.
    """
    with quiet():
        dataset = build_datasets([0, wanted_sequences(args) if args.mock_data else None, 0])[1]
    count = check_enough(args, len(dataset))
    device, size = current_device(), args.eval_micro_batch_size
    batches = []
    for first in range(0, count, size):
        samples = default_collate([_kept(dataset[index]) for index in range(first, first + size)])
        batches.append({key: value.to(device) for key, value in samples.items()})
    return batches, data_digest(dataset, count)


def _kept(sample: Mapping[str, Any]) -> dict[str, Any]:
    return {key: sample[key] for key in ("tokens", "labels", "loss_mask")}


def parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Parameters outside of routed experts, and in them. ERNIE's selection bias, which is not trained, is none."""
    routed = {
        id(p) for layer in model.model.layers if gate_of(layer) is not None for p in layer.mlp.experts.parameters()
    }
    counts = [0, 0]
    for name, parameter in model.named_parameters():
        if not name.endswith("e_score_correction_bias"):
            counts[id(parameter) in routed] += parameter.numel()
    return counts[0], counts[1]


@contextmanager
def watching_gates(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[Evidence]:
    """Gather evidence from the gates of a model that runs inside."""
    gates = {gate: n for n, layer in enumerate(model.model.layers, start=1) if (gate := gate_of(layer)) is not None}
    evidence = Evidence(layers, experts_in(model.config), current_device())

    def keep(gate: nn.Module, _inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _, indices_TK = output
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, indices_TK, True)
        evidence.add(gates[gate], logits_TE, chosen_TE)

    with hooked(list(gates), keep):
        yield evidence
