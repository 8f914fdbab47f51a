"""The elastic training path adds no wait of the host for the GPU: counted by the profiler in a step, and forbidden by
torch around a layer."""

from collections import Counter

import pytest

from tests.device_runs import in_process, on, waits
from tests.gpu_comparisons import ELASTIC, one_layer, wait_words

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("elastic", ELASTIC)
def test_an_unlogged_elastic_step_waits_as_often_as_a_stock_step(elastic, dispatcher):
    words = wait_words("cuda", moe_token_dispatcher_type=dispatcher, **ELASTIC[elastic])
    found = on("cuda", waits, words)
    assert found["elastic"] == found["stock"] != Counter()


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("elastic", ELASTIC)
def test_a_layer_waits_nowhere_if_the_stock_layer_does_not(elastic, dispatcher):
    stock = in_process("cuda", one_layer, None, dispatcher)
    if stock is not None:
        pytest.skip(f"the stock layer itself waits with {dispatcher}: {stock}")
    assert in_process("cuda", one_layer, ELASTIC[elastic], dispatcher) is None
