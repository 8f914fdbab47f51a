"""Any number k' of active experts, and a tail scale, on a transformers model that is already loaded.

transformers keeps k in each gate, read once from config.json; here it changes between two forward passes, for all MoE
layers or for each its own. The config is left as it is: ranks above the k of training are the tail. Shape suffixes: T
tokens, E experts, K active experts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel

from megatron_emoe.hf.comparison import gate_of, gate_scores, moe_block, selection_scores
from megatron_emoe.hf.config_file import check_block
from megatron_emoe.hf.low_rank_model import attached, set_low_rank_k
from megatron_emoe.hf.registry import architectures
from megatron_emoe.routing.budget_scales import at_budget
from megatron_emoe.settings.budget_table import BudgetTable, read_budget_table
from megatron_emoe.settings.tail_scale import TailScale, given_tail_scale, parse_tail_scale

_tails: WeakKeyDictionary[nn.Module, RemovableHandle] = WeakKeyDictionary()


def moe_layer_numbers(config: PreTrainedConfig) -> list[int]:
    """Numbers of the decoder layers with experts, from 1 as Megatron-Core counts, dense layers counted too."""
    architecture = architectures()[config.model_type]
    return [layer + 1 for layer in range(config.num_hidden_layers) if architecture.is_moe(config, layer)]


def trained_k(config: PreTrainedConfig) -> int:
    """The k that the model was trained with: in the block "emoe" that an export leaves, else num_experts_per_tok."""
    return (getattr(config, "emoe", None) or {}).get("k_train", config.num_experts_per_tok)


def set_active_experts(
    model: PreTrainedModel, k: int | Sequence[int], tail_scale: float | Mapping[int, float] | None = None
) -> None:
    """From now on `model` activates k' = `k` experts per token: one number, or one per MoE layer in layer order.

    tail_scale: one number, or a(k') at some k' (linear between them). Where k' is above the k of training
    (`trained_k`), the weights of the ranks above that k are multiplied by a(k') before they are renormalised, as
    --emoe-tail-scale does in Megatron. None: the scale that an export has in the block "emoe" of its config.json, or
    plain top-k' where there is none; 1: plain top-k'. Learned scales by budget in that block (--emoe-budget-scales)
    belong to the model: they are always used, at every k'. A model with low-rank experts (add_low_rank_experts) has one
    k' per layer, and what lora_moe.json says in place of config.json.

    Raises:
        ValueError: a model of another architecture, a k' out of range, a list of the wrong length, or a tail scale that
            is negative or not finite.
    """
    if attached(model):
        set_low_rank_k(model, k, tail_scale)
        return
    if model.config.model_type not in architectures():
        raise ValueError(
            f"model_type {model.config.model_type!r} is not supported; supported: {', '.join(architectures())}"
        )
    check_block(getattr(model.config, "emoe", None), model.config)
    gates = [gate for layer in model.model.layers if (gate := gate_of(layer)) is not None]
    if not gates:
        raise ValueError(f"model_type {model.config.model_type!r}: has no experts, and so no k'")
    ks = _one_per_gate(k, gates)
    tail = _own_tail(model.config) if tail_scale is None else given_tail_scale(tail_scale)
    model_k = trained_k(model.config)
    budgets = read_budget_table(getattr(model.config, "emoe", None), len(gates), gates[0].num_experts)
    for layer, (gate, layer_k) in enumerate(zip(gates, ks, strict=True)):
        gate.top_k = layer_k
        if gate in _tails:
            _tails.pop(gate).remove()
        scale = 1.0 if tail is None or layer_k <= model_k else tail.at(layer_k)
        learned = [0.0] * layer_k if budgets is None else _learned(budgets, layer, layer_k)
        factors = [math.exp(log) * (scale if rank >= model_k else 1.0) for rank, log in enumerate(learned)]
        if any(factor != 1.0 for factor in factors):
            _tails[gate] = gate.register_forward_hook(_rank_hook(factors))


def _learned(budgets: BudgetTable, layer: int, k: int) -> list[float]:
    return at_budget(torch.tensor(budgets.padded(layer)), budgets.ks, k).tolist()


def _own_tail(config: PreTrainedConfig) -> TailScale | None:
    words = (getattr(config, "emoe", None) or {}).get("tail_scale")
    return parse_tail_scale(words) if words else None


def _one_per_gate(k: int | Sequence[int], gates: list[nn.Module]) -> list[int]:
    if not isinstance(k, int) and len(k) != len(gates):
        raise ValueError(f"k' {list(k)}: has {len(k)} entries; must have one for each of the {len(gates)} MoE layers")
    ks = [k] * len(gates) if isinstance(k, int) else list(k)
    for gate, layer_k in zip(gates, ks, strict=True):
        if not 1 <= layer_k <= gate.num_experts:
            raise ValueError(f"k' {layer_k}: must lie in [1, {gate.num_experts}], the number of experts")
        if getattr(gate, "topk_method", None) == "group_limited_greedy":
            reachable = gate.num_experts // gate.num_group * gate.topk_group
            if layer_k > reachable:
                raise ValueError(f"k' {layer_k}: the {gate.topk_group} groups of a token hold only {reachable} experts")
    return ks


def _rank_hook(factors: Sequence[float]) -> Any:
    """Replaces the weights that a gate gives to its experts; which experts they are stays as it is. factors: of the
    scores, by rank, before they are renormalised."""

    def rescale(gate: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE, weights_TK, indices_TK = output
        # DeepSeek's gate does not sort its experts, so ranks are counted here.
        ranked_TK = selection_scores(gate, logits_TE).gather(1, indices_TK)
        order_TK = ranked_TK.argsort(dim=1, descending=True, stable=True)
        factors_K = torch.tensor(factors, device=logits_TE.device)
        scores_TK = gate_scores(gate, logits_TE).gather(1, indices_TK)
        scaled_TK = scores_TK * factors_K[order_TK.argsort(dim=1)]
        return logits_TE, _combined(gate, scaled_TK).to(weights_TK.dtype), indices_TK

    return rescale


def _combined(gate: nn.Module, scores_TK: Tensor) -> Tensor:
    """The rule by which each architecture makes weights of scores."""
    if hasattr(gate, "norm_min"):  # ERNIE 4.5
        return scores_TK / scores_TK.sum(dim=-1, keepdim=True).clamp(min=gate.norm_min)
    if hasattr(gate, "e_score_correction_bias"):  # DeepSeek-V3
        if gate.norm_topk_prob:
            scores_TK = scores_TK / (scores_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return scores_TK * gate.routed_scaling_factor
    if hasattr(gate, "routed_scaling_factor"):  # DeepSeek-V2
        return scores_TK * gate.routed_scaling_factor
    normalises = getattr(gate, "norm_topk_prob", True)  # Mixtral and Granite always do
    return scores_TK / scores_TK.sum(dim=-1, keepdim=True) if normalises else scores_TK


@contextmanager
def counting_rows(model: PreTrainedModel) -> Iterator[dict[int, int]]:
    """Count the (token, expert) pairs that reach the experts of each MoE layer inside, by layer number from 1.

    Pairs, not settings, prove which k' ran: tokens x k'. Shapes are read on the host: no sync.
    """
    rows: dict[int, int] = {}
    hooks = []
    for number, layer in enumerate(model.model.layers, start=1):
        if gate_of(layer) is not None:
            rows[number] = 0
            hooks.append(moe_block(layer).experts.register_forward_pre_hook(_counter(rows, number)))
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


def _counter(rows: dict[int, int], layer: int) -> Any:
    def count(_experts: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        rows[layer] += inputs[1].numel()  # the experts of each token, [T, K]

    return count
