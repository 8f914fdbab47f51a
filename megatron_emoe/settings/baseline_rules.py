"""What the baselines' settings must satisfy: top-p, null experts and noisy top-k."""

from __future__ import annotations

from megatron_emoe.settings.elastic_config import ElasticConfig, flag

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
        limit = f"{elastic.experts_flag} {num_experts}"
        rule = f"with --emoe-selection noisy-topk it must be below {limit}, or no noise can matter"
        _refuse("moe_router_topk", model_k, rule)


def _refuse(name: str, value: object, rule: str) -> None:
    raise ValueError(f"{flag(name)} {value}: {rule}")
