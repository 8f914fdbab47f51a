"""The check after an import: every layer of the checkpoint computes what transformers computes, one layer in memory.

The Hugging Face side knows nothing of this package's name tables: transformers builds a model of one layer and loads
that layer's tensors by its own rules. The Megatron side is this package's model of one layer, which reads what its own
sharded state dict names for layer n. Both get the same hidden states in fp32, so a difference has its cause in that
layer: only transformers' output is handed on.

Each layer runs twice: each model with its own k, and both with every expert active, so that no weight stays unused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from megatron_emoe.hf.architecture import experts_in, own_k
from megatron_emoe.hf.comparison import (
    Trace,
    differing_sets,
    relative_difference,
    set_hf_k,
    tracing_hf,
    tracing_megatron,
)
from megatron_emoe.hf.one_layer import HFLayers, MegatronLayers
from megatron_emoe.hf.one_process import alone
from megatron_emoe.hf.registry import architectures
from megatron_emoe.routing.active_k import get_active_k
from megatron_emoe.training.evaluation import current_device

BOUND = 1e-5
"""Largest difference of a token's hidden state over its largest element, with fp32 arithmetic on both sides. Rounding
leaves about 1e-6; of the faults that this check is tested with, the least visible (a norm's epsilon of 1e-6 for 1e-5)
makes ten times the bound."""

_SEQUENCES, _LENGTH = 2, 32


@dataclass(frozen=True)
class LayerRow:
    """One comparison. part: "embedding", "layer n", or "head". k: active experts, None where there is no MoE layer.
    difference: the largest of all tokens, relative to the token's largest element. ties: tokens left out of it, where
    two experts have the same score up to the rounding of fp32."""

    part: str
    k: int | None
    difference: float
    ties: int = 0

    def __str__(self) -> str:
        k = "" if self.k is None else f" at k = {self.k}"
        ties = f", {self.ties} tokens left out (ties)" if self.ties else ""
        return f"{self.part}{k}: largest relative difference {self.difference:.1e}{ties}"


@dataclass(frozen=True)
class LayerReport:
    """All comparisons of a model, in the order of a forward pass. tokens: in each of them."""

    rows: tuple[LayerRow, ...]
    tokens: int

    @property
    def largest(self) -> LayerRow:
        """The comparison with the largest difference."""
        return max(self.rows, key=lambda row: row.difference)


def check_layers(
    hf_folder: Path,
    checkpoint: Path,
    *,
    tokens: Tensor | None = None,
    report: Callable[[str], None] = print,
    flags: Sequence[str] = (),
) -> LayerReport:
    """Compare a checkpoint, given by its own folder (release, iter_...), with a Hugging Face model, layer by layer.

    tokens: int64 [B, S]; by default 2 x 32 random ones. report: gets a line for each comparison. flags: Megatron's, on
    how to run (--transformer-impl local). Memory: a layer (or embedding and head) in fp32 on either side, more while
    transformers loads its own: 8 GB at OLMoE's size, 14 GB at ERNIE's, however many layers there are.

    Raises:
        ValueError: the first part that differs, by how much, and the bound; or an input that cannot be read.
    """
    hf = HFLayers(hf_folder)
    generator = torch.Generator().manual_seed(1)
    if tokens is None:
        tokens = torch.randint(0, hf.config.vocab_size, (_SEQUENCES, _LENGTH), generator=generator)
    rows = []
    with alone(), torch.no_grad():
        ours = MegatronLayers(checkpoint, tokens.shape[1], flags)
        if ours.num_layers != hf.config.num_hidden_layers:
            raise ValueError(f"{checkpoint}: {ours.num_layers} layers, {hf_folder} has {hf.config.num_hidden_layers}")
        for row in _comparisons(hf, ours, tokens.to(current_device())):
            report(str(row))
            rows.append(row)
    return LayerReport(tuple(rows), tokens.numel())


def _comparisons(hf: HFLayers, ours: MegatronLayers, tokens_BS: Tensor) -> Iterator[LayerRow]:
    config, scale = hf.config, architectures()[hf.config.model_type].stream_scale(hf.config)
    hidden_BSD = hf.ends().model.embed_tokens(tokens_BS) * getattr(config, "embedding_multiplier", 1.0)
    positions = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    yield _row("embedding", None, ours.ends().embedding(tokens_BS, positions).transpose(0, 1) * scale, hidden_BSD)
    for layer in range(config.num_hidden_layers):
        moe = hf.is_moe(layer)
        mine, theirs = ours.layer(layer, moe), hf.layer(layer)
        given_BSD = hidden_BSD
        for k in (config.num_experts_per_tok, experts_in(config)) if moe else (None,):
            row, output_BSD = _compare_layer(theirs, mine, given_BSD, f"layer {layer}", k, scale)
            hidden_BSD = output_BSD if hidden_BSD is given_BSD else hidden_BSD
            yield row
        del theirs, mine
    model = hf.ends()
    logits_BSV = model.lm_head(model.model.norm(hidden_BSD)) / getattr(config, "logits_scaling", 1.0)
    yield _row("head", None, _logits(ours.ends(), hidden_BSD / scale), logits_BSV)


def _compare_layer(
    theirs: PreTrainedModel, mine: nn.Module, hidden_BSD: Tensor, part: str, k: int | None, scale: float
) -> tuple[LayerRow, Tensor]:
    """One layer on both sides; the comparison and transformers' output. scale: its hidden states over Megatron's."""
    expected = _run_hf(theirs, hidden_BSD, k)
    own = k == own_k(theirs.config)  # then the checkpoint must say the same
    found = _run_megatron(mine, hidden_BSD / scale, None if own else k, scale)
    ties_BS = torch.zeros(hidden_BSD.shape[:2], dtype=torch.bool)
    if k is not None:
        ties_BS = _check_sets(expected, found, part, k)
    output_BSD = expected.outputs_BSD[0]
    return _row(part, k, found.outputs_BSD[0], output_BSD, ties_BS), output_BSD.to(hidden_BSD.device)


def _run_hf(model: PreTrainedModel, hidden_BSD: Tensor, k: int | None) -> Trace:
    layers = model.model.layers
    if k is not None:
        set_hf_k(layers, k)
    with tracing_hf(layers, hidden_BSD.shape[0]) as trace:
        model.model(inputs_embeds=hidden_BSD, use_cache=False)
    return trace


def _run_megatron(model: nn.Module, hidden_BSD: Tensor, k: int | None, scale: float) -> Trace:
    model.set_input_tensor(hidden_BSD.transpose(0, 1).contiguous())
    with (
        tracing_megatron(model.decoder.layers, hidden_BSD.shape[0], scale) as trace,
        get_active_k().evaluating(k),
        get_active_k().plain_weights(),  # transformers by its own rules has no scales
    ):
        model(None, None, None)
    return trace


def _logits(model: nn.Module, hidden_BSD: Tensor) -> Tensor:
    tied = model.shared_embedding_or_output_weight() if model.share_embeddings_and_output_weights else None
    normed = model.decoder.final_layernorm(hidden_BSD.transpose(0, 1).contiguous())
    return model._scale_logits(model.output_layer(normed, weight=tied)[0]).transpose(0, 1)


def _check_sets(expected: Trace, found: Trace, part: str, k: int) -> Tensor:
    """Tokens whose experts differ by a tie, bool [B, S]; ValueError if any differ otherwise."""
    differs_BS, ties_BS = differing_sets(expected, found, 0)
    wrong_BS = differs_BS & ~ties_BS
    if wrong_BS.any():
        b, s = wrong_BS.nonzero()[0].tolist()
        theirs, mine = (trace.chosen_BSE[0][b, s].nonzero().flatten().tolist() for trace in (expected, found))
        raise ValueError(
            f"{part} at k = {k}: {int(wrong_BS.sum())} of {wrong_BS.numel()} tokens have other experts than in "
            f"transformers, the first {mine} instead of {theirs}"
        )
    return ties_BS


def _row(part: str, k: int | None, ours: Tensor, theirs: Tensor, ties_BS: Tensor | None = None) -> LayerRow:
    """The comparison; ValueError if it is out of bounds. A head may have rows of padding."""
    theirs = theirs.float().cpu()
    difference_BS = relative_difference(ours[..., : theirs.shape[-1]].float().cpu(), theirs)
    ties = 0
    if ties_BS is not None:
        difference_BS, ties = difference_BS[~ties_BS], int(ties_BS.sum())
    largest = float(difference_BS.max()) if difference_BS.numel() else 0.0
    row = LayerRow(part, k, largest, ties)
    if not largest <= BOUND:  # also where it is not a number
        raise ValueError(
            f"{row}, above the bound of {BOUND:.0e}: the checkpoint does not compute what transformers does"
        )
    return row
