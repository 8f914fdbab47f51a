"""Elastic settings and a stored checkpoint: what it was trained with, and what may not differ when it is continued.

Megatron-Core stores the whole argument namespace, elastic flags included, in every checkpoint. It compares a fixed list
of them on load and knows nothing of ours; the checks here read that namespace before anything is built.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename
from torch.distributed.checkpoint.api import CheckpointException

from megatron_emoe.elastic_config import MODEL_FEATURES, ElasticConfig, flag
from megatron_emoe.recovery import Recovery, damage, newest_whole, plan
from megatron_emoe.tail_scale import TAIL_SCALE_FILE, tail_scale_words

_MEASURING_ONLY = {"emoe_eval_k", "emoe_coactivation_interval", "emoe_router_watch"}
SHAPE_FLAGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_layer_freq",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_layernorm",
    "add_qkv_bias",
    "position_embedding_type",
    "swiglu",
    "normalization",
    "untie_embeddings_and_output_weights",
    "moe_router_enable_expert_bias",
)
LAYOUT_FLAGS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)


def locate(folder: str, step: int | None = None, source: str = "--load") -> Path:
    """The newest checkpoint in `folder` (or that of iteration `step`), as a path to its iter_ folder.

    source: the flag that names the folder, for messages.

    Raises:
        ValueError: no such folder, no checkpoint in it, or not the one asked for.
    """
    tracker = Path(get_checkpoint_tracker_filename(folder))
    if not Path(folder).is_dir():
        raise ValueError(f"{source} {folder}: no such folder")
    if not tracker.is_file():
        raise ValueError(f"{source} {folder}: no checkpoint in it ({tracker.name} is missing)")
    newest = tracker.read_text(errors="replace").strip()
    if newest != "release" and not newest.isdecimal():
        raise ValueError(f"{source} {folder}: {tracker.name} holds {newest!r}, which is neither a number nor 'release'")
    release = newest == "release" and not step
    iteration = 0 if release else step or int(newest)
    path = Path(get_checkpoint_name(folder, iteration, release, return_base_dir=True))
    if not path.is_dir():
        named_by = "--ckpt-step" if step else tracker.name
        raise ValueError(f"{source} {folder}: {path.name} is missing, although {named_by} names it")
    return path


def iteration_of(checkpoint: Path) -> int:
    """The iteration after which the checkpoint in this iter_ folder was saved; 0 for a release or another folder."""
    return int(checkpoint.name.removeprefix("iter_")) if checkpoint.name.startswith("iter_") else 0


def stored_args(checkpoint: Path, source: str = "--load") -> Namespace:
    """The arguments a torch_dist checkpoint was saved with. source: the flag that names it, for messages.

    Raises:
        ValueError: the checkpoint is not torch_dist, or is damaged.
    """
    if not (checkpoint / ".metadata").is_file():
        raise ValueError(f"{source} {checkpoint}: not a torch_dist checkpoint (.metadata is missing)")
    try:
        stored = load_common_state_dict(checkpoint)["args"]
    except (Exception, CheckpointException) as error:  # a class for each kind of damage; torch's is no Exception
        reason = (str(error) or type(error).__name__).strip().splitlines()[-1]  # above it, torch's has the traceback
        raise ValueError(f"{source} {checkpoint}: not a readable torch_dist checkpoint ({reason})") from error
    if what := damage(checkpoint):
        raise ValueError(f"{source} {checkpoint}: damaged ({what})")
    return stored


def fitted_tail_scale(checkpoint: Path) -> list[str] | None:
    """The words of --emoe-tail-scale that were fitted to this checkpoint, or None where nothing was.

    Raises:
        ValueError: the file is damaged.
    """
    path = checkpoint / TAIL_SCALE_FILE
    if not path.is_file():
        return None
    try:
        return tail_scale_words({int(k): float(a) for k, a in json.loads(path.read_text())["tail_scale"].items()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{path}: not a table of the tail scale ({error}); fit it again or delete it") from error


def check_load(args: Namespace, report: Callable[[str], None] = print) -> None:
    """Check --load before anything is built: it exists, fits the model and the layout, and elastic settings go on.

    A first start with --load equal to --save and nothing saved yet is allowed: that is how a job that restarts itself
    is written. A continued run must keep its elastic settings; one that starts from another's weights (--finetune,
    --pretrained-checkpoint) is told old and new.

    Raises:
        ValueError: with flag, stored and given value.
    """
    found = _source(args)
    if found is None or found[0] != "--load":
        recovery_of(args)  # it may refuse a folder that holds damaged checkpoints alone: this run would start over
    if found is None:
        return
    source, folder, _ = found
    checkpoint = _located(args, found)
    stored = stored_args(checkpoint, source)
    check_shape(args, stored, f"{source} {folder}")
    changes = elastic_changes(args, stored)
    if changes and not starts_anew(args):
        raise ValueError(
            f"{source} {folder}: elastic settings differ from the stored ones: {'; '.join(changes)}. "
            "Keep them to continue this run, or start a new one from its weights with --finetune"
        )
    if not (starts_anew(args) or args.no_load_optim or stored.no_save_optim or checkpoint.name == "release"):
        check_layout(args, stored, f"{source} {folder}")
    for change in changes:
        report(f"elastic setting changed: {change}")


def checkpoint_to_load(args: Namespace) -> Path | None:
    """The checkpoint that a run with these arguments starts from; None: none (ValueError as in check_load)."""
    found = _source(args)
    return None if found is None else _located(args, found)


def recovery_of(args: Namespace) -> Recovery | None:
    """What a run that goes on where it was stopped (--load equal to --save) finds in that folder; None for other runs.

    Raises:
        ValueError: no checkpoint in it is whole.
        OSError: the folder cannot be read now.
    """
    goes_on = _restarts(args) and args.ckpt_step is None and args.ckpt_format == "torch_dist"
    return plan(Path(args.load)) if goes_on else None  # whatever is there by now: every rank has to come to the same


def _located(args: Namespace, found: tuple[str, str, int | None]) -> Path:
    source, folder, step = found
    recovery = recovery_of(args) if source == "--load" else None
    if recovery is not None and recovery.iteration is not None:
        return recovery.checkpoint
    return locate(folder, step, source)


def _restarts(args: Namespace) -> bool:
    return args.load is not None and args.load == args.save and not args.finetune


def starts_anew(args: Namespace) -> bool:
    """Whether a run with these arguments takes nothing but weights from a checkpoint (ValueError as in check_load)."""
    found = _source(args)
    return found is not None and (found[0] != "--load" or args.finetune)


def _source(args: Namespace) -> tuple[str, str, int | None] | None:
    """The flag that names the checkpoint to start from, the folder it names, and the iteration asked for."""
    if args.load is not None and (has_checkpoint(args.load) or not _restarts(args)):
        return "--load", args.load, args.ckpt_step
    if args.pretrained_checkpoint is not None:
        return "--pretrained-checkpoint", args.pretrained_checkpoint, None
    if args.finetune:
        raise ValueError("--finetune is given without --load: there is nothing to continue from")
    return None


def has_checkpoint(folder: str) -> bool:
    """Whether something was saved in `folder` (which need not exist)."""
    return Path(get_checkpoint_tracker_filename(folder)).is_file() or bool(newest_whole(Path(folder)))


def check_shape(args: Namespace, stored: Namespace, source: str) -> None:
    """ValueError for the first flag in which the checkpoint in `source` holds another model.

    A part of the stored model that this run leaves out counts too: the core would drop its weights without a word.
    """
    for name in (*SHAPE_FLAGS, *MODEL_FEATURES):
        old, new = shape_value(stored, name), shape_value(args, name)
        if old != new and (old is not None or name in MODEL_FEATURES):
            given = f"{flag(name)} is not given" if new is None else f"{flag(name)} {new}"
            saved = "without it" if old is None else f"with {old}"
            raise ValueError(f"{given}: the checkpoint in {source} was saved {saved}")


def check_layout(args: Namespace, stored: Namespace, source: str) -> None:
    """ValueError for the first flag in which a run's layout is one that cannot take the optimizer state in `source`.

    Tried in host mode: data-parallel ranks may change; the other sizes may where the state was stored by parameter,
    which the distributed optimizer does with --dist-ckpt-optim-fully-reshardable alone. But then too experts either
    have an optimizer of their own or they have not.
    """
    whole = not stored.use_distributed_optimizer or stored.dist_ckpt_optim_fully_reshardable
    if whole and experts_apart(stored) == experts_apart(args):
        return
    for name in LAYOUT_FLAGS:
        old, new = getattr(stored, name), getattr(args, name)
        if old != new:
            state = f"the optimizer state in {source} was saved with {old}, and this run cannot take it"
            raise ValueError(f"{flag(name)} {new}: {state}; keep the layout (jobs of slurm/: set EMOE_LAYOUT)")


def experts_apart(args: Namespace) -> bool:
    """Whether experts are spread over other ranks than the rest of a layer: Megatron gives them their own optimizer."""
    return args.expert_model_parallel_size > 1 or args.expert_tensor_parallel_size != args.tensor_model_parallel_size


def check_given(given: Mapping[str, Any], stored: Namespace, source: str) -> None:
    """ValueError for the first flag on an evaluation's command line in which the model in `source` is another.

    given: values by name. k counts too: past it the tail begins, and a result names it as the k of training.
    """
    for name in (*SHAPE_FLAGS, *MODEL_FEATURES, "moe_router_topk"):
        if name in given and given[name] != shape_value(stored, name):
            rule = f"the model in {source} has {shape_value(stored, name)}; leave the flag out"
            asks = " (--k asks for other numbers of active experts)" if name == "moe_router_topk" else ""
            raise ValueError(f"{flag(name)} {given[name]}: {rule}{asks}")


def shape_value(args: Namespace, name: str) -> Any:
    """Without --group-query-attention the number of query groups is the number of heads: the core writes that into its
    namespace, and so into checkpoints, when it first logs. A checkpoint without our flags has no feature of ours."""
    if name == "num_query_groups" and not getattr(args, "group_query_attention", True):
        return args.num_attention_heads
    return getattr(args, name, getattr(ElasticConfig, name, None))


# What a configuration field says about how a model runs, not which model it is: taken from the command line.
_RUNTIME = (
    *("recompute", "cuda_graph", "offload", "overlap", "fusion", "fp8", "fp4"),
    *("dispatcher", "moe_pad_expert", "init"),
)
_RUNTIME_FIELDS = {
    "attention_backend",
    "transformer_impl",
    "persist_layer_norm",
    "distribute_saved_activations",
    "deterministic_mode",
    "pipeline_model_parallel_layout",
    "moe_grouped_gemm",
    "moe_per_layer_logging",
    "attention_dropout",
    "hidden_dropout",
}
_MODEL_FLAGS = [
    "num_experts",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "use_rope_scaling",
    "rotary_seq_len_interpolation_factor",
    "add_position_embedding",
    "group_query_attention",
    "seq_length",
    "max_position_embeddings",
    "untie_embeddings_and_output_weights",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "tokenizer_type",
    "tokenizer_model",
    "vocab_file",
    "merge_file",
    "rope_type",
    "bf16",
    "fp16",
    "micro_batch_size",
    "multi_latent_attention",
    "mtp_num_layers",
]


def model_flags(stored: Namespace) -> dict[str, Any]:
    """What the checkpoint says about which model it holds, elastic settings included: name and stored value.

    The core's --use-checkpoint-args takes a fixed list that misses, among others, --qk-layernorm and --norm-epsilon;
    this is every field of the configuration except those about how to run it.
    """
    shape = {f.name for f in fields(MLATransformerConfig)} - {f.name for f in fields(ModelParallelConfig)}
    shape = {name for name in shape - _RUNTIME_FIELDS if not any(word in name for word in _RUNTIME)}
    names = [*sorted(shape), *_MODEL_FLAGS, *(f.name for f in fields(ElasticConfig))]
    return {name: getattr(stored, name) for name in names if hasattr(stored, name)}


def elastic_changes(args: Namespace, stored: Namespace) -> list[str]:
    """Every elastic setting, and k, that differs from the stored run, as 'flag: stored a, now b'. Model features are
    no such settings (see check_shape).

    A checkpoint without elastic settings is one of plain top-k: the defaults.
    """
    changes = []
    for field in fields(ElasticConfig):
        old, new = getattr(stored, field.name, field.default), getattr(args, field.name)
        if old != new and field.name not in (*_MEASURING_ONLY, *MODEL_FEATURES):
            changes.append(f"{flag(field.name)}: stored {old}, now {new}")
    if stored.moe_router_topk != args.moe_router_topk:
        changes.append(f"--moe-router-topk: stored {stored.moe_router_topk}, now {args.moe_router_topk}")
    return changes
