"""k' of a running engine, from Python: for `LLM` and, awaited, for `AsyncLLM`.

What a request without a k' gets is known by the scheduler, in the process of the engine core; tokens are counted by the
workers. The scheduler adds one method, `emoe`, to those that vLLM's front end can call there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

_schedulers: WeakValueDictionary[str, Any] = WeakValueDictionary()
"""Of this process, by the engine's instance id."""
METHOD = "emoe"


def register(scheduler: Any) -> None:
    """Called by a scheduler when it is made: from now on its engine core can be asked."""
    from vllm.v1.engine.core import EngineCore

    _schedulers[scheduler.vllm_config.instance_id] = scheduler
    setattr(EngineCore, METHOD, _ask)


def _ask(core: Any, change: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """A method of EngineCore: changes what applies where a change is given, and says what applies."""
    scheduler = core.scheduler
    return scheduler.emoe_settings() if change is None else scheduler.emoe_change(change)


def in_this_process(vllm_config: Any) -> Any:
    """The scheduler of an engine whose worker lives in the same process (RuntimeError: it does not)."""
    found = _schedulers.get(vllm_config.instance_id)
    if found is None:
        raise RuntimeError(
            "emoe_set_k: the scheduler of this engine is another process; emoe_vllm.set_k(llm, k) or POST /emoe/k"
        )
    return found


def change_of(k: Any, follow: bool | None) -> dict[str, Any]:
    """What `emoe_change` of a scheduler takes."""
    return {"k": k} | ({} if follow is None else {"follow": follow})


def set_k(llm: Any, k: int | str | Sequence[int] | None, follow: bool | None = None) -> dict[str, Any]:
    """From now on requests to an `LLM` that name no k' get this one: one number, one for each layer with experts, or
    the name of a budget. None: what the server started with, following the load if it did. Where there are levels to
    follow, a k' ends that, for requests to come; with `follow` True prompts alone are read at it.

    Raises:
        ValueError: out of range, or nothing to follow.
    """
    return _call(llm, change_of(k, follow))


def status(llm: Any) -> dict[str, Any]:
    """k' now, what is admitted, and per k' the tokens that ran; rows: (token, expert) pairs by layer (CPU)."""
    return _call(llm, None) | llm.collective_rpc("emoe_status")[0]


async def set_k_async(engine: Any, k: int | str | Sequence[int] | None, follow: bool | None = None) -> dict[str, Any]:
    """`set_k` for an AsyncLLM."""
    return await change_async(engine, change_of(k, follow))


async def change_async(engine: Any, change: Mapping[str, Any]) -> dict[str, Any]:
    """The same with a change as `POST /emoe/k` takes it."""
    return await engine.engine_core.call_utility_async(METHOD, change)


async def status_async(engine: Any) -> dict[str, Any]:
    """`status` for an AsyncLLM."""
    found = await engine.engine_core.call_utility_async(METHOD, None)
    return found | (await engine.collective_rpc("emoe_status"))[0]


def _call(llm: Any, change: Mapping[str, Any] | None) -> dict[str, Any]:
    client = llm.llm_engine.engine_core
    if hasattr(client, "engine_core"):  # everything is one process
        return getattr(client.engine_core, METHOD)(change)
    return client.call_utility(METHOD, change)
