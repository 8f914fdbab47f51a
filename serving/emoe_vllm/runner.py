"""vLLM's MoE layer with a router that knows each token's budget, and expert kernels that get no more than k' experts.

`ElasticMoERunner` takes the place of vLLM's MoERunner by its registry of pluggable layers. Where nothing is elastic it
is vLLM's own, method by method. Shape suffixes: T tokens, E experts, K ranks, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.router.base_router import BaseRouter
from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner, SharedExpertsOrder
from vllm.platforms import current_platform

from emoe_vllm.layers import ARCHITECTURES
from emoe_vllm.levels import LayerTable
from emoe_vllm.on_cpu import Batch, ExpertsOnCPU
from emoe_vllm.routing import Rule, route, rule_of
from emoe_vllm.settings import ElasticSettings, asked_for, decided
from emoe_vllm.surplus import elsewhere, without_surplus


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
        return weights_TK.contiguous(), experts_TK.to(indices_type or torch.int32).contiguous()


class ElasticMoERunner(MoERunner):
    """Registered in place of MoERunner. `elastic`: the settings, None where vLLM's own layer runs. `on_cpu`: what runs
    there, from `attach` on."""

    elastic: ElasticSettings | None = None
    on_cpu: ExpertsOnCPU | None = None

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

    def attach(self, batch: Batch, table: LayerTable) -> None:
        """Called once by the worker, when the model is loaded."""
        if self.is_monolithic:
            kernel = type(self.routed_experts.quant_method).__name__
            raise ValueError(
                f"{self.layer_name}: the expert kernel of {kernel} routes by itself, at one k for ever; choose another "
                "with --moe-backend, such as triton"
            )
        if current_platform.is_cpu():
            self.on_cpu = ExpertsOnCPU(self.routed_experts, self.layer_id, self.router.rule, batch, table)
            return
        self.router.batch, self.router.table = batch, table
        self.router.elsewhere = elsewhere(self.routed_experts)

    def _apply_quant_method(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        shared_experts_input: Tensor | None,
        input_ids: Tensor | None = None,
        shared_experts_overlapping: bool = False,
    ) -> tuple[Tensor | None, Any]:
        """On a CPU, experts of each token's k'; elsewhere vLLM's own, with weights of 0."""
        if self.elastic is None or not current_platform.is_cpu():
            return super()._apply_quant_method(
                hidden_states, router_logits, shared_experts_input, input_ids, shared_experts_overlapping
            )
        self._maybe_apply_shared_experts(shared_experts_input, SharedExpertsOrder.NO_OVERLAP)
        if torch.compiler.is_compiling():
            # On a CPU vLLM lets the compiler trace into the layer, and the k' of the first trace would stay for ever.
            fused_TD = torch.ops.vllm.emoe_experts(hidden_states, router_logits, self.layer_name)
        else:
            assert self.on_cpu is not None, "the worker is not emoe_vllm's"
            fused_TD = self.on_cpu(hidden_states, router_logits)
        return self._shared_experts.output if self._shared_experts is not None else None, fused_TD


def _check_not_asked(vllm_config: Any) -> None:
    """ValueError where elastic experts were asked for in a model that the plugin does not know."""
    if vllm_config.model_config is None:  # a layer that vLLM builds without a model
        return
    config = vllm_config.model_config.hf_config
    if asked_for(config, vllm_config.additional_config):
        found = ", ".join(config.architectures or ["?"])
        raise ValueError(f"architecture {found}: elastic experts are supported in {', '.join(ARCHITECTURES)}")
