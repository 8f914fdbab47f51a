"""What the elastic settings must satisfy, each against the others and against the model. Pure; no tensors."""

from __future__ import annotations

from megatron_emoe.settings.elastic_config import ElasticConfig, flag
from megatron_emoe.settings.k_schedule import drawn_ks
from megatron_emoe.settings.lora_rules import check_lora_settings
from megatron_emoe.settings.tail_scale import TailScale, parse_tail_scale

_SCHEDULE_NEEDS = {
    "constant": set(),
    "uniform": {"emoe_k_min", "emoe_k_max"},
    "weighted": {"emoe_k_min", "emoe_k_max", "emoe_k_weights"},
    "default-or-smaller": {"emoe_k_min"},
    "default-or-larger": set(),
    "ramp": {"emoe_k_min", "emoe_k_max", "emoe_k_ramp_iters"},
    "stratified": set(),
}
_SCHEDULE_TAKES = {
    **_SCHEDULE_NEEDS,
    "default-or-smaller": {"emoe_k_min", "emoe_k_default_prob"},
    "default-or-larger": {"emoe_k_max", "emoe_k_default_prob"},
    "stratified": {"emoe_k_grid", "emoe_k_default_prob"},
}
_SCHEDULE_PARAMETERS = {
    *("emoe_k_min", "emoe_k_max", "emoe_k_weights", "emoe_k_default_prob", "emoe_k_ramp_iters", "emoe_k_grid")
}
_SAMPLING_PARAMETERS = (
    *("emoe_pool_k", "emoe_pool_draw", "emoe_pool_fixed", "emoe_pool_keep", "emoe_pool_prob"),
    *("emoe_pool_anneal_iters", "emoe_balance_on"),
)


def validate_elastic(
    elastic: ElasticConfig,
    *,
    model_k: int,
    num_experts: int,
    num_groups: int | None = None,
    group_topk: int | None = None,
) -> None:
    """Check every elastic setting against the model. Pure; all arguments in experts or groups.

    Raises:
        ValueError: with flag, value and rule, for the first setting that cannot hold.
    """
    check_lora_settings(elastic)
    _check_schedule(elastic, model_k, num_experts)
    _check_selection(elastic, model_k, num_experts)
    _check_eval_k(elastic, num_experts)
    check_tail_scale(elastic.emoe_tail_scale, model_k, num_experts)
    _check_numbers(elastic)
    _check_weights_of_others(elastic)
    _check_distillation(elastic, model_k)
    _check_teacher(elastic)
    if group_topk:
        _check_groups(elastic, model_k, num_experts, num_groups or 1, group_topk)


def _refuse(name: str, value: object, rule: str) -> None:
    raise ValueError(f"{f'{flag(name)} {value}'.rstrip()}: {rule}")


def _check_schedule(elastic: ElasticConfig, model_k: int, num_experts: int) -> None:
    schedule = elastic.emoe_k_schedule
    given = {name for name in _SCHEDULE_PARAMETERS if getattr(elastic, name) is not None}
    for name in sorted(_SCHEDULE_NEEDS[schedule] - given):
        _refuse("emoe_k_schedule", schedule, f"needs {flag(name)}, which is not given")
    for name in sorted(given - _SCHEDULE_TAKES[schedule]):
        _refuse(name, getattr(elastic, name), f"has no meaning with {flag('emoe_k_schedule')} {schedule}")
    if schedule == "stratified":
        _check_grid(elastic, model_k)
    if schedule in ("constant", "ramp", "stratified") and elastic.emoe_k_draw != "step":
        _refuse("emoe_k_draw", elastic.emoe_k_draw, f"has no meaning with {flag('emoe_k_schedule')} {schedule}")
    (low, high), (low_name, high_name) = elastic.k_range(model_k), elastic.k_fields()
    if low < 1:
        _refuse(low_name, low, "must be at least 1")
    if high > num_experts:
        _refuse(high_name, high, f"must not exceed {elastic.experts_flag} {num_experts}")
    if low > high:
        _refuse(low_name, low, f"must not exceed {flag(high_name)} {high}")
    if schedule == "default-or-smaller" and low == high:
        _refuse(low_name, low, f"must be below {flag(high_name)} {high}, or no smaller k exists")
    if schedule == "default-or-larger" and low == high:
        _refuse(high_name, high, f"must be above {flag(low_name)} {low}, or no larger k exists")
    if schedule == "weighted":
        _check_weights(_weights(elastic), low, high)
    _check_that_k_varies(elastic, model_k)


def _check_grid(elastic: ElasticConfig, model_k: int) -> None:
    grid = elastic.k_grid(model_k)
    words = " ".join(map(str, grid))
    if not grid or len(set(grid)) != len(grid) or model_k in grid:
        rule = f"must name one k or more, each once, and not --moe-router-topk {model_k}, which has its own share"
        _refuse("emoe_k_grid", words, rule)
    if elastic.emoe_second_pass and elastic.emoe_k_default_prob is not None:
        rule = f"has no meaning with --emoe-second-pass {elastic.emoe_second_pass}: every micro-batch runs at k too"
        _refuse("emoe_k_default_prob", elastic.emoe_k_default_prob, rule)


def _check_weights_of_others(elastic: ElasticConfig) -> None:
    """Weights of the passes at another k than the model's, which only stratified has in every step."""
    weight, second = elastic.emoe_other_weight, elastic.emoe_second_pass
    if not 0 < weight < float("inf"):
        _refuse("emoe_other_weight", weight, "must be a finite number above 0")
    if not 0 <= second < float("inf"):
        _refuse("emoe_second_pass", second, "must be a finite number of at least 0")
    for name, value, unset in (("emoe_other_weight", weight, 1.0), ("emoe_second_pass", second, 0.0)):
        if value != unset and elastic.emoe_k_schedule != "stratified":
            _refuse(name, value, "needs --emoe-k-schedule stratified")
    if second and weight != 1.0:
        _refuse("emoe_other_weight", weight, f"has no meaning with --emoe-second-pass {second}, which is a weight")
    if elastic.emoe_budget_scales and not elastic.draws_k:
        _refuse("emoe_budget_scales", "", "needs an --emoe-k-schedule that trains more than one k")


def _check_that_k_varies(elastic: ElasticConfig, model_k: int) -> None:
    """A schedule that never draws another k is no schedule."""
    if not 0 < elastic.default_prob < 1:
        _refuse("emoe_k_default_prob", elastic.default_prob, "must lie in (0, 1)")
    if elastic.draws_k and drawn_ks(elastic, model_k) == [model_k]:
        rule = f"draws nothing but --moe-router-topk {model_k}; it is --emoe-k-schedule constant"
        _refuse("emoe_k_schedule", elastic.emoe_k_schedule, rule)


def _weights(elastic: ElasticConfig) -> list[float]:
    return elastic.emoe_k_weights or []


def _check_weights(weights: list[float], low: int, high: int) -> None:
    if len(weights) != high - low + 1:
        _refuse("emoe_k_weights", weights, f"needs {high - low + 1} values, one for each k in [{low}, {high}]")
    if min(weights) < 0 or not 0 < sum(weights) < float("inf"):
        _refuse("emoe_k_weights", weights, "must be non-negative, finite and not all zero")


def _check_selection(elastic: ElasticConfig, model_k: int, num_experts: int) -> None:
    low, high = elastic.k_range(model_k)
    pool = elastic.emoe_pool_k
    if elastic.emoe_selection not in ("prefix", "coactivation") and elastic.draws_k:
        _refuse("emoe_k_schedule", elastic.emoe_k_schedule, "needs --emoe-selection prefix or coactivation")
    if elastic.emoe_selection == "prefix" and not elastic.draws_k:
        _refuse("emoe_selection", "prefix", "needs --emoe-k-schedule; with a constant k it is plain topk")
    if not elastic.samples:
        for name in _SAMPLING_PARAMETERS:
            if getattr(elastic, name) != getattr(ElasticConfig, name):
                _refuse(name, getattr(elastic, name), "needs --emoe-selection coactivation")
        return
    if elastic.emoe_pool_fixed and elastic.emoe_pool_draw != "token":
        _refuse("emoe_pool_draw", elastic.emoe_pool_draw, "has no meaning with --emoe-pool-fixed")
    if pool is None:
        _refuse("emoe_selection", "coactivation", "needs --emoe-pool-k, which is not given")
    elif pool > num_experts:
        _refuse("emoe_pool_k", pool, f"must not exceed {elastic.experts_flag} {num_experts}")
    elif pool < high:
        _refuse("emoe_pool_k", pool, f"must hold the largest k of the schedule, {high}")
    elif pool == low:
        _refuse("emoe_pool_k", pool, f"must exceed the smallest k of the schedule, {low}; equal, it is plain topk")
    _check_pool_numbers(elastic, low)


def _check_pool_numbers(elastic: ElasticConfig, low: int) -> None:
    if not 0 <= elastic.emoe_pool_keep < low:
        _refuse("emoe_pool_keep", elastic.emoe_pool_keep, f"must lie in [0, {low - 1}], below the smallest k")
    if not 0 < elastic.emoe_pool_prob <= 1:
        _refuse("emoe_pool_prob", elastic.emoe_pool_prob, "must lie in (0, 1]")
    if elastic.emoe_pool_anneal_iters < 0:
        _refuse("emoe_pool_anneal_iters", elastic.emoe_pool_anneal_iters, "must be at least 0 iterations")
    if elastic.emoe_pool_fixed and elastic.emoe_pool_prob < 1:
        _refuse("emoe_pool_prob", elastic.emoe_pool_prob, "has no meaning with --emoe-pool-fixed")


def read_tail_scale(words: list[str]) -> TailScale:
    """The table in the words of --emoe-tail-scale (ValueError, which names the flag, where they are none)."""
    try:
        return parse_tail_scale(words)
    except ValueError as error:
        raise ValueError(f"{flag('emoe_tail_scale')} {error}") from error


def check_tail_scale(words: list[str] | None, model_k: int, num_experts: int) -> None:
    """ValueError for words of --emoe-tail-scale that are none, or name a k' that has no tail in this model."""
    for k, scale in () if words is None else read_tail_scale(words).table:
        if k and not model_k < k <= num_experts:
            _refuse("emoe_tail_scale", f"{k}:{scale}", f"k' must lie in [{model_k + 1}, {num_experts}], above k")


def _check_eval_k(elastic: ElasticConfig, num_experts: int) -> None:
    ks = elastic.emoe_eval_k or []
    for k in ks:
        if not 1 <= k <= num_experts:
            _refuse("emoe_eval_k", k, f"must lie in [1, {num_experts}], the number of experts")
    if len(set(ks)) != len(ks):
        _refuse("emoe_eval_k", " ".join(map(str, ks)), "must not name a k' twice")


def _check_numbers(elastic: ElasticConfig) -> None:
    coeff = elastic.emoe_hr_loss_coeff
    if coeff is not None and not 0 <= coeff < float("inf"):
        _refuse("emoe_hr_loss_coeff", coeff, "must be a finite number of at least 0")
    if elastic.emoe_k_ramp_iters is not None and elastic.emoe_k_ramp_iters < 1:
        _refuse("emoe_k_ramp_iters", elastic.emoe_k_ramp_iters, "must be at least 1 iteration")
    if elastic.emoe_coactivation_interval < 0:
        _refuse("emoe_coactivation_interval", elastic.emoe_coactivation_interval, "must be at least 0 iterations")


def _check_distillation(elastic: ElasticConfig, model_k: int) -> None:
    coeff = elastic.emoe_distill_coeff
    if not 0 <= coeff < float("inf"):
        _refuse("emoe_distill_coeff", coeff, "must be a finite number of at least 0")
    if coeff and drawn_ks(elastic, model_k) == [model_k]:
        rule = f"needs an --emoe-k-schedule that draws another number than --moe-router-topk {model_k}"
        _refuse("emoe_distill_coeff", coeff, rule)


def _check_teacher(elastic: ElasticConfig) -> None:
    teacher, weight = elastic.emoe_teacher, elastic.emoe_teacher_weight
    if not 0 < weight <= 1:
        _refuse("emoe_teacher_weight", weight, "must lie in (0, 1]")
    if teacher is None:
        if weight != ElasticConfig.emoe_teacher_weight:
            _refuse("emoe_teacher_weight", weight, "has no meaning without --emoe-teacher")
        return
    if elastic.emoe_distill_coeff:
        _refuse("emoe_teacher", teacher, f"excludes --emoe-distill-coeff {elastic.emoe_distill_coeff}: one teacher")
    if elastic.emoe_second_pass:
        _refuse("emoe_teacher", teacher, f"excludes --emoe-second-pass {elastic.emoe_second_pass}: a third pass")
    if elastic.emoe_lora_experts is not None:
        _refuse("emoe_teacher", teacher, f"excludes --emoe-lora-experts {elastic.emoe_lora_experts}: not tried")


def _check_groups(elastic: ElasticConfig, model_k: int, num_experts: int, num_groups: int, group_topk: int) -> None:
    """Group-limited routing picks `group_topk` of `num_groups` groups, scoring each by its best k // group_topk
    experts."""
    reachable = num_experts // num_groups * group_topk
    (low, high), (low_name, high_name) = elastic.k_range(model_k), elastic.k_fields()
    largest = {high_name: high, "emoe_pool_k": elastic.emoe_pool_k or 0, "emoe_eval_k": max(elastic.emoe_eval_k or [0])}
    for name, value in largest.items():
        if value > reachable:
            _refuse(name, value, f"{group_topk} groups of {num_experts // num_groups} experts hold only {reachable}")
    smallest = {low_name: low, "emoe_eval_k": min(elastic.emoe_eval_k or [num_experts])}
    for name, value in smallest.items():
        if value < group_topk:
            _refuse(name, value, f"must be at least --moe-router-group-topk {group_topk}, or a group has no score")
