"""Bytes that one rank hands to the others in one training step, by kind, from the flags and the layout alone.

Formulas follow Megatron-Core with the all-to-all dispatcher, sequence parallelism wherever TP > 1, the distributed
optimizer and no overlap of communication. Tests compare them with every collective of a host-mode run. Not counted:
what has no weight, such as the batch within a tensor-parallel group, norms of gradients, the balancing loss's counts of
tokens per expert (8 bytes each), and logged values.
"""

from __future__ import annotations

import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from megatron_emoe.plan.layout import Layout
from megatron_emoe.plan.parameters import layers_of_each_kind, stage_parameters, table_size
from megatron_emoe.settings.elastic_config import elastic_settings

Kind = Literal["all-to-all", "data parallel", "tensor parallel", "pipeline"]
KINDS: tuple[Kind, ...] = ("all-to-all", "data parallel", "tensor parallel", "pipeline")

_BF16, _FP32, _INT64 = 2, 4, 8


@dataclass(frozen=True)
class Transfer:
    """One kind of operation of one rank. ranks: of its group. payload: bytes of the whole tensor, that is the output of
    a gather and the input of everything else; fractional where the number of rows is an expectation. crosses: the
    group leaves the node."""

    kind: Kind
    operation: Literal["all-to-all", "all-gather", "reduce-scatter", "all-reduce", "send"]
    ranks: int
    payload: float
    crosses: bool = False

    @property
    def sent(self) -> float:
        """Bytes that leave the rank: all but its own share, twice in an all-reduce (ring); tokens spread evenly."""
        if self.operation == "send":
            return self.payload
        return self.payload * (self.ranks - 1) / self.ranks * (2 if self.operation == "all-reduce" else 1)


def stage_transfers(args: Namespace, layout: Layout, stage: int, k: float, *, local: bool = False) -> list[Transfer]:
    """Everything that a rank of the pipeline stage (from 0) transfers in one step.

    k: experts per token, the mean over micro-batches, their passes and layers. local: see stage_parameters.
    """
    passes = layout.micro_batches * (2 if args.emoe_second_pass else 1)
    each_time = (_layers(args, layout, stage, k, local), _ends(args, layout, stage), _pipeline(args, layout, stage))
    found = [_times(transfer, passes) for transfer in chain(*each_time) if transfer.ranks > 1]
    if args.emoe_teacher:
        taught = _teacher(args, layout, stage, local)
        found += [_times(transfer, layout.micro_batches) for transfer in taught if transfer.ranks > 1]
    found += [transfer for transfer in _gradients(args, layout, stage, local) if transfer.ranks > 1]
    return [transfer for transfer in found if transfer.payload]


def _teacher(args: Namespace, layout: Layout, stage: int, local: bool) -> Iterator[Transfer]:
    """Of one micro-batch: a forward pass at the model's own k, which is what recomputation of all layers repeats, and
    the divergence (for both models' logits the largest and the sum of exponentials, and the divergence itself)."""
    with_it, without = (
        list(_layers(args, replace(layout, recompute=kind), stage, args.moe_router_topk, local))
        for kind in ("full", "none")
    )
    for twice, once in zip(with_it, without, strict=True):
        yield replace(twice, payload=twice.payload - once.payload)
    embedding, _ = _row(layout, args.hidden_size, 1)
    head, _ = _column(layout, args.hidden_size, 1, frozen=True)
    yield from (embedding, head)
    yield _tensor(layout, "all-reduce", 5 * layout.micro_batch * layout.seq * _FP32)


def sent_by_kind(transfers: Iterable[Transfer]) -> dict[Kind, float]:
    """Bytes that leave the rank, by kind."""
    totals = dict.fromkeys(KINDS, 0.0)
    for transfer in transfers:
        totals[transfer.kind] += transfer.sent
    return totals


def _times(one: Transfer, factor: float) -> Transfer:
    return Transfer(one.kind, one.operation, one.ranks, one.payload * factor, one.crosses)


def _layers(args: Namespace, layout: Layout, stage: int, k: float, local: bool) -> Iterator[Transfer]:
    """Of one micro-batch in the stage's layers, forward and backward, with what recomputation repeats."""
    moe, dense = layers_of_each_kind(args, layout, stage)
    if args.emoe_lora_experts is not None:
        yield from _low_rank_layers(args, layout, stage, moe, local)
        return
    again = 2 if layout.recompute == "full" else 1
    moe_again = 1 if layout.recompute == "none" else 2
    in_moe = [_experts(args, layout, k, moe_again)]
    if args.moe_shared_expert_intermediate_size:
        in_moe.append(_pair(args, layout, moe_again))
    in_all, in_dense = [_attention(args, layout, again, local)], [_pair(args, layout, again)]
    for layers, transfers in ((moe + dense, in_all), (moe, in_moe), (dense, in_dense)):
        if layers:
            yield from (_times(transfer, layers) for transfer in chain(*transfers))


def _low_rank_layers(args: Namespace, layout: Layout, stage: int, layers: int, local: bool) -> Iterator[Transfer]:
    """Dense layers with low-rank experts: what these make of a token travels behind what the MLP's layers exchange.

    The attention of the model's first layer has no backward pass, as nothing before it is trained: unless a gradient is
    asked for there, for recomputation or between stages (train_only).
    """
    again = 2 if layout.recompute == "full" else 1
    width = args.hidden_size + args.emoe_lora_experts * elastic_settings(args).lora_rank
    for transfer in chain(_column(layout, width, again, frozen=True), _row(layout, width, again)):
        yield _times(transfer, layers)
    cut = int(stage == 0 and layout.pp == 1 and layout.recompute == "none")
    for transfer in _attention(args, layout, again, local, frozen=True):
        yield _times(transfer, layers - cut)
    for operation in ("all-gather", "reduce-scatter"):
        yield _tensor(layout, operation, cut * _activation(layout, args.hidden_size))


def _tensor(layout: Layout, operation, payload: float) -> Transfer:
    return Transfer("tensor parallel", operation, layout.tp, payload, layout.crosses_nodes(layout.tp))


def _activation(layout: Layout, width: int) -> int:
    """Bytes of a micro-batch's activations over all tensor-parallel ranks."""
    return layout.micro_batch * layout.seq * width * _BF16


def _column(layout: Layout, width: int, forwards: int, frozen: bool = False) -> Iterator[Transfer]:
    """A linear layer split by its outputs: its input is gathered, again for the weights' gradient if they have one; its
    gradient is scattered."""
    payload = _activation(layout, width)
    yield _tensor(layout, "all-gather", payload * (forwards + (0 if frozen else 1)))
    yield _tensor(layout, "reduce-scatter", payload)


def _row(layout: Layout, width: int, forwards: int) -> Iterator[Transfer]:
    """A linear layer split by its inputs, or the embedding: its output is scattered, its gradient gathered."""
    payload = _activation(layout, width)
    yield _tensor(layout, "reduce-scatter", payload * forwards)
    yield _tensor(layout, "all-gather", payload)


def _pair(args: Namespace, layout: Layout, forwards: int, frozen: bool = False) -> Iterator[Transfer]:
    """An MLP, or the projections of an attention."""
    yield from _column(layout, args.hidden_size, forwards, frozen)
    yield from _row(layout, args.hidden_size, forwards)


def _attention(args: Namespace, layout: Layout, forwards: int, local: bool, frozen: bool = False) -> Iterator[Transfer]:
    yield from _pair(args, layout, forwards, frozen)
    if args.multi_latent_attention:
        yield from _latent(args, layout, forwards, local)
    elif args.qk_layernorm and args.emoe_qk_norm == "full":  # sums of squares of queries and of keys
        tokens = layout.micro_batch * layout.seq
        yield _tensor(layout, "all-reduce", 2 * tokens * _FP32 * (forwards + 1))


def _latent(args: Namespace, layout: Layout, forwards: int, local: bool) -> Iterator[Transfer]:
    """The keys' and values' latent is expanded by a split layer, their rotary part is gathered for all heads."""
    rank, rope = args.kv_lora_rank, args.qk_pos_emb_head_dim
    yield from _column(layout, rank, forwards)
    yield _tensor(layout, "all-gather", _activation(layout, rope) * forwards)
    yield _tensor(layout, "reduce-scatter", _activation(layout, rope))
    if local:
        yield from _column(layout, args.hidden_size, forwards)
        yield _tensor(layout, "all-gather", _activation(layout, rank + rope) * (forwards + 1))


def _experts(args: Namespace, layout: Layout, k: float, forwards: int) -> Iterator[Transfer]:
    """Tokens and their weights to the experts and back; in the backward pass the same in reverse."""
    weight = _FP32 if args.moe_router_dtype == "fp32" else _BF16
    rows, span = layout.tokens * k, layout.etp * layout.ep
    token = args.hidden_size * _BF16
    crosses = layout.crosses_nodes(span)
    there_and_back = rows * (2 * token + weight) * (forwards + 1)
    yield Transfer("all-to-all", "all-to-all", layout.ep, there_and_back, crosses)
    yield Transfer("all-to-all", "all-gather", span, span * args.num_experts * _INT64 * forwards, crosses)
    yield from _split_experts(args, layout, rows, weight, forwards)


def _split_experts(args: Namespace, layout: Layout, rows: float, weight: int, forwards: int) -> Iterator[Transfer]:
    """Ranks that share an expert gather each other's rows, and scatter the sum in the router's precision."""
    taken = layout.etp * rows * (args.hidden_size * _BF16 + weight)
    returned = layout.etp * rows * args.hidden_size * weight
    crosses = layout.crosses_nodes(layout.etp)
    gathered, scattered = taken * forwards + returned, returned * forwards + taken
    yield Transfer("tensor parallel", "all-gather", layout.etp, gathered, crosses)
    yield Transfer("tensor parallel", "reduce-scatter", layout.etp, scattered, crosses)


def _ends(args: Namespace, layout: Layout, stage: int) -> Iterator[Transfer]:
    """Embedding, head and cross entropy (largest logit, that of the label, sum of exponentials), per micro-batch."""
    frozen = args.emoe_lora_experts is not None
    if stage == 0:
        embedding, its_gradient = _row(layout, args.hidden_size, 1)
        yield from (embedding,) if frozen else (embedding, its_gradient)
    if stage == layout.pp - 1:
        yield from _column(layout, args.hidden_size, 1, frozen)
        yield _tensor(layout, "all-reduce", 3 * layout.micro_batch * layout.seq * _FP32)


def _pipeline(args: Namespace, layout: Layout, stage: int) -> Iterator[Transfer]:
    """Activations to the next stage and gradients to the one before, per micro-batch."""
    neighbours = (stage > 0) + (stage < layout.pp - 1)
    crosses = layout.gpus > layout.gpus_per_node
    yield Transfer("pipeline", "send", layout.pp, neighbours * layout.tokens * args.hidden_size * _BF16, crosses)


def _gradients(args: Namespace, layout: Layout, stage: int, local: bool) -> Iterator[Transfer]:
    """Once a step: gradients to their owners, updated weights in bf16 back from them.

    Where experts have ranks of their own Megatron has two optimizers, and without overlap each of them gathers all
    weights: so does the count.
    """
    parameters = stage_parameters(args, layout, stage, local=local)
    apart = args.emoe_lora_experts is None and (layout.ep > 1 or layout.etp != layout.tp)
    dense = parameters.dense if apart else parameters.trained
    span, gradient = layout.gpus // layout.pp, layout.kept.gradient
    for count, ranks in ((dense, layout.dp), (parameters.expert if apart else 0, layout.edp)):
        padded = _padded(count, ranks)
        crosses = layout.crosses_nodes(span)
        yield Transfer("data parallel", "reduce-scatter", ranks, padded * gradient, crosses)
        yield Transfer("data parallel", "all-gather", ranks, padded * _BF16 * (2 if apart else 1), crosses)
    yield _tensor(layout, "all-reduce", parameters.whole * gradient)
    if (
        args.emoe_lora_experts is None
        and layout.pp > 1
        and not args.untie_embeddings_and_output_weights
        and stage in (0, layout.pp - 1)
    ):
        yield Transfer(
            "pipeline", "all-reduce", 2, table_size(args, layout.tp) * gradient, layout.gpus > layout.gpus_per_node
        )


def _padded(count: int, ranks: int) -> int:
    """Elements of Megatron's gradient buffer: every rank's share is a multiple of 128 bytes."""
    multiple = math.lcm(ranks, 128)
    return -(-count // multiple) * multiple
