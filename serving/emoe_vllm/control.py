"""k' of a running engine, from Python: for `LLM` and, awaited, for `AsyncLLM`.

What a request without a k' gets is known by the scheduler, in the process of the engine core; tokens are counted by the
workers. The scheduler adds one method, `emoe`, to those that vLLM's front end can call there.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def _ask(core: Any, k: Any = None) -> dict[str, Any]:
    """A method of EngineCore: sets k' where one is given, and says what applies."""
    scheduler = core.scheduler
    return scheduler.emoe_settings() if k is None else scheduler.emoe_set_k(k)


def in_this_process(vllm_config: Any) -> Any:
    """The scheduler of an engine whose worker lives in the same process (RuntimeError: it does not)."""
    found = _schedulers.get(vllm_config.instance_id)
    if found is None:
        raise RuntimeError(
            "emoe_set_k: the scheduler of this engine is another process; emoe_vllm.set_k(llm, k) or POST /emoe/k"
        )
    return found


def set_k(llm: Any, k: int | Sequence[int]) -> dict[str, Any]:
    """From now on requests to an `LLM` that name no k' get this one: one number, or one for each layer with experts.

    Raises:
        ValueError: out of range.
    """
    return _call(llm, k)


def status(llm: Any) -> dict[str, Any]:
    """k' now, what is admitted, and per k' the tokens that ran; rows: (token, expert) pairs by layer (CPU)."""
    return _call(llm, None) | llm.collective_rpc("emoe_status")[0]


async def set_k_async(engine: Any, k: int | Sequence[int]) -> dict[str, Any]:
    """`set_k` for an AsyncLLM."""
    return await engine.engine_core.call_utility_async(METHOD, k)


async def status_async(engine: Any) -> dict[str, Any]:
    """`status` for an AsyncLLM."""
    found = await engine.engine_core.call_utility_async(METHOD, None)
    return found | (await engine.collective_rpc("emoe_status"))[0]


def _call(llm: Any, k: Any) -> dict[str, Any]:
    client = llm.llm_engine.engine_core
    if hasattr(client, "engine_core"):  # everything is one process
        return getattr(client.engine_core, METHOD)(k)
    return client.call_utility(METHOD, k)
