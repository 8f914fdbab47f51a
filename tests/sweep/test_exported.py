"""What an exported model says of a sweep, and that the sweep is of that model."""

import pytest

from megatron_emoe.sweep.curve import save
from megatron_emoe.sweep.exported import measured_in
from tests.sweep.test_curve import WALL_AT_8, make_result


def test_a_sweep_is_noted_if_it_is_of_this_checkpoint(tmp_path):
    path = tmp_path / "sweep.json"
    save(make_result(WALL_AT_8, iteration=1000), path)  # k = 2; good up to 6
    measured = measured_in(path, {"iteration": 1000, "k_train": 2})
    assert measured["evaluated_k"] == [1, 2, 3, 4, 6, 8, 16]
    assert (measured["range_end"], measured["best_k"]) == (6, 16)  # 16 is good again, past the wall
    assert measured["measured_tail_scale"] is None
    with pytest.raises(ValueError, match="is of iteration 1000 and k = 2, the checkpoint of iteration 500 and k = 2"):
        measured_in(path, {"iteration": 500, "k_train": 2})
