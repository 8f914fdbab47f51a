"""On a CPU: router and experts of one layer, on as many experts of each token as its k', in one call of vLLM's kernel.

The kernel takes equally many experts of every row. One call for each k' would read an expert's weights once for each,
and in decoding reading them is most of the work. So a token with k' experts becomes k' / w rows of w experts, where w
is the greatest common divisor of the k' in the batch; the rows of a token are added up. In bf16 each row is rounded
before that, as a token in a batch of one k' is not. No kernel is given an expert of -1: this one writes out of bounds
with it. Shape suffixes: T tokens, E experts, K ranks, R rows, W experts of a row, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.forward_context import get_forward_context
from vllm.utils.torch_utils import direct_register_custom_op

from emoe_vllm.levels import LayerTable
from emoe_vllm.routing import Rule, route

Group = tuple[int, Tensor | None]
"""A level, and which tokens have it: int64 positions, None: all of them."""


@dataclass(frozen=True)
class Rows:
    """Tokens of several k' as rows of `width` experts. token_R: whose row it is. slice_R: which experts it has, of the
    tokens' ranks in slices of `width`."""

    width: int
    token_R: Tensor
    slice_R: Tensor

    @classmethod
    def of(cls, tokens: Sequence[Tensor], ks: Sequence[int]) -> Rows:
        """tokens: int64 positions of those that have each of `ks`."""
        width = math.gcd(*ks)
        counts, most = [k // width for k in ks], max(ks) // width
        found = zip(tokens, counts, strict=True)
        slices = [(where.unsqueeze(1) * most + torch.arange(rows)).flatten() for where, rows in found]
        slice_R = torch.cat(slices)
        return cls(width, slice_R // most, slice_R)

    def added(self, rows_RD: Tensor, tokens: int) -> Tensor:
        """The sum of each token's rows, in fp32; 0 for tokens that have none."""
        out_TD = torch.zeros(tokens, rows_RD.shape[1], dtype=torch.float32)
        return out_TD.index_add_(0, self.token_R, rows_RD.float()).to(rows_RD.dtype)


@dataclass
class Batch:
    """What the layers of one engine know of the tokens that they get. levels_T: int32, one for every token that a step
    can have, on the model's device and always the same memory. groups: the same by level, on the host, without
    padding; a CPU goes by them."""

    levels_T: Tensor
    groups: list[Group]
    rows: dict[int, int] = field(default_factory=dict)
    """(token, expert) pairs that reached the experts of each layer, by its number in the model. CPU only: elsewhere
    counting would wait for the device."""
    _known: dict[tuple[int, ...], Rows] = field(default_factory=dict)
    _known_of: list[Group] | None = None

    def as_rows(self, ks: tuple[int, ...]) -> Rows:
        """The rows of the groups' tokens where a layer has these k' for them: made once for all layers alike."""
        if self._known_of is not self.groups:
            self._known, self._known_of = {}, self.groups
        if ks not in self._known:
            self._known[ks] = Rows.of([where for _, where in self.groups if where is not None], ks)
        return self._known[ks]


class ExpertsOnCPU:
    """One layer. `layer`: vLLM's RoutedExperts, loaded."""

    def __init__(self, layer: Any, number: int, rule: Rule, batch: Batch, table: LayerTable) -> None:
        self.layer, self.number, self.rule, self.batch, self.table = layer, number, rule, batch, table
        self.kind = layer.quant_method.topk_indices_dtype or torch.int32  # all that the kernel reads
        self.kernel = _kernel(layer)
        self.factors: dict[int, Tensor] = {}
        batch.rows[number] = 0

    def __call__(self, hidden_TD: Tensor, logits_TE: Tensor) -> Tensor:
        groups = self.batch.groups
        if len(groups) > 1:
            return self._mixed(hidden_TD, logits_TE, groups)
        level = groups[0][0]
        if (factors_1K := self.factors.get(level)) is None:
            table = self.table
            factors_1K = self.factors[level] = table.factors_VK[level : level + 1, : table.ks[level]]
        return self._run(hidden_TD, *route(logits_TE, factors_1K, self.rule))

    def _mixed(self, hidden_TD: Tensor, logits_TE: Tensor, groups: Sequence[Group]) -> Tensor:
        table, tokens = self.table, hidden_TD.shape[0]
        ks = tuple(table.ks[level] for level, _ in groups)
        rows = self.batch.as_rows(ks)
        factors_TK = table.factors_VK[self.batch.levels_T[:tokens], : max(ks)]
        weights_TK, experts_TK = route(logits_TE, factors_TK, self.rule)
        weights_RW, experts_RW = (each.view(-1, rows.width)[rows.slice_R] for each in (weights_TK, experts_TK))
        return rows.added(self._run(hidden_TD[rows.token_R], weights_RW, experts_RW), tokens)

    def _run(self, hidden_RD: Tensor, weights_RW: Tensor, experts_RW: Tensor) -> Tensor:
        """The expert kernel. It works in proportion to the experts that it is given."""
        self.batch.rows[self.number] += experts_RW.numel()
        experts_RW = experts_RW.to(self.kind)
        if self.kernel is None:
            return self.layer.forward_modular(x=hidden_RD, topk_weights=weights_RW, topk_ids=experts_RW)
        out_RD, weights = torch.empty_like(hidden_RD), self.layer._parameters
        self.kernel(out_RD, hidden_RD, weights["w13_weight"], weights["w2_weight"], weights_RW, experts_RW)
        return out_RD


def _kernel(layer: Any) -> Callable[..., None] | None:
    """vLLM's own unquantised kernel, where all that vLLM does before and after it is nothing for this layer; else None.

    In an operator that the compiler does not look into, all that would be Python that stock vLLM does not run.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
    from vllm.model_executor.layers.fused_moe.prepare_finalize.no_dp_ep import MoEPrepareAndFinalizeNoDPEPModular

    whole: Any = getattr(layer.quant_method, "moe_kernel", None)
    found: Any = getattr(whole, "fused_experts", None)
    if (
        not isinstance(found, CPUUnquantizedExperts)
        or found._use_zentorch
        or type(whole.prepare_finalize) is not MoEPrepareAndFinalizeNoDPEPModular
        or layer.apply_router_weight_on_input
    ):
        return None
    run, biases, how = torch.ops._C.cpu_fused_moe.default, (found.w1_bias, found.w2_bias), layer.activation.value

    def kernel(
        out_RD: Tensor, hidden_RD: Tensor, w13: Tensor, w2: Tensor, weights_RW: Tensor, experts_RW: Tensor
    ) -> None:
        run(out_RD, hidden_RD, w13, w2, *biases, weights_RW, experts_RW, False, how, found.isa)

    return kernel


def experts(hidden_states: Tensor, router_logits: Tensor, layer_name: str) -> Tensor:
    """Of the layer with that name, in the engine whose model runs now."""
    return get_forward_context().no_compile_layers[layer_name].on_cpu(hidden_states, router_logits)


def _like_hidden_states(hidden_states: Tensor, router_logits: Tensor, layer_name: str) -> Tensor:
    return torch.empty_like(hidden_states)


direct_register_custom_op(
    "emoe_experts", experts, fake_impl=_like_hidden_states, tags=(torch.Tag.needs_fixed_stride_order,)
)
