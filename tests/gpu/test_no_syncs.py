"""The elastic training path adds no wait of the host for the GPU: counted by the profiler in a step, and by torch's
sync debug mode in a layer."""

import functools
from collections import Counter

import pytest

from tests.device_runs import in_process, on, waits
from tests.gpu_comparisons import ELASTIC, one_layer, wait_words

pytestmark = pytest.mark.gpu


@functools.cache
def stock_layer(dispatcher: str) -> list[str]:
    return in_process("cuda", one_layer, None, dispatcher)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("elastic", ELASTIC)
def test_an_unlogged_elastic_step_waits_as_often_as_a_stock_step(elastic, dispatcher):
    words = wait_words("cuda", moe_token_dispatcher_type=dispatcher, **ELASTIC[elastic])
    found = on("cuda", waits, words)
    assert found["elastic"] == found["stock"] != Counter(), found


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("elastic", ELASTIC)
def test_an_elastic_layer_waits_no_more_often_than_a_stock_layer(elastic, dispatcher):
    elastic_layer, stock = in_process("cuda", one_layer, ELASTIC[elastic], dispatcher), stock_layer(dispatcher)
    assert len(elastic_layer) <= len(stock), f"elastic: {elastic_layer}; stock: {stock}"
