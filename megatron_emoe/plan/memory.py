"""Memory that one rank needs, by part, in bytes: what is kept for a step, and what for the micro-batches in flight.

Training in bf16 with the distributed optimizer, Transformer Engine layers and flash attention. Weights, gradients and
optimizer are exact but for padding; activations are a model of what autograd keeps, layer by layer (docs/planning.md
says how far it was compared). FP8 keeps two more bytes for each weight of a linear layer; its activations are counted
as bf16, an upper bound.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from itertools import product

from megatron_emoe.model.flops import is_gated, moe_layer_numbers
from megatron_emoe.plan.layout import Layout, stage_layers
from megatron_emoe.plan.model import PlannedModel
from megatron_emoe.plan.parameters import padded_vocabulary, stage_parameters, table_size
from megatron_emoe.settings.elastic_config import elastic_settings

GIB = 1 << 30

_BF16, _FP32 = 2, 4
_FP8_COPIES = 2  # the fp8 weight and its transpose
_ROW_INDICES = 28  # three places of 8 bytes (unfused permutation) and the weight
_RARE = 1e-6  # share of the steps that may need more than is planned for a varying k


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank. activations: at E[k]. larger_k: what more a step with larger draws keeps. all_to_all: buffers
    at k_max. working: one layer recomputed at k_max. logits: of one micro-batch, with their gradient. A second pass of
    every micro-batch is kept beside the first. teacher: it keeps nothing else of its pass."""

    weights: float = field(metadata={"text": "weights"})
    gradients: float = field(metadata={"text": "gradients"})
    optimizer: float = field(metadata={"text": "optimizer (its share)"})
    activations: float = field(metadata={"text": "activations at E[k]"})
    larger_k: float = field(metadata={"text": "activations, larger draws of k"})
    working: float = field(metadata={"text": "one layer recomputed at k_max"})
    all_to_all: float = field(metadata={"text": "all-to-all buffers at k_max"})
    logits: float = field(metadata={"text": "logits"})
    teacher: float = field(default=0, metadata={"text": "the teacher: weights and logits"})

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    def parts(self) -> dict[str, float]:
        """What each part is -> bytes."""
        return {part.metadata["text"]: getattr(self, part.name) for part in fields(self)}


def stage_memory(model: PlannedModel, layout: Layout, stage: int, imbalance: float) -> Memory:
    """Memory of a rank of the pipeline stage (from 0).

    imbalance: rows of the busiest rank's experts, as a multiple of the mean; 1 where every rank has all experts.
    """
    args = model.args
    spread = imbalance if layout.ep > 1 else 1.0
    parameters = stage_parameters(args, layout, stage)
    in_flight = min(layout.pp - stage, layout.micro_batches) * model.passes
    numbers = stage_layers(args.num_layers, layout.pp)[stage]
    with_experts = len(set(moe_layer_numbers(args)) & set(numbers))
    low_rank = args.emoe_lora_experts is not None
    rows = layout.recompute == "none" and not low_rank
    row = kept_per_row(args, layout.etp) * layout.tokens * spread if rows else 0
    kept = sum(kept_of_layer(model, layout, number, spread) for number in numbers)
    last = stage == layout.pp - 1
    experts_above_mean = _largest_experts(model, with_experts) - model.expected_k * with_experts
    return Memory(
        weights=parameters.total * _BF16 + (_fp8_weights(args, layout, stage) if layout.fp8 else 0),
        gradients=parameters.trained * layout.kept.gradient,
        optimizer=layout.kept.optimizer
        * ((parameters.dense - parameters.frozen) / layout.dp + parameters.expert / layout.edp),
        activations=in_flight * kept + (model.passes * layout.tokens * 2 * _BF16 * args.hidden_size if last else 0),
        larger_k=in_flight * row * max(0.0, experts_above_mean),
        working=_working(model, layout, numbers, spread),
        all_to_all=_buffers(model, layout, spread) if with_experts and not low_rank else 0,
        logits=model.passes * _logits(args, layout) if last else 0,
        teacher=parameters.total * _BF16 + _logits(args, layout) if args.emoe_teacher else 0,
    )


def _largest_experts(model: PlannedModel, layers: int) -> float:
    """Experts per token over `layers` layers, in one pass or on average of two: the first is always at the model's."""
    if model.passes == 2:
        return layers * (model.args.moe_router_topk + model.largest_k) / 2
    return largest_sum(model.k_distribution, layers, model.config.emoe_k_draw == "layer")


def kept_of_layer(model: PlannedModel, layout: Layout, number: int, spread: float) -> float:
    """Bytes that a layer keeps from a micro-batch's forward pass at E[k] until its backward pass."""
    if layout.recompute == "full":
        return layout.tokens * _BF16 * model.args.hidden_size
    is_moe = number in model.moe_layers
    outside = kept_by_attention(model.args) + 2 * _BF16 * model.args.hidden_size  # the second norm's input and output
    if model.args.emoe_lora_experts is not None:
        return layout.tokens * (outside + kept_by_low_rank_experts(model.args, layout.tp))
    if not is_moe:
        return layout.tokens * (outside + _kept_by_mlp(model.args, model.args.ffn_hidden_size))
    inside = 0 if layout.recompute == "moe" else kept_by_experts(model.args, model.expected_k * spread, layout.etp)
    return layout.tokens * (outside + inside)


def kept_by_attention(args: Namespace) -> int:
    """Bytes per token: input and output of the norm, and what projections, rotary embedding and flash attention keep.

    Widths are whole: tensor-parallel ranks share them, and a rank's tokens are counted by its part of the sequence.
    """
    norm = 2 * _BF16 * args.hidden_size
    statistics = _FP32 * args.num_attention_heads
    if args.multi_latent_attention:
        return norm + statistics + _BF16 * _latent_width(args)
    queries = args.num_attention_heads * args.kv_channels
    keys = args.kv_channels * (args.num_query_groups if args.group_query_attention else args.num_attention_heads)
    projected, rotated, output = queries + 2 * keys, queries + keys, queries
    norms = 0
    if args.qk_layernorm and args.emoe_qk_norm == "full":
        norms = (_FP32 + _BF16) * (queries + keys)  # computed in fp32, unfused
    elif args.qk_layernorm:
        norms = _BF16 * (queries + keys)
    return norm + statistics + norms + _BF16 * (projected + rotated + output)


def _latent_width(args: Namespace) -> int:
    """Elements per token: queries, latent and its norm, expanded keys and values, both with rotary part, output."""
    heads, rope, rank = args.num_attention_heads, args.qk_pos_emb_head_dim, args.kv_lora_rank
    head = args.qk_head_dim + rope
    expanded = heads * (args.qk_head_dim + args.v_head_dim)
    rotated = 2 * heads * head + heads * args.v_head_dim
    return heads * head + (rank + rope) + rank + expanded + rotated + heads * args.v_head_dim


def kept_by_experts(args: Namespace, k: float, etp: int = 1) -> float:
    """Bytes per token behind the second norm: router, shared experts, and k rows of routed experts."""
    router = args.num_experts * (2 * _FP32 + 8)  # scores twice, and the order of the tokens
    shared = args.moe_shared_expert_intermediate_size or 0
    gate = _BF16 * args.hidden_size if shared and args.moe_shared_expert_gate else 0
    return router + _kept_by_mlp(args, shared) + gate + k * kept_per_row(args, etp)


def kept_by_low_rank_experts(args: Namespace, tp: int) -> int:
    """Bytes per token behind the second norm of a dense layer with low-rank experts: the MLP's own, the router, and
    between A and B of both linear layers the products before and behind the weights. Those of the first layer are
    gathered for their B."""
    width = args.emoe_lora_experts * elastic_settings(args).lora_rank
    router = args.emoe_lora_experts * (2 * _FP32 + 8)
    return _kept_by_mlp(args, args.ffn_hidden_size) + router + _BF16 * width * (3 + tp)


def kept_per_row(args: Namespace, etp: int = 1) -> int:
    """Bytes of one row: a token at one of its experts. etp: ranks that share an expert and gather each other's rows."""
    gathered = (etp - 1) * (_BF16 * args.hidden_size + _FP32)  # with their weights
    return _BF16 * args.hidden_size + gathered + _kept_by_mlp(args, args.moe_ffn_hidden_size) + _ROW_INDICES


def _kept_by_mlp(args: Namespace, width: int) -> int:
    """Bytes per token: what the activation function takes (twice as wide where it is gated) and gives."""
    return _BF16 * width * (3 if is_gated(args) else 2)


def _working(model: PlannedModel, layout: Layout, numbers: range, spread: float) -> float:
    """The largest layer of the stage while it is computed again."""
    if layout.recompute == "none":
        return 0
    args = model.args
    if args.emoe_lora_experts is not None:
        outside = kept_by_attention(args) + 2 * _BF16 * args.hidden_size
        return layout.tokens * (outside + kept_by_low_rank_experts(args, layout.tp))
    moe = (
        kept_by_experts(args, model.largest_k * spread, layout.etp)
        if any(n in model.moe_layers for n in numbers)
        else 0
    )
    if layout.recompute == "moe":
        return layout.tokens * moe
    dense = 0 if all(n in model.moe_layers for n in numbers) else _kept_by_mlp(args, args.ffn_hidden_size)
    outside = kept_by_attention(args) + 2 * _BF16 * args.hidden_size
    return layout.tokens * (outside + max(moe, dense))


def _buffers(model: PlannedModel, layout: Layout, spread: float) -> float:
    """Rows of one layer while they are exchanged: sent, received, and with split experts gathered. Where no rank sends
    any, the rows in the order of the experts alone."""
    rows = layout.tokens * model.largest_k * _BF16 * model.args.hidden_size
    if layout.ep == 1:
        return rows * layout.etp
    return rows * (1 + spread * (1 + (layout.etp if layout.etp > 1 else 0)))


def _logits(args: Namespace, layout: Layout) -> float:
    """bf16 logits and fp32 softmax, or fp32 gradient and its bf16 copy; tensor-parallel ranks share the vocabulary."""
    share = padded_vocabulary(args, layout.tp) // layout.tp
    return layout.micro_batch * layout.seq * share * (_BF16 + _FP32)


def _fp8_weights(args: Namespace, layout: Layout, stage: int) -> float:
    """Copies of the linear layers' weights: all of the stage but embedding, head, norms and routers."""
    parameters = stage_parameters(args, layout, stage)
    table = table_size(args, layout.tp)
    tables = (stage == 0) + (stage == layout.pp - 1 and not (layout.pp == 1 and _tied(args)))
    return _FP8_COPIES * max(0, parameters.total - tables * table - parameters.whole)


def _tied(args: Namespace) -> bool:
    return not args.untie_embeddings_and_output_weights


def largest_sum(probabilities: Mapping[int, float], layers: int, each_its_own: bool) -> float:
    """Experts per token over `layers` layers that all but one of a million steps stay within.

    each_its_own: every layer draws its own k; otherwise all have the same, and the largest is what counts.
    """
    if not each_its_own:
        return float(layers * max(probabilities))
    return _quantile_of_sum(tuple(probabilities.items()), layers)


@cache  # a search asks for the same few hundreds of times
def _quantile_of_sum(probabilities: tuple[tuple[int, float], ...], layers: int) -> float:
    sums = {0: 1.0}
    for _ in range(layers):
        after: dict[int, float] = {}
        for (total, p), (k, q) in product(sums.items(), probabilities):
            after[total + k] = after.get(total + k, 0.0) + p * q
        sums = after
    above = 0.0
    for total in sorted(sums, reverse=True):
        above += sums[total]
        if above > _RARE:
            return float(total)
    return 0.0
