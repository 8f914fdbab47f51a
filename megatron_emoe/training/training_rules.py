"""What elastic settings must satisfy in a training run alone: an evaluation may have any k', and trains nothing."""

from __future__ import annotations

from argparse import Namespace

from megatron_emoe.routing.selection import normalizes
from megatron_emoe.settings.elastic_config import ElasticConfig, elastic_settings, flag
from megatron_emoe.settings.k_schedule import drawn_ks


def check_elastic_training(args: Namespace) -> None:
    """Refuse, by flag, value and rule, what would train nothing (ValueError). args: Megatron's, completed."""
    elastic = elastic_settings(args)
    if elastic.emoe_gradient_check == "stop" and not elastic.counts_vary:
        _refuse_constant_weights(elastic, args)


def _refuse_constant_weights(elastic: ElasticConfig, args: Namespace) -> None:
    """A weight that is divided by itself is 1 whatever the router says: its gradient is 0, and nothing shows it.

    Megatron-Core refuses --moe-router-topk 1 there. Draws can reach one expert too, and a tail scale of 0 leaves one.
    """
    model_k, (low, _) = args.moe_router_topk, elastic.k_fields()
    keep = "keep the scores as weights (--moe-router-pre-softmax, --emoe-combine raw)"
    rule = f"is always 1, so routers get no gradient from it: {keep}, or accept it with --emoe-gradient-check off"
    for k in drawn_ks(elastic, model_k):
        if not normalizes(elastic.emoe_combine, args.moe_router_score_function, args.moe_router_pre_softmax, k):
            continue
        if k == 1:
            raise ValueError(f"{flag(low)} 1: must be at least 2 here; the weight of one expert alone {rule}")
        if model_k == 1 and elastic.tail_scale_at(k, model_k) == 0:
            words = " ".join(elastic.emoe_tail_scale or [])
            raise ValueError(f"--emoe-tail-scale {words}: at k = {k} one expert is left, whose weight {rule}")
