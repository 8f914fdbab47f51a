"""Which number of experts is active now: pure functions of (seed, iteration, micro-batch, layer), and their one owner.

Every elastic random number comes from here. Nothing is drawn from a random stream: a value depends on its place alone,
so it is the same on every rank that asks for the same place, needs no communication, and a resumed run repeats it
exactly.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.training import checkpointing

from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.k_schedule import k_probabilities, loss_weights, ramp
from megatron_emoe.settings.tail_scale import TailScale, given_tail_scale

_MASK64 = (1 << 64) - 1
_K, _POOL, _EXPERTS, _DEAL = 1, 2, 3, 4
_MARKER = "emoe-place"
_TINY = 1e-6  # of a micro-batch: shares such as 0.7 are no exact numbers
_random_states = checkpointing.get_rng_state  # the core's own


def mix(*values: int) -> int:
    """A 64-bit hash of integers (SplitMix64, Steele et al. 2014): equal everywhere, independent of any random state."""
    state = 0
    for value in values:
        state = (state + (value & _MASK64) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def unit(*values: int) -> float:
    """A number in [0, 1) with 53 random bits, a pure function of `values`."""
    return (mix(*values) >> 11) / (1 << 53)


@dataclass(frozen=True)
class Place:
    """Where in training a forward pass stands. iteration and microbatch count from 0, layer from 1 (as the core
    does). microbatches: of the step. second: the micro-batch has run at the model's own k already."""

    iteration: int
    microbatch: int
    layer: int = 0
    microbatches: int = 1
    second: bool = False


@dataclass(frozen=True)
class Draw:
    """What one layer uses in one forward pass.

    k: active experts. pool: m, or None where each token draws its own from {k, ..., pool_max}. seed: of the layer's
    per-token numbers, before the rank is mixed in. tail: what multiplies the weights past the model's own k
    (tail_scale.py). asked: an evaluation named this k'. weight: of this pass in the loss.
    learned: whether the learned scales by budget, if there are any, are used.
    """

    k: int
    pool_max: int
    pool: int | None
    seed: int
    tail: float = 1.0
    asked: bool = False
    weight: float = 1.0
    learned: bool = True


def scheduled_k(elastic: ElasticConfig, model_k: int, place: Place) -> int:
    """The k of the schedule at `place`; `model_k` is --moe-router-topk. Pure."""
    low, high = elastic.k_range(model_k)
    if elastic.emoe_k_schedule == "constant":
        return model_k
    if elastic.emoe_k_schedule == "ramp":
        return ramp(elastic, low, high, place.iteration)
    if elastic.emoe_k_schedule == "stratified":
        return _stratified_k(elastic, model_k, place)
    where = {"step": (0, 0), "microbatch": (place.microbatch, 0), "layer": (0, place.layer)}[elastic.emoe_k_draw]
    u = unit(elastic.emoe_seed, _K, place.iteration, *where)
    cumulative = list(accumulate(k_probabilities(elastic, model_k).values()))
    return low + min(bisect_right(cumulative, u), high - low)


def _stratified_k(elastic: ElasticConfig, model_k: int, place: Place) -> int:
    """In each step its share of the micro-batches at `model_k`, the others in turn at a k that is dealt from the grid.

    Shares that do not divide the micro-batches are carried over to later steps, so a step may have one alone. Where the
    number of micro-batches grows, shares hold on average.
    """
    first = place.iteration * place.microbatches
    if elastic.emoe_second_pass:
        return _dealt(elastic, model_k, first + place.microbatch) if place.second else model_k
    share = 1 - elastic.default_prob
    before = int(first * share + _TINY)
    here = int((first + place.microbatches) * share + _TINY) - before
    turn, after = (number * here // place.microbatches for number in (place.microbatch, place.microbatch + 1))
    return _dealt(elastic, model_k, before + turn) if after > turn else model_k


def _dealt(elastic: ElasticConfig, model_k: int, number: int) -> int:
    """The k of deal `number`: the whole grid in an order of its own, then again in another one."""
    grid = elastic.k_grid(model_k)
    deal, position = divmod(number, len(grid))
    return sorted(grid, key=lambda k: unit(elastic.emoe_seed, _DEAL, deal, k))[position]


def loss_weight(elastic: ElasticConfig, model_k: int, place: Place) -> float:
    """How much the losses of the forward pass at `place` count (k_schedule.py). Pure, equal on all ranks."""
    own, other = loss_weights(elastic)
    return own if own == other or scheduled_k(elastic, model_k, place) == model_k else other


def draw_for(elastic: ElasticConfig, model_k: int, place: Place) -> Draw:
    """k, pool and seed of a layer's training forward pass at `place`. Pure."""
    k = scheduled_k(elastic, model_k, place)
    largest = _largest_pool(elastic, k, place.iteration)
    again = (1,) if place.second else ()
    seed = mix(elastic.emoe_seed, _EXPERTS, place.iteration, place.microbatch, place.layer, *again)
    tail, weight = elastic.tail_scale_at(k, model_k), loss_weight(elastic, model_k, place)
    if not elastic.samples or elastic.emoe_pool_fixed:
        return Draw(k, largest, largest, seed, tail, weight=weight)
    if elastic.emoe_pool_draw == "token":
        return Draw(k, largest, None, seed, tail, weight=weight)
    microbatch = place.microbatch if elastic.emoe_pool_draw == "microbatch" else 0
    u = unit(elastic.emoe_seed, _POOL, place.iteration, microbatch) / elastic.emoe_pool_prob
    pool = k + min(int(u * (largest - k + 1)), largest - k) if u < 1 else k
    return Draw(k, largest, pool, seed, tail, weight=weight)


def _largest_pool(elastic: ElasticConfig, k: int, iteration: int) -> int:
    """K, or on the way to it from k while the pool is annealed in; k where nothing is sampled."""
    if not elastic.samples or elastic.emoe_pool_k is None:
        return k
    if not elastic.emoe_pool_anneal_iters:
        return elastic.emoe_pool_k
    return k + round((elastic.emoe_pool_k - k) * min(1.0, iteration / elastic.emoe_pool_anneal_iters))


class ActiveK:
    """The one owner of the k in use. The training loop tells it the place, evaluation overrides it, routers ask it."""

    def __init__(self) -> None:
        self._override: int | Mapping[int, int] | None = None
        self._tail: TailScale | None = None
        self._learned = True

    def begin_microbatch(self, iteration: int, microbatch: int, microbatches: int = 1, second: bool = False) -> None:
        """Call before each training forward pass, with its place.

        The place is kept in the core's random-state tracker: activation recomputation saves and restores that tracker,
        so a recomputed forward pass stands where the first one stood, also when other micro-batches ran in between
        (1F1B). A new tensor each time, because the core keeps references to old states, not copies.
        """
        get_cuda_rng_tracker().states_[_MARKER] = torch.tensor([iteration, microbatch, microbatches, second])

    def place(self, layer: int) -> Place:
        """Where the running training forward pass stands. A CPU tensor is read: no device sync."""
        marker = get_cuda_rng_tracker().states_.get(_MARKER)
        if marker is None:
            raise RuntimeError("begin_microbatch() must be called before a training forward pass")
        iteration, microbatch, microbatches, second = marker.tolist()
        return Place(iteration, microbatch, layer, microbatches, bool(second))

    @contextmanager
    def evaluating(self, k: int | Sequence[int] | Mapping[int, int] | None) -> Iterator[None]:
        """Evaluation inside uses k' = `k`: one number, one per MoE layer by layer number (a mapping), or the model's
        own."""
        previous, self._override = self._override, k if not isinstance(k, Sequence) else dict(enumerate(k, start=1))
        try:
            yield
        finally:
            self._override = previous

    @contextmanager
    def scaling_tail(self, scale: float | Mapping[int, float]) -> Iterator[None]:
        """Evaluation inside multiplies the weights past the model's own k by `scale`, one number or a by k', whatever
        --emoe-tail-scale says."""
        previous, self._tail = self._tail, given_tail_scale(scale)
        try:
            yield
        finally:
            self._tail = previous

    @contextmanager
    def plain_weights(self) -> Iterator[None]:
        """Evaluation inside has no tail scale and no learned scales by budget: what other programs compute."""
        previous, self._learned = self._learned, False
        try:
            with self.scaling_tail(1.0):
                yield
        finally:
            self._learned = previous

    def draw(self, elastic: ElasticConfig, model_k: int, layer: int, training: bool) -> Draw:
        """What the layer uses now: the schedule's draw in training, plain top-k' in evaluation."""
        if training and elastic.draws:
            return draw_for(elastic, model_k, self.place(layer))
        override = None if training else self._override
        asked = override.get(layer) if isinstance(override, Mapping) else override
        k = asked or model_k
        fixed = self._tail if k > model_k and not training else None
        tail = elastic.tail_scale_at(k, model_k) if fixed is None else fixed.at(k)
        return Draw(k, k, k, 0, tail, asked is not None, learned=training or self._learned)


def keep_place_out_of_checkpoints() -> None:
    """Have Megatron save its random states without the place, which is none: Megatron-Core with the random states of
    CUDA graphs would not load it."""

    def without_place(*args: Any, **kwargs: Any) -> Any:
        states = get_cuda_rng_tracker().states_
        marker = states.pop(_MARKER, None)
        try:
            return _random_states(*args, **kwargs)
        finally:
            if marker is not None:
                states[_MARKER] = marker

    checkpointing.get_rng_state = without_place


_OWNER = ActiveK()


def get_active_k() -> ActiveK:
    """The process's owner of the active k."""
    return _OWNER
