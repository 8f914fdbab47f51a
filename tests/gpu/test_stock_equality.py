"""Elastic training with everything off, on a GPU: bit-equal to stock Megatron. So that stock equals itself there, both
run in Megatron's deterministic mode."""

import pytest

from tests.device_runs import on, trained
from tests.gpu_comparisons import ELASTIC, equal_runs, run_words

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_elastic_off_is_stock_to_the_bit(dispatcher, precision):
    words = run_words("cuda", deterministic_mode=True, moe_token_dispatcher_type=dispatcher, **precision)
    equal_runs(on("cuda", trained, words), on("cuda", trained, words, True))


def test_a_run_repeats_itself_to_the_bit():
    words = run_words("cuda", deterministic_mode=True, **ELASTIC["coactivation"])
    equal_runs(on("cuda", trained, words), on("cuda", trained, words))
