"""The same run from the same weights in fp32, in host mode and on a GPU: losses within stated bounds, as many rows."""

import pytest

from tests.device_runs import in_process, on, trained
from tests.gpu_comparisons import ELASTIC, FIRST_STEP, FOUR_STEPS, largest_difference, run_words

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("elastic", ["off", *ELASTIC])
def test_losses_on_a_gpu_are_those_of_host_mode(elastic):
    changes = ELASTIC.get(elastic, {})
    host = in_process("cpu", trained, run_words("cpu", **changes), False, True)
    device = on("cuda", trained, run_words("cuda", **changes), False, True)
    first, all_steps = largest_difference(device, host)
    assert first < FIRST_STEP, f"first step: {first:.2e}"
    assert all_steps < FOUR_STEPS, f"four steps: {all_steps:.2e}"
    assert device["routed"] == host["routed"], "another number of experts was active"
