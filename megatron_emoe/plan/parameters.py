"""Parameters that one rank holds, from the model's flags and the layout alone. tools/plan_job.py --check compares them
with the model really built.

Widths that tensor-parallel ranks share are divided by TP, those of experts by ETP; norms, routers and gates are whole
on every rank. Formulas follow Megatron-Core's GPT model with Transformer Engine layers.
"""

from __future__ import annotations

from argparse import Namespace
from dataclasses import astuple, dataclass

from megatron_emoe.model.flops import is_gated, moe_layer_numbers
from megatron_emoe.plan.layout import Layout, stage_layers
from megatron_emoe.settings.elastic_config import elastic_settings
from megatron_emoe.settings.k_schedule import trained_ks


@dataclass(frozen=True)
class Parameters:
    """dense: all but the experts', reduced over the data-parallel ranks. expert: of this rank's routed experts. whole:
    those of `dense` that every tensor-parallel rank holds whole and whose gradients they add up: norms, routers.
    frozen: those of `dense` that are not trained, the base of low-rank experts."""

    dense: int = 0
    expert: int = 0
    whole: int = 0
    frozen: int = 0

    def __add__(self, other: Parameters) -> Parameters:
        mine, theirs = astuple(self), astuple(other)
        return Parameters(*(one + more for one, more in zip(mine, theirs, strict=True)))

    def __mul__(self, layers: int) -> Parameters:
        return Parameters(*(each * layers for each in astuple(self)))

    @property
    def trained(self) -> int:
        """Those that have a gradient."""
        return self.total - self.frozen

    @property
    def total(self) -> int:
        """All parameters of the rank."""
        return self.dense + self.expert


def stage_parameters(args: Namespace, layout: Layout, stage: int, *, local: bool = False) -> Parameters:
    """Parameters of every rank of a pipeline stage (from 0). All its tensor- and expert-parallel ranks hold as many.

    local: of the layers that host mode builds, which split the projection into the keys' latent over the
    tensor-parallel ranks; Transformer Engine's copy it.
    """
    total = _ends(args, layout, stage)
    moe, dense = layers_of_each_kind(args, layout, stage)
    low_rank = args.emoe_lora_experts is not None
    for layers, rest in ((moe, _dense if low_rank else _moe), (dense, _dense)):
        if layers:
            total += (_attention(args, layout.tp, local) + rest(args, layout)) * layers
    if not low_rank:
        return total
    base = Parameters(total.dense, frozen=total.dense)  # without gradients there is nothing to add up
    return base + _low_rank_experts(args, layout) * moe


def _low_rank_experts(args: Namespace, layout: Layout) -> Parameters:
    """Router and low-rank experts of one layer: A of the first linear layer and B of the second are whole."""
    width = args.emoe_lora_experts * elastic_settings(args).lora_rank
    first = args.ffn_hidden_size * (2 if is_gated(args) else 1)
    whole = router_parameters(args) + 2 * width * args.hidden_size
    return Parameters(whole + width * (first + args.ffn_hidden_size) // layout.tp, whole=whole)


def layers_of_each_kind(args: Namespace, layout: Layout, stage: int) -> tuple[int, int]:
    """How many layers of a pipeline stage (from 0) have experts, and how many are dense."""
    numbers = stage_layers(args.num_layers, layout.pp)[stage]
    moe = sum(number in numbers for number in moe_layer_numbers(args))
    return moe, len(numbers) - moe


def padded_vocabulary(args: Namespace, tp: int) -> int:
    """Rows of the embedding over all ranks, as Megatron pads them."""
    if args.padded_vocab_size is not None:
        return args.padded_vocab_size
    multiple = args.make_vocab_size_divisible_by * tp
    return -(-args.vocab_size // multiple) * multiple


def table_size(args: Namespace, tp: int) -> int:
    """Elements of a rank's part of the embedding, or of the head."""
    return padded_vocabulary(args, tp) // tp * args.hidden_size


def _ends(args: Namespace, layout: Layout, stage: int) -> Parameters:
    """Embedding on the first stage, last norm and head on the last; a tied head is a copy if the stages differ."""
    first, last = stage == 0, stage == layout.pp - 1
    table = table_size(args, layout.tp)
    tied = not args.untie_embeddings_and_output_weights
    tables = first + (last and not (tied and first))
    learned = (
        args.max_position_embeddings * args.hidden_size if args.position_embedding_type == "learned_absolute" else 0
    )
    norm = _norm(args, args.hidden_size) if last else 0
    return Parameters(tables * table + (learned if first else 0) + norm, whole=norm)


def _norm(args: Namespace, width: int) -> int:
    return width if args.normalization == "RMSNorm" else 2 * width


def _attention(args: Namespace, tp: int, local: bool) -> Parameters:
    """The attention of a layer, with the norm before it."""
    own = _latent_attention(args, tp, local) if args.multi_latent_attention else _grouped_attention(args, tp)
    bias = args.hidden_size if args.add_bias_linear else 0
    norm = _norm(args, args.hidden_size)
    return own + Parameters(norm + bias, whole=norm + bias)


def _grouped_attention(args: Namespace, tp: int) -> Parameters:
    queries = args.num_attention_heads * args.kv_channels
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    keys = groups * args.kv_channels
    projections = (queries + 2 * keys) * (args.hidden_size + bool(args.add_qkv_bias or args.add_bias_linear))
    norms = 0
    if args.qk_layernorm:
        full = args.emoe_qk_norm == "full"
        norms = queries + keys if full else 2 * _norm(args, args.kv_channels)
    return Parameters((projections + queries * args.hidden_size) // tp + norms, whole=norms)


def _latent_attention(args: Namespace, tp: int, local: bool) -> Parameters:
    """Multi-latent attention with queries that are not compressed (DeepSeek-V2, arXiv 2405.04434, appendix B)."""
    hidden, heads, rope = args.hidden_size, args.num_attention_heads, args.qk_pos_emb_head_dim
    rank, value = args.kv_lora_rank, args.v_head_dim
    down = hidden * (rank + rope)
    split = heads * (hidden * (args.qk_head_dim + rope) + rank * (args.qk_head_dim + value) + value * hidden)
    norm = _norm(args, rank) if args.qk_layernorm else 0
    return Parameters(split // tp + (down // tp if local else down) + norm, whole=norm + (0 if local else down))


def _dense(args: Namespace, layout: Layout) -> Parameters:
    """A dense layer's MLP, with the norm before it."""
    norm = _norm(args, args.hidden_size)
    return Parameters(_mlp(args, args.ffn_hidden_size, layout.tp) + norm, whole=norm)


def _moe(args: Namespace, layout: Layout) -> Parameters:
    """Norm, router, shared experts, and this rank's experts."""
    whole = _norm(args, args.hidden_size) + router_parameters(args)
    shared = args.moe_shared_expert_intermediate_size or 0
    whole += args.hidden_size if shared and args.moe_shared_expert_gate else 0
    expert = args.num_experts // layout.ep * _mlp(args, args.moe_ffn_hidden_size, layout.etp)
    return Parameters(whole + _mlp(args, shared, layout.tp), expert, whole)


def router_parameters(args: Namespace) -> int:
    """Of one layer's router, whole on every rank."""
    noise = args.num_experts if args.emoe_selection == "noisy-topk" else 0
    rows = args.num_experts + noise + (args.emoe_null_experts or 0)
    ks = trained_ks(elastic_settings(args), args.moe_router_topk) if args.emoe_budget_scales else [0]
    return rows * args.hidden_size + (args.num_experts if args.add_bias_linear else 0) + len(ks) * max(ks)


def _mlp(args: Namespace, width: int, ranks: int) -> int:
    """Weights, and biases if there are any: those of the first matrix are split, those of the second are whole."""
    columns = width * (2 if is_gated(args) else 1)
    matrices = (columns + width) * args.hidden_size // ranks
    return matrices + (columns // ranks + args.hidden_size if args.add_bias_linear and width else 0)
