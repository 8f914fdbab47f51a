"""The scheduler gives every request its budget when it arrives, and keeps apart the cached blocks of different ones.

Keys and values above the first MoE layer depend on k'. So a request's prefix is hashed together with the level of its
prefill: blocks are shared between equal levels alone. Blocks with tokens that were written at another level than that
of the prefill are shared with nobody. What follows the load overrides `default_levels` and `level_now` (following.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from emoe_vllm import control
from emoe_vllm.budgets import Ks
from emoe_vllm.levels import Levels
from emoe_vllm.requests import FOLLOW, asked_k, pin, pinned
from emoe_vllm.settings import FLAG, decided

logger = init_logger(__name__)


class ElasticScheduling(Scheduler):
    """What both schedulers have in common. `default`: the level of requests that name no k'."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        settings = decided(self.vllm_config.additional_config)
        assert settings is not None, "the plugin chose this scheduler"
        self.levels = Levels(settings)
        self.default = self.levels.of(settings.k)
        control.register(self)

    def default_levels(self) -> tuple[int, int]:
        """Of prefill and decoding, where a request names none. A policy gives FOLLOW for decoding."""
        return self.default, self.default

    def level_now(self) -> int | None:
        """Of the decoding of requests that FOLLOW, in the step that is being scheduled. None: there are none."""
        return None

    def add_request(self, request: Any) -> None:
        if (session := self.requests.get(request.request_id)) is not None:  # goes on with what it began with
            if request.sampling_params is not None:
                pin(request.sampling_params, *pinned(session.sampling_params, FOLLOW))
        else:
            self._pin(request)
        super().add_request(request)

    def _pin(self, request: Any) -> None:
        prefill, decode = self.default_levels()
        try:
            asked = asked_k(request.sampling_params, self.levels.settings)
        except ValueError as error:  # the front end refuses these; whoever passed it by gets an answer of no tokens
            logger.error("request %s: %s", request.request_id, error)
            request.abort_immediately, asked = True, (None, None)
        prefill = prefill if asked[0] is None else self.levels.of(asked[0])
        decode = decode if asked[1] is None else self.levels.of(asked[1])
        pin(request.sampling_params, prefill, decode)
        request.cache_salt = f"{request.cache_salt or ''}|emoe:{self.levels.budget(prefill)}"
        if request._block_hasher is not None:
            if decode != prefill:
                request._block_hasher = _Unshared(request._block_hasher, self.hash_block_size)
            request.block_hashes = []
            request.update_block_hashes()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        output.emoe_level = self.level_now()
        output.emoe_layouts = tuple(self.levels.layouts)
        return output

    def emoe_change(self, change: Mapping[str, Any]) -> dict[str, Any]:
        """From now on requests that name no k' get `k` of the change, None: what the server started with.

        Raises:
            ValueError: out of range, or `follow` where there is nothing to follow.
        """
        if change.get("follow"):
            raise ValueError(f"follow True: this server has no levels to follow; they are set by {FLAG}.follow")
        if "k" in change:
            settings = self.levels.settings
            self.default = self.levels.of(settings.k if change["k"] is None else settings.budget(change["k"], "k"))
        return self.emoe_settings()

    def emoe_settings(self) -> dict[str, Any]:
        """k' now, and what is admitted. k_now: of decoding, where a request names none."""
        settings, decode = self.levels.settings, self.default_levels()[1]
        level = self.level_now() if decode == FOLLOW else decode
        assert level is not None, "a scheduler that lets requests follow it says a level"
        return {
            "k": as_json(self.levels.budget(self.default)),
            "k_now": as_json(self.levels.budget(level)),
            "k_mean": self._mean(self.default),
            "k_now_mean": self._mean(level),
            "k_train": settings.k_train,
            "k_min": settings.k_min,
            "k_max": settings.k_max,
            "layers": list(settings.layers),
            "budgets": [asdict(budget) | {"k": as_json(budget.k)} for budget in settings.budgets],
            "follow": None,
            "changes": 0,
        }

    def _mean(self, level: int) -> float:
        return fmean(self.levels.layout(level))


def as_json(k: Ks) -> int | list[int]:
    """A k' as it stands in an answer."""
    return k if isinstance(k, int) else list(k)


class _Unshared:
    """Hashes the blocks of a request like `inner`, but those that are not wholly of its prompt like no other's."""

    def __init__(self, inner: Any, block_size: int) -> None:
        self.inner, self.block_size = inner, block_size

    def __call__(self, request: Any) -> list[Any]:
        of_prompt = request.num_prompt_tokens // self.block_size - len(request.block_hashes)
        found = self.inner(request)
        return found[: max(of_prompt, 0)] + [
            hashlib.sha256(each + request.request_id.encode()).digest() for each in found[max(of_prompt, 0) :]
        ]


class ElasticScheduler(ElasticScheduling):
    """Where scheduling waits for each step."""


class ElasticAsyncScheduler(ElasticScheduling, AsyncScheduler):
    """Where it runs ahead of the device."""


def scheduler(vllm_config: Any, **kwargs: Any) -> ElasticScheduling:
    """The scheduler of an engine: what vLLM's `scheduler_cls` names. Which one is known only when the engine starts."""
    from emoe_vllm.following import FollowingAsyncScheduler, FollowingScheduler

    settings, ahead = decided(vllm_config.additional_config), vllm_config.scheduler_config.async_scheduling
    if settings is not None and settings.follow is not None:
        kind: type[ElasticScheduling] = FollowingAsyncScheduler if ahead else FollowingScheduler
    else:
        kind = ElasticAsyncScheduler if ahead else ElasticScheduler
    return kind(vllm_config=vllm_config, **kwargs)
