"""The baselines' settings and what they refuse, word for word. A model has 8 experts, of which 2 are active."""

from typing import Any

import pytest

from megatron_emoe.settings.baseline_rules import check_baseline_settings
from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.elastic_rules import validate_elastic
from tests.tiny import layer_config

TOP_P = {"emoe_selection": "top-p"}
NULL = {"emoe_selection": "null-experts", "emoe_null_experts": 8}
NOISY = {"emoe_selection": "noisy-topk"}
MODEL = {"model_k": 2, "num_experts": 8}


def check(settings: dict[str, Any], **model: int) -> None:
    elastic = ElasticConfig(**settings)
    validate_elastic(elastic, **MODEL | model)
    check_baseline_settings(elastic, **MODEL | model)


VALID = {
    "top-p": TOP_P,
    "top-p with everything": TOP_P | {"emoe_top_p": 1.0, "emoe_top_p_max": 8, "emoe_entropy_loss_coeff": 0.0},
    "null experts": NULL,
    "one null expert, raw": NULL | {"emoe_null_experts": 1, "emoe_combine": "raw"},
    "noisy top-k": NOISY,
    "noisy top-k without losses": NOISY | {"emoe_importance_loss_coeff": 0.0, "emoe_load_loss_coeff": 0.0},
    "hierarchical loss beside it": TOP_P | {"emoe_hr_loss_coeff": 0.1},
}


@pytest.mark.parametrize("settings", VALID.values(), ids=VALID)
def test_valid_settings(settings):
    check(settings)


def test_defaults_are_the_papers():
    top_p, null, noisy, plain = (ElasticConfig(**settings) for settings in (TOP_P, NULL, NOISY, {}))
    assert (top_p.top_p, top_p.entropy_loss_coeff, noisy.noise_loss_coeffs) == (0.4, 1e-4, (0.1, 0.1))
    for other in (null, noisy, plain):
        assert other.entropy_loss_coeff == 0
    assert plain.noise_loss_coeffs == top_p.noise_loss_coeffs == (0, 0)
    assert [each.counts_vary for each in (top_p, null, noisy, plain)] == [True, True, False, False]
    assert [each.draws for each in (top_p, null, noisy, plain)] == [False, False, True, False]
    assert top_p.hr_loss_coeff == noisy.hr_loss_coeff == 0


REFUSED = [
    ({"emoe_top_p": 0.5}, "--emoe-top-p 0.5: needs --emoe-selection top-p"),
    (NULL | {"emoe_top_p_max": 2}, "--emoe-top-p-max 2: needs --emoe-selection top-p"),
    (NOISY | {"emoe_entropy_loss_coeff": 0.1}, "--emoe-entropy-loss-coeff 0.1: needs --emoe-selection top-p"),
    (TOP_P | {"emoe_null_experts": 2}, "--emoe-null-experts 2: needs --emoe-selection null-experts"),
    ({"emoe_importance_loss_coeff": 0.0}, "--emoe-importance-loss-coeff 0.0: needs --emoe-selection noisy-topk"),
    (TOP_P | {"emoe_load_loss_coeff": 1.0}, "--emoe-load-loss-coeff 1.0: needs --emoe-selection noisy-topk"),
    (TOP_P | {"emoe_top_p": 0.0}, "--emoe-top-p 0.0: must lie in (0, 1]"),
    (TOP_P | {"emoe_top_p": 1.5}, "--emoe-top-p 1.5: must lie in (0, 1]"),
    (TOP_P | {"emoe_top_p": float("nan")}, "--emoe-top-p nan: must lie in (0, 1]"),
    (TOP_P | {"emoe_top_p_max": 0}, "--emoe-top-p-max 0: must lie in [1, 8], the number of experts"),
    (TOP_P | {"emoe_top_p_max": 9}, "--emoe-top-p-max 9: must lie in [1, 8], the number of experts"),
    (
        TOP_P | {"emoe_entropy_loss_coeff": -1.0},
        "--emoe-entropy-loss-coeff -1.0: must be a finite number of at least 0",
    ),
    (
        NOISY | {"emoe_load_loss_coeff": float("inf")},
        "--emoe-load-loss-coeff inf: must be a finite number of at least 0",
    ),
    (
        {"emoe_selection": "null-experts"},
        "--emoe-selection null-experts: needs --emoe-null-experts, which is not given",
    ),
    (NULL | {"emoe_null_experts": 0}, "--emoe-null-experts 0: must be at least 1"),
    (TOP_P | {"emoe_pool_k": 4}, "--emoe-pool-k 4: needs --emoe-selection coactivation"),
    (
        NULL | {"emoe_k_schedule": "uniform", "emoe_k_min": 1, "emoe_k_max": 4},
        "--emoe-k-schedule uniform: needs --emoe-selection prefix or coactivation",
    ),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_refused_settings(settings, message):
    with pytest.raises(ValueError) as error:
        check(settings)
    assert str(error.value) == message


def test_noise_that_cannot_matter_is_refused():
    message = (
        "--moe-router-topk 8: with --emoe-selection noisy-topk it must be below --num-experts 8, or no noise can matter"
    )
    with pytest.raises(ValueError) as error:
        check(NOISY, model_k=8)
    assert str(error.value) == message
    check(NOISY, model_k=7)


SIGMOID = {"moe_router_score_function": "sigmoid", "moe_router_pre_softmax": False}
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
AUX = "moe_router_load_balancing_type"
# For every baseline: what it is not defined with.
UNDEFINED = [
    (SIGMOID, "--moe-router-score-function sigmoid: it is defined by a softmax over the experts"),
    ({"moe_router_enable_expert_bias": True}, "--moe-router-enable-expert-bias: its rule knows no selection bias"),
    (GROUPS, "--moe-router-group-topk 2: its rule knows no groups of experts"),
    ({AUX: "sinkhorn"}, "--moe-router-load-balancing-type sinkhorn: it chooses the experts itself"),
    ({"moe_enable_routing_replay": True}, "--moe-enable-routing-replay: a replayed selection is not a drawn one"),
]
# For those whose counts differ from token to token.
COUNTED = [
    *(
        (
            {AUX: kind, "moe_aux_loss_coeff": 0.1},
            f"--moe-router-load-balancing-type {kind}: it counts k experts for every token; use aux_loss or none",
        )
        for kind in ("seq_aux_loss", "global_aux_loss")
    ),
    (
        {"moe_expert_capacity_factor": 1.5},
        "--moe-expert-capacity-factor 1.5: it is a share of tokens times k, and tokens have no common k",
    ),
    (
        {"emoe_tail_scale": ["4:0.5"]},
        "--emoe-tail-scale 4:0.5: it is about ranks above k, and tokens have no common k",
    ),
]


def cases() -> list[tuple[dict[str, Any], dict[str, Any], str]]:
    both = [(name, more, text) for name in (TOP_P, NULL, NOISY) for more, text in UNDEFINED]
    return both + [(name, more, text) for name in (TOP_P, NULL) for more, text in COUNTED]


@pytest.mark.parametrize(("baseline", "more", "text"), cases())
def test_what_a_baseline_is_not_defined_with_is_refused_by_both_flags(baseline, more, text):
    if more.get(AUX) == "sinkhorn" and baseline is not NOISY:
        text = "--moe-router-load-balancing-type sinkhorn: it counts k experts for every token; use aux_loss or none"
    with pytest.raises(ValueError) as error:
        layer_config(**baseline | more)
    assert str(error.value) == f"--emoe-selection {baseline['emoe_selection']} cannot be combined with {text}"


@pytest.mark.parametrize("baseline", [TOP_P, NULL], ids=["top-p", "null"])
def test_a_dispatcher_with_buffers_for_k_is_refused(baseline):
    from megatron_emoe.routing.transformer_config import check_elastic

    config = layer_config(**baseline)
    config.moe_token_dispatcher_type = "flex"
    with pytest.raises(
        ValueError, match="--emoe-selection .* cannot be combined with --moe-token-dispatcher-type flex"
    ):
        check_elastic(config)


@pytest.mark.parametrize("baseline", [TOP_P, NULL, NOISY], ids=["top-p", "null", "noisy"])
def test_the_fused_router_is_refused_and_a_tracker_that_loses_the_place(baseline):
    from megatron_emoe.routing.transformer_config import check_elastic

    for name in ("moe_router_fusion", "use_te_rng_tracker"):
        changed = layer_config(**baseline)
        setattr(changed, name, True)
        if name == "use_te_rng_tracker" and baseline is not NOISY:
            check_elastic(changed)  # they draw nothing
            continue
        with pytest.raises(ValueError, match=f"^--emoe-selection {baseline['emoe_selection']} cannot be combined with"):
            check_elastic(changed)


def test_what_stays_allowed():
    layer_config(**NOISY | {"moe_expert_capacity_factor": 1.5, "emoe_tail_scale": ["4:0.5"]})
    layer_config(**NOISY | {AUX: "seq_aux_loss", "moe_aux_loss_coeff": 0.1})
    layer_config(**NULL | {AUX: "aux_loss", "moe_aux_loss_coeff": 0.1, "moe_z_loss_coeff": 0.01})
    layer_config(**TOP_P | {"moe_token_dispatcher_type": "allgather", "moe_shared_expert_intermediate_size": 12})
