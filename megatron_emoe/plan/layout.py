"""A parallel layout: how a model, its experts and its batch are spread over GPUs, and the rules that it must obey."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_emoe.model.flops import moe_layer_numbers
from megatron_emoe.settings.elastic_config import flag

Recompute = Literal["none", "moe", "full"]

RECOMPUTE: dict[str, tuple[str, ...]] = {
    "none": (),
    "moe": ("--recompute-granularity", "selective", "--recompute-modules", "moe"),
    "full": ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "1"),
}
"""What is computed a second time in the backward pass instead of being kept -> Megatron's flags for it."""


@dataclass(frozen=True)
class OptimizerState:
    """Bytes of a parameter's gradient and of its optimizer state, and Megatron's flags for them."""

    gradient: int
    optimizer: int
    flags: tuple[str, ...] = ()


def _precision_aware(moments: str, gradients: str = "fp32") -> tuple[str, ...]:
    kept = ("--exp-avg-dtype", moments, "--exp-avg-sq-dtype", moments)
    return ("--use-precision-aware-optimizer", "--main-grads-dtype", gradients, *kept)


OPTIMIZER_STATES: dict[str, OptimizerState] = {
    "fp32": OptimizerState(4, 4 + 2 * 4),
    "bf16": OptimizerState(4, 2 + 2 * 2, _precision_aware("bf16")),
    "bf16-grads": OptimizerState(2, 2 + 2 * 2, _precision_aware("bf16", "bf16")),
    "fp8": OptimizerState(2, 2 + 2 * 1, _precision_aware("fp8", "bf16")),
}
"""What gradients and Adam's state are kept in -> their bytes: the fp32 weight and two moments. All but fp32 need
Transformer Engine's FusedAdam, which keeps of the fp32 weight the two bytes that the bf16 weight lacks."""


@dataclass(frozen=True)
class Layout:
    """tp, pp, ep: ranks that share a tensor, the layers, the experts. etp: ranks that share one expert. micro_batch,
    global_batch: sequences. seq: tokens of a sequence. Ranks are numbered as Megatron does: tensor, then expert (or
    data), then pipeline ranks, so the first are the closest. state: see OPTIMIZER_STATES."""

    gpus: int
    gpus_per_node: int
    tp: int
    pp: int
    ep: int
    etp: int
    micro_batch: int
    global_batch: int
    seq: int
    recompute: Recompute = "none"
    fp8: bool = False
    state: str = "fp32"

    @property
    def kept(self) -> OptimizerState:
        """What gradients and optimizer keep for a parameter."""
        return OPTIMIZER_STATES[self.state]

    @property
    def dp(self) -> int:
        """Data-parallel ranks: copies of the weights outside the experts."""
        return self.gpus // (self.tp * self.pp)

    @property
    def edp(self) -> int:
        """Copies of each expert."""
        return self.gpus // (self.etp * self.ep * self.pp)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one rank in one step."""
        return self.global_batch // (self.micro_batch * self.dp)

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch that one rank holds: with tensor parallelism its part of the sequences."""
        return self.micro_batch * self.seq // self.tp

    def crosses_nodes(self, ranks: int) -> bool:
        """Whether a group that spans `ranks` neighbouring ranks leaves a node."""
        return ranks > self.gpus_per_node

    def name(self) -> str:
        """As a person writes it."""
        experts = f" ETP{self.etp}" if max(self.tp, self.etp) > 1 else ""
        return f"TP{self.tp} PP{self.pp} EP{self.ep}{experts} DP{self.dp}"


def stage_layers(num_layers: int, pp: int) -> list[range]:
    """Numbers (from 1) of the layers of each pipeline stage.

    Where the stages cannot be equal the first differs, as Megatron allows: the split with the shortest longest stage,
    and of those the one with the shorter first stage, which holds the embedding and most micro-batches.

    Raises:
        ValueError: fewer layers than stages.
    """
    if pp > num_layers:
        raise ValueError(f"--pp {pp}: more stages than the model's {num_layers} layers")
    if pp == 1:
        return [range(1, num_layers + 1)]
    sizes = [(num_layers - (pp - 1) * rest, rest) for rest in range(1, num_layers // (pp - 1) + 1)]
    first, rest = min((pair for pair in sizes if pair[0] > 0), key=lambda pair: (max(pair), pair[0]))
    starts = [1, *(1 + first + stage * rest for stage in range(pp))]
    return [range(begin, end) for begin, end in zip(starts, starts[1:], strict=False)]


def layout_flags(args: Namespace, layout: Layout) -> list[str]:
    """Megatron's flags for the layout, as words of a command line; args: the model's."""
    words = ["--tensor-model-parallel-size", layout.tp, "--pipeline-model-parallel-size", layout.pp]
    if args.emoe_lora_experts is None:
        words += ["--expert-model-parallel-size", layout.ep, "--moe-token-dispatcher-type", "alltoall"]
    if layout.etp != layout.tp or layout.tp > 1:  # Megatron's default is TP
        words += ["--expert-tensor-parallel-size", layout.etp]
    if layout.tp > 1:
        words.append("--sequence-parallel")
    first, *rest = stage_layers(args.num_layers, layout.pp)
    if rest and len(first) != len(rest[0]):
        words += ["--decoder-first-pipeline-num-layers", len(first)]
    words += ["--micro-batch-size", layout.micro_batch, "--global-batch-size", layout.global_batch]
    words += ["--seq-length", layout.seq, "--use-distributed-optimizer", *RECOMPUTE[layout.recompute]]
    if layout.fp8:
        # Not delayed scaling, Megatron's default: its scales are pickles, which a later start may not load.
        words += ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"]
    words += layout.kept.flags
    return [str(word) for word in words]


_RECOMPUTED: dict[str | None, Recompute] = {None: "none", "full": "full", "selective": "moe"}


def layout_of(args: Namespace, gpus_per_node: int) -> Layout:
    """The layout of a run with Megatron's completed arguments."""
    return Layout(
        gpus=args.world_size,
        gpus_per_node=gpus_per_node,
        tp=args.tensor_model_parallel_size,
        pp=args.pipeline_model_parallel_size,
        ep=args.expert_model_parallel_size,
        etp=args.expert_tensor_parallel_size,
        micro_batch=args.micro_batch_size,
        global_batch=args.global_batch_size,
        seq=args.seq_length,
        recompute=_RECOMPUTED[args.recompute_granularity],
    )


def broken_rules(args: Namespace, layout: Layout) -> Iterator[str]:
    """What makes the layout impossible for a plan of the model: flag, value, rule. Nothing where it is possible."""
    if layout.gpus > layout.gpus_per_node and layout.gpus % layout.gpus_per_node:
        yield f"--gpus {layout.gpus}: must be a multiple of --gpus-per-node {layout.gpus_per_node}, or fit on one node"
    yield from megatron_rules(args, layout)
    if args.emoe_lora_experts is not None:
        yield from _broken_low_rank_rules(args, layout)
    groups = _groups(args)
    if groups % layout.tp:  # Megatron also takes a multiple of the groups, and copies them
        yield f"--tp {layout.tp}: must divide the model's {groups} groups of keys and values (--num-query-groups)"
    if layout.seq % layout.tp:
        yield f"--tp {layout.tp}: must divide --seq {layout.seq}, which its ranks share (--sequence-parallel)"
    if layout.fp8:
        yield from _broken_fp8_rules(args, layout)


def _broken_low_rank_rules(args: Namespace, layout: Layout) -> Iterator[str]:
    """What low-rank experts on a dense model cannot be planned with."""
    cause = f"with --emoe-lora-experts {args.emoe_lora_experts}"
    if layout.ep > 1:
        yield f"--ep {layout.ep}: must be 1 {cause}, every rank has them all"
    if layout.recompute == "moe":
        yield f"--recompute moe: must be none or full {cause}"
    if layout.fp8:
        yield f"--precision fp8: must be bf16 {cause}"


def megatron_rules(args: Namespace, layout: Layout) -> Iterator[str]:
    """What Megatron refuses, in part only when the ranks have started: flag, value, rule."""
    model = layout.tp * layout.pp
    if layout.gpus % model:
        yield f"--tp {layout.tp} x --pp {layout.pp} = {model}: must divide --gpus {layout.gpus}"
    yield from expert_rules(args, layout)
    for name in ("emoe_second_pass", "emoe_teacher"):
        if layout.pp > 1 and (value := getattr(args, name)):
            cause = "both passes go through the whole model"
            yield f"--pp {layout.pp}: must be 1 with {flag(name)} {value}, {cause}"
    if layout.pp > args.num_layers:
        yield f"--pp {layout.pp}: more stages than the model's {args.num_layers} layers (--num-layers)"
    yield from _broken_tensor_rules(args, layout)
    yield from _broken_batch_rules(args, layout)


def expert_rules(args: Namespace, layout: Layout) -> Iterator[str]:
    """The same for the experts alone, whose ranks are counted without context parallelism."""
    experts = layout.etp * layout.ep * layout.pp
    if layout.gpus % experts:
        shape = f"--ep {layout.ep} x --etp {layout.etp} x --pp {layout.pp} = {experts}"
        yield f"{shape}: must divide --gpus {layout.gpus}"
    if layout.ep > 1 and args.num_experts % layout.ep:
        yield f"--ep {layout.ep}: must divide the model's {args.num_experts} experts (--num-experts)"
    if args.moe_ffn_hidden_size % layout.etp:
        yield f"--etp {layout.etp}: must divide the model's {args.moe_ffn_hidden_size} columns (--moe-ffn-hidden-size)"


def _groups(args: Namespace) -> int:
    return args.num_query_groups if args.group_query_attention else 0


def _dense_width(args: Namespace) -> int:
    """Columns of a dense layer; 0 where every layer has experts."""
    return args.ffn_hidden_size if len(moe_layer_numbers(args)) < args.num_layers else 0


def _broken_fp8_rules(args: Namespace, layout: Layout) -> Iterator[str]:
    """FP8 products take tensors whose sides are multiples of 16."""
    shared = args.moe_shared_expert_intermediate_size or 0
    sides = {
        f"--micro-batch {layout.micro_batch} x --seq {layout.seq} / --tp {layout.tp}": layout.tokens,
        "the model's --hidden-size": args.hidden_size,
        f"--ffn-hidden-size / --tp {layout.tp}": _dense_width(args) // layout.tp,
        f"--moe-shared-expert-intermediate-size / --tp {layout.tp}": shared // layout.tp,
        f"--moe-ffn-hidden-size / --etp {layout.etp}": args.moe_ffn_hidden_size // layout.etp,
        **_attention_sides(args, layout.tp),
    }
    for side, size in sides.items():
        if size % 16:
            yield f"--precision fp8: {side} = {size} must be a multiple of 16"


def _attention_sides(args: Namespace, tp: int) -> dict[str, int]:
    """Widths of the attention's projections on one rank."""
    heads = args.num_attention_heads
    if args.multi_latent_attention:
        rope, head = args.qk_pos_emb_head_dim, args.qk_head_dim
        return {
            "--kv-lora-rank": args.kv_lora_rank,
            "--kv-lora-rank + --qk-pos-emb-head-dim": args.kv_lora_rank + rope,
            f"queries' width / --tp {tp}": heads * (head + rope) // tp,
            f"width of keys and values / --tp {tp}": heads * (head + args.v_head_dim) // tp,
            f"output's width / --tp {tp}": heads * args.v_head_dim // tp,
        }
    queries, keys = heads * args.kv_channels, (_groups(args) or heads) * args.kv_channels
    together = f"width of queries, keys and values / --tp {tp}"
    return {f"queries' width / --tp {tp}": queries // tp, together: (queries + 2 * keys) // tp}


def _broken_tensor_rules(args: Namespace, layout: Layout) -> Iterator[str]:
    """Everything that tensor-parallel ranks share must split evenly."""
    shared = {
        "attention heads (--num-attention-heads)": args.num_attention_heads,
        "columns of a dense layer (--ffn-hidden-size)": _dense_width(args),
        "columns of the shared experts (--moe-shared-expert-intermediate-size)": (
            args.moe_shared_expert_intermediate_size or 0
        ),
        "rows of the embedding (--padded-vocab-size)": args.padded_vocab_size or 0,
    }
    for what, count in shared.items():
        if count % layout.tp:
            yield f"--tp {layout.tp}: must divide the model's {count} {what}"
    groups = _groups(args)
    if groups and groups % layout.tp and layout.tp % groups:
        what = "groups of keys and values (--num-query-groups)"
        yield f"--tp {layout.tp}: must divide the model's {groups} {what}, or be a multiple of them"
    if args.sequence_parallel and layout.seq % layout.tp:
        yield f"--tp {layout.tp}: must divide --seq {layout.seq}, which its ranks share (--sequence-parallel)"


def _broken_batch_rules(args: Namespace, layout: Layout) -> Iterator[str]:
    if layout.seq > args.max_position_embeddings:
        longest = f"the model's --max-position-embeddings {args.max_position_embeddings}"
        yield f"--seq {layout.seq}: must not exceed {longest}"
    if layout.gpus % (layout.tp * layout.pp) == 0 and layout.global_batch % (layout.micro_batch * layout.dp):
        share = f"--micro-batch {layout.micro_batch} x {layout.dp} data-parallel ranks"
        yield f"--global-batch {layout.global_batch}: must be a multiple of {share}"
