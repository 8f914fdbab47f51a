"""The active k: purity and distributions of the draws, and the owner under evaluation and recomputation."""

import itertools
import math
from argparse import Namespace
from collections import Counter

import pytest
import torch

from megatron_emoe.routing.active_k import (
    ActiveK,
    Draw,
    Place,
    draw_for,
    get_active_k,
    mix,
    scheduled_k,
    unit,
)
from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.k_schedule import expected_k, k_probabilities
from tests.distributed import run_ranks

DRAWS = 4000
SIGMAS = 5  # a correct sampler fails one comparison in about two million

UNIFORM = {"emoe_selection": "prefix", "emoe_k_schedule": "uniform", "emoe_k_min": 1, "emoe_k_max": 4}
WEIGHTED = UNIFORM | {"emoe_k_schedule": "weighted", "emoe_k_weights": [1.0, 0.0, 3.0, 4.0]}
SMALLER = {"emoe_selection": "prefix", "emoe_k_schedule": "default-or-smaller", "emoe_k_min": 2}
LARGER = {"emoe_selection": "prefix", "emoe_k_schedule": "default-or-larger", "emoe_k_max": 8}
RAMP = UNIFORM | {"emoe_k_schedule": "ramp", "emoe_k_min": 2, "emoe_k_max": 8, "emoe_k_ramp_iters": 100}
COACTIVATION = {"emoe_selection": "coactivation", "emoe_pool_k": 8}


def five_sigmas(p: float, n: int = DRAWS) -> float:
    return SIGMAS * math.sqrt(p * (1 - p) / n)


# The hash and the uniform numbers.


def test_mix_of_one_number_is_splitmix64():
    # The generator's first outputs from the seed 0, as published with it; mix(0) takes one step from the state 0.
    assert mix(0) == 0xE220A8397B1DCDAF
    # A step from the state s adds 0x9E37... first, so mix(v) is the first output of the generator seeded with v.
    assert mix(1234567) == 6457827717110365317


def test_mix_tells_places_apart():
    values = [mix(*place) for place in itertools.product(range(20), repeat=3)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**64 for value in values)
    assert mix(1, 2) != mix(2, 1)
    assert mix(1) != mix(1, 0)
    assert mix(-1) == mix(2**64 - 1)


def test_every_input_bit_flips_about_half_of_the_output():
    # 64 output bits with probability 1/2 each: mean 32; over 192 input bits x 64 output bits the share is 1/2 +- 5 sd.
    base = (12345, 7, 3)
    flipped = 0
    for position, bit in itertools.product(range(3), range(64)):
        changed = list(base)
        changed[position] ^= 1 << bit
        flipped += (mix(*base) ^ mix(*changed)).bit_count()
    assert flipped / (192 * 64) == pytest.approx(0.5, abs=five_sigmas(0.5, 192 * 64))


def test_unit_is_uniform():
    values = [unit(1234, 1, iteration, 0, 0) for iteration in range(DRAWS)]
    assert all(0 <= value < 1 for value in values)
    bins = Counter(int(value * 10) for value in values)
    for tenth in range(10):
        assert bins[tenth] / DRAWS == pytest.approx(0.1, abs=five_sigmas(0.1))
    # Neighbouring iterations are independent: both below 1/2 in a quarter of the (overlapping, so 2 sd wider) pairs.
    both = sum(a < 0.5 and b < 0.5 for a, b in itertools.pairwise(values)) / DRAWS
    assert both == pytest.approx(0.25, abs=2 * five_sigmas(0.25))


# Schedules. Expected distributions are written out by hand.

SCHEDULES = {
    "uniform": (UNIFORM, {1: 0.25, 2: 0.25, 3: 0.25, 4: 0.25}),
    "weighted": (WEIGHTED, {1: 1 / 8, 2: 0.0, 3: 3 / 8, 4: 4 / 8}),
    "default-or-smaller": (SMALLER, {2: 0.1, 3: 0.1, 4: 0.8}),  # .8 for k = 4, the rest shared by 2 and 3
    "default-or-larger": (LARGER, {4: 0.5, 5: 0.125, 6: 0.125, 7: 0.125, 8: 0.125}),  # .5 for k = 4, the rest shared
    "default-or-larger at .8": (LARGER | {"emoe_k_default_prob": 0.8}, {4: 0.8, 5: 0.05, 6: 0.05, 7: 0.05, 8: 0.05}),
    "default-or-smaller at .4": (SMALLER | {"emoe_k_default_prob": 0.4}, {2: 0.3, 3: 0.3, 4: 0.4}),
    "constant": ({}, {4: 1.0}),
}


@pytest.mark.parametrize("draw", ["step", "microbatch", "layer"])
@pytest.mark.parametrize(("settings", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_distribution_of_k(settings, expected, draw):
    elastic = ElasticConfig(**settings, emoe_k_draw=draw)
    places = [Place(i // 2, i % 2, 1 + i % 2) for i in range(2 * DRAWS)]
    step = 2 if draw == "step" else 1  # both places of an iteration share one draw
    counts = Counter(scheduled_k(elastic, 4, place) for place in places[::step])
    assert set(counts) == {k for k, p in expected.items() if p}
    for k, p in expected.items():
        assert counts[k] / counts.total() == pytest.approx(p, abs=five_sigmas(p))
    assert k_probabilities(elastic, 4) == pytest.approx(expected)


@pytest.mark.parametrize(("settings", "expected"), SCHEDULES.values(), ids=SCHEDULES)
def test_expected_k(settings, expected):
    # uniform (1+2+3+4)/4 = 2.5; weighted (1 + 9 + 16)/8 = 3.25; .1*2 + .1*3 + .8*4 = 3.7; .6 + .9 + 1.6 = 3.1; 4;
    # .5*4 + .125*(5+6+7+8) = 5.25; .8*4 + .05*26 = 4.5.
    by_hand = {0.25: 2.5, 1 / 8: 3.25, 0.1: 3.7, 0.3: 3.1, 1.0: 4.0, 0.5: 5.25, 0.8: 4.5}[next(iter(expected.values()))]
    assert expected_k(ElasticConfig(**settings), 4, 17) == pytest.approx(by_hand)


def test_ramp():
    # 2 + 6 * i / 100, rounded: 25 -> 3.5 -> round half to even gives 6 * .25 = 1.5 -> 2, so 4; 10 -> 2.6 -> 3.
    elastic = ElasticConfig(**RAMP)
    for iteration, k in {0: 2, 8: 2, 9: 3, 10: 3, 50: 5, 91: 7, 92: 8, 100: 8, 101: 8, 10**9: 8}.items():
        assert scheduled_k(elastic, 4, Place(iteration, 3, 2)) == k, iteration
        assert expected_k(elastic, 4, iteration) == k
    ks = [scheduled_k(elastic, 4, Place(i, 0, 1)) for i in range(120)]
    assert ks == sorted(ks) and set(ks) == set(range(2, 9))


def test_k_does_not_depend_on_what_was_asked_before():
    elastic = ElasticConfig(**UNIFORM, emoe_k_draw="layer")
    places = [Place(i, m, layer) for i in range(40) for m in range(2) for layer in range(1, 4)]
    forward = {place: scheduled_k(elastic, 2, place) for place in places}
    backward = {place: scheduled_k(elastic, 2, place) for place in reversed(places)}
    assert forward == backward


def ks_of(elastic: ElasticConfig, iterations: int = 60) -> dict[tuple[int, int, int], int]:
    return {
        (i, m, layer): scheduled_k(elastic, 2, Place(i, m, layer))
        for i, m, layer in itertools.product(range(iterations), range(3), range(1, 4))
    }


@pytest.mark.parametrize(("draw", "same_over"), [("step", {"m", "layer"}), ("microbatch", {"layer"}), ("layer", {"m"})])
def test_granularity_of_k(draw, same_over):
    ks = ks_of(ElasticConfig(**UNIFORM, emoe_k_draw=draw))
    over_m = all(len({ks[i, m, layer] for m in range(3)}) == 1 for i in range(60) for layer in range(1, 4))
    over_layers = all(len({ks[i, m, layer] for layer in range(1, 4)}) == 1 for i in range(60) for m in range(3))
    assert {name for name, same in (("m", over_m), ("layer", over_layers)) if same} == same_over
    assert len({ks[i, 0, 1] for i in range(60)}) > 1


def test_seed_changes_the_draws():
    assert ks_of(ElasticConfig(**UNIFORM)) != ks_of(ElasticConfig(**UNIFORM, emoe_seed=1235))


# The whole draw of a layer.


def test_draw_without_sampling_is_a_prefix():
    draw = draw_for(ElasticConfig(**UNIFORM), 2, Place(5, 0, 1))
    assert draw.pool_max == draw.pool == draw.k == scheduled_k(ElasticConfig(**UNIFORM), 2, Place(5, 0, 1))


def test_pool_per_token_or_fixed():
    per_token = draw_for(ElasticConfig(**COACTIVATION), 2, Place(5, 0, 1))
    assert (per_token.k, per_token.pool_max, per_token.pool) == (2, 8, None)
    fixed = draw_for(ElasticConfig(**COACTIVATION, emoe_pool_fixed=True), 2, Place(5, 0, 1))
    assert (fixed.k, fixed.pool_max, fixed.pool) == (2, 8, 8)


@pytest.mark.parametrize("draw", ["microbatch", "step"])
def test_pool_of_a_microbatch_or_step(draw):
    elastic = ElasticConfig(**COACTIVATION, emoe_pool_draw=draw)
    places = [[Place(i, 0, 1), Place(i, 0, 2), Place(i, 1, 1)] for i in range(DRAWS)]
    pools = [[draw_for(elastic, 2, place).pool for place in row] for row in places]
    for m in range(2, 9):  # uniform over {2, ..., 8}
        assert sum(row[0] == m for row in pools) / DRAWS == pytest.approx(1 / 7, abs=five_sigmas(1 / 7))
    assert {row[0] for row in pools} == set(range(2, 9))
    assert all(row[0] == row[1] for row in pools)  # layers share it
    assert all(row[0] == row[2] for row in pools) is (draw == "step")


def test_pool_is_drawn_above_a_drawn_k():
    elastic = ElasticConfig(**COACTIVATION | UNIFORM | {"emoe_selection": "coactivation"}, emoe_pool_draw="step")
    draws = [draw_for(elastic, 2, Place(i, 0, 1)) for i in range(2000)]
    assert {(d.k, d.pool) for d in draws} == {(k, m) for k in range(1, 5) for m in range(k, 9)}


def test_pool_and_k_are_independent():
    # k = 4 in a quarter of the steps; m = 8 in 1/5 of those. Were both read off one number, the product would be off.
    elastic = ElasticConfig(**COACTIVATION | UNIFORM | {"emoe_selection": "coactivation"}, emoe_pool_draw="step")
    draws = [draw_for(elastic, 2, Place(i, 0, 1)) for i in range(DRAWS)]
    both = sum(d.k == 4 and d.pool == 8 for d in draws) / DRAWS
    assert both == pytest.approx(1 / 20, abs=five_sigmas(1 / 20))


def test_seed_of_the_experts_differs_by_place():
    elastic = ElasticConfig(**COACTIVATION)
    places = [Place(i, m, layer) for i in range(10) for m in range(4) for layer in range(1, 5)]
    seeds = {draw_for(elastic, 2, place).seed for place in places}
    assert len(seeds) == len(places)
    assert draw_for(elastic, 2, places[0]).seed == draw_for(elastic, 2, places[0]).seed


# The owner.


@pytest.fixture
def owner(monkeypatch) -> ActiveK:
    """A fresh owner over an empty random-state tracker."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    monkeypatch.setattr("megatron_emoe.routing.active_k.get_cuda_rng_tracker", lambda: tracker)
    return ActiveK()


def test_there_is_one_owner():
    assert get_active_k() is get_active_k()


def test_place_must_be_set(owner):
    with pytest.raises(RuntimeError, match=r"^begin_microbatch\(\) must be called before a training forward pass$"):
        owner.draw(ElasticConfig(**COACTIVATION), 2, 1, training=True)
    assert owner.draw(ElasticConfig(), 2, 1, training=True) == Draw(2, 2, 2, 0)  # nothing is drawn: no place needed
    owner.begin_microbatch(7, 3)
    assert owner.place(2) == Place(7, 3, 2)
    assert owner.draw(ElasticConfig(**UNIFORM), 2, 2, training=True) == draw_for(
        ElasticConfig(**UNIFORM), 2, Place(7, 3, 2)
    )


def test_evaluation_is_plain_at_the_model_s_k_and_needs_no_place(owner):
    assert owner.draw(ElasticConfig(**COACTIVATION), 2, 1, training=False) == Draw(2, 2, 2, 0)
    assert owner.draw(ElasticConfig(**UNIFORM), 2, 1, training=False).k == 2


def evaluated(owner: ActiveK, layers: int = 3) -> list[int]:
    draws = [owner.draw(ElasticConfig(**COACTIVATION), 2, layer, training=False) for layer in range(1, layers + 1)]
    assert all(d.pool_max == d.pool == d.k for d in draws)  # plain top-k', whatever it is
    return [d.k for d in draws]


def test_evaluation_override_nests_and_ends(owner):
    with owner.evaluating(6):
        assert evaluated(owner) == [6, 6, 6]
        with owner.evaluating([1, 4, 8]):
            assert evaluated(owner) == [1, 4, 8]
            with owner.evaluating({2: 5}):
                assert evaluated(owner) == [2, 5, 2]  # layers that are not named keep the model's k
            with owner.evaluating(None):
                assert evaluated(owner) == [2, 2, 2]
            assert evaluated(owner) == [1, 4, 8]
        assert evaluated(owner) == [6, 6, 6]
    assert evaluated(owner) == [2, 2, 2]


def test_evaluation_override_ends_after_an_error(owner):
    with pytest.raises(KeyError), owner.evaluating(6):
        raise KeyError
    assert evaluated(owner) == [2, 2, 2]


def test_evaluation_override_does_not_reach_training(owner):
    owner.begin_microbatch(0, 0)
    with owner.evaluating(6):
        assert owner.draw(ElasticConfig(), 2, 1, training=True).k == 2


# Recomputation: the core runs a layer's forward pass again in the backward pass, when the loop is elsewhere already.


def places_under_recompute() -> tuple[list, list, dict]:
    from megatron.core.tensor_parallel import checkpoint, model_parallel_cuda_manual_seed

    from megatron_emoe.routing.active_k import get_active_k

    model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    seen = []

    def layer(x: torch.Tensor) -> torch.Tensor:
        place = get_active_k().place(1)
        seen.append((place.iteration, place.microbatch))
        return x * (1 + place.microbatch)

    x = torch.ones(2, requires_grad=True)
    outputs = []
    for microbatch in (0, 1, 2):  # 1F1B: several forward passes before the first backward pass
        get_active_k().begin_microbatch(4, microbatch)
        outputs.append(checkpoint(layer, False, x))
    for output in outputs:
        output.sum().backward()
    stored = stored_states()
    place = get_active_k().place(1)
    seen.append((place.iteration, place.microbatch))  # the loop's own place is as it left it
    return seen, x.grad.tolist(), ks_of(ElasticConfig(**UNIFORM, emoe_k_draw="layer")), stored


def stored_states() -> tuple[list[str], list[str]]:
    """Names of the random states that the core's checkpoint would hold: as the core has it, then as ours."""
    from megatron.training import checkpointing

    from megatron_emoe.routing.active_k import keep_place_out_of_checkpoints

    checkpointing.get_args = lambda: Namespace(data_parallel_random_init=False)
    everyone = torch.distributed.group.WORLD
    names = []
    for prepare in (lambda: None, keep_place_out_of_checkpoints):
        prepare()
        (state,) = checkpointing.get_rng_state("torch", everyone, everyone, everyone, everyone)
        names.append(sorted(state["rng_tracker_states"]))
    return names[0], names[1]


def test_recomputation_stands_where_the_first_pass_stood():
    ((seen, gradient, ks, (core_s, stored)),) = run_ranks(places_under_recompute, 1)
    forward = [(4, 0), (4, 1), (4, 2)]
    # d(sum of x * (1 + m))/dx over m = 0, 1, 2 is 1 + 2 + 3 = 6; a wrong micro-batch in the recomputed pass changes it.
    assert seen == [*forward, *forward, (4, 2)]
    assert gradient == [6.0, 6.0]
    assert ks == ks_of(ElasticConfig(**UNIFORM, emoe_k_draw="layer"))  # another process, with other random states
    assert "emoe-place" in core_s and stored == [name for name in core_s if name != "emoe-place"]
