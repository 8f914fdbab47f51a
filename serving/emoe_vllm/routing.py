"""The router as one pure function: from logits and the factors of ranks to experts and weights, for every mode.

Scores are fp32. Experts are chosen by score, or by score plus a selection bias, inside a token's best groups where
there are group limits; they come sorted, so a column is a rank. Shape suffixes: T tokens, E experts, G groups, K ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALLEST = 1e-20
"""Of a sum that weights are divided by: padding has only weights of 0."""


@dataclass(frozen=True)
class Rule:
    """How a model makes weights of router logits. score: softmax or sigmoid. groups, kept_groups: experts are chosen
    from the best `kept_groups` of `groups`. bias_E: added for the choice alone. scale: of all weights, at the end."""

    score: str = "softmax"
    renormalise: bool = True
    groups: int = 1
    kept_groups: int = 1
    scale: float = 1.0
    bias_E: Tensor | None = None


def rule_of(router: Any, config: Any) -> Rule:
    """The rule of the router that vLLM's model made. config: of the model, from Hugging Face.

    Raises:
        ValueError: a router that computes something else.
    """
    for name in ("custom_routing_function", "_hash_indices_table", "hash_indices_table", "zero_expert_type"):
        if getattr(router, name, None) is not None:
            raise ValueError(f"router {type(router).__name__} with {name}: k' cannot change there")
    score = getattr(router, "scoring_func", None)
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"router {type(router).__name__}, scores {score!r}: k' changes with softmax or sigmoid alone")
    grouped = getattr(router, "use_grouped_topk", True) and getattr(router, "num_expert_group", None)
    return Rule(
        score=score,
        # vLLM's OLMoE never renormalises, whatever the model's own setting says.
        renormalise=config.norm_topk_prob if config.model_type == "olmoe" else router.renormalize,
        groups=router.num_expert_group if grouped else 1,
        kept_groups=router.topk_group if grouped else 1,
        scale=getattr(router, "routed_scaling_factor", 1.0),
        bias_E=getattr(router, "e_score_correction_bias", None),
    )


def route(logits_TE: Tensor, factors_TK: Tensor, rule: Rule) -> tuple[Tensor, Tensor]:
    """Weights (fp32) and experts (int64) of every token, [T, K] both. The experts of a token are all different.

    factors_TK: fp32, of the ranks' scores: what a layer's table has for each token's level, 0 from its k' on; or one
    row [1, K], where all tokens have the same level.
    """
    logits_TE = logits_TE.float()
    scores_TE = logits_TE.softmax(dim=-1) if rule.score == "softmax" else logits_TE.sigmoid()
    choice_TE = scores_TE if rule.bias_E is None else scores_TE + rule.bias_E.float()
    if rule.kept_groups < rule.groups:
        choice_TE = choice_TE.masked_fill(~_in_best_groups(choice_TE, rule), -torch.inf)
    chosen_TK, experts_TK = choice_TE.topk(factors_TK.shape[1], dim=-1, sorted=True)
    if rule.bias_E is not None:
        chosen_TK = scores_TE.gather(1, experts_TK)
    weights_TK = chosen_TK * factors_TK
    if rule.renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True).clamp(min=SMALLEST)
    return weights_TK * rule.scale if rule.scale != 1.0 else weights_TK, experts_TK


def _in_best_groups(choice_TE: Tensor, rule: Rule) -> Tensor:
    """Bool [T, E]: a group's score is its best expert, with a selection bias the sum of its best two."""
    tokens, experts = choice_TE.shape
    grouped_TGE = choice_TE.view(tokens, rule.groups, experts // rule.groups)
    best_TG = grouped_TGE.amax(-1) if rule.bias_E is None else grouped_TGE.topk(2, dim=-1).values.sum(-1)
    kept_TG = torch.zeros_like(best_TG, dtype=torch.bool).scatter(1, best_TG.topk(rule.kept_groups, -1).indices, True)
    return kept_TG.unsqueeze(-1).expand_as(grouped_TGE).reshape(tokens, experts)
