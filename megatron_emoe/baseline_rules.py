"""What the baselines' settings must satisfy, and what top-p, null experts and noisy top-k cannot be combined with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_emoe.elastic_config import ElasticConfig, flag

if TYPE_CHECKING:
    from megatron_emoe.transformer_config import ElasticTransformerConfig

BASELINES = ("top-p", "null-experts", "noisy-topk")
_NEEDS = {
    "emoe_top_p": "top-p",
    "emoe_top_p_max": "top-p",
    "emoe_entropy_loss_coeff": "top-p",
    "emoe_null_experts": "null-experts",
    "emoe_importance_loss_coeff": "noisy-topk",
    "emoe_load_loss_coeff": "noisy-topk",
}


def check_baseline_settings(elastic: ElasticConfig, *, model_k: int, num_experts: int) -> None:
    """Check the baselines' own settings. Pure; arguments in experts.

    Raises:
        ValueError: with flag, value and rule, for the first setting that cannot hold.
    """
    given = {name: getattr(elastic, name) for name in _NEEDS if getattr(elastic, name) is not None}
    for name, value in given.items():
        if elastic.emoe_selection != _NEEDS[name]:
            _refuse(name, value, f"needs --emoe-selection {_NEEDS[name]}")
        if name.endswith("_coeff") and not 0 <= value < float("inf"):
            _refuse(name, value, "must be a finite number of at least 0")
    if not 0 < elastic.top_p <= 1:
        _refuse("emoe_top_p", elastic.top_p, "must lie in (0, 1]")
    if not 1 <= given.get("emoe_top_p_max", 1) <= num_experts:
        _refuse("emoe_top_p_max", elastic.emoe_top_p_max, f"must lie in [1, {num_experts}], the number of experts")
    if elastic.emoe_selection == "null-experts" and elastic.emoe_null_experts is None:
        _refuse("emoe_selection", "null-experts", "needs --emoe-null-experts, which is not given")
    if given.get("emoe_null_experts", 1) < 1:
        _refuse("emoe_null_experts", elastic.emoe_null_experts, "must be at least 1")
    if elastic.adds_noise and model_k >= num_experts:
        rule = f"with --emoe-selection noisy-topk it must be below --num-experts {num_experts}, or no noise can matter"
        _refuse("moe_router_topk", model_k, rule)


def _refuse(name: str, value: object, rule: str) -> None:
    raise ValueError(f"{flag(name)} {value}: {rule}")


def check_baseline_combinations(config: ElasticTransformerConfig) -> None:
    """Refuse what a baseline is not defined for, by both flags and the reason (ValueError)."""
    if config.emoe_selection not in BASELINES:
        return
    cause = f"--emoe-selection {config.emoe_selection}"
    scores, groups = config.moe_router_score_function, config.moe_router_group_topk
    if scores != "softmax":
        _conflict(cause, f"--moe-router-score-function {scores}", "it is defined by a softmax over the experts")
    if config.moe_router_enable_expert_bias:
        _conflict(cause, "--moe-router-enable-expert-bias", "its rule knows no selection bias")
    if groups:
        _conflict(cause, f"--moe-router-group-topk {groups}", "its rule knows no groups of experts")
    if config.counts_vary:
        _refuse_fixed_counts(config, cause)


def _refuse_fixed_counts(config: ElasticTransformerConfig, cause: str) -> None:
    """What counts on every token having k experts."""
    kinds = config.moe_router_load_balancing_type
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in ("none", "aux_loss"):
            flagged = f"--moe-router-load-balancing-type {kind}"
            _conflict(cause, flagged, "it counts k experts for every token; use aux_loss or none")
    if config.moe_expert_capacity_factor is not None:
        factor = f"--moe-expert-capacity-factor {config.moe_expert_capacity_factor}"
        _conflict(cause, factor, "it is a share of tokens times k, and tokens have no common k")
    if config.emoe_tail_scale is not None:
        tail = f"--emoe-tail-scale {' '.join(config.emoe_tail_scale)}"
        _conflict(cause, tail, "it is about ranks above k, and tokens have no common k")


def _conflict(elastic: str, other: str, why: str) -> None:
    raise ValueError(f"{elastic} cannot be combined with {other}: {why}")
