"""What an export prints: the lines that serve the model at another k'."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_emoe.hf.architecture import Architecture
from megatron_emoe.settings.budget_table import KEY
from megatron_emoe.settings.serving_plugin import serve_command
from megatron_emoe.settings.tail_scale import parse_tail_scale


def serving_lines(
    out: Path, architecture: Architecture, settings: Mapping[str, Any], num_experts: int, k: int
) -> list[str]:
    """How to serve the model with another k'. k: what config.json says; settings: the block "emoe".

    No stock engine has a tail scale: where one belongs to a k', the line is that of this package.
    """
    if settings.get(KEY):
        return [
            f"it has learned scales at every k' but {settings['k_train']}, that of training: vLLM and transformers as "
            "they are have none, and would compute something else there; with the plugin in serving/, or this package, "
            f"here k' = {k}:",
            *_with_scales(out, k),
        ]
    said = []
    if (tail := _tail_at(settings, k)) != 1:
        said.append(f"as it stands, {out} is served without the tail scale {tail:g} that belongs to its k' = {k}")
    k = settings["pool_k"] or settings["k_max"] or min(2 * settings["k_train"], num_experts)
    if (tail := _tail_at(settings, k)) != 1:
        return [
            *said,
            f"to serve it at another k', here k' = {k}, to which the tail scale {tail:g} belongs: vLLM and "
            "transformers as they are have none, and would compute something else; with the plugin in serving/, or "
            "this package:",
            *_with_scales(out, k),
        ]
    override = json.dumps({architecture.k_key: k})
    return [
        *said,
        "to serve it at another k', here k' = " + str(k) + ":",
        f"  vllm serve {out} --hf-overrides '{override}'",
        f'  AutoModelForCausalLM.from_pretrained("{out}", {architecture.k_key}={k})',
    ]


def _with_scales(out: Path, k: int) -> list[str]:
    """What computes with the block's scales: vLLM with our plugin, transformers with this package."""
    return [
        f"  {serve_command(str(out), k)}",
        f'  model = AutoModelForCausalLM.from_pretrained("{out}"); megatron_emoe.set_active_experts(model, {k})',
    ]


def _tail_at(settings: Mapping[str, Any], k: int) -> float:
    """a(k') by the block "emoe"; 1 where nothing is scaled."""
    if k <= settings["k_train"] or not settings["tail_scale"]:
        return 1.0
    return parse_tail_scale(settings["tail_scale"]).at(k)
