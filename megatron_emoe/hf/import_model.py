"""Hugging Face -> Megatron: safetensors to a torch_dist checkpoint, one group of tensors at a time."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, Flags
from megatron_emoe.hf.companions import CARRIED, copy_companions
from megatron_emoe.hf.output_folder import WORKERS, OutputFolder, in_parallel, state_of
from megatron_emoe.hf.pieces import Group, Layout, Piece
from megatron_emoe.hf.registry import architecture_of, read_config
from megatron_emoe.hf.safetensors_files import SafetensorsFolder, write_shard
from megatron_emoe.hf.torch_dist import COMMON_STATE, TorchDistWriter, without_checksums
from megatron_emoe.settings.budget_table import KEY
from megatron_emoe.settings.companion_folder import HF_FOLDER, has_tokenizer
from megatron_emoe.settings.flag_files import flag_file, flag_words
from megatron_emoe.settings.hf_folder import read_config_json
from megatron_emoe.training.arguments import stored_form

FLAG_FILE = "model.args"
_IGNORED = ("rotary_emb.inv_freq",)  # old releases saved this buffer; it follows from the configuration


def import_model(
    hf: Path,
    out: Path,
    *,
    workers: int = WORKERS,
    verify: Callable[[Path, Path], None] | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Write the Hugging Face model in `hf` as a Megatron checkpoint to the new folder `out`.

    out gets release/ (torch_dist: any parallel layout, local and Transformer Engine layers), model.args (a flag file
    for pretrain_emoe.py) and hf/ (configuration, tokenizer, and tensors that are only carried along). At most `workers`
    groups of tensors (a decoder layer, say) are in memory at a time. An interrupted import goes on where it stopped.

    verify: called with `hf` and the finished release folder before `out` appears; its ValueError stops the import.

    Raises:
        ValueError: an input that is missing, damaged, contradictory or not supported, or an output that cannot be
            written: path, value, rule. Nothing is left behind.
    """
    config = read_config(hf)
    architecture = architecture_of(config)
    _refuse_budget_scales(hf, config)
    source = SafetensorsFolder(hf)
    groups = architecture.groups(config)
    carried = check_tensors(source, architecture, config, groups)
    flags = model_flags(architecture, config, source)
    inputs = {"files": state_of([hf / "config.json", *source.files.values()]), "flags": flags, "to": "torch_dist"}
    folder = OutputFolder(out)
    with folder.making(inputs):
        folder.check_space(_needed(source))
        balancing = architecture.balancing(config)
        tokenizer = _write_companions(folder.path, hf, out, source.read(carried), flags, balancing)
        words = flag_words({**flags, **tokenizer})
        _write_release(folder, source, groups, architecture.layout(config), _stored(config, words), workers)
        if verify is not None:
            verify(hf, folder.path / "release")
        (folder.path / "latest_checkpointed_iteration.txt").write_text("release")
    report(f"{out}: {sum(map(_parameters, groups)):,} parameters, {config.model_type}")
    report(f"flags of this model, for pretrain_emoe.py @{out / FLAG_FILE}:")
    report((out / FLAG_FILE).read_text().rstrip())
    tail = _block(config).get("tail_scale")
    if tail:
        report(f"tail scale {' '.join(tail)}: of config.json's block emoe; evaluations of {out} use it")
    for line in [] if architecture.dense else said_of_balancing(hf, architecture.balancing_key, balancing):
        report(line)


def said_of_balancing(hf: Path, key: str, balancing: Flags) -> Iterator[str]:
    """What a person has to know of load balancing where config.json itself does not name its weight, or it is 0."""
    named = key in read_config_json(hf)
    if not balancing:
        yield (
            f"config.json: {key} is {'0' if named else 'not there'}, so these flags balance no experts: to train with "
            "a loss that does, give --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff X"
        )
    elif not named:
        yield f"config.json: {key} is not there; --moe-aux-loss-coeff follows from transformers' default"


def check_tensors(
    source: SafetensorsFolder, architecture: Architecture, config: PretrainedConfig, groups: list[Group]
) -> list[str]:
    """Names of tensors to carry along; ValueError for missing, superfluous and misshapen ones."""
    expected = {name: shape for group in groups for name, shape in group.hf_tensors().items()}
    source.check_shapes(expected, source.folder / "config.json")
    carried = [name for name in source.tensors if architecture.carried and name.startswith(architecture.carried)]
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for name, stored in source.tensors.items():
        if name not in expected and name not in carried and name not in tied and not name.endswith(_IGNORED):
            raise ValueError(f"{stored.file}: {name} is not a tensor of {config.model_type} as config.json has it")
    if tied & source.tensors.keys():
        _check_tied(source)
    return carried


def _check_tied(source: SafetensorsFolder) -> None:
    """A head that is stored although it is tied must be the embedding, or one of the two would be lost."""
    names = ["lm_head.weight", "model.embed_tokens.weight"]
    head, embedding = source.read(names).values()
    if not torch.equal(head, embedding):
        raise ValueError(f"{source.folder}: config.json ties {names[0]} to {names[1]}, and they differ")


def model_flags(architecture: Architecture, config: PretrainedConfig, source: SafetensorsFolder) -> Flags:
    """The model's flags. Where config.json names no type, the embedding's counts; the vocabulary is not padded."""
    if config.dtype is None:
        config.dtype = source.tensors["model.embed_tokens.weight"].dtype
    return {**architecture.flags(config), "padded_vocab_size": config.vocab_size}


def arguments_of(hf: Path) -> tuple[Namespace, dict[str, Any] | None]:
    """The arguments that an import of the model in `hf` would store, and the block "emoe" that an export left in
    config.json (None: none). The k of training and the tail scale are taken from that block.

    Raises:
        ValueError: as `import_model`, for what is read: config.json and the headers of the tensors.
    """
    config = read_config(hf)
    flags = model_flags(architecture_of(config), config, SafetensorsFolder(hf))
    return _stored(config, flag_words({**flags, **tokenizer_flags(hf, hf)})), getattr(config, "emoe", None)


def _stored(config: PretrainedConfig, words: list[str]) -> Namespace:
    """The arguments to store for these flags, with the tail scale that an export left in config.json."""
    stored = stored_form(words)
    if tail := _block(config).get("tail_scale"):
        stored.emoe_tail_scale = list(tail)
    return stored


def _block(config: PretrainedConfig) -> dict[str, Any]:
    """What an export left in config.json; {}: it is of another origin."""
    return getattr(config, "emoe", None) or {}


def _refuse_budget_scales(hf: Path, config: PretrainedConfig) -> None:
    """An import would lose them, and the model would be another one."""
    if _block(config).get(KEY):
        raise ValueError(
            f"{hf}/config.json: emoe.{KEY}: learned scales by budget cannot be imported; take the Megatron checkpoint "
            "that it was exported from, or delete the key to import the model without them"
        )


def _parameters(group: Group) -> int:
    """Parameters in a group; ERNIE's selection bias is none."""
    return sum(torch.Size(piece.chunk_shape).numel() for piece in group.pieces if not piece.fp32)


def _needed(source: SafetensorsFolder) -> int:
    """Bytes on disk: the tensors, a kilobyte of wrapping for each, and 16 MB."""
    return sum(stored.bytes + 2048 for stored in source.tensors.values()) + (16 << 20)


def _write_release(
    folder: OutputFolder,
    source: SafetensorsFolder,
    groups: list[Group],
    layout: Layout,
    args: Namespace,
    workers: int,
) -> None:
    release = folder.path / "release"
    release.mkdir(exist_ok=True)
    writer = TorchDistWriter(release)
    for group in groups:
        _declare(writer, group, layout, source)
    total = sum(_bytes(group, source) for group in groups)
    with tqdm(total=total, desc="import", unit="B", unit_scale=True, unit_divisor=1024) as bar:
        bar.update(sum(_bytes(group, source) for group in groups if group.name in folder.done))

        def convert(number: int, group: Group) -> None:
            results = writer.write(number, *_contents(group, layout, source))
            folder.finished(group.name, results)
            bar.update(_bytes(group, source))

        todo = [(n, group) for n, group in enumerate(groups) if group.name not in folder.done]
        with without_checksums():
            in_parallel(convert, todo, workers)
    common = {"args": args, "checkpoint_version": 3.0, "iteration": 0, **_CONTENT}
    writer.declare_object(COMMON_STATE)
    results = [result for group in groups for result in folder.done[group.name]]
    writer.finish(results + writer.write(len(groups), [], {COMMON_STATE: common}))


# What the core notes of its sharding, in the state that does not depend on ranks; there is no optimizer in here.
_CONTENT = {"content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}}


def _declare(writer: TorchDistWriter, group: Group, layout: Layout, source: SafetensorsFolder) -> None:
    for piece in group.pieces:
        writer.declare(layout.place(piece), _dtype(piece, source))
        extra = layout.extra_state(piece)
        if extra is not None:
            writer.declare_object(extra)


def _contents(group: Group, layout: Layout, source: SafetensorsFolder) -> tuple[list[Any], dict[str, None]]:
    """Chunks and objects of a group. Tensors are mapped into memory; they come from the disk as they are written."""
    tensors = source.read(group.hf_tensors())
    chunks = [
        (layout.place(piece), _dtype(piece, source), partial(_pack, piece, tensors, _dtype(piece, source)))
        for piece in group.pieces
    ]
    extra = [layout.extra_state(piece) for piece in group.pieces]
    return chunks, {key: None for key in extra if key is not None}


def _pack(piece: Piece, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
    return piece.transform.pack([tensors[name] for name, _ in piece.hf], piece.chunk_shape).to(dtype)


def _dtype(piece: Piece, source: SafetensorsFolder) -> torch.dtype:
    """The widest type among a piece's tensors: nothing is rounded."""
    dtypes = [source.tensors[name].dtype for name, _ in piece.hf]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return torch.promote_types(dtype, torch.float32) if piece.fp32 else dtype


def _bytes(group: Group, source: SafetensorsFolder) -> int:
    return sum(source.tensors[name].bytes for name in group.hf_tensors())


def _write_companions(
    folder: Path, hf: Path, out: Path, carried: Mapping[str, Tensor], flags: Flags, balancing: Flags
) -> Flags:
    """hf/ with everything but the weights, and the flag file. Returns the tokenizer's flags."""
    kept = folder / HF_FOLDER
    kept.mkdir(exist_ok=True)
    copy_companions(hf, kept)
    if carried:
        write_shard({name: tensor.clone() for name, tensor in carried.items()}, kept / CARRIED)
    tokenizer = tokenizer_flags(kept, out / HF_FOLDER)
    beside = {"tokenizer_model": f"./{HF_FOLDER}"} if "tokenizer_model" in tokenizer else {}  # the folder may be moved
    (folder / FLAG_FILE).write_text(flag_file(flags, tokenizer | beside, balancing))
    return tokenizer


def tokenizer_flags(folder: Path, name: Path) -> Flags:
    """Flags of the tokenizer in `folder`, which will be called `name`; none where it has no tokenizer."""
    if not has_tokenizer(folder):
        return {"tokenizer_type": "NullTokenizer"}
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(name.resolve())}
