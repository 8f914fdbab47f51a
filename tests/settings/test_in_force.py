"""No elastic flag is taken and then does nothing; what is in force is said."""

from dataclasses import fields
from itertools import product
from typing import Any

import pytest

from megatron_emoe.routing.active_k import Place, draw_for
from megatron_emoe.settings import flag_files
from megatron_emoe.settings.baseline_rules import check_baseline_settings
from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.elastic_rules import validate_elastic
from megatron_emoe.settings.in_force import settings_in_force
from megatron_emoe.settings.k_schedule import trained_ks
from tests.distributed import REPO

POOL = {"emoe_selection": "coactivation", "emoe_pool_k": 6}
RANGE = {"emoe_k_min": 1, "emoe_k_max": 4}
SCHEDULES: dict[str, dict[str, Any]] = {
    "constant": {},
    "uniform": RANGE,
    "weighted": RANGE | {"emoe_k_weights": [1.0, 1.0, 1.0, 2.0]},
    "default-or-smaller": {"emoe_k_min": 1},
    "default-or-larger": {},
    "ramp": RANGE | {"emoe_k_ramp_iters": 20},
    "stratified": {},
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "topk": {},
    "coactivation": POOL,
    "fixed pool": POOL | {"emoe_pool_fixed": True},
    "prefix": {"emoe_selection": "prefix"},
    "top-p": {"emoe_selection": "top-p"},
    "null-experts": {"emoe_selection": "null-experts", "emoe_null_experts": 4},
    "noisy-topk": {"emoe_selection": "noisy-topk"},
}
CHANGED: dict[str, Any] = {
    "emoe_pool_k": 7,
    "emoe_pool_draw": "step",
    "emoe_pool_fixed": True,
    "emoe_pool_keep": 1,
    "emoe_pool_prob": 0.5,
    "emoe_pool_anneal_iters": 20,
    "emoe_k_min": 2,
    "emoe_k_max": 5,
    "emoe_k_weights": [4.0, 1.0, 1.0, 1.0],
    "emoe_k_default_prob": 0.3,
    "emoe_k_ramp_iters": 40,
    "emoe_k_draw": "layer",
    "emoe_balance_on": "topk",
    "emoe_top_p": 0.6,
    "emoe_top_p_max": 3,
    "emoe_entropy_loss_coeff": 0.5,
    "emoe_null_experts": 6,
    "emoe_importance_loss_coeff": 0.5,
    "emoe_load_loss_coeff": 0.5,
    "emoe_distill_coeff": 0.5,
    "emoe_k_grid": [3, 5],
    "emoe_other_weight": 0.5,
    "emoe_second_pass": 0.5,
    "emoe_budget_scales": True,
}
ALWAYS = {
    "emoe_selection": "what the others depend on",
    "emoe_k_schedule": "likewise",
    "emoe_seed": "which draws: runs of one comparison have it in common, also those that draw nothing",
    "emoe_hr_loss_coeff": "a loss of every selection",
    "emoe_combine": "weights of every selection",
    "emoe_tail_scale": "evaluations have it too, and it is stored with the model",
    "emoe_train": "whatever is selected",
    "emoe_teacher": "of every micro-batch, whatever its k",
    "emoe_teacher_weight": "likewise; refused without (tests/training/test_teacher.py)",
    "emoe_gradient_check": "likewise",
    "emoe_lora_experts": "which model it is, with every selection",
    "emoe_lora_rank": "likewise; refused without them (test_elastic_config.py)",
    "emoe_lora_alpha": "likewise",
    "emoe_eval_k": "likewise; a run without evaluations: tests/training/test_training_rules.py",
    "emoe_router_watch": "likewise",
    "emoe_coactivation_interval": "likewise",
    "emoe_qk_norm": "of the model",
    "emoe_clip_qkv": "of the model",
}
"""Flags that mean something with every selection and schedule, and why."""

PLACES = [Place(iteration, microbatch, layer) for iteration in range(30) for microbatch in (0, 1) for layer in (1, 2)]


def does(settings: ElasticConfig) -> list[Any]:
    """What routers and losses get of the settings."""
    draws = [draw_for(settings, 2, place) for place in PLACES]
    pools = settings.samples and (settings.emoe_pool_keep, settings.emoe_pool_prob, settings.emoe_balance_on)
    others = any(draw.k != 2 for draw in draws) and settings.emoe_distill_coeff
    top_p = settings.emoe_selection == "top-p" and (settings.top_p, settings.emoe_top_p_max)
    nulls = settings.emoe_selection == "null-experts" and settings.emoe_null_experts
    scales = settings.emoe_budget_scales and trained_ks(settings, 2)
    losses = (settings.hr_loss_coeff, settings.entropy_loss_coeff, settings.noise_loss_coeffs)
    return [draws, pools, others, top_p, nulls, losses, scales]


def refused(settings: ElasticConfig) -> str | None:
    try:
        validate_elastic(settings, model_k=2, num_experts=8)
        check_baseline_settings(settings, model_k=2, num_experts=8)
    except ValueError as error:
        return str(error)
    return None


def test_every_setting_is_looked_at():
    assert sorted([*CHANGED, *ALWAYS]) == sorted(field.name for field in fields(ElasticConfig))


@pytest.mark.parametrize("name", CHANGED)
def test_a_flag_does_something_or_is_refused(name):
    taken = 0
    for selection, schedule in product(SELECTIONS, SCHEDULES):
        base = SELECTIONS[selection] | SCHEDULES[schedule] | {"emoe_k_schedule": schedule}
        if refused(ElasticConfig(**base)) is not None:
            continue
        before, after = ElasticConfig(**base), ElasticConfig(**base | {name: CHANGED[name]})
        if getattr(before, name) == CHANGED[name]:
            continue
        message = refused(after)
        taken += message is None
        changes = message is None and does(before) != does(after)
        assert changes or message is not None, (selection, schedule)
    assert taken > 0


def test_a_selection_in_place_of_the_recipe_s_says_what_stays():
    words = flag_files.expand([f"@{REPO}/examples/recipe.args", "--emoe-selection", "coactivation", "--lr", "1e-3"])
    words += ["--emoe-pool-k=6", "--emoe-pool-fixed", "--emoe-eval-k", "2", "4"]
    settings = ElasticConfig(
        **POOL,
        emoe_pool_fixed=True,
        emoe_k_schedule="stratified",
        emoe_budget_scales=True,
        emoe_tail_scale=["0.25"],
        emoe_eval_k=[2, 4],
        emoe_clip_qkv=8.0,
    )
    assert settings_in_force(settings, words) == (
        "elastic settings: --emoe-selection coactivation (not prefix) --emoe-pool-k 6 --emoe-pool-fixed "
        "--emoe-k-schedule stratified --emoe-budget-scales --emoe-tail-scale 0.25 --emoe-eval-k 2 4"
    )


def test_nothing_is_said_of_a_plain_run():
    assert settings_in_force(ElasticConfig(), ["--emoe-selection", "prefix", "--emoe-selection", "topk"]) is None
