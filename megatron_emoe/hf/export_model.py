"""Megatron -> Hugging Face: a torch_dist checkpoint to safetensors, one group of tensors at a time."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, experts_in
from megatron_emoe.hf.budget_scales import STORED, stored_budget_table
from megatron_emoe.hf.companions import CARRIED, HF_FOLDER, copy_companions
from megatron_emoe.hf.config_file import with_floats
from megatron_emoe.hf.export_lora import export_lora, without_experts
from megatron_emoe.hf.output_folder import WORKERS, OutputFolder, in_parallel, state_of
from megatron_emoe.hf.pieces import Group, Layout
from megatron_emoe.hf.registry import architecture_of, read_config
from megatron_emoe.hf.safetensors_files import header, write_index, write_shard
from megatron_emoe.hf.served import served
from megatron_emoe.hf.serving_lines import serving_lines
from megatron_emoe.hf.torch_dist import TorchDistReader
from megatron_emoe.model.checkpoint import fitted_tail_scale, iteration_of, locate, stored_args
from megatron_emoe.model.stored_model import SHAPE_FLAGS, shape_value
from megatron_emoe.settings.budget_table import KEY
from megatron_emoe.settings.elastic_config import flag
from megatron_emoe.settings.flag_files import flag_words
from megatron_emoe.settings.hf_folder import read_config_json
from megatron_emoe.training.arguments import stored_form

# What decides, beside the shape of the weights, what the model computes. A config.json must say the same.
_COMPUTES = (
    *("layernorm_epsilon", "add_bias_linear", "softmax_type", "mtp_num_layers"),
    *("rotary_base", "rotary_percent", "rotary_interleaved", "rotary_seq_len_interpolation_factor", "use_rope_scaling"),
    *("rope_scaling_factor", "use_mup", "mup_embedding_mult", "mup_output_mult", "mup_base_head_dim"),
    *("rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim"),
    *("qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "emoe_combine"),
    *("moe_router_pre_softmax", "moe_router_score_function", "moe_router_topk_scaling_factor"),
    *("moe_router_num_groups", "moe_router_group_topk", "moe_shared_expert_gate", "moe_expert_capacity_factor"),
)
_FLAGS = {"layernorm_epsilon": "--norm-epsilon", "add_bias_linear": "--disable-bias-linear: add_bias_linear"}


def export_model(
    megatron: Path,
    out: Path,
    *,
    k: int | None = None,
    k_per_layer: Sequence[int] | None = None,
    step: int | None = None,
    hf_config: Path | None = None,
    measured: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
    workers: int = WORKERS,
    report: Callable[[str], None] = print,
) -> None:
    """Write a Megatron checkpoint as a Hugging Face model to the new folder `out`.

    The newest checkpoint in the folder `megatron`, or that of iteration `step`, saved in any parallel layout. Weights
    keep the type they are stored in. config.json, tokenizer and carried tensors come from `megatron`/hf, or from
    `hf_config`, a folder with the original model's config.json. k: num_experts_per_tok to write, by default the k in
    training. k_per_layer: a k' for each layer with experts, for servers that can have it. measured: what is known of
    the model's k' beside what is stored, given the block "emoe" of config.json (see sweep.exported); it goes into that
    block. Of a model with low-rank experts these alone are written (export_lora).

    Raises:
        ValueError: a checkpoint that is missing, damaged, or another model than config.json says; k out of range; an
            output that cannot be written. Nothing is left behind.
    """
    checkpoint = locate(str(megatron), step, "--megatron")
    args = stored_args(checkpoint, "--megatron")
    _check_selection(args)
    companions = _companions(megatron, hf_config)
    config = read_config(companions)
    architecture = architecture_of(config)
    if getattr(args, "emoe_lora_experts", None) is not None:
        _refuse_k(k, k_per_layer)
        check_same_model(architecture, config, without_experts(args), companions)
        settings = elastic_settings(args, checkpoint)
        if table := stored_budget_table(TorchDistReader(checkpoint), args):
            settings[KEY] = table.as_json()
        settings |= measured(settings) if measured is not None else {}
        export_lora(checkpoint, args, config, settings, out, report)
        return
    check_same_model(architecture, config, args, companions)
    k = _asked_k(config, args, k, k_per_layer)
    reader = TorchDistReader(checkpoint)
    groups = architecture.groups(config)
    layout = architecture.layout(config, stacked=not any(key.startswith("decoder.layers.0.") for key in reader.tensors))
    _check_tensors(reader, groups, layout, config)
    settings = {}
    if not architecture.dense:
        settings = elastic_settings(args, checkpoint)
        if table := stored_budget_table(reader, args):
            settings[KEY] = table.as_json()
        settings |= measured(settings) if measured is not None else {}
        settings |= served(args, settings, config, k_per_layer)
    state = state_of([*checkpoint.glob("*"), companions / "config.json"])
    with OutputFolder(out).making({"files": state, "k": k, "settings": settings, "to": "safetensors"}) as folder:
        carried = _carried(companions)
        folder.check_space(_total(groups, layout, reader) + sum(carried.values()) + (16 << 20))
        _write_shards(folder, reader, groups, layout, companions if carried else None, carried, architecture, workers)
        copy_companions(companions, folder.path)
        _write_config(folder.path, reader, {architecture.k_key: k, "emoe": settings} if settings else {})
    if k is None:
        report(f"{out}: {config.model_type}, dense")
        return
    report(f"{out}: {config.model_type}, {architecture.k_key} {k}")
    for line in serving_lines(out, architecture, settings, experts_in(config), k):
        report(line)


def _asked_k(config: PretrainedConfig, args: Namespace, k: int | None, k_per_layer: Sequence[int] | None) -> int | None:
    """The k to write into config.json; None for a dense model, which is asked for none (ValueError)."""
    experts = experts_in(config)
    if not experts:
        for name, given in (("--k", k), ("--k-per-layer", k_per_layer)):
            if given is not None:
                words = given if isinstance(given, int) else ",".join(map(str, given))
                raise ValueError(f"{name} {words}: a {config.model_type} has no experts, and so no k'")
        return None
    k = args.moe_router_topk if k is None else k
    if not 1 <= k <= experts:
        raise ValueError(f"--k {k}: must lie in [1, {experts}], the number of experts")
    return k


def _refuse_k(k: int | None, k_per_layer: Sequence[int] | None) -> None:
    """ValueError for a k' where low-rank experts are exported: whoever loads them says it."""
    for name, given in (("--k", k), ("--k-per-layer", k_per_layer)):
        if given is not None:
            words = given if isinstance(given, int) else ",".join(map(str, given))
            raise ValueError(
                f"{name} {words}: low-rank experts are exported without a k', which the model is told later"
            )


def _check_selection(args: Namespace) -> None:
    """ValueError for a selection that goes on in evaluation and that a Hugging Face model would replace by top-k."""
    selection = getattr(args, "emoe_selection", "topk")
    if selection in ("top-p", "null-experts"):
        raise ValueError(
            f"--emoe-selection {selection}: the checkpoint was trained with it, and in a Hugging Face model of this "
            "kind every token has the same number of experts"
        )


def _companions(megatron: Path, hf_config: Path | None) -> Path:
    if hf_config is not None:
        return hf_config
    folder = megatron / HF_FOLDER
    if not folder.is_dir():
        raise ValueError(
            f"--megatron {megatron}: has no folder {HF_FOLDER} with the original config.json and tokenizer; "
            "name the folder of the original model with --hf-config"
        )
    return folder


def check_same_model(
    architecture: Architecture,
    config: PretrainedConfig,
    args: Namespace,
    companions: Path,
    names: Sequence[str] = (*SHAPE_FLAGS, *_COMPUTES),
) -> None:
    """ValueError for the first flag of `names` in which the checkpoint is another model than config.json says."""
    if config.dtype is None:
        config.dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else torch.float32
    expected = stored_form(flag_words(architecture.flags(config)))
    for name in names:
        stored, asked = _value(args, name), _value(expected, name)
        if stored != asked:
            raise ValueError(
                f"{_FLAGS.get(name, flag(name))} {stored}: the checkpoint was trained with it, "
                f"{companions / 'config.json'} means {asked}"
            )


def _value(args: Namespace, name: str) -> Any:
    """A setting in a form that two commands for the same model share."""
    every = args.moe_layer_freq
    layers = [int(n % every == 0) for n in range(args.num_layers)] if isinstance(every, int) else every
    layers = layers if args.num_experts else [0] * args.num_layers
    if name == "moe_layer_freq":
        return layers
    if name == "ffn_hidden_size" and all(layers):
        return None  # no layer has this width
    assert hasattr(args, name), name
    return shape_value(args, name)


def _check_tensors(reader: TorchDistReader, groups: list[Group], layout: Layout, config: PretrainedConfig) -> None:
    """ValueError for a tensor that is missing, or one that this architecture has no place for."""
    places = [layout.place(piece) for group in groups for piece in group.pieces]
    known = {place.key for place in places}
    for place in places:
        if place.key not in reader.tensors:
            raise ValueError(f"{reader.folder}: {place.key} is missing")
    for key in reader.tensors:
        if key.endswith(("router.noise_weight", STORED)):
            continue  # of noisy top-k, which has noise in training alone; in config.json
        if key.startswith(("decoder.", "embedding.", "output_layer.", "mtp.")) and key not in known:
            raise ValueError(f"{reader.folder}: holds {key}, for which {config.model_type} has no place")


def elastic_settings(args: Namespace, checkpoint: Path) -> dict[str, Any]:
    """The block "emoe" of config.json: how the model was trained, and at which k' it was evaluated."""
    return {
        "k_train": args.moe_router_topk,
        "iteration": iteration_of(checkpoint),
        "selection": getattr(args, "emoe_selection", "topk"),
        "pool_k": getattr(args, "emoe_pool_k", None),
        "k_schedule": getattr(args, "emoe_k_schedule", "constant"),
        "k_min": getattr(args, "emoe_k_min", None),
        "k_max": getattr(args, "emoe_k_max", None),
        "evaluated_k": sorted(getattr(args, "emoe_eval_k", None) or []),
        "tail_scale": fitted_tail_scale(checkpoint) or getattr(args, "emoe_tail_scale", None),
    }


def _carried(companions: Path) -> dict[str, int]:
    """Names and bytes of the tensors that are only carried along."""
    if not (companions / CARRIED).is_file():
        return {}
    return {stored.name: stored.bytes for stored in header(companions / CARRIED)}


def _total(groups: list[Group], layout: Layout, reader: TorchDistReader) -> int:
    return sum(_bytes(group, layout, reader) for group in groups)


def _bytes(group: Group, layout: Layout, reader: TorchDistReader) -> int:
    return sum(
        torch.Size(piece.chunk_shape).numel() * reader.tensors[layout.place(piece).key].properties.dtype.itemsize
        for piece in group.pieces
    )


def _write_shards(
    folder: OutputFolder,
    reader: TorchDistReader,
    groups: list[Group],
    layout: Layout,
    companions: Path | None,
    carried: Mapping[str, int],
    architecture: Architecture,
    workers: int,
) -> None:
    """One file for each group, and one for what is carried."""
    count = len(groups) + (companions is not None)
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    with tqdm(total=_total(groups, layout, reader), desc="export", unit="B", unit_scale=True) as bar:
        bar.update(sum(_bytes(group, layout, reader) for group in groups if group.name in folder.done))

        def convert(file: str, group: Group) -> None:
            chunks = reader.read([layout.place(piece) for piece in group.pieces])
            tensors: dict[str, Tensor] = {}
            for piece, chunk in zip(group.pieces, chunks, strict=True):
                unpacked = piece.transform.unpack(chunk.reshape(piece.chunk_shape), [shape for _, shape in piece.hf])
                tensors.update(zip([name for name, _ in piece.hf], unpacked, strict=True))
            tensors = architecture.on_disk(tensors)
            write_shard(tensors, folder.path / file)
            folder.finished(group.name, {name: tensor.nbytes for name, tensor in tensors.items()})
            bar.update(_bytes(group, layout, reader))

        calls = [(file, group) for file, group in zip(names, groups, strict=False) if group.name not in folder.done]
        in_parallel(convert, calls, workers)
    shards = {file: folder.done[group.name] for file, group in zip(names, groups, strict=False)}
    if companions is not None:
        shutil.copyfile(companions / CARRIED, folder.path / names[-1])
        shards[names[-1]] = dict(carried)
    write_index(shards, folder.path)


def _write_config(folder: Path, reader: TorchDistReader, changes: Mapping[str, Any]) -> None:
    """config.json as it was, with k, the elastic settings, and the type of the weights."""
    path = folder / "config.json"
    raw = with_floats(read_config_json(folder))
    key = "torch_dtype" if "torch_dtype" in raw else "dtype"
    dtype = reader.tensors["embedding.word_embeddings.weight"].properties.dtype
    raw[key] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(raw | dict(changes), indent=2) + "\n")
