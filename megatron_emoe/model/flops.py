"""Forward FLOPs of a whole model for one token at any k', from Megatron's flags alone. Pure, no tensors.

A multiply-add counts as 2. Counted are the matrix products of attention, router, experts, shared experts, dense layers
and output layer, and attention itself over the average causal context of (S + 1) / 2 tokens. Not counted: the lookup in
the embedding, norms, biases, activation functions, softmax.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from megatron_emoe.settings.elastic_config import elastic_settings

_NOT_COUNTED = ("moe_latent_size", "experimental_attention_variant", "attention_output_gate", "window_size")
"""Flags that change what a layer computes in ways that this formula does not know."""


def moe_layer_numbers(args: Namespace) -> list[int]:
    """Numbers of the decoder layers with experts, from 1, dense layers counted too (--moe-layer-freq)."""
    frequency, layers = args.moe_layer_freq, range(args.num_layers)
    pattern = [layer % frequency == 0 for layer in layers] if isinstance(frequency, int) else frequency
    return [layer + 1 for layer in layers if pattern[layer]]


def check_moe_layers(args: Namespace) -> None:
    """ValueError where --moe-layer-freq is below 1, or a list of another length than the model has layers."""
    pattern, layers = args.moe_layer_freq, args.num_layers
    if isinstance(pattern, int) and pattern < 1:
        raise ValueError(f"--moe-layer-freq {pattern}: must be at least 1")
    if isinstance(pattern, list) and layers is not None and len(pattern) != layers:
        raise ValueError(f"--moe-layer-freq {pattern}: {len(pattern)} entries; must be one for each of {layers} layers")


def flops_per_token(args: Namespace, ks: Sequence[float]) -> float | None:
    """Forward FLOPs of one token in a sequence of --seq-length. ks: experts that run, one number per MoE layer.

    args: Megatron's, completed. None where a flag changes a layer in a way that is not counted here.
    """
    if any(getattr(args, name, None) for name in _NOT_COUNTED):
        return None
    low_rank = args.emoe_lora_experts is not None
    dense_layers = args.num_layers if low_rank else args.num_layers - len(ks)
    matrices = 3 if is_gated(args) else 2
    weights, per_context = _latent_attention(args) if args.multi_latent_attention else _attention(args)
    products = args.num_layers * weights
    products += dense_layers * matrices * args.hidden_size * args.ffn_hidden_size
    routed_to = args.num_experts + (args.emoe_null_experts or 0)
    products += len(ks) * (args.hidden_size * routed_to + _shared_experts(args, matrices))
    if low_rank:
        products += len(ks) * lora_products(args)
    else:
        products += sum(ks) * matrices * args.hidden_size * args.moe_ffn_hidden_size
    products += args.hidden_size * args.padded_vocab_size
    return 2.0 * products + args.num_layers * per_context * (args.seq_length + 1)


def lora_products(args: Namespace) -> int:
    """Multiply-adds of the low-rank experts on both linear layers of one MLP for one token. All of them are computed,
    at every k'."""
    rank = elastic_settings(args).lora_rank
    first = (2 if is_gated(args) else 1) * args.ffn_hidden_size
    return args.emoe_lora_experts * rank * (2 * args.hidden_size + first + args.ffn_hidden_size)


def is_gated(args: Namespace) -> bool:
    """Whether an expert has three matrices instead of two."""
    return bool(args.swiglu or getattr(args, "quick_geglu", False))


def _attention(args: Namespace) -> tuple[int, int]:
    """Weights of the projections, and multiply-adds for each token of context."""
    queries = args.num_attention_heads * args.kv_channels
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    return args.hidden_size * (2 * queries + 2 * groups * args.kv_channels), 2 * queries


def _latent_attention(args: Namespace) -> tuple[int, int]:
    """The same for multi-latent attention (DeepSeek-V2, arXiv 2405.04434), latents expanded as in training."""
    hidden, heads, rope = args.hidden_size, args.num_attention_heads, args.qk_pos_emb_head_dim
    head = args.qk_head_dim + rope
    queries = (hidden + heads * head) * args.q_lora_rank if args.q_lora_rank else hidden * heads * head
    latent = hidden * (args.kv_lora_rank + rope) + args.kv_lora_rank * heads * (args.qk_head_dim + args.v_head_dim)
    return queries + latent + heads * args.v_head_dim * hidden, heads * (head + args.v_head_dim)


def _shared_experts(args: Namespace, matrices: int) -> int:
    width = args.moe_shared_expert_intermediate_size or 0
    gate = args.hidden_size if width and args.moe_shared_expert_gate else 0
    return matrices * args.hidden_size * width + gate
