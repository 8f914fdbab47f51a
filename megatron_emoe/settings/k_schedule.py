"""Which k the schedule draws, and how often: pure functions of the elastic settings. routing/active_k.py draws it."""

from __future__ import annotations

from megatron_emoe.settings.elastic_config import ElasticConfig


def k_probabilities(elastic: ElasticConfig, model_k: int, iteration: int = 0) -> dict[int, float]:
    """Probability of each k of the schedule at `iteration`."""
    low, high = elastic.k_range(model_k)
    ks = range(low, high + 1)
    if elastic.emoe_k_schedule == "ramp":
        return {ramp(elastic, low, high, iteration): 1.0}
    if elastic.emoe_k_schedule == "stratified":
        return _dealt_shares(elastic, model_k)
    if elastic.emoe_k_schedule == "weighted":
        weights = elastic.emoe_k_weights or []
        return {k: w / sum(weights) for k, w in zip(ks, weights, strict=True)}
    if elastic.emoe_k_schedule in ("default-or-smaller", "default-or-larger"):
        other = (1 - elastic.default_prob) / (high - low)
        return {k: elastic.default_prob if k == model_k else other for k in ks}
    return {k: 1 / len(ks) for k in ks}


def _dealt_shares(elastic: ElasticConfig, model_k: int) -> dict[int, float]:
    """Shares of the passes through the model: with a second pass for every first one, half of them are at k."""
    share, grid = 0.5 if elastic.emoe_second_pass else elastic.default_prob, elastic.k_grid(model_k)
    return dict(sorted([(model_k, share), *((k, (1 - share) / len(grid)) for k in grid)]))


def trained_ks(elastic: ElasticConfig, model_k: int) -> list[int]:
    """Every k that learned budget scales have values for, ascending: those that a run trains, and `model_k`."""
    return sorted({model_k, *drawn_ks(elastic, model_k)})


def loss_weights(elastic: ElasticConfig) -> tuple[float, float]:
    """How much a pass at --moe-router-topk counts in the loss, and one at another k: 1 on average of micro-batches."""
    if elastic.emoe_k_schedule != "stratified":
        return 1.0, 1.0
    if elastic.emoe_second_pass:
        return 1 / (1 + elastic.emoe_second_pass), elastic.emoe_second_pass / (1 + elastic.emoe_second_pass)
    mean = elastic.default_prob + (1 - elastic.default_prob) * elastic.emoe_other_weight
    return 1 / mean, elastic.emoe_other_weight / mean


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
