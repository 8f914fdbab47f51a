"""Errors of differences, and the k' that follows from them: worked out by hand."""

import pytest

from megatron_emoe.sweep.summary import answer, ending, sure_k
from megatron_emoe.sweep.uncertainty import block_losses, difference, signed
from tests.sweep_results import make_cell, make_result


def test_sums_of_sequences_become_losses_of_blocks():
    # 8 sequences, 4 tokens each but the last with 0: 28 tokens, 3.5 of a sequence on average.
    assert block_losses([7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 7.0, 0.0], 28) == (2.0,) * 7 + (0.0,)
    assert block_losses([1.0] * 128, 128) == (1.0,) * 64
    assert len(block_losses([1.0] * 100, 100)) == 50  # the most, up to 64, that have equally many sequences
    assert block_losses([1.0] * 67, 67) is None and block_losses([1.0], 1) is None and block_losses([], 1) is None


def cell(k: int, *blocks: float):
    return make_cell(k, sum(blocks) / len(blocks), block_losses=blocks)


def test_a_difference_is_paired():
    # Differences -0.1, -0.3, -0.2: mean -0.2, deviation 0.1, error 0.1 / sqrt 3. The losses themselves differ by 2.
    found = difference(cell(2, 1.0, 2.0, 3.0), cell(4, 1.1, 2.3, 3.2))
    assert found.value == pytest.approx(-0.2) and found.error == pytest.approx(0.1 / 3**0.5)
    assert found.text() == "-0.2000 ± 0.0577" and found.is_sure
    assert (signed(-0.00004), signed(0.00006), signed(-0.004, 2)) == ("+0.0000", "+0.0001", "+0.00")
    assert not difference(cell(2, 1.0, 2.0, 3.0), cell(4, 1.3, 2.0, 2.9)).is_sure
    unknown = difference(make_cell(2, 1.0), cell(4, 1.0, 1.0))
    assert (unknown.value, unknown.error, unknown.is_sure, unknown.text()) == (0.0, None, False, "+0.0000")


def test_the_k_to_use_is_the_smallest_that_is_not_surely_worse():
    # k' = 12 is best by 0.001 with an error of 0.0012 (deviation 0.0017 over two): 8 is as good, 4 is not.
    cells = [cell(4, 1.5, 1.5), cell(8, 1.4008, 1.4012), cell(12, 1.4012, 1.3988)]
    result = make_result("a", cells)
    assert sure_k(result) == 8
    told = "use k' = 8: loss -0.0990 ± 0.0002 to k = 4, at 2 times its expert FLOPs; no wall up to k' = 12"
    assert answer(result) == told and ending(result).endswith(told)
    assert "| 8 | 1.4010 | -0.0990 ± 0.0002 | x 2 | 64 |" in ending(result)


def test_where_nothing_is_better_k_stays():
    result = make_result("a", [cell(4, 1.5, 1.6), cell(8, 1.5, 1.5999), cell(12, 1.7, 1.7)])
    assert answer(result) == ("use k' = 4: the k of training: no other measured k' is surely better; wall at k' = 12")
    assert sure_k(make_result("old", {4: 1.5, 8: 1.499})) == 8  # without errors the numbers are taken as they are


def test_without_a_cell_at_k_there_is_a_table_but_no_answer():
    assert "use k'" not in ending(make_result("a", {8: 1.4, (4, 8): 1.5})) and "| 4,8 | 1.5000 |" in ending(
        make_result("a", {8: 1.4, (4, 8): 1.5})
    )
