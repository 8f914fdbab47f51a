"""Schedulers whose decoding follows the load, by the policy of policy.py.

Requests that name no k' have their prompts read at the server's k' and decode at the level of each step; one that names
a k' keeps it. The level of a step travels with the step, so that all workers agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from emoe_vllm.policy import LoadTable, Policy
from emoe_vllm.requests import FOLLOW
from emoe_vllm.scheduler import ElasticScheduling, as_json


class Following(ElasticScheduling):
    """What both schedulers have in common. `follows`: whether requests to come do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        table = self.levels.settings.follow
        assert table is not None, "refusals.py lets no such scheduler through"
        self.table: LoadTable = table
        self.policy = Policy(table.starts, table.hold, table.margin)
        self._by_load = [self.levels.of(k) for k in table.ks]
        self.follows = True

    def default_levels(self) -> tuple[int, int]:
        return self.default, FOLLOW if self.follows else self.default

    def level_now(self) -> int:
        return self._by_load[self.policy.now]

    def add_request(self, request: Any) -> None:
        self._rest_if_idle()
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        load = self._load()
        output = super().schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:  # else it is no step, as where finished requests are only cleared away
            self.policy.step(load)
            output.emoe_level = self.level_now()
        return output

    def emoe_change(self, change: Mapping[str, Any]) -> dict[str, Any]:
        """A k' pins it for requests to come, None follows again; `follow` says which of both without a new k'."""
        super().emoe_change({key: value for key, value in change.items() if key != "follow"})
        self.follows = change.get("follow", change["k"] is None if "k" in change else self.follows)
        return self.emoe_settings()

    def emoe_settings(self) -> dict[str, Any]:
        self._rest_if_idle()
        levels = self.levels.settings
        names = [levels.budget_at(k) for k in self.table.ks]
        return super().emoe_settings() | {
            "changes": self.policy.changes,
            "follow": {
                "now": self.follows,
                "levels": [
                    {"from": start, "k": as_json(k), "name": None if name is None else name.name}
                    for start, k, name in zip(self.table.starts, self.table.ks, names, strict=True)
                ],
                "hold": self.table.hold,
                "margin": self.table.margin,
                "min_quality": self.table.min_quality,
                "left_out": [{"from": start, "k": as_json(k)} for start, k in self.table.left_out],
            },
        }

    def _load(self) -> int:
        running, waiting = self.get_request_counts()
        return running + waiting

    def _rest_if_idle(self) -> None:
        """Without requests there are no steps in which the policy could see that."""
        if not self._load():
            self.policy.rest()


class FollowingScheduler(Following):
    """Where scheduling waits for each step."""


class FollowingAsyncScheduler(Following, AsyncScheduler):
    """Where it runs ahead of the device."""
