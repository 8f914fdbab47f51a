"""ElasticRouter: Megatron-Core's TopKRouter with elastic selection. Glue only; formulas are in selection.py and
losses.py.

Sources: EMoE, arXiv 2509.21892; Matryoshka MoE, arXiv 2509.26520. Shape suffixes: T tokens, E experts, P pool, K
active.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor
from torch.nn import Parameter

from megatron_emoe.routing import kernel as router_kernel
from megatron_emoe.routing import selection
from megatron_emoe.routing.active_k import Draw, get_active_k, mix
from megatron_emoe.routing.budget_scales import empty_scales, log_scales
from megatron_emoe.routing.kernel import Routed, RoutingRule, Wanted
from megatron_emoe.routing.losses import hierarchical_router_loss, mean_over_tokens, token_entropy
from megatron_emoe.routing.metrics import get_elastic_tracker
from megatron_emoe.routing.transformer_config import ElasticTransformerConfig
from megatron_emoe.settings.k_schedule import trained_ks


class ElasticRouter(TopKRouter):
    """A TopKRouter whose k, and whose choice of experts, may change from one forward pass to the next.

    One forward pass: (1) ask the owner of the active k for this layer's draw and set `topk`; (2) where the stock router
    computes exactly what is asked (top-k at any k), call it; (3) else score once, rank, draw, combine and balance on
    the same scores; (4) attach the hierarchical loss and record metrics. With all settings off, (2) is the whole of it.
    """

    config: ElasticTransformerConfig
    loss_weight = 1.0
    """What the losses of the running forward pass count (k_schedule.loss_weights)."""
    _learned = False

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.config, ElasticTransformerConfig):
            raise TypeError(
                f"ElasticRouter needs an ElasticTransformerConfig, got {type(self.config).__name__}: "
                "elastic settings would be lost without a word; build the config with elastic_config_from_args()"
            )
        self.model_k = self.config.moe_router_topk
        self.fused = self.config.moe_router_fusion
        if self.fused and not _core_can_fuse():
            # The core would stop at its first fused function. Its own parts read this router's configuration.
            router_kernel.say_once(
                "--moe-router-fusion: Transformer Engine is not installed, so only elastic routing is fused"
            )
            self.config = copy(self.config)
            self.config.moe_router_fusion = False
        if self.config.emoe_budget_scales:
            self.budget_ks = trained_ks(self.config, self.model_k)
            self.budget_scales = Parameter(empty_scales(self.budget_ks))
            self.budget_scales.sequence_parallel = self.config.sequence_parallel  # type: ignore[attr-defined]

    def get_aux_loss_coeff(self, aux_loss_type: str) -> float:
        """The core's, times what this forward pass counts in the loss."""
        return super().get_aux_loss_coeff(aux_loss_type) * self.loss_weight

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The core's, which divides by the weight for the log, and averages over micro-batches: a second pass of each
        would double it."""
        passes = 2 if self.config.emoe_second_pass else 1
        return super().attach_and_log_load_balancing_loss(activation, aux_loss_coeff * passes, *args, **kwargs)

    @property
    def global_layer_number(self) -> int:
        """1-based over decoder layers, then MTP layers: the numbering of the core's metrics."""
        return self.layer_number + (self.config.num_layers if self.is_mtp_layer else 0)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routing probabilities and boolean map, both [T, E], for logits [sequence, batch, E].

        padding_mask: bool [sequence, batch], True where a token is padding.
        """
        draw = get_active_k().draw(self.config, self.model_k, self.global_layer_number, self.training)
        self.topk, self.loss_weight = draw.k, draw.weight
        self._learned = self.config.emoe_budget_scales and draw.learned
        if self._stock_is_exact(draw):
            logits = self._attach_hierarchical_loss(logits, logits, None, padding_mask)
            probs_TE, map_TE = super().routing(logits, padding_mask)
            pool = draw.pool_max
        else:
            probs_TE, map_TE, pool = self._elastic_routing(logits, padding_mask, draw)
        if self.training and torch.is_grad_enabled():  # once also under recomputation, whose first pass has no gradient
            padding_T = None if padding_mask is None else padding_mask.reshape(-1)
            get_elastic_tracker().add_routing(self.global_layer_number, map_TE, padding_T, draw.k, pool)
        return probs_TE, map_TE

    def _stock_is_exact(self, draw: Draw) -> bool:
        """Whether the unmodified core computes this forward pass."""
        samples = self.training and draw.pool_max > draw.k
        softmax_bias = self.expert_bias is not None and self.score_function == "softmax"
        plain = self.config.emoe_combine == "model" and draw.tail == 1.0 and not self._learned
        return not samples and not softmax_bias and plain

    def _elastic_routing(
        self, logits: Tensor, padding_mask: Tensor | None, draw: Draw
    ) -> tuple[Tensor, Tensor, Tensor | int]:
        """The same steps as TopKRouter.routing, on one set of scores."""
        sequence, batch = logits.shape[:2]
        logits_TE = logits.view(-1, self.config.num_moe_experts)
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_T)
        rule, seed = self._rule(draw), mix(draw.seed, self._token_shard())
        routed = self._route(logits_TE, rule, seed)
        probs_TE, map_TE = routed.probs_TE, routed.map_TE
        probs_TE = self._attach_hierarchical_loss(probs_TE, logits_TE, None, padding_T, routed.entropy_T)
        if routed.balance_TE is not None:
            counted_TE = self._counted(routed, routed.balance_TE.detach(), rule, seed)
            probs_TE = self._attach_balance_losses(probs_TE, routed.balance_TE, counted_TE, padding_T, sequence, batch)
        probs_TE, map_TE = self._drop_tokens(probs_TE, map_TE)
        self._apply_expert_bias(map_TE, padding_mask=padding_T)
        return probs_TE, map_TE, routed.pool

    def _counted(self, routed: Routed, scores_TE: Tensor, rule: RoutingRule, seed: int) -> Tensor:
        """The experts that the balance losses count, bool [T, E].

        The core counts top-k of the scores alone, without selection bias and groups; what is drawn from a pool is
        counted in that order too. So one definition holds for every draw, and it is the core's where none is made.
        """
        if not self._ranks_otherwise():
            return routed.map_TE if routed.plain_TE is None else routed.plain_TE
        if rule.pool_max == rule.k or self.config.emoe_balance_on == "topk":
            return selection.dense_map(selection.rank_experts(scores_TE, rule.k, k=rule.k), scores_TE.shape[1])
        ranked_TP = selection.rank_experts(scores_TE, rule.pool_max, k=rule.k)
        drawn_TK, _ = selection.coactivation_indices(
            ranked_TP, rule.k, pool=rule.pool, seed=seed, keep=rule.keep, prob=rule.prob
        )
        return selection.dense_map(drawn_TK, scores_TE.shape[1])

    def _ranks_otherwise(self) -> bool:
        """Whether experts are selected in another order than that of their scores."""
        return self.expert_bias is not None or bool(self.config.moe_router_group_topk)

    def _route(self, logits_TE: Tensor, rule: RoutingRule, seed: int) -> Routed:
        """One pass over the logits where --moe-router-fusion asks for it and the kernel can; else selection.py."""
        wanted = self._wanted(rule)
        if not self.fused:
            return self._route_unfused(logits_TE, rule, seed, wanted)
        reason = "--emoe-budget-scales has no kernel" if self._learned else None
        if reason := reason or router_kernel.why_not(logits_TE):
            router_kernel.say_once(f"--moe-router-fusion: elastic routing is not fused, because {reason}")
            return self._route_unfused(logits_TE, rule, seed, wanted)
        u_TP = None
        if rule.pool_max > rule.k:
            u_TP = selection.uniform_numbers(logits_TE.shape[0], rule.pool_max + 1, seed, logits_TE.device)
        bias_E = None if self.expert_bias is None else self.expert_bias.float()
        return router_kernel.route(logits_TE, rule, bias_E, u_TP, wanted)

    def _rule(self, draw: Draw) -> RoutingRule:
        """What this model and this draw ask of selection."""
        config = self.config
        return RoutingRule(
            score_function=self.score_function,
            k=draw.k,
            pool_max=draw.pool_max,
            normalize=selection.normalizes(
                config.emoe_combine, self.score_function, config.moe_router_pre_softmax, draw.k
            ),
            rank_by_scores=self.score_function != "softmax" or config.moe_router_pre_softmax,
            scale=config.moe_router_topk_scaling_factor,
            num_groups=config.moe_router_num_groups,
            group_topk=config.moe_router_group_topk,
            tail=None if draw.tail == 1.0 else (self.model_k, draw.tail),
            pool=draw.pool,
            keep=config.emoe_pool_keep,
            prob=config.emoe_pool_prob,
        )

    def _wanted(self, rule: RoutingRule) -> Wanted:
        """What the losses and metrics of this pass need beside probabilities and map."""
        trains = self.training and torch.is_grad_enabled()
        balance = trains and self.is_aux_loss_enabled()
        plain = balance and self.config.emoe_balance_on == "topk" and rule.pool_max > rule.k
        plain = plain and not self._ranks_otherwise()
        return Wanted(entropy=self._wants_entropy(), balance=balance, plain=plain)

    def _route_unfused(self, logits_TE: Tensor, rule: RoutingRule, seed: int, wanted: Wanted) -> Routed:
        scores_TE = selection.expert_scores(logits_TE, rule.score_function)
        indices_TK, topk_TK, pool = self._select(logits_TE, scores_TE, rule, seed)
        weights_TK = selection.combine_weights(
            logits_TE,
            scores_TE,
            indices_TK,
            score_function=rule.score_function,
            normalize=rule.normalize,
            scale=rule.scale,
            tail=rule.tail,
            log_scales_K=self._log_scales(rule.k),
        )
        probs_TE, map_TE = selection.to_dense(weights_TK, indices_TK, logits_TE)
        entropy_T = self._token_entropy(logits_TE, scores_TE) if wanted.entropy else None
        plain_TE = selection.dense_map(topk_TK, scores_TE.shape[1]) if wanted.plain else None
        if rule.score_function != "softmax" and wanted.balance:
            scores_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
        return Routed(probs_TE, map_TE, pool, entropy_T, scores_TE if wanted.balance else None, plain_TE)

    def _log_scales(self, k: int) -> Tensor | None:
        if not self._learned:
            return None
        if self.budget_scales.device != self.weight.device:  # built on the CPU, as the core builds the router's weight
            self.budget_scales.data = self.budget_scales.data.to(self.weight.device)
        return log_scales(self.budget_scales, self.budget_ks, k, self.model_k)

    @torch.no_grad()
    def _select(
        self, logits_TE: Tensor, scores_TE: Tensor, rule: RoutingRule, seed: int
    ) -> tuple[Tensor, Tensor, Tensor | int]:
        """Experts [T, K], plain top-k's experts [T, K], pool size ([T, 1] or one number).

        The core ranks by logits for a softmax after selection, else by scores, plus the selection bias.
        """
        ranked_by_TE = scores_TE if rule.rank_by_scores else logits_TE
        if self.expert_bias is not None:
            ranked_by_TE = scores_TE + self.expert_bias.float()
        groups = {"num_groups": rule.num_groups, "group_topk": rule.group_topk}
        ranked_TP = selection.rank_experts(ranked_by_TE, rule.pool_max, k=rule.k, **groups)
        topk_TK = ranked_TP[:, : rule.k]
        if rule.pool_max == rule.k:
            return topk_TK, topk_TK, rule.k
        indices_TK, pool = selection.coactivation_indices(
            ranked_TP, rule.k, pool=rule.pool, seed=seed, keep=rule.keep, prob=rule.prob
        )
        return indices_TK, topk_TK, pool

    def _token_shard(self) -> int:
        """Which shard of the batch's tokens this rank holds: ranks with other tokens draw other numbers."""
        if self.config.sequence_parallel or self.tp_group.size() == 1:
            return self.tp_dp_cp_group.rank()
        return self.tp_dp_cp_group.rank() // self.tp_group.size()

    def _attach_balance_losses(
        self,
        probs_TE: Tensor,
        scores_TE: Tensor,
        counted_TE: Tensor,
        padding_T: Tensor | None,
        sequence: int,
        batch: int,
    ) -> Tensor:
        """The core's aux, seq-aux and global-aux losses on the experts in `counted_TE` and the scores already
        computed, which sum to 1 for every token."""
        padded = padding_T is not None
        if padding_T is not None:
            valid_T1 = ~padding_T.unsqueeze(-1)
            scores_TE, counted_TE = scores_TE * valid_T1, counted_TE & valid_T1
        probs_TE = self._apply_aux_loss(probs_TE, scores_TE, counted_TE, with_padding_mask=padded)
        probs_TE = self._apply_seq_aux_loss(probs_TE, scores_TE, counted_TE, sequence, batch, with_padding_mask=padded)
        return self._apply_global_aux_loss(probs_TE, scores_TE, counted_TE, with_padding_mask=padded)

    def _apply_expert_bias(self, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        """As the core's, which takes [T, 1] here and is given [T] by its own routing."""
        super()._apply_expert_bias(routing_map, None if padding_mask is None else padding_mask.view(-1, 1))

    def _drop_tokens(self, probs_TE: Tensor, map_TE: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.moe_expert_capacity_factor is None:
            return probs_TE, map_TE
        return apply_router_token_dropping(
            probs_TE,
            map_TE,
            router_topk=self.topk,
            capacity_factor=self.config.moe_expert_capacity_factor,
            drop_policy=self.config.moe_token_drop_policy,
            pad_to_capacity=self.config.moe_pad_expert_input_to_capacity,
        )

    def _attach_hierarchical_loss(
        self,
        activation: Tensor,
        logits: Tensor,
        scores_TE: Tensor | None,
        padding: Tensor | None,
        entropy_T: Tensor | None = None,
    ) -> Tensor:
        """Add lambda * L_HR to the backward pass of `activation`, and record it with the entropy on measured steps.

        activation: logits or probabilities; the layer's output must depend on it, or the loss has no gradient.
        scores_TE, entropy_T: the scores, or each token's entropy, where they are known already.
        """
        if not self._wants_entropy():
            return activation
        coeff, tracker = self._entropy_coeff(), get_elastic_tracker()
        valid_T = None if padding is None else ~padding.reshape(-1)
        if entropy_T is None:
            entropy_T = self._token_entropy(logits.view(-1, logits.shape[-1]), scores_TE)
        with torch.set_grad_enabled(coeff > 0):
            entropy = mean_over_tokens(entropy_T, valid_T)
            loss = hierarchical_router_loss(entropy=entropy, num_experts=logits.shape[-1])
        if tracker.measuring:
            values = {"hierarchical router loss": loss, "router entropy": entropy}
            tracker.add_values(self.global_layer_number, values)
        return self._attach_loss(activation, self.loss_weight * coeff * loss, valid_T) if coeff else activation

    def _entropy_coeff(self) -> float:
        """The entropy loss of top-p is the hierarchical loss but for a constant, log E: its weight adds up."""
        return self.config.hr_loss_coeff + self.config.entropy_loss_coeff

    def _wants_entropy(self) -> bool:
        """Whether this pass has the hierarchical loss, or measures it."""
        wanted = self._entropy_coeff() or get_elastic_tracker().measuring
        return bool(wanted) and self.training and torch.is_grad_enabled()

    def _token_entropy(self, logits_TE: Tensor, scores_TE: Tensor | None) -> Tensor:
        """Entropy of each token's softmax, fp32 [T]; softmax scores are that already and not computed again."""
        with torch.set_grad_enabled(self._entropy_coeff() > 0):
            if scores_TE is None or self.score_function != "softmax":
                scores_TE = selection.expert_scores(logits_TE, "softmax")
            return token_entropy(logits_TE=logits_TE, probs_TE=scores_TE)

    def _attach_loss(self, activation: Tensor, loss: Tensor, valid_T: Tensor | None) -> Tensor:
        """As the core attaches its z-loss: averaged over the ranks that share the tokens, per token where asked."""
        if self.is_mtp_layer and self.config.mtp_use_repeated_layer and self.config.mtp_num_layers:
            loss = loss / self.config.mtp_num_layers  # the core: one layer called that often counts once
        if self.calculate_per_token_loss:
            tokens = activation.numel() // self.config.num_moe_experts if valid_T is None else valid_T.sum()
            return MoEAuxLossAutoScaler.apply(activation, loss * tokens)
        return MoEAuxLossAutoScaler.apply(activation, loss / self.tp_cp_group.size())


def _core_can_fuse() -> bool:
    """Whether Transformer Engine brings the functions of the core's own --moe-router-fusion."""
    return moe_utils.fused_topk_with_score_function is not None and moe_utils.fused_moe_aux_loss is not None
