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
"""Routing scores are softmax probabilities, for ERNIE plus a selection bias. Two experts whose scores differ by no more
than this are a tie in fp32: near ERNIE's offset of 40 one step of fp32 is 3.8e-6."""


@dataclass
class Trace:
    """One forward pass. outputs_BSD: fp32, of each decoder layer. chosen_BSE: bool, routed experts of each MoE layer.
    scores_BSE: fp32, what the experts were ranked by (Hugging Face side only). All on the CPU."""

    outputs_BSD: dict[int, Tensor] = field(default_factory=dict)
    chosen_BSE: dict[int, Tensor] = field(default_factory=dict)
    scores_BSE: dict[int, Tensor] = field(default_factory=dict)


@contextmanager
def tracing_hf(layers: nn.ModuleList, batch: int) -> Iterator[Trace]:
    """Fill a Trace from the decoder layers of a transformers model that runs `batch` sequences inside."""
    trace, hooks = Trace(), []

    def gate_hook(number: int) -> Any:
        def keep(gate: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits_TE, _, indices_TK = output
            chosen = torch.zeros_like(logits_TE, dtype=torch.bool).scatter(1, indices_TK, True)
            trace.chosen_BSE[number] = chosen.view(batch, -1, chosen.shape[-1]).cpu()
            trace.scores_BSE[number] = _scores(gate, logits_TE).view(batch, -1, chosen.shape[-1]).cpu()

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
def tracing_megatron(layers: nn.ModuleList, batch: int) -> Iterator[Trace]:
    """The same from the decoder layers of a Megatron model, whose tensors are [S, B, ...] or [S * B, E]."""
    trace, hooks = Trace(), []

    def router_hook(number: int) -> Any:
        def keep(_router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor]) -> None:
            chosen_TE = output[1].bool()
            trace.chosen_BSE[number] = chosen_TE.view(-1, batch, chosen_TE.shape[-1]).transpose(0, 1).cpu()

        return keep

    def layer_hook(number: int) -> Any:
        def keep(_layer: nn.Module, _inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            trace.outputs_BSD[number] = hidden.transpose(0, 1).float().cpu()

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
    return getattr(layer.mlp, "gate", None) if hasattr(layer.mlp, "experts") else None


def set_hf_k(layers: nn.ModuleList, k: int) -> None:
    """Make every gate of a transformers model choose k experts: each keeps the number it was built with."""
    for layer in layers:
        if (gate := gate_of(layer)) is not None:
            gate.top_k = k


def _scores(gate: nn.Module, logits_TE: Tensor) -> Tensor:
    """What the gate ranks by: probabilities, plus ERNIE's selection bias."""
    scores_TE = logits_TE.float().softmax(dim=-1)
    bias = getattr(gate, "moe_statics", None)
    return scores_TE if bias is None else bias(scores_TE)


def relative_difference(ours_BSD: Tensor, theirs_BSD: Tensor) -> Tensor:
    """Largest difference of each token's hidden state over its largest element: [B, S].

    Per token, because a few tokens of a trained model have hidden states a thousand times larger than all others.
    """
    scale_BS = theirs_BSD.abs().amax(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
    return (ours_BSD - theirs_BSD).abs().amax(dim=-1) / scale_BS


def differing_sets(theirs: Trace, ours: Trace, layer: int) -> tuple[Tensor, Tensor]:
    """Where a layer's routed sets differ, and where they differ by nothing but ties: bool [B, S] each."""
    a_BSE, b_BSE = theirs.chosen_BSE[layer], ours.chosen_BSE[layer]
    differs_BS = (a_BSE != b_BSE).any(dim=-1)
    scores_BSE = theirs.scores_BSE[layer]
    lost = torch.where(a_BSE & ~b_BSE, scores_BSE, torch.inf).amin(dim=-1)
    gained = torch.where(b_BSE & ~a_BSE, scores_BSE, -torch.inf).amax(dim=-1)
    highest = torch.where(a_BSE & ~b_BSE, scores_BSE, -torch.inf).amax(dim=-1)
    lowest = torch.where(b_BSE & ~a_BSE, scores_BSE, torch.inf).amin(dim=-1)
    close = (lost - gained).abs().maximum((highest - lowest).abs()) <= TIE
    same_number = a_BSE.sum(dim=-1) == b_BSE.sum(dim=-1)
    return differs_BS, differs_BS & close & same_number


def after(flagged_BS: Tensor) -> Tensor:
    """Every position at or after a flagged one of the same sequence: what attention carries a difference to."""
    return flagged_BS.int().cummax(dim=1).values.bool()
