"""The search for a k' per layer: worked by hand, and against trying every allocation."""

import dataclasses
import itertools
import random
import time
from functools import partial

import pytest

from megatron_emoe.sweep.allocation import allocate, cheapest, complete, moe_layers, rise, sensitivities
from tests import sweep_results
from tests.sweep_results import make_cell

make_result = partial(sweep_results.make_result, "two layers")

# Layer 1 hardly needs experts, layer 2 does; both are convex.
EASY = {1: 0.03, 2: 0.01, 3: 0.004, 4: 0.0}
HARD = {1: 0.30, 2: 0.10, 3: 0.04, 4: 0.0}


def test_what_each_layer_adds_is_read_off_the_cells_that_change_it_alone():
    result = make_result({4: 2.0, 2: 2.2, (2, 4): 2.01, (4, 2): 2.1, (4, 6): 1.95, (2, 2): 2.15, (4, 4): 2.5})
    assert [{k: round(added, 6) for k, added in layer.items()} for layer in sensitivities(result)] == [
        {4: 0.0, 2: 0.01},
        {4: 0.0, 2: 0.1, 6: -0.05},
    ]


def test_a_sweep_without_such_cells_or_layers_has_no_sensitivity():
    assert sensitivities(make_result({4: 2.0, 2: 2.2})) == []
    assert sensitivities(make_result({4: 2.0, 2: 2.2}, num_moe_layers=2)) == [{4: 0.0}, {4: 0.0}]
    with pytest.raises(ValueError, match=r"two layers: no cell at k' = 4"):
        sensitivities(make_result({2: 2.2, (2, 4): 2.0}))


def test_the_number_of_layers_is_what_any_cell_tells():
    assert moe_layers(make_result({4: 2.0})) is None
    assert moe_layers(make_result({4: 2.0, (4, 2, 1): 2.0})) == 3
    assert moe_layers(make_result([make_cell(4, 2.0, rows_per_layer={"2": 8, "3": 8})])) == 2
    with pytest.raises(ValueError, match=r"two layers: cells of \[2, 3\] MoE layers"):
        moe_layers(make_result({(4, 2): 2.0, (4, 2, 1): 2.0}))


def test_a_k_that_one_layer_lacks_favours_none():
    assert complete([{4: 0.0, 2: 0.1, 1: 0.2}, {4: 0.0, 2: 0.3}]) == [{2: 0.1, 4: 0.0}, {2: 0.3, 4: 0.0}]
    assert complete([]) == []


def test_budget_goes_where_the_loss_falls_most():
    # 6 experts: from (1, 1), +1 expert buys 0.20 at the hard layer, then 0.06, then 0.04 there, then 0.02 at the easy
    # one: (1, 4) costs 5 and (2, 4) costs 6. Uniform 3: 0.044. (2, 4): 0.010.
    table = [EASY, HARD]
    assert allocate(table, 2) == (1, 1)
    assert allocate(table, 3) == (1, 2)
    assert allocate(table, 5) == (1, 4)
    assert allocate(table, 6) == (2, 4)
    assert rise(table, (2, 4)) == pytest.approx(0.010)
    assert allocate(table, 1) is None
    assert allocate([], 5) is None


def test_more_experts_that_hurt_are_left_unspent():
    # Past the wall: 8 at layer 2 is worse than 4, whatever the budget.
    assert allocate([{2: 0.1, 4: 0.0, 8: 0.05}, {2: 0.1, 4: 0.0, 8: 0.2}], 16) == (4, 4)


def test_an_exchange_finds_what_raising_alone_does_not():
    # From (1, 1) with 5 experts: 2 at the first layer buys 0.05 for 1 expert, the best rate; then 3 left buy nothing
    # (the second layer falls only at 4). Uniform 2 is (2, 2). Giving the expert back: (1, 4), fall 0.12 > 0.05.
    table = [{1: 0.05, 2: 0.0, 4: 0.0}, {1: 0.12, 2: 0.12, 4: 0.0}]
    assert allocate(table, 5) == (1, 4)


@pytest.mark.parametrize("seed", range(8))
def test_on_convex_curves_and_unit_steps_it_is_the_optimum(seed):
    rng = random.Random(seed)
    table = [_convex(rng) for _ in range(3)]
    for experts in range(3, 16):
        found = allocate(table, experts)
        assert found is not None and sum(found) <= experts
        assert rise(table, found) == pytest.approx(_least(table, experts), abs=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_on_any_curves_it_lies_between_the_optimum_and_uniform(seed):
    rng = random.Random(100 + seed)
    ks = (1, 2, 3, 4, 6, 8)
    table = [{k: rng.uniform(-0.1, 0.3) for k in ks} for _ in range(3)]
    gaps = []
    for experts in range(3, 25):
        found = allocate(table, experts)
        uniform = min(rise(table, (k,) * 3) for k in ks if 3 * k <= experts)
        best = _least(table, experts)
        assert sum(found) <= experts
        assert best - 1e-9 <= rise(table, found) <= uniform + 1e-9
        gaps.append(rise(table, found) - best)
    assert sum(gap > 1e-9 for gap in gaps) <= len(gaps) // 4  # greedy, but rarely beaten


def test_the_fewest_experts_for_a_loss():
    # (1, 4) adds 0.03 with 5 experts, (1, 3) adds 0.07 with 4, (2, 4) adds 0.01 with 6, (4, 4) nothing with 8.
    table = [EASY, HARD]
    assert cheapest(table, 0.05) == (1, 4)
    assert cheapest(table, 0.08) == (1, 3)
    assert cheapest(table, 0.02) == (2, 4)
    assert cheapest(table, 0.001) == (4, 4)
    assert cheapest(table, -0.001) is None
    assert cheapest([], 1.0) is None


def test_a_deep_model_takes_seconds():
    rng = random.Random(0)
    table = [{k: rng.uniform(0.01, 0.1) / k for k in (1, 2, 4, 6, 8, 12, 16, 24)} for _ in range(48)]
    started = time.process_time()
    found = cheapest(table, rise(table, (8,) * 48))
    assert found is not None and sum(found) < 8 * 48
    assert time.process_time() - started < 20


def _convex(rng: random.Random) -> dict[int, float]:
    falls = sorted((rng.uniform(0, 0.1) for _ in range(4)), reverse=True)
    return {k: sum(falls[k - 1 :]) for k in range(1, 6)}


def _least(table: list[dict[int, float]], experts: int) -> float:
    every = itertools.product(*table)
    return min(rise(table, allocation) for allocation in every if sum(allocation) <= experts)


def test_sensitivities_follow_the_order_of_layers_not_of_cells():
    cells = make_result({4: 2.0, (2, 4): 2.01, (4, 2): 2.1}).cells
    turned = dataclasses.replace(make_result({4: 2.0}), cells=tuple(reversed(cells)))
    assert [layer[2] for layer in sensitivities(turned)] == pytest.approx([0.01, 0.1])
