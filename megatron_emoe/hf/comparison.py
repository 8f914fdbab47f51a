"""What a forward pass shows on either side, decoder layer by decoder layer, and how far two passes are apart.

Both sides are watched through hooks on their own modules: transformers' decoder layers and gates, Megatron's decoder
layers and routers. Layers count from 0. Shape suffixes: B sequences, S positions, D hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

TIE = 1e-5
"""Routing scores are softmax probabilities or sigmoids, for ERNIE and DeepSeek-V3 plus a selection bias. Where the same
hidden states are routed in fp32, two experts are a tie if their scores differ by no more than this: near ERNIE's offset
of 40 a step of fp32 is 3.8e-6."""


@dataclass
class Trace:
    """One forward pass. outputs_BSD: fp32, of each decoder layer. chosen_BSE: bool, routed experts of each MoE layer.
    scores_BSE: fp32, what the experts were ranked by (Hugging Face side only). All on the CPU."""

    outputs_BSD: dict[int, Tensor] = field(default_factory=dict)
    chosen_BSE: dict[int, Tensor] = field(default_factory=dict)
    scores_BSE: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """One run of one model. logits_BSV: fp32, on the CPU."""

    logits_BSV: Tensor
    trace: Trace


@dataclass(frozen=True)
class Distance:
    """How far one run is from another. max_difference: of a logit. kl: mean KL, nats per token, in float64. other_top1:
    share of tokens with another most likely next token. other_sets: share of (token, MoE layer) pairs with other
    experts."""

    max_difference: float
    kl: float
    other_top1: float
    other_sets: float


@contextmanager
def tracing_hf(layers: nn.ModuleList, batch: int) -> Iterator[Trace]:
    """Fill a Trace from the decoder layers of a transformers model that runs `batch` sequences inside."""
    trace, hooks = Trace(), []

    def gate_hook(number: int) -> Any:
        def keep(gate: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits_TE, _, indices_TK = output
            chosen = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, indices_TK, True)
            trace.chosen_BSE[number] = chosen.view(batch, -1, chosen.shape[-1]).cpu()
            trace.scores_BSE[number] = selection_scores(gate, logits_TE).view(batch, -1, chosen.shape[-1]).cpu()

        return keep

    def layer_hook(number: int) -> Any:
        def keep(_layer: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            trace.outputs_BSD[number] = hidden.float().cpu()

        return keep

    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_hook(layer_hook(number)))
        if (gate := gate_of(layer)) is not None:
            hooks.append(gate.register_forward_hook(gate_hook(number)))
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def tracing_megatron(layers: nn.ModuleList, batch: int, scale: float = 1.0) -> Iterator[Trace]:
    """The same from the decoder layers of a Megatron model, whose tensors are [S, B, ...] or [S * B, E]. scale: what
    its hidden states are multiplied by (Architecture.stream_scale)."""
    trace, hooks = Trace(), []

    def router_hook(number: int) -> Any:
        def keep(_router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            chosen_TE = output[1].bool()
            trace.chosen_BSE[number] = chosen_TE.view(-1, batch, chosen_TE.shape[-1]).transpose(0, 1).cpu()

        return keep

    def layer_hook(number: int) -> Any:
        def keep(_layer: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            trace.outputs_BSD[number] = hidden.transpose(0, 1).float().cpu() * scale

        return keep

    for number, layer in enumerate(layers):
        hooks.append(layer.register_forward_hook(layer_hook(number)))
        if (router := getattr(layer.mlp, "router", None)) is not None:
            hooks.append(router.register_forward_hook(router_hook(number)))
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()


def gate_of(layer: nn.Module) -> nn.Module | None:
    """The gate of a transformers decoder layer, None where the layer is dense."""
    block = moe_block(layer)
    return (getattr(block, "gate", None) or block.router) if hasattr(block, "experts") else None


def moe_block(layer: nn.Module) -> nn.Module:
    """What stands behind the attention of a transformers decoder layer; in Granite it is not called mlp."""
    return layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe


def set_hf_k(layers: nn.ModuleList, k: int) -> None:
    """Make every gate of a transformers model choose k experts: each keeps the number it was built with."""
    for layer in layers:
        if (gate := gate_of(layer)) is not None:
            gate.top_k = k


def gate_scores(gate: nn.Module, logits_TE: Tensor) -> Tensor:
    """What the gate makes weights of: sigmoids in DeepSeek-V3's, which has a bias of its own, else a softmax."""
    if hasattr(gate, "e_score_correction_bias"):
        return logits_TE.float().sigmoid()
    return logits_TE.float().softmax(dim=-1)


def selection_scores(gate: nn.Module, logits_TE: Tensor) -> Tensor:
    """What the gate ranks by: its scores, plus the selection bias of ERNIE and DeepSeek-V3."""
    scores_TE = gate_scores(gate, logits_TE)
    if hasattr(gate, "e_score_correction_bias"):
        return scores_TE + gate.e_score_correction_bias
    bias = getattr(gate, "moe_statics", None)
    return scores_TE if bias is None else bias(scores_TE)


def relative_difference(ours_BSD: Tensor, theirs_BSD: Tensor) -> Tensor:
    """Largest difference of each token's hidden state over its largest element: [B, S].

    Per token, because a few tokens of a trained model have hidden states a thousand times larger than all others.
    """
    scale_BS = theirs_BSD.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (ours_BSD - theirs_BSD).abs().amax(dim=-1) / scale_BS


def differing_sets(theirs: Trace, ours: Trace, layer: int, tie: float = TIE) -> tuple[Tensor, Tensor]:
    """Where a layer's routed sets differ, and where they differ by nothing but ties: bool [B, S] each."""
    a_BSE, b_BSE = theirs.chosen_BSE[layer], ours.chosen_BSE[layer]
    differs_BS = (a_BSE != b_BSE).any(dim=-1)
    scores_BSE = theirs.scores_BSE[layer]
    swapped_BSE = a_BSE ^ b_BSE
    highest_BS = torch.where(swapped_BSE, scores_BSE, -torch.inf).amax(dim=-1)
    lowest_BS = torch.where(swapped_BSE, scores_BSE, torch.inf).amin(dim=-1)
    same_number_BS = a_BSE.sum(dim=-1) == b_BSE.sum(dim=-1)
    return differs_BS, differs_BS & same_number_BS & (highest_BS - lowest_BS <= tie)


def distance(expected: Answer, found: Answer, where_BS: Tensor) -> Distance:
    """Over the tokens where `where_BS`; infinite where there are none."""
    if not where_BS.any():
        return Distance(torch.inf, torch.inf, torch.inf, torch.inf)
    a_TV, b_TV = expected.logits_BSV[where_BS], found.logits_BSV[where_BS]
    p_TV, q_TV = a_TV.double().log_softmax(-1), b_TV.double().log_softmax(-1)
    layers = expected.trace.chosen_BSE
    differs = [differing_sets(expected.trace, found.trace, layer)[0][where_BS] for layer in layers]
    return Distance(
        max_difference=float((a_TV - b_TV).abs().max()),
        kl=float((p_TV.exp() * (p_TV - q_TV)).sum(-1).mean()),
        other_top1=float((a_TV.argmax(-1) != b_TV.argmax(-1)).double().mean()),
        other_sets=float(torch.stack(differs).double().mean()) if differs else 0.0,
    )


def reached_by_no_tie(expected: Trace, found: Trace, tie: float | None) -> tuple[Tensor, int, int | None]:
    """Tokens that no tie reaches (bool [B, S]), the number of ties, the first layer with another difference of sets.

    A tie reaches its own token, and in the layers that follow all later ones of its sequence. Without a `tie` none is
    told apart: every token counts.
    """
    reached_BS = torch.zeros(next(iter(expected.outputs_BSD.values())).shape[:2], dtype=torch.bool)
    ties, first = 0, None
    for layer in sorted(expected.chosen_BSE):
        differs_BS, tied_BS = differing_sets(expected, found, layer, -1.0 if tie is None else tie)
        if first is None and (differs_BS & ~tied_BS & ~reached_BS).any():
            first = layer
        tied_BS = tied_BS & ~reached_BS
        ties += int(tied_BS.sum())
        reached_BS = _from_there_on(reached_BS | tied_BS)
    return ~reached_BS, ties, first


def first_layer(expected: Trace, found: Trace, where_BS: Tensor, bound: float) -> int | None:
    """The first layer whose output differs by more than `bound` (relative) at a token where `where_BS`."""
    for layer in sorted(expected.outputs_BSD):
        difference_BS = relative_difference(found.outputs_BSD[layer], expected.outputs_BSD[layer])
        if not (difference_BS[where_BS] <= bound).all():
            return layer
    return None


def _from_there_on(flagged_BS: Tensor) -> Tensor:
    """Every position at or after a flagged one of the same sequence: what attention carries a difference to."""
    return flagged_BS.int().cummax(dim=1).values.bool()
