"""What was decided for one server: from the block in config.json and `--additional-config '{"emoe": ...}'`. Pure.

The decision is made once, where vLLM's configuration is complete, and travels to every process as numbers in
`additional_config["emoe"]`, which vLLM counts in the hash of compiled code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from emoe_vllm.block import Block, read_block
from emoe_vllm.layers import experts_of, k_key, moe_layers, reachable_experts

FLAG = "--additional-config emoe"
ASKED = ("k", "k_min", "k_max")
"""What a person may set. Everything else in the block of additional_config is what this module decided."""
MOST_LAYOUTS = 64
"""Budgets with a k' per layer that one server knows at a time."""


@dataclass(frozen=True)
class ElasticSettings:
    """k_train: k of training. k_min, k_max: the k' that are admitted; layers run with k_max, masked down. k: the k' of
    a request that names none, one number or one for each layer. layers: numbers of the decoder layers with experts."""

    k_train: int
    k_min: int
    k_max: int
    k: int | tuple[int, ...]
    layers: tuple[int, ...]
    experts: int

    def as_json(self) -> dict[str, Any]:
        """For additional_config."""
        return asdict(self) | {"decided": True}


def decided(additional_config: Any) -> ElasticSettings | None:
    """The settings of a configuration that `decide` has passed, None where nothing is elastic."""
    found = additional_config.get("emoe") if isinstance(additional_config, Mapping) else None
    if not isinstance(found, Mapping) or not found.get("decided"):
        return None
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}
    values.pop("decided")
    return ElasticSettings(**values)


def asked_for(config: Any, additional_config: Any) -> bool:
    """Whether a model is served elastically: it has the block, or the flag says so. `"emoe": false` is a no."""
    if not isinstance(additional_config, Mapping):
        return getattr(config, "emoe", None) is not None
    asked = additional_config.get("emoe")
    if asked is None:
        return getattr(config, "emoe", None) is not None
    if isinstance(asked, bool | Mapping):
        return asked is not False
    raise ValueError(f"{FLAG} {asked!r}: must be an object with {', '.join(ASKED)}, or false for vLLM as it is")


def block_of(config: Any) -> Block:
    """What the checkpoint says; of a model that was not exported by megatron_emoe, its k alone."""
    k = getattr(config, k_key(config))
    return read_block(getattr(config, "emoe", None) or {}, len(moe_layers(config)), experts_of(config), k)


def decide(config: Any, additional_config: Mapping[str, Any]) -> ElasticSettings:
    """The settings of a server, before anything is built.

    Raises:
        ValueError: flag or key, value and rule.
    """
    asked = additional_config.get("emoe")
    asked = asked if isinstance(asked, Mapping) else {}
    for key in asked:
        if key not in ASKED:
            raise ValueError(f"{FLAG}.{key}: is not known; known: {', '.join(ASKED)}")
    block, layers, most = block_of(config), moe_layers(config), reachable_experts(config)
    default = block.k_per_layer or getattr(config, k_key(config))
    largest = block.k_range[1] if block.k_range else min(2 * block.k_train, most)
    wanted = max(largest, *as_layout(default, len(layers)), *_numbers(asked.get("k")))
    k_max = _whole(asked, "k_max", min(wanted, most), 1, most)
    k_min = _whole(asked, "k_min", block.k_range[0] if block.k_range else 1, 1, k_max)
    k = check_budget(asked.get("k", default), k_min, k_max, len(layers), f"{FLAG}.k")
    return ElasticSettings(block.k_train, k_min, k_max, k, layers, experts_of(config))


def check_budget(found: Any, k_min: int, k_max: int, layers: int, where: str) -> int | tuple[int, ...]:
    """A k' for all layers or one for each (ValueError: neither, or out of range)."""
    if isinstance(found, Sequence) and not isinstance(found, str):
        if len(found) != layers:
            raise ValueError(f"{where} {list(found)}: must have one k' for each of the {layers} layers with experts")
        return tuple(check_k(each, k_min, k_max, where) for each in found)
    return check_k(found, k_min, k_max, where)


def check_k(found: Any, k_min: int, k_max: int, where: str) -> int:
    """A k' within the range that is served."""
    if type(found) is not int or not k_min <= found <= k_max:
        raise ValueError(f"{where} {found!r}: must be a whole number in [{k_min}, {k_max}], the k' that are served")
    return found


def as_layout(k: int | Sequence[int], layers: int) -> tuple[int, ...]:
    """A k' for every layer."""
    return (k,) * layers if isinstance(k, int) else tuple(k)


def _numbers(k: Any) -> list[int]:
    found = k if isinstance(k, list | tuple) else [k]
    return [each for each in found if type(each) is int]


def _whole(asked: Mapping[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = asked.get(key, default)
    if type(value) is not int or not low <= value <= high:
        raise ValueError(f"{FLAG}.{key} {value!r}: must be a whole number in [{low}, {high}]")
    return value
