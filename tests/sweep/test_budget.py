"""The best k' within a limit, on sweeps small enough to decide by hand."""

import dataclasses
import math
from functools import partial

import pytest

from megatron_emoe.sweep.budget import (
    answer,
    flops_limit,
    flops_share,
    latency_limit,
    pick,
    proposals,
    quality,
    quality_limit,
)
from tests import sweep_results
from tests.sweep_results import make_cell

make_result = partial(sweep_results.make_result, "two layers", num_moe_layers=2)

CURVE = {1: 2.4, 2: 2.2, 3: 2.1, 4: 2.0, 6: 1.95, 8: 1.97}
# The first layer hardly needs its experts, the second does.
LAYERS = {(1, 4): 2.03, (2, 4): 2.01, (3, 4): 2.004, (4, 1): 2.32, (4, 2): 2.12, (4, 3): 2.05}


def test_flops_are_a_multiple_of_those_at_k():
    result = make_result(CURVE)
    assert [flops_share(result, cell) for cell in result.cells] == [0.25, 0.5, 0.75, 1.0, 1.5, 2.0]


def test_the_lowest_loss_within_the_flops():
    result = make_result(CURVE)
    assert pick(result, flops_limit(result, 0.6)).k == 2
    assert pick(result, flops_limit(result, 0.75)).k == 3  # the bound itself is within
    assert pick(result, flops_limit(result, 1)).k == 4
    assert pick(result, flops_limit(result, 2)).k == 6  # 8 fits too, but lies past the wall


def test_a_bound_in_decimal_digits_is_met_by_its_binary_fraction():
    # 3 * 0.1 = 0.30000000000000004 in binary: a cell of share 0.3 must pass a limit of 0.3.
    cells = [make_cell(4, 2.0), dataclasses.replace(make_cell(1, 2.5), expert_flops_per_token=8e6 * (3 * 0.1))]
    result = dataclasses.replace(make_result({4: 2.0}), cells=tuple(cells))
    assert flops_share(result, cells[1]) > 0.3
    assert pick(result, flops_limit(result, 0.3)).k == 1


def test_a_tie_goes_to_the_cheaper_and_then_to_one_k():
    result = make_result({2: 2.0, 3: 2.0, 4: 2.0, (2, 2): 2.0, (1, 3): 2.0})
    assert pick(result, flops_limit(result, 1)).k == 2


def test_latency_counts_only_where_it_was_measured():
    result = make_result(CURVE, latency={2: 1.0, 4: 1.5, 8: 2.5})
    assert pick(result, latency_limit(result, 2)).k == 4  # 6 might be fast enough; nobody knows
    assert pick(result, latency_limit(result, 3)).k == 8
    with pytest.raises(ValueError, match="latency_ms_large; must be measured, by tools/sweep_k.py --latency"):
        latency_limit(result, 2, at="large")


def test_quality_is_the_ratio_of_probabilities():
    result = make_result(CURVE)
    # exp(2.0 - 2.2) = 0.8187; exp(2.0 - 2.1) = 0.9048; exp(2.0 - 1.95) = 1.0513.
    assert [round(quality(result, cell), 4) for cell in result.cells[1:5]] == [0.8187, 0.9048, 1.0, 1.0513]
    assert pick(result, quality_limit(result, 0.8)).k == 2
    assert pick(result, quality_limit(result, 0.9)).k == 3
    assert pick(result, quality_limit(result, 1.0)).k == 4
    assert pick(result, quality_limit(result, 1.05)).k == 6


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [
        (flops_limit, 0.2, r"--max-flops 0.2: no measured k' of two layers has .*; the nearest is k' = 1 with 0.25"),
        (latency_limit, 0.5, r"--max-latency-ms 0.5: .* at most 0.5 ms per token.*; the nearest is k' = 2 with 1$"),
        (quality_limit, 1.2, r"--min-quality 1.2: .* at least 1.2 times.*; the nearest is k' = 6 with 1.051"),
    ],
)
def test_where_nothing_fits_the_nearest_is_named(limit, value, message):
    result = make_result(CURVE, latency={2: 1.0, 4: 1.5})
    with pytest.raises(ValueError, match=message):
        pick(result, limit(result, value))


def test_bad_limits_and_sweeps_without_a_reference():
    result = make_result(CURVE, latency={4: 1.5})
    for limit in (flops_limit, latency_limit, quality_limit):
        for value in (0, -1, math.nan, math.inf):
            with pytest.raises(ValueError, match="must be a finite number above 0"):
                limit(result, value)
        with pytest.raises(ValueError, match=r"no cell at k' = 4"):
            limit(make_result({2: 2.2}, latency={2: 1.0}), 1)


def test_proposals_at_the_cost_of_uniform_and_at_all_that_is_allowed():
    # Limit 0.6: uniform 2 (4 experts, 2.2); 0.6 * 8 = 4.8 allows no fifth. (1, 3) has 4 experts and adds 0.03 + 0.05
    # to k, uniform 2 adds 0.01 + 0.12: predicted 2.2 + 0.08 - 0.13 = 2.15.
    result = make_result(CURVE | LAYERS)
    (found,) = proposals(result, flops_limit(result, 0.6))
    assert (found.k, found.cell) == ((1, 3), None)
    assert found.loss == pytest.approx(2.15)
    # Limit 0.65: 5.2 experts allow a fifth: (1, 4) adds 0.03: 2.2 + 0.03 - 0.13 = 2.10, but it was measured: 2.03.
    first, second = proposals(result, flops_limit(result, 0.65))
    assert (first.k, second.k) == ((1, 3), (1, 4))
    assert (second.loss, second.cell) == (2.03, result.cells[6])


def test_the_answer_stays_uniform_until_a_layerwise_cell_is_measured_better():
    unmeasured = make_result(CURVE | LAYERS)
    limit = flops_limit(unmeasured, 0.6)
    assert answer(unmeasured, limit).best.k == 2

    better = make_result(CURVE | LAYERS | {(1, 3): 2.16})
    found = answer(better, flops_limit(better, 0.6))
    assert (found.best.k, found.single.k) == ((1, 3), 2)
    assert [(each.k, each.loss) for each in found.per_layer] == [((1, 3), 2.16)]

    worse = make_result(CURVE | LAYERS | {(1, 3): 2.21})
    assert answer(worse, flops_limit(worse, 0.6)).best.k == 2


@pytest.mark.parametrize("value", [0.3, 0.5, 0.6, 0.65, 0.8, 1.0, 1.6])
def test_the_answer_is_never_worse_than_the_best_single_k(value):
    result = make_result(CURVE | LAYERS | {(1, 3): 2.21, (2, 3): 2.06})
    found = answer(result, flops_limit(result, value))
    assert found.best.loss <= found.single.loss
    assert found.best in result.cells and flops_share(result, found.best) <= value


def test_where_only_a_layerwise_cell_fits_it_is_the_answer():
    result = make_result({4: 2.0, 3: 2.1, (1, 4): 2.03})
    found = answer(result, flops_limit(result, 0.7))
    assert (found.best.k, found.single) == ((1, 4), None)


def test_proposals_for_a_quality_have_fewer_experts():
    # Quality 0.82 is a loss of at most 2.1985: uniform 2 (2.2) misses it, uniform 3 (2.1, 6 experts; adds 0.054) has
    # room 0.0985 for 0.1525 in all. (1, 2) adds 0.15 with 3 experts; (1, 1) 0.35. Predicted 2.1 + 0.15 - 0.054.
    result = make_result(CURVE | LAYERS)
    (found,) = proposals(result, quality_limit(result, 0.82))
    assert (found.k, found.cell) == ((1, 2), None)
    assert found.loss == pytest.approx(2.196)


def test_no_proposal_for_a_quality_that_needs_the_uniform_k():
    # Quality 0.75 is a loss of 2.2877: uniform 2 (2.2, adds 0.13) has room 0.0877, 0.2177 in all. (1, 2) adds 0.15.
    # Quality 0.66 is a loss of 2.4155: uniform 1, the smallest, reaches it.
    result = make_result(CURVE | LAYERS)
    assert [each.k for each in proposals(result, quality_limit(result, 0.75))] == [(1, 2)]
    assert proposals(result, quality_limit(result, 0.66)) == []


def test_a_measured_layerwise_cell_may_be_the_cheapest_for_a_quality():
    result = make_result(CURVE | LAYERS | {(1, 2): 2.19})
    found = answer(result, quality_limit(result, 0.82))
    assert (found.best.k, found.single.k) == ((1, 2), 3)
    missed = make_result(CURVE | LAYERS | {(1, 2): 2.1986})
    assert answer(missed, quality_limit(missed, 0.82)).best.k == (1, 4)  # 5 experts, 2.03


def test_proposals_for_a_latency_use_the_experts_of_the_largest_k_that_fits():
    result = make_result(CURVE | LAYERS, latency={1: 0.8, 2: 1.0, 4: 1.5})
    (found,) = proposals(result, latency_limit(result, 1.2))
    assert (found.k, found.cell) == ((1, 3), None)


def test_no_proposals_without_sensitivities_or_where_uniform_is_best():
    bare = make_result(CURVE)
    assert proposals(bare, flops_limit(bare, 0.6)) == []
    alike = make_result({4: 2.0, 2: 2.2, (2, 4): 2.1, (4, 2): 2.1})
    assert proposals(alike, flops_limit(alike, 0.5)) == []


def test_where_no_layer_was_measured_at_the_uniform_k_the_prediction_starts_at_k():
    # The layers alone lack k' = 2. (1, 3) adds 0.03 + 0.05 to the 2.0 of k: 2.08, better than uniform 2 (2.2).
    lacking = {ks: loss for ks, loss in LAYERS.items() if 2 not in ks}
    result = make_result(CURVE | lacking)
    (found,) = proposals(result, flops_limit(result, 0.6))
    assert (found.k, found.cell) == ((1, 3), None)
    assert found.loss == pytest.approx(2.08)
    # With a uniform 2 of 2.07 that is no proposal.
    good = make_result(CURVE | {2: 2.07} | lacking)
    assert proposals(good, flops_limit(good, 0.6)) == []
    # Quality 0.82 (loss 2.1985) takes uniform 3, 6 experts; (1, 3) is predicted to do with 4.
    assert [each.k for each in proposals(result, quality_limit(result, 0.82))] == [(1, 3)]
