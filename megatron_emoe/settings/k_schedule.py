"""Which k the schedule draws, and how often: pure functions of the elastic settings. routing/active_k.py draws it."""

from __future__ import annotations

from megatron_emoe.settings.elastic_config import ElasticConfig


def k_probabilities(elastic: ElasticConfig, model_k: int, iteration: int = 0) -> dict[int, float]:
    """Probability of each k of the schedule at `iteration`."""
    low, high = elastic.k_range(model_k)
    ks = range(low, high + 1)
    if elastic.emoe_k_schedule == "ramp":
        return {ramp(elastic, low, high, iteration): 1.0}
    if elastic.emoe_k_schedule == "weighted":
        weights = elastic.emoe_k_weights or []
        return {k: w / sum(weights) for k, w in zip(ks, weights, strict=True)}
    if elastic.emoe_k_schedule in ("default-or-smaller", "default-or-larger"):
        other = (1 - elastic.default_prob) / (high - low)
        return {k: elastic.default_prob if k == model_k else other for k in ks}
    return {k: 1 / len(ks) for k in ks}


def drawn_ks(elastic: ElasticConfig, model_k: int) -> list[int]:
    """Every k that a run may draw, ascending."""
    low, high = elastic.k_range(model_k)
    if elastic.emoe_k_schedule == "ramp":
        return list(range(low, high + 1))
    return [k for k, probability in k_probabilities(elastic, model_k).items() if probability]


def expected_k(elastic: ElasticConfig, model_k: int, iteration: int) -> float:
    """E[k] of the schedule at `iteration`, for FLOPs and MFU."""
    return sum(k * p for k, p in k_probabilities(elastic, model_k, iteration).items())


def ramp(elastic: ElasticConfig, low: int, high: int, iteration: int) -> int:
    """k of the schedule ramp: linear from `low` to `high` over --emoe-k-ramp-iters, rounded."""
    assert elastic.emoe_k_ramp_iters is not None
    return low + round((high - low) * min(1.0, iteration / elastic.emoe_k_ramp_iters))
