"""The supported architectures, and which of them a folder's config.json names."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, experts_in
from megatron_emoe.hf.config_file import completed
from megatron_emoe.hf.deepseek_v2 import DeepseekV2
from megatron_emoe.hf.deepseek_v3 import DeepseekV3
from megatron_emoe.hf.ernie4_5_moe import Ernie45Moe
from megatron_emoe.hf.granitemoe import GraniteMoe
from megatron_emoe.hf.llama import Llama
from megatron_emoe.hf.mixtral import Mixtral
from megatron_emoe.hf.olmoe import Olmoe
from megatron_emoe.hf.qwen2_moe import Qwen2Moe
from megatron_emoe.hf.qwen3_moe import Qwen3Moe
from megatron_emoe.settings.budget_table import read_budget_table
from megatron_emoe.settings.hf_folder import CONFIG, read_config_json


def architectures() -> dict[str, Architecture]:
    """Every supported architecture, by model_type."""
    kinds = (Olmoe, Qwen2Moe, DeepseekV2, Ernie45Moe, Llama, Qwen3Moe, Mixtral, DeepseekV3, GraniteMoe)
    return {kind.model_type: kind() for kind in kinds}


def architecture_of(config: PretrainedConfig) -> Architecture:
    """The architecture of a configuration, checked (ValueError: not supported, or not with these settings)."""
    architecture = architectures()[config.model_type]
    architecture.check(config)
    return architecture


def read_config(folder: Path) -> PretrainedConfig:
    """The configuration in `folder`/config.json, completed by transformers. Code in the folder is never run.

    num_experts_per_tok is the k of training, also of an export that is served with another k (its block "emoe").

    Raises:
        ValueError: path and reason; also for an architecture that is not supported.
    """
    raw, path = read_config_json(folder), folder / CONFIG
    known = architectures()
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(known)}")
    config = completed(raw, path)
    try:
        known[model_type].check(config)
        layers = sum(known[model_type].is_moe(config, layer) for layer in range(config.num_hidden_layers))
        if layers:
            read_budget_table(getattr(config, "emoe", None), layers, experts_in(config))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def read_moe_config(folder: Path) -> PretrainedConfig:
    """The same of a model with experts (ValueError for a dense one, too)."""
    config = read_config(folder)
    if not experts_in(config):
        raise ValueError(f"{folder / CONFIG}: model_type {config.model_type!r} has no experts, and so no k'")
    return config
