"""What `GET /metrics` says of elastic experts, after what vLLM says there.

vLLM's registry is read as vLLM reads it, also where several processes answer. What is ours is asked of the engine
while the answer is made and stored nowhere, so it is the same whichever process answers, and exact: the engine answers
between two steps, with numbers that the host has anyway. Labels are those of vLLM's own metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from vllm.v1.metrics.prometheus import get_prometheus_registry

__all__ = ["CONTENT_TYPE_LATEST", "text"]
_COMMON = ("model_name", "engine")
ENGINE = "0"
"""There is one: engines side by side (--data-parallel-size) are refused."""


def text(status: Mapping[str, Any] | None, model_name: str) -> bytes:
    """The answer, in the text format. status: as control.status_async gives it; None: vLLM's metrics alone."""
    said = generate_latest(get_prometheus_registry())
    if status is None:
        return said
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Snapshot(status, model_name))
    return said + generate_latest(registry)


class _Snapshot(Collector):
    def __init__(self, status: Mapping[str, Any], model_name: str) -> None:
        self.status, self.labels = status, [model_name, ENGINE]

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("k", "k' at which requests that name none decode now, mean over layers", "k_now_mean")
        yield self._gauge("k_prefill", "k' at which their prompts are read, mean over layers", "k_mean")
        changes = CounterMetricFamily("emoe:level_changes", "Changes of the level that follows the load", None, _COMMON)
        changes.add_metric(self.labels, self.status["changes"])
        yield changes
        tokens = CounterMetricFamily("emoe:tokens", "Tokens that ran at each k'", None, (*_COMMON, "phase", "k"))
        for phase in ("prefill", "decode"):
            for k, count in self.status[phase]:
                tokens.add_metric([*self.labels, phase, label(k)], count)
        yield tokens

    def _gauge(self, name: str, documentation: str, key: str) -> Metric:
        family = GaugeMetricFamily(f"emoe:{name}", documentation, None, _COMMON)
        family.add_metric(self.labels, self.status[key])
        return family


def label(k: int | list[int]) -> str:
    """A k' as the value of a label: `8`, or `8-12-12` with one for each layer with experts."""
    return str(k) if isinstance(k, int) else "-".join(map(str, k))
