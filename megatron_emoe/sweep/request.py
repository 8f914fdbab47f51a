"""What a sweep is asked for: flags checked before anything is built, budgets listed.

Megatron is imported where it is needed, not with this module: `check_asked` answers without it.
"""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_emoe.model.flops import moe_layer_numbers
from megatron_emoe.settings.budget_table import KEY as BUDGET_SCALES
from megatron_emoe.settings.command_line import installed, say
from megatron_emoe.settings.elastic_config import MODEL_FEATURES, ONLY_WATCHING, ElasticConfig, flag
from megatron_emoe.settings.flag_files import own_command
from megatron_emoe.settings.hf_folder import model_name
from megatron_emoe.settings.in_force import setting_words
from megatron_emoe.settings.paths import check_out
from megatron_emoe.settings.result_file import check_label
from megatron_emoe.settings.tail_scale import parse_tail_scale
from megatron_emoe.sweep.curve import sensitivity_budgets
from megatron_emoe.sweep.result import (
    SweepData,
    SweepResult,
    load,
    missing_ks,
    resume,
)

Budget = int | tuple[int, ...]
"""k' everywhere, or one per MoE layer in layer order."""


def check_asked(args: Namespace) -> None:
    """ValueError for what can be refused before the model is known, and without Megatron: flag, value and rule."""
    _check_any_k(args)
    check_out(args.out)
    check_label("--label", args.label)
    if args.coverage_at_least < 1:
        raise ValueError(f"--coverage-at-least {args.coverage_at_least}: must be at least 1")


def check_sweep(args: Namespace) -> SweepResult:
    """The result so far: the header of this sweep with the finished cells of --out. Nothing is built yet.

    Raises:
        ValueError: as check_asked; a k' out of range, a list of another length than the model has MoE layers, or an
            --out that belongs to another sweep.
    """
    check_asked(args)
    layers = len(moe_layer_numbers(args))
    _check_ks(args, layers)
    if args.max_eval_tokens < args.seq_length:
        raise ValueError(
            f"--max-eval-tokens {args.max_eval_tokens}: must hold one sequence of {args.seq_length} tokens"
        )
    if args.agreement and args.pipeline_model_parallel_size > 1:
        stages = f"--pipeline-model-parallel-size {args.pipeline_model_parallel_size}"
        raise ValueError(f"--agreement cannot be combined with {stages}: both passes go through the whole model")
    model = _hugging_face(args) if args.hf else _megatron(args)
    header = SweepResult(
        schema=3,
        label=args.label or model_name(model["checkpoint"]) or "model",
        **model,
        num_experts=args.num_experts,
        num_moe_layers=layers,
        tail_scale=_tail_scale(args),
        coverage_at_least=args.coverage_at_least if args.evidence else None,
        dtype=str(args.params_dtype).removeprefix("torch."),
        selection=args.emoe_selection,
        combine=args.emoe_combine,
        versions={name: installed(name) for name in LIBRARIES[model["framework"]]},
        data=SweepData(
            path=tuple(map(str, args.data_path or [])), tokens=args.max_eval_tokens, sequence_length=args.seq_length
        ),
        cells=(),
        command=own_command(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    result = resume(Path(args.out), header)
    return result if args.label or not result.cells else dataclasses.replace(result, label=load(args.out).label)


LIBRARIES = {"megatron": ("megatron-core", "torch"), "transformers": ("transformers", "torch")}
"""What a sweep's losses depend on, by framework; named in its file."""


def _check_any_k(args: Namespace) -> None:
    if not args.k and not args.k_per_layer:
        raise ValueError("--k is not given, nor --k-per-layer: which numbers of active experts?")
    if args.layer_sensitivity and not args.k:
        raise ValueError("--layer-sensitivity needs --k: the numbers of active experts to try in each layer")


def _check_ks(args: Namespace, num_moe_layers: int) -> None:
    """Every k' can run, and there is one for each layer where there should be."""
    from megatron_emoe.routing.transformer_config import check_ks

    _check_any_k(args)
    for ks in args.k_per_layer:
        if len(ks) != num_moe_layers:
            text = ",".join(map(str, ks))
            raise ValueError(f"--k-per-layer {text}: {len(ks)} numbers; the model has {num_moe_layers} MoE layers")
    check_ks(args, "--k", dict.fromkeys(args.k))
    check_ks(args, "--k-per-layer", dict.fromkeys(k for ks in args.k_per_layer for k in ks))


def _megatron(args: Namespace) -> dict[str, Any]:
    """What the header says of a Megatron checkpoint."""
    from megatron_emoe.model.checkpoint import iteration_of, locate, stored_args

    checkpoint = locate(args.load, args.ckpt_step)
    stored = stored_args(checkpoint)
    if not _training(stored) and args.emoe_tail_scale is None:
        say(f"--load {args.load}: no elastic settings in this checkpoint; it is swept as a model of plain top-k")
    return {
        "framework": "megatron",
        "checkpoint": args.load,
        "iteration": iteration_of(checkpoint),
        "k_train": stored.moe_router_topk,
        "training": _training(stored),
        "trained_tokens": getattr(stored, "consumed_train_samples", 0) * (stored.seq_length or 0) or None,
    }


def _training(stored: Namespace) -> dict[str, str]:
    """The elastic settings that a run stored and that shape its weights, as flags and their words."""
    defaults = {field.name: field.default for field in dataclasses.fields(ElasticConfig)}
    no_matter = ("emoe_seed", *ONLY_WATCHING, *MODEL_FEATURES)
    set_ones = {name: getattr(stored, name, old) for name, old in defaults.items() if name not in no_matter}
    words = {name: value for name, value in set_ones.items() if value != defaults[name]}
    return {flag(name): setting_words(value) for name, value in words.items()}


_NOT_IN_TRANSFORMERS = {
    "sft": False,
    "dataloader_inter_document_masking": False,
    "reset_position_ids": False,
    "reset_attention_mask": False,
    "emoe_selection": "topk",
}


def _hugging_face(args: Namespace) -> dict[str, Any]:
    """What the header says of a folder of transformers."""
    if args.world_size != 1:
        raise ValueError(f"--hf {args.hf}: transformers runs in one process, here are {args.world_size}: no torchrun")
    for name, plain in (_NOT_IN_TRANSFORMERS | {"emoe_combine": args.hf_combine}).items():
        if getattr(args, name) != plain:
            raise ValueError(f"{flag(name)} has no meaning with --hf: transformers runs the model by its own code")
    settings = args.hf_settings
    if settings is None:
        say(f"--hf {args.hf}: no elastic settings in its config.json; it is swept as a model of plain top-k")
    return {
        "framework": "transformers",
        "checkpoint": str(args.hf),
        "iteration": (settings or {}).get("iteration", 0),
        "k_train": args.moe_router_topk,
        "training": None if settings is None else _exported_training(settings),
    }


def _exported_training(settings: Mapping[str, Any]) -> dict[str, str]:
    """What the block "emoe" in config.json says of the training, as _training has it."""
    known = {flag(f"emoe_{key}"): settings.get(key) for key in ("selection", "pool_k", "k_schedule", "k_min", "k_max")}
    said = {name: str(value) for name, value in known.items() if value not in (None, "topk", "constant")}
    return said | ({flag("emoe_budget_scales"): ""} if settings.get(BUDGET_SCALES) else {})


def _tail_scale(args: Namespace) -> dict[str, float] | None:
    if args.emoe_tail_scale is None:
        return None
    return {str(k): scale for k, scale in parse_tail_scale(args.emoe_tail_scale).table}


def budgets(args: Namespace, result: SweepResult) -> list[Budget]:
    """Everything asked for, each once: --k, --k-per-layer, and with --layer-sensitivity its lists and k itself."""
    asked: list[Budget] = [*args.k, *args.k_per_layer]
    if args.layer_sensitivity:
        assert result.num_moe_layers is not None
        asked += [result.k_train, *sensitivity_budgets(args.k, result.k_train, result.num_moe_layers)]
    return list(dict.fromkeys(asked))


def unfinished(args: Namespace, result: SweepResult) -> list[Budget]:
    """The budgets without a cell, or without what --evidence, --agreement and --latency ask for."""
    fields = ["router_entropy"] * args.evidence + ["agreement"] * args.agreement + ["latency_ms_large"] * args.latency
    return missing_ks(result, budgets(args, result), fields)


def by_layer(k: Budget, layers: Sequence[int]) -> int | dict[int, int]:
    """One k' per MoE layer as a mapping from layer numbers, in which dense layers count."""
    return k if isinstance(k, int) else dict(zip(layers, k, strict=True))
