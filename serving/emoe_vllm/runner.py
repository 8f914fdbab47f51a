"""vLLM's MoE layer with a router that knows each token's budget, and expert kernels that get no more than k' experts.

`ElasticMoERunner` takes the place of vLLM's MoERunner by its registry of pluggable layers. Where nothing is elastic it
is vLLM's own, method by method. Shape suffixes: T tokens, E experts, K ranks, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner, SharedExpertsOrder
from vllm.platforms import current_platform

from emoe_vllm.layers import ARCHITECTURES
from emoe_vllm.levels import LayerTable
from emoe_vllm.routing import Rule, route, rule_of
from emoe_vllm.settings import ElasticSettings, asked_for, decided
from emoe_vllm.surplus import elsewhere, without_surplus

Group = tuple[int, Tensor | None]
"""A level, and which tokens have it: int64 positions, None: all of them."""


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


class ElasticRouter(BaseRouter):
    """The router of one layer, in place of `stock`, which vLLM's model made."""

    def __init__(self, stock: BaseRouter, rule: Rule, k_max: int) -> None:
        super().__init__(k_max, stock.global_num_experts, stock.eplb_state)
        self.stock, self.rule = stock, rule
        self.batch: Batch | None = None
        self.table: LayerTable | None = None
        self.elsewhere: int | None = None

    @property
    def routing_method_type(self) -> Any:
        return self.stock.routing_method_type

    def _compute_routing(
        self, hidden_states: Tensor, router_logits: Tensor, indices_type: torch.dtype | None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        """Not run: no GPU was at hand. Weights past a token's k' are 0, its experts all different: right in every
        kernel; or they are elsewhere, where the kernel leaves such out."""
        assert self.batch is not None and self.table is not None, "the worker is not emoe_vllm's"
        levels_T = self.batch.levels_T[: router_logits.shape[0]]
        weights_TK, experts_TK = route(router_logits, self.table.factors_VK[levels_T], self.rule)
        if self.elsewhere is not None:
            experts_TK = without_surplus(experts_TK, self.table.k_V[levels_T], self.elsewhere)
        return self.as_kernels_read(weights_TK, experts_TK, indices_type)

    @staticmethod
    def as_kernels_read(weights_TK: Tensor, experts_TK: Tensor, kind: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Expert kernels take no strides, on a CPU int32 alone."""
        return weights_TK.contiguous(), experts_TK.to(kind or torch.int32).contiguous()


class ElasticMoERunner(MoERunner):
    """Registered in place of MoERunner. `elastic`: the settings, None where vLLM's own layer runs."""

    elastic: ElasticSettings | None = None

    def __init__(self, layer_name: str, moe_config: Any, router: BaseRouter, *args: Any, **kwargs: Any) -> None:
        vllm_config = get_current_vllm_config()
        settings = decided(vllm_config.additional_config)
        if settings is None:
            _check_not_asked(vllm_config)
        else:
            router = ElasticRouter(router, rule_of(router, vllm_config.model_config.hf_config), settings.k_max)
            self.elastic = settings
        super().__init__(layer_name, moe_config, router, *args, **kwargs)
        if settings is not None and self.layer_id not in settings.layers:
            raise ValueError(f"layer {self.layer_id} has experts; config.json says that {list(settings.layers)} have")

    def _select_forward(self) -> Any:
        if self.elastic is None or not current_platform.is_cpu():
            return super()._select_forward()
        # On a CPU vLLM lets the compiler trace into the layer, and the k' of the first trace would stay for ever. As
        # the opaque operator that other devices use, the layer runs eagerly inside compiled code.
        shared = self._shared_experts is not None
        return torch.ops.vllm.moe_forward_shared if shared else torch.ops.vllm.moe_forward

    def attach(self, batch: Batch, table: LayerTable) -> None:
        """Called once by the worker, when the model is loaded."""
        if self.is_monolithic:
            kernel = type(self.routed_experts.quant_method).__name__
            raise ValueError(
                f"{self.layer_name}: the expert kernel of {kernel} routes by itself, at one k for ever; choose another "
                "with --moe-backend, such as triton"
            )
        self.router.batch, self.router.table = batch, table
        if not current_platform.is_cpu():
            self.router.elsewhere = elsewhere(self.routed_experts)
        batch.rows[self.layer_id] = 0

    def _apply_quant_method(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        shared_experts_input: Tensor | None,
        input_ids: Tensor | None = None,
        shared_experts_overlapping: bool = False,
    ) -> tuple[Tensor | None, Any]:
        """On a CPU, the kernel once for each k' among the tokens; elsewhere vLLM's own, with weights of 0."""
        if self.elastic is None or not current_platform.is_cpu():
            return super()._apply_quant_method(
                hidden_states, router_logits, shared_experts_input, input_ids, shared_experts_overlapping
            )
        self._maybe_apply_shared_experts(shared_experts_input, SharedExpertsOrder.NO_OVERLAP)
        fused_TD = self._by_k(hidden_states, router_logits)
        return self._shared_experts.output if self._shared_experts is not None else None, fused_TD

    def _by_k(self, hidden_TD: Tensor, logits_TE: Tensor) -> Tensor:
        batch, table = self.router.batch, self.router.table
        assert batch is not None and table is not None, "the worker is not emoe_vllm's"
        out_TD = None
        for level, where in batch.groups:
            factors_1K = table.factors_VK[level : level + 1, : table.ks[level]]
            if where is None:
                return self._experts(hidden_TD, logits_TE, factors_1K)
            out_TD = torch.zeros_like(hidden_TD) if out_TD is None else out_TD
            out_TD[where] = self._experts(hidden_TD[where], logits_TE[where], factors_1K)
        return out_TD

    def _experts(self, hidden_TD: Tensor, logits_TE: Tensor, factors_1K: Tensor) -> Tensor:
        """The expert kernel on tokens that all have k' = K. It works in proportion to the experts that it is given."""
        router = self.router
        weights_TK, experts_TK = route(logits_TE, factors_1K, router.rule)
        kind = self._quant_method.topk_indices_dtype
        weights_TK, experts_TK = router.as_kernels_read(weights_TK, experts_TK, kind)
        router.batch.rows[self.layer_id] += experts_TK.numel()
        return self.routed_experts.forward_modular(x=hidden_TD, topk_weights=weights_TK, topk_ids=experts_TK)


def _check_not_asked(vllm_config: Any) -> None:
    """ValueError where elastic experts were asked for in a model that the plugin does not know."""
    if vllm_config.model_config is None:  # a layer that vLLM builds without a model
        return
    config = vllm_config.model_config.hf_config
    if asked_for(config, vllm_config.additional_config):
        found = ", ".join(config.architectures or ["?"])
        raise ValueError(f"architecture {found}: elastic experts are supported in {', '.join(ARCHITECTURES)}")
