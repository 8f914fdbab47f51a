"""The text of /metrics without an engine: exact numbers, labels, and an engine that does not answer."""

import asyncio
from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from emoe_vllm import endpoint, metrics

STATUS = {
    "k_now_mean": 4.5,
    "k_mean": 8.0,
    "changes": 3,
    "prefill": [[8, 2**53 - 1]],
    "decode": [[1, 7], [[8, 12], 5]],
}


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
        if sample.name.startswith("emoe")
    }


def test_the_numbers_are_those_of_the_status():
    common = (("engine", "0"), ("model_name", "a model"))
    tokens = {("8", "prefill"): 2**53 - 1, ("1", "decode"): 7, ("8-12", "decode"): 5}
    assert samples(metrics.text(STATUS, "a model")) == {
        ("emoe:k", *common): 4.5,
        ("emoe:k_prefill", *common): 8.0,
        ("emoe:level_changes_total", *common): 3.0,
    } | {
        ("emoe:tokens_total", common[0], ("k", k), common[1], ("phase", phase)): count
        for (k, phase), count in tokens.items()
    }
    assert samples(metrics.text(STATUS | {"changes": 4}, "a model"))[("emoe:level_changes_total", *common)] == 4.0
    assert samples(metrics.text(None, "a model")) == {}


async def dies(engine):
    raise RuntimeError("dead")


async def hangs(engine):
    await asyncio.sleep(60)


async def answers(engine):
    return STATUS


@pytest.mark.parametrize(("status", "there"), [(answers, True), (dies, False), (hangs, False)])
def test_vllms_metrics_come_also_where_the_engine_does_not_answer(status, there, monkeypatch):
    monkeypatch.setattr(endpoint.control, "status_async", status)
    monkeypatch.setattr(endpoint, "PATIENCE", 0.05)
    config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="a model"))
    state = SimpleNamespace(emoe_settings=object(), engine_client=None, vllm_config=config)
    answer = asyncio.run(endpoint.get_metrics(SimpleNamespace(app=SimpleNamespace(state=state))))
    assert b"process_" in answer.body or b"python_info" in answer.body
    assert bool(samples(answer.body)) is there and answer.headers["content-type"].startswith("text/plain; version=")
