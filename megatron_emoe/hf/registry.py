"""The supported architectures, and which of them a folder's config.json names."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from megatron_emoe.hf.architecture import Architecture
from megatron_emoe.hf.deepseek_v2 import DeepseekV2
from megatron_emoe.hf.ernie4_5_moe import Ernie45Moe
from megatron_emoe.hf.olmoe import Olmoe
from megatron_emoe.hf.qwen2_moe import Qwen2Moe


def architectures() -> dict[str, Architecture]:
    """Every supported architecture, by model_type."""
    return {cls.model_type: cls() for cls in (Olmoe, Qwen2Moe, DeepseekV2, Ernie45Moe)}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a configuration, checked (ValueError: not supported, or not with these settings)."""
    architecture = architectures()[config.model_type]
    architecture.check(config)
    return architecture


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in `folder`/config.json, completed by transformers. Code in the folder is never run.

    Raises:
        ValueError: path and reason; also for an architecture that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {folder} is no Hugging Face model")
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    known = architectures()
    model_type = raw.get("model_type") if isinstance(raw, dict) else None
    if model_type not in known:
        raise ValueError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(known)}")
    try:
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        known[model_type].check(config)
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config
