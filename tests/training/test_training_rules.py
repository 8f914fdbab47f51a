"""What a training run refuses and an evaluation does not."""

from argparse import Namespace
from typing import Any

from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.training.training_rules import check_elastic_training
from tests.distributed import run_ranks
from tests.tiny import begin, build_layer, hidden_states, layer_config, start

MODELS = {
    "softmax after": {"moe_router_pre_softmax": False},
    "softmax before": {"moe_router_pre_softmax": True},
    "sigmoid": {"moe_router_pre_softmax": False, "moe_router_score_function": "sigmoid"},
}
UNIFORM = {"emoe_selection": "prefix", "emoe_k_schedule": "uniform", "emoe_k_min": 1, "emoe_k_max": 4}
ONE = UNIFORM | {"emoe_k_max": 1}
POOL_OF_ONE = ONE | {"emoe_selection": "coactivation", "emoe_pool_k": 4, "emoe_hr_loss_coeff": 0.0}
TAIL = UNIFORM | {"emoe_k_min": 2, "emoe_k_max": 2, "emoe_tail_scale": ["0"]}
NAMED: dict[str, dict[str, Any]] = {
    "k 1": ONE,
    "k 1 of a pool": POOL_OF_ONE,
    "k 1, renormalised": ONE | {"emoe_combine": "renormalize"},
    "k 1, raw": ONE | {"emoe_combine": "raw"},
    "k 2 of 1, no tail": TAIL | {"moe_router_topk": 1},
    "k 2 of 1, a tail": TAIL | {"moe_router_topk": 1, "emoe_tail_scale": ["0.25"]},
    "k 3 of 2, no tail": TAIL | {"emoe_k_min": 3, "emoe_k_max": 3},
}


def refusal(settings: dict[str, Any], model: str = "softmax after") -> str | None:
    args = Namespace(**vars(ElasticConfig()) | {"moe_router_topk": 2, "moe_router_score_function": "softmax"})
    vars(args).update(num_experts=8, eval_iters=4, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.0)
    vars(args).update(MODELS[model] | settings)
    try:
        check_elastic_training(args)
    except ValueError as error:
        return str(error)
    return None


def router_learns() -> dict[tuple[str, str], bool]:
    """Whether the loss of a real layer's output gives its router a gradient that is more than rounding."""
    start()
    found = {}
    for model, settings in MODELS.items():
        for name, elastic in NAMED.items():
            if model == "softmax after" and "moe_router_topk" in elastic:
                continue  # the core refuses --moe-router-topk 1 there
            layer = build_layer(layer_config(**settings | elastic))
            begin()
            layer(hidden_states())[0].square().sum().backward()
            experts = max(weight.grad.abs().max() for weight in layer.experts.parameters())
            found[model, name] = bool(layer.router.weight.grad.abs().max() > 1e-5 * experts)
    return found


def test_what_gives_a_router_no_gradient_is_refused_and_nothing_else():
    learns = run_ranks(router_learns, 1)[0]
    assert len(learns) == 3 * len(NAMED) - 2
    for (model, name), has_gradient in learns.items():
        assert (refusal(NAMED[name], model) is None) == has_gradient, (model, name)
    assert 5 < sum(learns.values()) < len(learns) - 5


WHY = (
    "is always 1, so routers get no gradient from it: keep the scores as weights (--moe-router-pre-softmax, "
    "--emoe-combine raw), or accept it with --emoe-gradient-check off"
)


def test_what_a_refusal_says():
    assert refusal(UNIFORM) == f"--emoe-k-min 1: must be at least 2 here; the weight of one expert alone {WHY}"
    alone = {"moe_router_topk": 1, "emoe_combine": "renormalize"}
    assert refusal(alone) == f"--moe-router-topk 1: must be at least 2 here; the weight of one expert alone {WHY}"
    no_tail = TAIL | {"moe_router_topk": 1, "emoe_tail_scale": ["2:0", "4:0.5"]}
    assert refusal(no_tail) == f"--emoe-tail-scale 2:0 4:0.5: at k = 2 one expert is left, whose weight {WHY}"


def test_what_is_never_drawn_is_no_reason():
    weighted = UNIFORM | {"emoe_k_schedule": "weighted"}
    assert refusal(weighted | {"emoe_k_weights": [0.0, 1.0, 1.0, 1.0]}) is None
    assert refusal(weighted | {"emoe_k_weights": [0.1, 1.0, 1.0, 1.0]}) is not None
    assert refusal(UNIFORM | {"emoe_k_schedule": "ramp", "emoe_k_ramp_iters": 9}) is not None
    smaller = {"emoe_selection": "prefix", "emoe_k_schedule": "default-or-smaller"}
    assert (
        refusal(smaller | {"emoe_k_min": 1}) is not None
        and refusal(smaller | {"emoe_k_min": 2, "moe_router_topk": 3}) is None
    )
    assert refusal({"emoe_eval_k": [1, 2], "eval_iters": 4}) is None  # an evaluation trains nothing


def test_it_can_be_accepted():
    assert refusal(UNIFORM | {"emoe_gradient_check": "off"}) is None


def test_settings_of_what_the_run_does_not_have():
    evaluated = {"emoe_eval_k": [2, 4], "eval_iters": 0}
    assert refusal(evaluated) == "--emoe-eval-k 2 4: needs evaluations, and --eval-iters is 0"
    assert refusal(evaluated | {"eval_iters": None}) is None  # the whole validation set
    counted = {"emoe_selection": "coactivation", "emoe_pool_k": 6, "emoe_balance_on": "topk"}
    assert refusal(counted) == "--emoe-balance-on topk: there is no load-balancing loss that counts"
    two = {"moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"], "moe_aux_loss_coeff": [0.0, 0.1]}
    assert refusal(counted | {"moe_aux_loss_coeff": 0.1}) is None and refusal(counted | two) is None
