"""From what stands in a config.json to transformers' configuration, or one line that names key, value and rule."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from megatron_emoe.hf.architecture import experts_in
from megatron_emoe.settings.elastic_rules import check_tail_scale

_QUANTISED = ("quantization_config", "compression_config")
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
    *("num_key_value_heads", "max_position_embeddings", "moe_intermediate_size", "shared_expert_intermediate_size"),
    *("num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts", "decoder_sparse_step"),
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_layer_interval", "clip_qkv"),
)
_COUNTED = ("num_hidden_layers", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_MOST = 4096
"""Layers, and experts of a layer: what is listed one by one."""
_NEVER_NULL = (
    *("moe_k", "num_experts_per_tok", "moe_num_experts", "n_routed_experts", "num_experts", "moe_num_shared_experts"),
    *("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_norm_min", "attention_dropout"),
    "num_key_value_heads",
)
"""transformers' classes take null there, or anything, and it and this package calculate with them."""
_LARGEST = 2**63
_NONE_OR_ANY = ("_token_id", "_end_index")
"""Ends of the keys in which a negative number says "none"."""
_DTYPES = ("float16", "bfloat16", "float32", "float64")


def completed(raw: Mapping[str, Any], path: Path) -> PretrainedConfig:
    """transformers' configuration of the model_type in `raw`, which stands in the file `path`. Where the block "emoe"
    of an export has the k of training, num_experts_per_tok is that one, whatever k the folder is served with.

    Raises:
        ValueError: path, key, value and rule.
    """
    kind = CONFIG_MAPPING[raw["model_type"]]
    try:
        _check_numbers(raw)
        _check_dtype(raw)
        config = kind.from_dict(_in_new_words(with_floats(raw)))
        _check_known(config)
        _check_rope(config)
        check_block(getattr(config, "emoe", None), config)
    except (ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path}: {text.partition('TypeError: ')[2] or text}") from error  # what is before says it too
    k_train = (getattr(config, "emoe", None) or {}).get("k_train")
    if k_train is not None:
        config.num_experts_per_tok = k_train
    return config


def with_floats(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The same with every whole number a float where transformers' class takes floats alone: 1 as 1.0."""
    hints = _types(CONFIG_MAPPING[raw["model_type"]])
    return {key: float(value) if _wants_float(hints.get(key), value) else value for key, value in raw.items()}


def _types(kind: type[PretrainedConfig]) -> dict[str, Any]:
    """The type of every key that transformers' class knows."""
    return {field.name: field.type for field in dataclasses.fields(kind)}


def _wants_float(hint: Any, value: Any) -> bool:
    kinds = typing.get_args(hint) or (hint,)
    return type(value) is int and float in kinds and int not in kinds


def _check_numbers(raw: Mapping[str, Any]) -> None:
    """ValueError for a number that no model can have. Keys that transformers does not know are nobody's."""
    hints = _types(CONFIG_MAPPING[raw["model_type"]])
    if not isinstance(raw.get("head_dim"), int | None):
        raise ValueError(f"head_dim {raw['head_dim']!r}: must be a whole number")
    for key, value in _numbers(raw):
        if isinstance(value, int) and abs(value) >= _LARGEST:
            raise ValueError(f"{key}: a number of {len(f'{abs(value):x}') * 4} bits; must fit in 64")
        if not math.isfinite(value):
            raise ValueError(f"{key} {value}: must be a finite number")
        if key in _SIZES and value <= 0:
            raise ValueError(f"{key} {value}: must be above 0")
        if key in hints and value < 0 and not key.endswith(_NONE_OR_ANY):
            raise ValueError(f"{key} {value}: must not be negative")
        if key in _COUNTED and value > _MOST:
            raise ValueError(f"{key} {value}: must be at most {_MOST}")


def _numbers(found: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number with its key, inner objects' as outer.inner."""
    if isinstance(found, dict):
        for name, value in found.items():
            yield from _numbers(value, f"{key}.{name}" if key else name)
    elif isinstance(found, list):
        for value in found:
            yield from _numbers(value, key)
    elif isinstance(found, int | float) and not isinstance(found, bool):
        yield key, found


def _in_new_words(raw: dict[str, Any]) -> dict[str, Any]:
    """transformers warns of the name that it gave the weights' type before release 5."""
    return {"dtype" if key == "torch_dtype" else key: value for key, value in raw.items()}


def _check_dtype(raw: Mapping[str, Any]) -> None:
    """Weights are of a float type that is computed with, and not packed."""
    for key in _QUANTISED:
        if raw.get(key) is not None:
            raise ValueError(f"{key}: a quantised model; only weights of 16, 32 or 64 bits are supported")
    for key in ("dtype", "torch_dtype"):
        if raw.get(key) is not None and raw[key] not in _DTYPES:
            raise ValueError(f"{key} {raw[key]!r}: must be one of {', '.join(_DTYPES)}")


def _check_known(config: PretrainedConfig) -> None:
    """ValueError for what is calculated with and is no number, as transformers completed it."""
    for key in _NEVER_NULL:
        value = getattr(config, key, 0)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{key} {value!r}: must be a number")


def _check_rope(config: PretrainedConfig) -> None:
    """transformers takes what stands there as it comes, and we calculate with it."""
    for key, value in (config.rope_parameters or {}).items():
        if key != "rope_type" and key != "type" and isinstance(value, str | bool):
            raise ValueError(f"rope_parameters.{key} {value!r}: must be a number")


def check_block(block: Any, config: PretrainedConfig) -> None:
    """The block "emoe", as far as it is read again: k of training, iteration, tail scale."""
    if block is None:
        return
    if not isinstance(block, dict):
        raise ValueError(f"emoe {block!r}: must be an object")
    if not experts_in(config):
        raise ValueError("emoe: a block about active experts, in a model that has none")
    experts, k = experts_in(config), block.get("k_train", config.num_experts_per_tok)
    if type(k) is not int or not 1 <= k <= experts:
        raise ValueError(f"emoe.k_train {k!r}: must be a whole number in [1, {experts}]")
    if type(block.get("iteration", 0)) is not int:
        raise ValueError(f"emoe.iteration {block['iteration']!r}: must be a whole number")
    words = block.get("tail_scale")
    if words is not None:
        if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
            raise ValueError(f'emoe.tail_scale {words!r}: must be a list of words such as "6:0.25", or null')
        check_tail_scale(words, k, experts)
