"""Elastic settings: defaults, flags, and every refusal word for word.

A model here has 8 experts, of which 2 are active, unless a case says otherwise.
"""

import argparse
import dataclasses
import re

import pytest
from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.elastic_rules import validate_elastic

COACTIVATION = {"emoe_selection": "coactivation", "emoe_pool_k": 6}
UNIFORM = {"emoe_selection": "prefix", "emoe_k_schedule": "uniform", "emoe_k_min": 1, "emoe_k_max": 4}
WEIGHTED = UNIFORM | {"emoe_k_schedule": "weighted", "emoe_k_weights": [1.0, 0.0, 2.0, 1.0]}
LARGER = {"emoe_selection": "prefix", "emoe_k_schedule": "default-or-larger"}
SMALLER = {"emoe_selection": "prefix", "emoe_k_schedule": "default-or-smaller", "emoe_k_min": 1}
RAMP = UNIFORM | {"emoe_k_schedule": "ramp", "emoe_k_ramp_iters": 100}
LORA = {"emoe_lora_experts": 8}
MODEL = {"model_k": 2, "num_experts": 8}
GROUPS = MODEL | {"num_groups": 4, "group_topk": 2}  # 4 groups of 2 experts, 2 groups are used: 4 experts in reach


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


def flags() -> dict[str, argparse.Action]:
    """The flags that Megatron's factory makes of the fields, by field name."""
    parser = argparse.ArgumentParser(add_help=False)
    ArgumentGroupFactory(ElasticConfig).build_group(parser, "elastic MoE")
    return {action.dest: action for action in parser._actions}


VALID = {
    "defaults": {},
    "coactivation": COACTIVATION,
    "pool of all experts": COACTIVATION | {"emoe_pool_k": 8},
    "fixed pool": COACTIVATION | {"emoe_pool_fixed": True},
    "pool per step, balance on top-k": COACTIVATION | {"emoe_pool_draw": "step", "emoe_balance_on": "topk"},
    "uniform": UNIFORM,
    "uniform over one k": UNIFORM | {"emoe_k_min": 4},
    "uniform up to all experts": UNIFORM | {"emoe_k_max": 8},
    "uniform per layer": UNIFORM | {"emoe_k_draw": "layer"},
    "weighted": WEIGHTED,
    "default or smaller": SMALLER,
    "default or larger, up to 3 k": LARGER,
    "default or larger, up to all experts": LARGER | {"emoe_k_max": 8},
    "ramp": RAMP,
    "schedule and pool": COACTIVATION | without(UNIFORM, "emoe_selection"),
    "pool equal to the largest k": COACTIVATION | without(UNIFORM, "emoe_selection") | {"emoe_pool_k": 4},
    "evaluation": {"emoe_eval_k": [1, 8, 4]},
    "low-rank experts": LORA | COACTIVATION | {"emoe_lora_rank": 4, "emoe_lora_alpha": 0.5},
    "no hierarchical loss": COACTIVATION | {"emoe_hr_loss_coeff": 0.0},
}


@pytest.mark.parametrize("settings", VALID.values(), ids=VALID)
def test_valid_settings(settings):
    validate_elastic(ElasticConfig(**settings), **MODEL)


NO_OTHER = "draws nothing but --moe-router-topk 2; it is --emoe-k-schedule constant"
NO_POOL = "needs --emoe-selection coactivation"
REFUSED = [
    # Parameters that a schedule lacks.
    (without(UNIFORM, "emoe_k_min"), "--emoe-k-schedule uniform: needs --emoe-k-min, which is not given"),
    (without(UNIFORM, "emoe_k_max"), "--emoe-k-schedule uniform: needs --emoe-k-max, which is not given"),
    (without(WEIGHTED, "emoe_k_weights"), "--emoe-k-schedule weighted: needs --emoe-k-weights, which is not given"),
    (without(WEIGHTED, "emoe_k_min"), "--emoe-k-schedule weighted: needs --emoe-k-min, which is not given"),
    (without(WEIGHTED, "emoe_k_max"), "--emoe-k-schedule weighted: needs --emoe-k-max, which is not given"),
    (without(SMALLER, "emoe_k_min"), "--emoe-k-schedule default-or-smaller: needs --emoe-k-min, which is not given"),
    (without(RAMP, "emoe_k_ramp_iters"), "--emoe-k-schedule ramp: needs --emoe-k-ramp-iters, which is not given"),
    (without(RAMP, "emoe_k_min"), "--emoe-k-schedule ramp: needs --emoe-k-min, which is not given"),
    (without(RAMP, "emoe_k_max"), "--emoe-k-schedule ramp: needs --emoe-k-max, which is not given"),
    # Parameters that a schedule has no use for.
    ({"emoe_k_min": 1}, "--emoe-k-min 1: has no meaning with --emoe-k-schedule constant"),
    ({"emoe_k_max": 4}, "--emoe-k-max 4: has no meaning with --emoe-k-schedule constant"),
    ({"emoe_k_ramp_iters": 0}, "--emoe-k-ramp-iters 0: has no meaning with --emoe-k-schedule constant"),
    (SMALLER | {"emoe_k_max": 4}, "--emoe-k-max 4: has no meaning with --emoe-k-schedule default-or-smaller"),
    (UNIFORM | {"emoe_k_weights": [1.0]}, "--emoe-k-weights [1.0]: has no meaning with --emoe-k-schedule uniform"),
    (
        UNIFORM | {"emoe_k_default_prob": 0.8},
        "--emoe-k-default-prob 0.8: has no meaning with --emoe-k-schedule uniform",
    ),
    (WEIGHTED | {"emoe_k_ramp_iters": 9}, "--emoe-k-ramp-iters 9: has no meaning with --emoe-k-schedule weighted"),
    ({"emoe_k_draw": "layer"}, "--emoe-k-draw layer: has no meaning with --emoe-k-schedule constant"),
    (RAMP | {"emoe_k_draw": "microbatch"}, "--emoe-k-draw microbatch: has no meaning with --emoe-k-schedule ramp"),
    # The range of k.
    (UNIFORM | {"emoe_k_min": 0}, "--emoe-k-min 0: must be at least 1"),
    (UNIFORM | {"emoe_k_max": 9}, "--emoe-k-max 9: must not exceed --num-experts 8"),
    (UNIFORM | {"emoe_k_min": 5}, "--emoe-k-min 5: must not exceed --emoe-k-max 4"),
    (SMALLER | {"emoe_k_min": 3}, "--emoe-k-min 3: must not exceed --moe-router-topk 2"),
    (SMALLER | {"emoe_k_min": 2}, "--emoe-k-min 2: must be below --moe-router-topk 2, or no smaller k exists"),
    (SMALLER | {"emoe_k_min": -1}, "--emoe-k-min -1: must be at least 1"),
    # Numbers of the schedules.
    (
        WEIGHTED | {"emoe_k_weights": [1.0, 1.0]},
        "--emoe-k-weights [1.0, 1.0]: needs 4 values, one for each k in [1, 4]",
    ),
    *(
        (
            WEIGHTED | {"emoe_k_weights": weights},
            f"--emoe-k-weights {weights}: must be non-negative, finite and not all zero",
        )
        for weights in ([1.0, -1.0, 1.0, 1.0], [0.0] * 4, [1.0, float("inf"), 1.0, 1.0], [1.0, float("nan"), 1.0, 1.0])
    ),
    (LARGER | {"emoe_k_min": 1}, "--emoe-k-min 1: has no meaning with --emoe-k-schedule default-or-larger"),
    (LARGER | {"emoe_k_max": 2}, "--emoe-k-max 2: must be above --moe-router-topk 2, or no larger k exists"),
    (LARGER | {"emoe_k_max": 1}, "--moe-router-topk 2: must not exceed --emoe-k-max 1"),
    (LARGER | {"emoe_k_max": 9}, "--emoe-k-max 9: must not exceed --num-experts 8"),
    (LARGER | {"emoe_k_default_prob": 0.0}, "--emoe-k-default-prob 0.0: must lie in (0, 1)"),
    (SMALLER | {"emoe_k_default_prob": 0.0}, "--emoe-k-default-prob 0.0: must lie in (0, 1)"),
    (SMALLER | {"emoe_k_default_prob": 1.0}, "--emoe-k-default-prob 1.0: must lie in (0, 1)"),
    *(
        (settings, f"--emoe-k-schedule {settings['emoe_k_schedule']}: {NO_OTHER}")
        for settings in (
            UNIFORM | {"emoe_k_min": 2, "emoe_k_max": 2},
            WEIGHTED | {"emoe_k_weights": [0.0, 3.0, 0.0, 0.0]},
            RAMP | {"emoe_k_min": 2, "emoe_k_max": 2},
        )
    ),
    (SMALLER | {"emoe_k_default_prob": 1.5}, "--emoe-k-default-prob 1.5: must lie in (0, 1)"),
    (SMALLER | {"emoe_k_default_prob": float("nan")}, "--emoe-k-default-prob nan: must lie in (0, 1)"),
    (RAMP | {"emoe_k_ramp_iters": 0}, "--emoe-k-ramp-iters 0: must be at least 1 iteration"),
    # Selection.
    (UNIFORM | {"emoe_selection": "topk"}, "--emoe-k-schedule uniform: needs --emoe-selection prefix or coactivation"),
    (
        {"emoe_selection": "prefix"},
        "--emoe-selection prefix: needs --emoe-k-schedule; with a constant k it is plain topk",
    ),
    ({"emoe_selection": "coactivation"}, "--emoe-selection coactivation: needs --emoe-pool-k, which is not given"),
    ({"emoe_pool_k": 6}, f"--emoe-pool-k 6: {NO_POOL}"),
    ({"emoe_pool_k": 0}, f"--emoe-pool-k 0: {NO_POOL}"),
    (UNIFORM | {"emoe_pool_k": 6}, f"--emoe-pool-k 6: {NO_POOL}"),
    ({"emoe_pool_fixed": True}, f"--emoe-pool-fixed True: {NO_POOL}"),
    ({"emoe_pool_draw": "step"}, f"--emoe-pool-draw step: {NO_POOL}"),
    (UNIFORM | {"emoe_balance_on": "topk"}, f"--emoe-balance-on topk: {NO_POOL}"),
    (
        COACTIVATION | {"emoe_pool_fixed": True, "emoe_pool_draw": "step"},
        "--emoe-pool-draw step: has no meaning with --emoe-pool-fixed",
    ),
    (COACTIVATION | {"emoe_pool_k": 9}, "--emoe-pool-k 9: must not exceed --num-experts 8"),
    (COACTIVATION | {"emoe_pool_k": 1}, "--emoe-pool-k 1: must hold the largest k of the schedule, 2"),
    (
        COACTIVATION | without(UNIFORM, "emoe_selection") | {"emoe_pool_k": 3},
        "--emoe-pool-k 3: must hold the largest k of the schedule, 4",
    ),
    (
        COACTIVATION | {"emoe_pool_k": 2},
        "--emoe-pool-k 2: must exceed the smallest k of the schedule, 2; equal, it is plain topk",
    ),
    # Evaluation, loss, measurements.
    ({"emoe_eval_k": [2, 9]}, "--emoe-eval-k 9: must lie in [1, 8], the number of experts"),
    ({"emoe_eval_k": [0]}, "--emoe-eval-k 0: must lie in [1, 8], the number of experts"),
    ({"emoe_eval_k": [2, 4, 2]}, "--emoe-eval-k 2 4 2: must not name a k' twice"),
    ({"emoe_hr_loss_coeff": -0.1}, "--emoe-hr-loss-coeff -0.1: must be a finite number of at least 0"),
    ({"emoe_hr_loss_coeff": float("inf")}, "--emoe-hr-loss-coeff inf: must be a finite number of at least 0"),
    ({"emoe_hr_loss_coeff": float("nan")}, "--emoe-hr-loss-coeff nan: must be a finite number of at least 0"),
    ({"emoe_coactivation_interval": -1}, "--emoe-coactivation-interval -1: must be at least 0 iterations"),
    # Low-rank experts.
    ({"emoe_lora_rank": 4}, "--emoe-lora-rank 4: needs --emoe-lora-experts, which is not given"),
    ({"emoe_lora_alpha": 4.0}, "--emoe-lora-alpha 4.0: needs --emoe-lora-experts, which is not given"),
    ({"emoe_lora_experts": 1}, "--emoe-lora-experts 1: must be at least 2"),
    (LORA | {"emoe_lora_rank": 0}, "--emoe-lora-rank 0: must be at least 1"),
    *(
        (LORA | {"emoe_lora_alpha": alpha}, f"--emoe-lora-alpha {alpha}: must be a finite number above 0")
        for alpha in (0.0, -1.0, float("nan"), float("inf"))
    ),
    (LORA | COACTIVATION | {"emoe_pool_k": 9}, "--emoe-pool-k 9: must not exceed --emoe-lora-experts 8"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validate_elastic(ElasticConfig(**settings), **MODEL)


NO_SCORE = "must be at least --moe-router-group-topk 2, or a group has no score"
REFUSED_MODEL = [
    (MODEL | {"model_k": 0}, {}, "--moe-router-topk 0: must be at least 1"),
    (MODEL | {"model_k": 9}, {}, "--moe-router-topk 9: must not exceed --num-experts 8"),
    (MODEL | {"model_k": 9}, SMALLER, "--moe-router-topk 9: must not exceed --num-experts 8"),
    (GROUPS | {"model_k": 6}, {}, "--moe-router-topk 6: 2 groups of 2 experts hold only 4"),
    (GROUPS | {"model_k": 1}, {}, f"--moe-router-topk 1: {NO_SCORE}"),
    (GROUPS, COACTIVATION, "--emoe-pool-k 6: 2 groups of 2 experts hold only 4"),
    (GROUPS, UNIFORM | {"emoe_k_min": 2, "emoe_k_max": 5}, "--emoe-k-max 5: 2 groups of 2 experts hold only 4"),
    (GROUPS, UNIFORM, f"--emoe-k-min 1: {NO_SCORE}"),
    (GROUPS | {"model_k": 6}, SMALLER | {"emoe_k_min": 2}, "--moe-router-topk 6: 2 groups of 2 experts hold only 4"),
    (GROUPS, {"emoe_eval_k": [4, 6]}, "--emoe-eval-k 6: 2 groups of 2 experts hold only 4"),
    (GROUPS, {"emoe_eval_k": [4, 1]}, f"--emoe-eval-k 1: {NO_SCORE}"),
]


@pytest.mark.parametrize(("model", "settings", "message"), REFUSED_MODEL, ids=[row[2] for row in REFUSED_MODEL])
def test_settings_refused_for_this_model(model, settings, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        validate_elastic(ElasticConfig(**settings), **model)


def test_everything_within_the_groups_is_accepted():
    validate_elastic(ElasticConfig(**COACTIVATION | {"emoe_pool_k": 4, "emoe_eval_k": [2, 3, 4]}), **GROUPS)


def test_every_field_is_a_flag_with_its_default_and_help():
    made = flags()
    assert set(made) == {field.name for field in dataclasses.fields(ElasticConfig)}
    for field in dataclasses.fields(ElasticConfig):
        action = made[field.name]
        assert action.option_strings == ["--" + field.name.replace("_", "-")]
        assert action.default == field.default
        assert len(action.help) > 30, f"{field.name} has no text under its field"
        assert field.name.startswith("emoe_")  # no name of Megatron's is taken


def test_flags_take_what_the_fields_hold():
    parser = argparse.ArgumentParser()
    ArgumentGroupFactory(ElasticConfig).build_group(parser, "elastic MoE")
    line = (
        "--emoe-selection prefix --emoe-k-schedule weighted --emoe-k-min 1 --emoe-k-max 2 --emoe-k-weights 1 3.5 "
        "--emoe-eval-k 1 4 --emoe-hr-loss-coeff 1e-2 --emoe-pool-fixed"
    )
    args = parser.parse_args(line.split())
    assert (args.emoe_k_weights, args.emoe_eval_k, args.emoe_hr_loss_coeff) == ([1.0, 3.5], [1, 4], 0.01)
    assert args.emoe_pool_fixed is True and args.emoe_seed == 1234
    with pytest.raises(SystemExit):
        parser.parse_args(["--emoe-selection", "random"])


def test_defaults_that_depend_on_other_settings():
    assert ElasticConfig().hr_loss_coeff == 0.0
    assert ElasticConfig(**UNIFORM).hr_loss_coeff == 0.0
    assert ElasticConfig(**COACTIVATION).hr_loss_coeff == 1e-3
    assert ElasticConfig(**COACTIVATION, emoe_hr_loss_coeff=0.0).hr_loss_coeff == 0.0
    assert ElasticConfig(emoe_hr_loss_coeff=0.5).hr_loss_coeff == 0.5
    assert ElasticConfig(**SMALLER).default_prob == 0.8  # ERNIE 5.0
    assert ElasticConfig(**SMALLER, emoe_k_default_prob=0.3).default_prob == 0.3
    assert ElasticConfig(**LARGER).default_prob == 0.5
    assert ElasticConfig(**LARGER).k_range(2) == (2, 6)  # up to 3 k
    assert (ElasticConfig(**LORA).lora_rank, ElasticConfig(**LORA).lora_scale) == (8, 2.0)
    assert ElasticConfig(**LORA, emoe_lora_rank=4, emoe_lora_alpha=32).lora_scale == 8.0


def test_what_the_settings_imply():
    nothing = ElasticConfig()
    assert not (nothing.draws_k or nothing.samples or nothing.draws)
    assert ElasticConfig(**COACTIVATION).samples and not ElasticConfig(**COACTIVATION).draws_k
    assert ElasticConfig(**UNIFORM).draws_k and not ElasticConfig(**UNIFORM).samples
    assert all(ElasticConfig(**settings).draws for settings in (COACTIVATION, UNIFORM))
    assert not ElasticConfig(emoe_eval_k=[4]).draws  # evaluation is no draw


@pytest.mark.parametrize(
    ("settings", "expected"), [({}, (2, 2)), (UNIFORM, (1, 4)), (WEIGHTED, (1, 4)), (SMALLER, (1, 2)), (RAMP, (1, 4))]
)
def test_range_of_k(settings, expected):
    assert ElasticConfig(**settings).k_range(2) == expected


def test_settings_for_checkpoints_and_logs():
    settings = ElasticConfig(**COACTIVATION).settings()
    assert list(settings) == [field.name for field in dataclasses.fields(ElasticConfig)]
    assert settings["emoe_selection"] == "coactivation" and settings["emoe_pool_k"] == 6
    assert settings["emoe_k_min"] is None
