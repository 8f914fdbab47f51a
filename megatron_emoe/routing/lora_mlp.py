"""LoraMLP: Megatron-Core's dense MLP, frozen, with a router and low-rank experts on both of its linear layers.

Source: LoRAMoE, arXiv 2312.09979; in EMoE (arXiv 2509.21892) LLaMA-2-7B with 32 such experts. Left open there, and
chosen here: one router for the block, which reads what the MLP reads; experts on both linear layers, where a gated
MLP's first one, gate and up together, is one.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from torch import Tensor, nn
from torch.nn.functional import linear

from megatron_emoe.routing.dynamic_router import build_router
from megatron_emoe.routing.low_rank_experts import LowRankExperts
from megatron_emoe.routing.router import ElasticRouter
from megatron_emoe.routing.transformer_config import ElasticTransformerConfig

LORA_WEIGHTS = (
    *("mlp.router.weight", "mlp.router.bias", "mlp.router.expert_bias", "mlp.router.local_tokens_per_expert"),
    *(f"mlp.lora.{layer}.{side}" for layer in ("linear_fc1", "linear_fc2") for side in "ab"),
)
"""How the names of what a checkpoint of the dense model lacks end."""


class LoraExperts(MegatronModule):
    """The low-rank experts of one MLP: those on its first linear layer and those on its second."""

    def __init__(self, config: ElasticTransformerConfig, first_width: int, tp_group: Any) -> None:
        super().__init__(config)
        hidden, inner = config.hidden_size, config.ffn_hidden_size
        self.tp_group = tp_group
        self.linear_fc1 = LowRankExperts(config, hidden, first_width, "outputs", tp_group)
        self.linear_fc2 = LowRankExperts(config, inner, hidden, "inputs", tp_group)


class LoraMLP(MLP):
    """A dense MLP whose linear layers each gain the low-rank experts that an ElasticRouter selects for a token.

    One forward pass: (1) route; (2) first linear layer and its experts; (3) the core's activation; (4) second linear
    layer and its experts. Every expert is computed for every token, in dense products with weights of 0 for those that
    are not selected: no dispatch, and the same time at every k'.

    Under tensor parallelism no collective is added. What the experts make of a token in the middle, [T, X], travels
    with the core's own: behind the hidden states where the first layer gathers them, behind the partial sums where the
    second reduces them. In between every rank has the tokens whole and its own columns.
    """

    config: ElasticTransformerConfig

    def __init__(
        self,
        config: ElasticTransformerConfig,
        submodules: MLPSubmodules,
        pg_collection: ProcessGroupCollection,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        width = config.ffn_hidden_size
        super().__init__(config, submodules, ffn_hidden_size=width, tp_group=pg_collection.tp, name=name)
        self.router: ElasticRouter = build_router(config, pg_collection=pg_collection, is_mtp_layer=is_mtp_layer)
        self.lora = LoraExperts(config, 2 * width if config.gated_linear_unit else width, pg_collection.tp)

    def set_layer_number(self, layer_number: int) -> None:
        """Tell the router which layer this is, from 1."""
        self.router.set_layer_number(layer_number)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, padding_mask: Tensor | None = None, **_rest: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Output and bias, as the core's MLP. hidden_states: [sequence, batch, hidden]; padding_mask: [batch,
        sequence], True where a token is padding."""
        if padding_mask is not None:
            padding_mask = padding_mask.transpose(0, 1).bool()
        weights_TE, _ = self.router(hidden_states, padding_mask)
        parts = SimpleNamespace(
            config=self.config,
            activation_func=self.activation_func,
            linear_fc1=_Linear(lambda x: self._first(x, weights_TE)),
            linear_fc2=_Linear(lambda x: self._second(x, weights_TE)),
        )
        return MLP.forward(parts, hidden_states)  # type: ignore[arg-type]

    def _first(self, x: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor | None]:
        experts = self.lora.linear_fc1
        middle = experts.weighted(experts(x), weights_TE)
        if self.tp_group.size() > 1:
            x, middle = self._to_all_tokens(torch.cat([x, middle], dim=-1)).split([x.shape[-1], middle.shape[-1]], -1)
        return experts.added(linear(x, self.linear_fc1.weight), middle), self._bias(self.linear_fc1)

    def _second(self, x: Tensor, weights_TE: Tensor) -> tuple[Tensor, Tensor | None]:
        experts = self.lora.linear_fc2
        base, middle = linear(x, self.linear_fc2.weight), experts(x)
        if self.tp_group.size() > 1:
            widths = [base.shape[-1], middle.shape[-1]]
            base, middle = self._to_own_tokens(torch.cat([base, middle], dim=-1)).split(widths, -1)
        return experts.added(base, experts.weighted(middle, weights_TE)), self._bias(self.linear_fc2)

    def _to_all_tokens(self, x: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(x, group=self.tp_group)
        return copy_to_tensor_model_parallel_region(x, group=self.tp_group)

    def _to_own_tokens(self, x: Tensor) -> Tensor:
        if self.config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(x, group=self.tp_group)
        return reduce_from_tensor_model_parallel_region(x, group=self.tp_group)

    def _bias(self, layer: Any) -> Tensor | None:
        return layer.bias if self.config.add_bias_linear else None


class _Linear(nn.Module):
    """A function in the place of a linear layer, for the core's MLP."""

    def __init__(self, product: Callable[[Tensor], tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        self.product = product

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.product(x)
