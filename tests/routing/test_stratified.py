"""The schedule stratified: which k each micro-batch of each step gets, counted by hand; what it counts in the loss."""

from collections import Counter

import pytest

from megatron_emoe.routing.active_k import Place, draw_for, loss_weight, scheduled_k
from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.elastic_rules import validate_elastic
from megatron_emoe.settings.k_schedule import expected_k, loss_weights

SETTINGS = {"emoe_selection": "prefix", "emoe_k_schedule": "stratified"}
K, GRID = 4, [2, 8, 12]


def elastic(**changes: object) -> ElasticConfig:
    return ElasticConfig(**SETTINGS | {"emoe_k_grid": GRID} | changes)


def step(settings: ElasticConfig, iteration: int, microbatches: int, second: bool = False) -> list[int]:
    places = (Place(iteration, number, 1, microbatches, second) for number in range(microbatches))
    return [scheduled_k(settings, K, place) for place in places]


def test_every_step_has_its_share_at_k_and_others_between_them():
    for iteration in range(30):
        drawn = step(elastic(), iteration, 8)
        assert [k == K for k in drawn] == [True, False] * 4
    counts = Counter(k for iteration in range(30) for k in step(elastic(), iteration, 8))
    assert counts == {4: 120, 2: 40, 8: 40, 12: 40}  # dealt out, not drawn: equal to the last one


@pytest.mark.parametrize(("share", "microbatches"), [(0.5, 1), (0.5, 3), (0.7, 4), (0.75, 2), (0.9, 7)])
def test_a_share_that_does_not_divide_is_carried_over(share, microbatches):
    settings, steps = elastic(emoe_k_default_prob=share), 600
    drawn = [step(settings, iteration, microbatches) for iteration in range(steps)]
    counts = Counter(k for ks in drawn for k in ks)
    others = steps * microbatches * (1 - share)
    assert counts[K] == pytest.approx(steps * microbatches * share, abs=1)
    assert all(counts[k] == pytest.approx(others / 3, abs=1.4) for k in GRID)
    per_step = {sum(k != K for k in ks) for ks in drawn}
    assert max(per_step) - min(per_step) <= 1


def test_layers_of_a_micro_batch_have_one_k_and_the_seed_chooses_the_order():
    layers = {scheduled_k(elastic(), K, Place(3, 1, layer, 8)) for layer in range(1, 9)}
    assert len(layers) == 1
    orders = {tuple(step(elastic(emoe_seed=seed), 0, 12)) for seed in range(8)}
    assert len(orders) > 2
    assert step(elastic(), 5, 8) == step(elastic(), 5, 8)


def test_without_a_grid_it_is_half_twice_and_three_times():
    unset = elastic(emoe_k_grid=None)
    assert unset.k_grid(4) == [2, 8, 12] and unset.k_grid(1) == [2, 3] and unset.k_grid(6) == [3, 12, 18]
    assert unset.k_range(4) == (2, 12) and unset.largest_k(4) == 12


def test_a_second_pass_of_each_micro_batch_has_the_other_k():
    settings = elastic(emoe_second_pass=0.3)
    assert all(step(settings, iteration, 4) == [K] * 4 for iteration in range(5))
    counts = Counter(k for iteration in range(30) for k in step(settings, iteration, 4, second=True))
    assert counts == {2: 40, 8: 40, 12: 40}
    one, other = (draw_for(settings, K, Place(0, 0, 1, 4, second)) for second in (False, True))
    assert one.k == K != other.k and one.seed != other.seed
    assert (one.weight, other.weight) == pytest.approx((1 / 1.3, 0.3 / 1.3))


def test_weights_are_1_on_average():
    assert loss_weights(elastic()) == (1.0, 1.0) and loss_weights(ElasticConfig()) == (1.0, 1.0)
    settings = elastic(emoe_other_weight=0.25, emoe_k_default_prob=0.75)
    places = [Place(iteration, number, 1, 8) for iteration in range(3) for number in range(8)]
    weights = [loss_weight(settings, K, place) for place in places]
    assert sum(weights) / len(weights) == pytest.approx(1)
    at_k = {scheduled_k(settings, K, place) == K: weight for place, weight in zip(places, weights, strict=True)}
    assert at_k[False] / at_k[True] == pytest.approx(0.25)


def test_the_expected_k():
    assert expected_k(elastic(), K, 0) == pytest.approx(0.5 * 4 + 0.5 * 22 / 3)
    assert expected_k(elastic(emoe_k_default_prob=0.7), K, 0) == pytest.approx(0.7 * 4 + 0.3 * 22 / 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"emoe_k_grid": [2, 2]}, "--emoe-k-grid 2 2: must name one k or more, each once, and not --moe-router-topk 4"),
        ({"emoe_k_grid": [4, 8]}, "--emoe-k-grid 4 8: must name one k or more, each once, and not --moe-router-topk 4"),
        ({"emoe_k_grid": []}, "--emoe-k-grid: must name one k or more"),
        ({"emoe_k_grid": [0, 8]}, "--emoe-k-grid 0: must be at least 1"),
        ({"emoe_k_grid": [2, 17]}, "--emoe-k-grid 17: must not exceed --num-experts 16"),
        ({"emoe_k_draw": "layer"}, "--emoe-k-draw layer: has no meaning with --emoe-k-schedule stratified"),
        ({"emoe_k_min": 2}, "--emoe-k-min 2: has no meaning with --emoe-k-schedule stratified"),
        ({"emoe_other_weight": 0.0}, "--emoe-other-weight 0.0: must be a finite number above 0"),
        ({"emoe_second_pass": -1.0}, "--emoe-second-pass -1.0: must be a finite number of at least 0"),
        (
            {"emoe_second_pass": 0.3, "emoe_k_default_prob": 0.5},
            "--emoe-k-default-prob 0.5: has no meaning with --emoe-second-pass 0.3",
        ),
        (
            {"emoe_second_pass": 0.3, "emoe_other_weight": 0.5},
            "--emoe-other-weight 0.5: has no meaning with --emoe-second-pass 0.3",
        ),
        (
            {"emoe_selection": "topk", "emoe_k_schedule": "constant", "emoe_k_grid": [2]},
            "--emoe-k-grid [2]: has no meaning with --emoe-k-schedule constant",
        ),
        (
            {"emoe_selection": "topk", "emoe_k_schedule": "constant", "emoe_k_grid": None, "emoe_other_weight": 0.5},
            "--emoe-other-weight 0.5: needs --emoe-k-schedule stratified",
        ),
        (
            {"emoe_selection": "topk", "emoe_k_schedule": "constant", "emoe_k_grid": None, "emoe_budget_scales": True},
            "--emoe-budget-scales: needs an --emoe-k-schedule that trains more than one k",
        ),
    ],
)
def test_flag_value_and_rule(changes, message):
    with pytest.raises(ValueError) as refused:
        validate_elastic(elastic(**changes), model_k=K, num_experts=16)
    assert str(refused.value).startswith(message)
