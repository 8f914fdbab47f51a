"""Routers of the baselines: top-p, null experts, noisy top-k. Glue only; formulas are in dynamic_selection.py,
noisy_topk.py and losses.py.

Sources: top-p, Huang et al. 2024, arXiv 2403.07652; null experts, AdaMoE, arXiv 2406.13233; noisy top-k, Shazeer et al.
2017, arXiv 1701.06538. Shape suffixes: T tokens, E experts, N null experts, X = E + N (N is 0 for top-p), D hidden.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.moe.moe_utils import router_gating_linear, switch_load_balancing_loss_func
from torch import Tensor
from torch.nn import Parameter

from megatron_emoe.routing import selection
from megatron_emoe.routing.active_k import Draw, get_active_k, mix
from megatron_emoe.routing.dynamic_selection import selected_weights, share_null_counts, top_p_map
from megatron_emoe.routing.metrics import get_elastic_tracker
from megatron_emoe.routing.noisy_topk import load_probabilities, noise_deviation, normal_numbers, squared_variation
from megatron_emoe.routing.router import ElasticRouter
from megatron_emoe.routing.transformer_config import ElasticTransformerConfig

NEW_WEIGHTS = ("router.null_weight", "router.noise_weight", "router.budget_scales")
"""What a checkpoint of another selection, or without budget scales, lacks."""


def build_router(config: ElasticTransformerConfig, **rest: Any) -> ElasticRouter:
    """The router for --emoe-selection, as the core's MoE layer asks for one (TypeError for a plain configuration)."""
    return _ROUTERS.get(getattr(config, "emoe_selection", "topk"), ElasticRouter)(config=config, **rest)


class DynamicRouter(ElasticRouter):
    """A router that gives every token its own number of experts.

    One forward pass: (1) softmax over all X columns; (2) choose columns; (3) weight the true experts among them;
    (4) attach the losses and record metrics. A token may end up with no expert: then its expert output is zero.
    """

    picks = 1
    """What the load-balancing loss divides the counts by, beside the tokens."""

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routing probabilities and boolean map, both [T, E], for logits [sequence, batch, X].

        padding_mask: bool [sequence, batch], True where a token is padding.

        Raises:
            ValueError: an evaluation asks for a tail scale, which no selection of this kind has.
        """
        draw = get_active_k().draw(self.config, self.model_k, self.global_layer_number, self.training)
        if draw.tail != 1.0:
            kind = self.config.emoe_selection
            raise ValueError(f"tail scale {draw.tail}: has no meaning with --emoe-selection {kind}")
        self.topk, experts = draw.k, self.config.num_moe_experts
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TX = self.apply_z_loss(logits.view(-1, logits.shape[-1]), padding_mask=padding_T)
        scores_TX = selection.expert_scores(logits_TX, "softmax")
        map_TX = self._choose(scores_TX.detach(), draw)
        map_TE = map_TX[:, :experts].contiguous()
        scale = self.config.moe_router_topk_scaling_factor
        weights_TE = selected_weights(scores_TX[:, :experts], map_TE, normalize=self._normalizes(), scale=scale)
        weights_TE = weights_TE.type_as(logits_TX)
        if self.training and torch.is_grad_enabled():
            weights_TE = self._attach_hierarchical_loss(weights_TE, logits_TX, scores_TX, padding_T)
            weights_TE = self._attach_balance_loss(weights_TE, scores_TX, map_TX, padding_T)
            tracker = get_elastic_tracker()
            tracker.add_routing(self.global_layer_number, map_TE, padding_T, None, map_TX.shape[1])
        return weights_TE, map_TE

    @abstractmethod
    def _choose(self, scores_TX: Tensor, draw: Draw) -> Tensor:
        """The columns that each token uses, bool [T, X]."""

    @abstractmethod
    def _normalizes(self) -> bool:
        """Whether weights are divided by their sum over a token's true experts."""

    def _balanced_counts(self, counts_X: Tensor) -> Tensor:
        """What the load-balancing loss sees of the assignments per column."""
        return counts_X

    def _attach_balance_loss(
        self, weights_TE: Tensor, scores_TX: Tensor, map_TX: Tensor, padding_T: Tensor | None
    ) -> Tensor:
        """The core's load-balancing loss X sum_i f_i P_i, whose own code takes every token to have k experts."""
        coeff, group = self.get_aux_loss_coeff("aux_loss"), self.tp_cp_group
        if coeff == 0:
            return weights_TE
        tokens = torch.full((), map_TX.shape[0], device=map_TX.device)  # torch.tensor would copy from the host
        if padding_T is not None:
            tokens, valid_T1 = (~padding_T).sum(), ~padding_T.unsqueeze(-1)
            scores_TX, map_TX = scores_TX * valid_T1, map_TX & valid_T1
        counts_X = reduce_from_tensor_model_parallel_region(map_TX.sum(dim=0), group)
        loss = switch_load_balancing_loss_func(
            probs=scores_TX,
            tokens_per_expert=self._balanced_counts(counts_X),
            total_num_tokens=reduce_from_tensor_model_parallel_region(tokens.clone(), group),
            topk=self.picks,
            num_experts=map_TX.shape[1],
            moe_aux_loss_coeff=coeff,
        )
        return self.attach_and_log_load_balancing_loss(
            weights_TE, coeff, loss, "load_balancing_loss", group, valid_token_count=tokens
        )


class TopPRouter(DynamicRouter):
    """The smallest set of experts whose probabilities sum to at least --emoe-top-p (arXiv 2403.07652).

    An evaluation that asks for a k' gets plain top-k'. Weights are the probabilities themselves, as in the paper.
    """

    def _choose(self, scores_TX: Tensor, draw: Draw) -> Tensor:
        if draw.asked:
            return selection.dense_map(scores_TX.topk(draw.k, dim=1).indices, scores_TX.shape[1])
        return top_p_map(scores_TX, self.config.top_p, self.config.emoe_top_p_max)

    def _normalizes(self) -> bool:
        return self.config.emoe_combine == "renormalize"


class NullExpertRouter(DynamicRouter):
    """Top-k over the experts and N null experts, which give nothing and cost nothing (arXiv 2406.13233).

    Weights are renormalised over the true experts among the k, as in the paper.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.config.emoe_null_experts is not None
        self.null_weight = _replicated(self, self.config.emoe_null_experts)
        _fill(self.null_weight, self.config.init_method, self.config)

    def reset_parameters(self) -> None:
        """As the core's, for the null experts' weight too once there is one."""
        super().reset_parameters()
        if "null_weight" in self._parameters:
            _fill(self.null_weight, self.config.init_method, self.config)

    def gating(self, input: Tensor) -> Tensor:
        """Logits of the experts, then of the null experts: [sequence, batch, E + N]."""
        logits = super().gating(input)
        return torch.cat([logits, _logits(input, self.null_weight, logits.dtype)], dim=-1)

    def _choose(self, scores_TX: Tensor, draw: Draw) -> Tensor:
        self.picks = draw.k
        return selection.dense_map(scores_TX.topk(draw.k, dim=1).indices, scores_TX.shape[1])

    def _normalizes(self) -> bool:
        return self.config.emoe_combine != "raw"

    def _balanced_counts(self, counts_X: Tensor) -> Tensor:
        return share_null_counts(counts_X, self.num_experts)


class NoisyTopKRouter(ElasticRouter):
    """Top-k of logits with noise of a learned deviation, in training; plain top-k' in evaluation (arXiv 1701.06538).

    Everything after the noise is the router that it extends. Its own losses even the experts' weights (importance) and
    tokens (load) over the micro-batch.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noise_weight = _replicated(self, self.num_experts)
        _fill(self.noise_weight, torch.nn.init.zeros_, self.config)  # the paper's start: equal noise everywhere

    def reset_parameters(self) -> None:
        """As the core's, for the noise's weight too once there is one."""
        super().reset_parameters()
        if "noise_weight" in self._parameters:
            _fill(self.noise_weight, torch.nn.init.zeros_, self.config)

    def gating(self, input: Tensor) -> Tensor:
        """Logits [sequence, batch, E]; in training the noise's raw deviations behind them, [sequence, batch, 2 E]."""
        logits = super().gating(input)
        if not self.training:
            return logits
        return torch.cat([logits, _logits(input, self.noise_weight, logits.dtype)], dim=-1)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routing probabilities and boolean map, both [T, E], for what `gating` gave."""
        if not self.training:
            return super().routing(logits, padding_mask)
        clean, raw = logits.chunk(2, dim=-1)
        clean_TE, deviation_TE = clean.flatten(0, 1), noise_deviation(raw.flatten(0, 1))
        draw = get_active_k().draw(self.config, self.model_k, self.global_layer_number, True)
        seed = mix(draw.seed, self._token_shard())
        normal_TE = normal_numbers(clean_TE.shape[0], self.num_experts, seed, clean_TE.device)
        noisy = (clean_TE.float() + normal_TE * deviation_TE).type_as(clean).view_as(clean)
        probs_TE, map_TE = super().routing(noisy, padding_mask)
        if torch.is_grad_enabled():
            padding_T = None if padding_mask is None else padding_mask.reshape(-1)
            load_TE = load_probabilities(clean_TE, noisy.flatten(0, 1), deviation_TE, draw.k)
            probs_TE = self._attach_noise_losses(probs_TE, load_TE, padding_T)
        return probs_TE, map_TE

    def _attach_noise_losses(self, probs_TE: Tensor, load_TE: Tensor, padding_T: Tensor | None) -> Tensor:
        """w_importance CV(importance)^2 + w_load CV(load)^2 over the tokens of the whole micro-batch."""
        group = self.tp_cp_group
        both_T2E = torch.cat([probs_TE.float(), load_TE], dim=1)
        if padding_T is not None:
            both_T2E = both_T2E * ~padding_T.unsqueeze(-1)
        sums_2E = reduce_from_tensor_model_parallel_region(both_T2E.sum(dim=0), group)
        importance, load = (squared_variation(sums_E) for sums_E in sums_2E.chunk(2))
        tracker = get_elastic_tracker()
        if tracker.measuring:
            tracker.add_values(self.global_layer_number, {"importance loss": importance, "load loss": load})
        importance_coeff, load_coeff = self.config.noise_loss_coeffs
        loss = importance_coeff * importance + load_coeff * load
        # Every rank of the group has the whole loss and the gradient of its own tokens: a sum over ranks, not a mean.
        return self._attach_loss(probs_TE, loss * group.size(), None if padding_T is None else ~padding_T)


_ROUTERS: dict[str, Callable[..., ElasticRouter]] = {
    "top-p": TopPRouter,
    "null-experts": NullExpertRouter,
    "noisy-topk": NoisyTopKRouter,
}


def _replicated(router: ElasticRouter, rows: int) -> Parameter:
    """A weight [rows, D] that every rank holds whole, like the router's own."""
    weight = Parameter(torch.empty((rows, router.config.hidden_size), dtype=router.weight.dtype))
    weight.sequence_parallel = router.config.sequence_parallel  # type: ignore[attr-defined]
    return weight


def _fill(weight: Parameter, init: Callable[[Tensor], Any], config: ElasticTransformerConfig) -> None:
    """Initialise in fp32 as the core initialises the router's weight, then round to the weight's dtype."""
    if config.perform_initialization:
        values = torch.empty_like(weight, dtype=torch.float32)
        init(values)
        weight.data.copy_(values)


def _logits(input: Tensor, weight: Parameter, dtype: torch.dtype) -> Tensor:
    if weight.device != input.device:  # built on the CPU, as the core builds the router's weight
        weight.data = weight.data.to(input.device)
    return router_gating_linear(input, weight, None, dtype)
