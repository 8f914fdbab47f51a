"""What elastic settings must satisfy in a training run alone: an evaluation may have any k', and trains nothing."""

from __future__ import annotations

from argparse import Namespace

from megatron_emoe.routing.selection import normalizes
from megatron_emoe.settings.elastic_config import ElasticConfig, elastic_settings, flag
from megatron_emoe.settings.k_schedule import drawn_ks


def check_elastic_training(args: Namespace) -> None:
    """Refuse, by flag, value and rule, what would train nothing or do nothing (ValueError). args: Megatron's,
    completed."""
    if not args.num_experts:
        raise ValueError("--num-experts is not given: an elastic mixture of experts needs experts")
    elastic = elastic_settings(args)
    _refuse_idle(elastic, args)
    if elastic.emoe_gradient_check == "stop" and not elastic.counts_vary:
        _refuse_constant_weights(elastic, args)


def _refuse_idle(elastic: ElasticConfig, args: Namespace) -> None:
    """Settings of a part of Megatron that the run does not have."""
    if elastic.emoe_eval_k and args.eval_iters == 0:
        ks = " ".join(map(str, elastic.emoe_eval_k))
        raise ValueError(f"--emoe-eval-k {ks}: needs evaluations, and --eval-iters is 0")
    if elastic.emoe_balance_on != "dispatched" and not _balances(args):
        raise ValueError(f"--emoe-balance-on {elastic.emoe_balance_on}: there is no load-balancing loss that counts")


def _balances(args: Namespace) -> bool:
    """Whether a load-balancing loss has a weight."""
    kinds, coeffs = args.moe_router_load_balancing_type, args.moe_aux_loss_coeff
    kinds, coeffs = (value if isinstance(value, list) else [value] for value in (kinds, coeffs))
    return any(kind.endswith("aux_loss") and coeff for kind, coeff in zip(kinds, coeffs, strict=False))


def _refuse_constant_weights(elastic: ElasticConfig, args: Namespace) -> None:
    """A weight that is divided by itself is 1 whatever the router says: its gradient is 0, and nothing shows it.

    Megatron-Core refuses --moe-router-topk 1 there. Draws can reach one expert too, and a tail scale of 0 leaves one.
    stratified may deal 1: other micro-batches of the same steps train the routers.
    """
    model_k, (low, _) = args.moe_router_topk, elastic.k_fields()
    keep = "keep the scores as weights (--moe-router-pre-softmax, --emoe-combine raw)"
    rule = f"is always 1, so routers get no gradient from it: {keep}, or accept it with --emoe-gradient-check off"
    for k in drawn_ks(elastic, model_k):
        if not normalizes(elastic.emoe_combine, args.moe_router_score_function, args.moe_router_pre_softmax, k):
            continue
        if k == 1 and elastic.emoe_k_schedule != "stratified":
            raise ValueError(f"{flag(low)} 1: must be at least 2 here; the weight of one expert alone {rule}")
        if model_k == 1 and elastic.tail_scale_at(k, model_k) == 0:
            words = " ".join(elastic.emoe_tail_scale or [])
            raise ValueError(f"--emoe-tail-scale {words}: at k = {k} one expert is left, whose weight {rule}")
