"""ElasticRouter: Megatron-Core's TopKRouter with elastic selection. Glue only; formulas are in selection.py and
losses.py.

Sources: EMoE, arXiv 2509.21892; Matryoshka MoE, arXiv 2509.26520. Shape suffixes: T tokens, E experts, P pool, K
active.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, apply_router_token_dropping
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor

from megatron_emoe import selection
from megatron_emoe.active_k import Draw, get_active_k, mix
from megatron_emoe.losses import hierarchical_router_loss, router_entropy
from megatron_emoe.metrics import get_elastic_tracker
from megatron_emoe.transformer_config import ElasticTransformerConfig


class ElasticRouter(TopKRouter):
    """A TopKRouter whose k, and whose choice of experts, may change from one forward pass to the next.

    One forward pass: (1) ask the owner of the active k for this layer's draw and set `topk`; (2) where the stock router
    computes exactly what is asked (top-k at any k), call it; (3) else score once, rank, draw, combine and balance on
    the same scores; (4) attach the hierarchical loss and record metrics. With all settings off, (2) is the whole of it.
    """

    config: ElasticTransformerConfig

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.config, ElasticTransformerConfig):
            raise TypeError(
                f"ElasticRouter needs an ElasticTransformerConfig, got {type(self.config).__name__}: "
                "elastic settings would be lost without a word; build the config with elastic_config_from_args()"
            )
        self.model_k = self.config.moe_router_topk

    @property
    def global_layer_number(self) -> int:
        """1-based over decoder layers, then MTP layers: the numbering of the core's metrics."""
        return self.layer_number + (self.config.num_layers if self.is_mtp_layer else 0)

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routing probabilities and boolean map, both [T, E], for logits [sequence, batch, E].

        padding_mask: bool [sequence, batch], True where a token is padding.
        """
        draw = get_active_k().draw(self.config, self.model_k, self.global_layer_number, self.training)
        self.topk = draw.k
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
        plain = self.config.emoe_combine == "model" and draw.tail == 1.0
        return not samples and not softmax_bias and plain

    def _elastic_routing(
        self, logits: Tensor, padding_mask: Tensor | None, draw: Draw
    ) -> tuple[Tensor, Tensor, Tensor | int]:
        """The same steps as TopKRouter.routing, on one set of scores."""
        sequence, batch = logits.shape[:2]
        logits_TE = logits.view(-1, self.config.num_moe_experts)
        padding_T = None if padding_mask is None else padding_mask.reshape(-1)
        logits_TE = self.apply_z_loss(logits_TE, padding_mask=padding_T)
        scores_TE = selection.expert_scores(logits_TE, self.score_function)
        indices_TK, topk_TK, pool = self._select(logits_TE, scores_TE, draw)
        probs_TE, map_TE = self._combine(logits_TE, scores_TE, indices_TK, draw.tail)
        probs_TE = self._attach_hierarchical_loss(probs_TE, logits_TE, scores_TE, padding_T)
        if self.training and torch.is_grad_enabled() and self.is_aux_loss_enabled():
            on_topk = self.config.emoe_balance_on == "topk" and indices_TK is not topk_TK
            counted_TE = selection.dense_map(topk_TK, scores_TE.shape[1]) if on_topk else map_TE
            probs_TE = self._attach_balance_losses(probs_TE, scores_TE, counted_TE, padding_T, sequence, batch)
        probs_TE, map_TE = self._drop_tokens(probs_TE, map_TE)
        self._apply_expert_bias(map_TE, padding_mask=None if padding_T is None else padding_T.unsqueeze(-1))
        return probs_TE, map_TE, pool

    @torch.no_grad()
    def _select(self, logits_TE: Tensor, scores_TE: Tensor, draw: Draw) -> tuple[Tensor, Tensor, Tensor | int]:
        """Experts [T, K], plain top-k's experts [T, K], pool size ([T, 1] or one number)."""
        ranked_TP = selection.rank_experts(
            self._selection_scores(logits_TE, scores_TE),
            draw.pool_max,
            k=draw.k,
            num_groups=self.config.moe_router_num_groups,
            group_topk=self.config.moe_router_group_topk,
        )
        topk_TK = ranked_TP[:, : draw.k]
        if draw.pool_max == draw.k:
            return topk_TK, topk_TK, draw.k
        seed = mix(draw.seed, self._token_shard())
        keep, prob = self.config.emoe_pool_keep, self.config.emoe_pool_prob
        indices_TK, pool = selection.coactivation_indices(
            ranked_TP, draw.k, pool=draw.pool, seed=seed, keep=keep, prob=prob
        )
        return indices_TK, topk_TK, pool

    def _selection_scores(self, logits_TE: Tensor, scores_TE: Tensor) -> Tensor:
        """What the core ranks by: logits for a softmax after selection, else scores, plus the selection bias."""
        if self.expert_bias is not None:
            return scores_TE + self.expert_bias.float()
        after = self.score_function == "softmax" and not self.config.moe_router_pre_softmax
        return logits_TE if after else scores_TE

    def _token_shard(self) -> int:
        """Which shard of the batch's tokens this rank holds: ranks with other tokens draw other numbers."""
        if self.config.sequence_parallel or self.tp_group.size() == 1:
            return self.tp_dp_cp_group.rank()
        return self.tp_dp_cp_group.rank() // self.tp_group.size()

    def _combine(self, logits_TE: Tensor, scores_TE: Tensor, indices_TK: Tensor, tail: float) -> tuple[Tensor, Tensor]:
        config = self.config
        k = indices_TK.shape[1]
        weights_TK = selection.combine_weights(
            logits_TE,
            scores_TE,
            indices_TK,
            score_function=self.score_function,
            normalize=selection.normalizes(config.emoe_combine, self.score_function, config.moe_router_pre_softmax, k),
            scale=config.moe_router_topk_scaling_factor,
            tail=None if tail == 1.0 else (self.model_k, tail),
        )
        return selection.to_dense(weights_TK, indices_TK, logits_TE)

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
        computed."""
        if self.score_function != "softmax":
            scores_TE = scores_TE / (scores_TE.sum(dim=-1, keepdim=True) + 1e-20)
        padded = padding_T is not None
        if padding_T is not None:
            valid_T1 = ~padding_T.unsqueeze(-1)
            scores_TE, counted_TE = scores_TE * valid_T1, counted_TE & valid_T1
        probs_TE = self._apply_aux_loss(probs_TE, scores_TE, counted_TE, with_padding_mask=padded)
        probs_TE = self._apply_seq_aux_loss(probs_TE, scores_TE, counted_TE, sequence, batch, with_padding_mask=padded)
        return self._apply_global_aux_loss(probs_TE, scores_TE, counted_TE, with_padding_mask=padded)

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
        self, activation: Tensor, logits: Tensor, scores_TE: Tensor | None, padding: Tensor | None
    ) -> Tensor:
        """Add lambda * L_HR to the backward pass of `activation`, and record it with the entropy on measured steps.

        activation: logits or probabilities; the layer's output must depend on it, or the loss has no gradient.
        scores_TE: the scores if they are known already; softmax scores are q itself and are not computed again.
        """
        # The entropy loss of top-p is the same loss but for a constant, log E: its weight adds up.
        coeff, tracker = self.config.hr_loss_coeff + self.config.entropy_loss_coeff, get_elastic_tracker()
        if not (self.training and torch.is_grad_enabled()) or not (coeff or tracker.measuring):
            return activation
        logits_TE = logits.view(-1, logits.shape[-1])
        valid_T = None if padding is None else ~padding.reshape(-1)
        if scores_TE is None or self.score_function != "softmax":
            scores_TE = selection.expert_scores(logits_TE, "softmax")
        with torch.set_grad_enabled(coeff > 0):
            entropy = router_entropy(logits_TE=logits_TE, probs_TE=scores_TE, valid_T=valid_T)
            loss = hierarchical_router_loss(entropy=entropy, num_experts=logits_TE.shape[-1])
        if tracker.measuring:
            values = {"hierarchical router loss": loss, "router entropy": entropy}
            tracker.add_values(self.global_layer_number, values)
        return self._attach_loss(activation, coeff * loss, valid_T) if coeff else activation

    def _attach_loss(self, activation: Tensor, loss: Tensor, valid_T: Tensor | None) -> Tensor:
        """As the core attaches its z-loss: averaged over the ranks that share the tokens, per token where asked."""
        if self.is_mtp_layer and self.config.mtp_use_repeated_layer and self.config.mtp_num_layers:
            loss = loss / self.config.mtp_num_layers  # the core: one layer called that often counts once
        if self.calculate_per_token_loss:
            tokens = activation.numel() // self.config.num_moe_experts if valid_T is None else valid_T.sum()
            return MoEAuxLossAutoScaler.apply(activation, loss * tokens)
        return MoEAuxLossAutoScaler.apply(activation, loss / self.tp_cp_group.size())
