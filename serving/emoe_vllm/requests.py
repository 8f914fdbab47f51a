"""What a request asks for, in `SamplingParams.extra_args` (`vllm_xargs` of the OpenAI server), and what it gets.

`emoe_k` is its k', a number or the name of a budget; `emoe_k_prefill` and `emoe_k_decode` those of the tokens of its
prompt and of the tokens that it writes. The scheduler pins the levels of a request once, when it arrives (`PINNED`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.v1.sample.logits_processor import LogitsProcessor

from emoe_vllm.budgets import Ks
from emoe_vllm.settings import ElasticSettings

K, K_PREFILL, K_DECODE = "emoe_k", "emoe_k_prefill", "emoe_k_decode"
PINNED = "emoe_levels"
"""In the extra_args of a request that the scheduler has seen: [prefill, decode], levels."""
FOLLOW = -1
"""As the level of decoding: whatever the scheduler says in each step."""


def asked_k(params: Any, settings: ElasticSettings) -> tuple[Ks | None, Ks | None]:
    """The k' of prefill and of decoding that a request names, None where it names none; one for each layer, where it
    names such a budget.

    Raises:
        ValueError: a name that is not known, or a k' out of range.
    """
    found = {key: value for key, value in _arguments(params).items() if key.startswith("emoe") and key != PINNED}
    for key in found:
        if key not in (K, K_PREFILL, K_DECODE):
            raise ValueError(f"{key}: is not known; a request may name {K}, {K_PREFILL} and {K_DECODE}")
    ks = {key: settings.named(_whole(k), key) for key, k in found.items()}
    return ks.get(K_PREFILL, ks.get(K)), ks.get(K_DECODE, ks.get(K))


def pin(params: Any, prefill: int, decode: int) -> None:
    """Note the levels of a request in its own arguments, which reach the worker."""
    params.extra_args = {**_arguments(params), PINNED: [prefill, decode]}


def pinned(params: Any, following: int | None) -> tuple[int, int]:
    """The levels of a request. following: the scheduler's, for requests that follow it."""
    prefill, decode = params.extra_args[PINNED]
    if decode != FOLLOW:
        return prefill, decode
    assert following is not None, "a scheduler that lets requests follow it says a level in every step"
    return prefill, following


def _arguments(params: Any) -> Mapping[str, Any]:
    return getattr(params, "extra_args", None) or {}


def _whole(value: Any) -> Any:
    """The OpenAI server may hand a whole number on as text or as a float."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return int(value) if isinstance(value, str) and value.isdecimal() else value


class RequestCheck(LogitsProcessor):
    """Refuses a request with a bad k' in the process that takes it: HTTP 400. It processes no logits: this is where
    vLLM lets a plugin see the parameters of a request before the engine does."""

    settings: ElasticSettings | None = None
    """Of the engine that this process was configured for last."""

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        if PINNED in _arguments(sampling_params):
            raise ValueError(f"{PINNED}: is set by the server; a request may name {K}, {K_PREFILL} and {K_DECODE}")
        if cls.settings is not None:
            asked_k(sampling_params, cls.settings)

    def __init__(self, vllm_config: Any, device: Any, is_pin_memory: bool) -> None:
        pass

    def apply(self, logits: Any) -> Any:
        return logits

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass
