"""Elastic settings and a stored checkpoint: what it was trained with, and what may not differ when it is continued.

Megatron-Core stores the whole argument namespace, elastic flags included, in every checkpoint. It compares a fixed list
of them on load and knows nothing of ours; the checks here read that namespace before anything is built.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from megatron.core.dist_checkpointing import load_common_state_dict
from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename
from torch.distributed.checkpoint.api import CheckpointException

from megatron_emoe.model.going_on import check_going_on
from megatron_emoe.model.recovery import Recovery, damage, newest_whole, plan
from megatron_emoe.model.stored_files import looks_at_sizes
from megatron_emoe.model.stored_model import check_shape
from megatron_emoe.settings.elastic_config import MODEL_FEATURES, ONLY_WATCHING, ElasticConfig, elastic_settings, flag
from megatron_emoe.settings.k_schedule import trained_ks
from megatron_emoe.settings.paths import same_folder
from megatron_emoe.settings.tail_scale import TAIL_SCALE_FILE, tail_scale_words

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


def stored_args(checkpoint: Path, source: str = "--load", *, is_whole: bool = False) -> Namespace:
    """The arguments a torch_dist checkpoint was saved with. source: the flag that names it, for messages. is_whole: its
    files were looked at.

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
    if not is_whole and (what := damage(checkpoint)):
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
    --pretrained-checkpoint) is told old and new. A --save folder with another run's checkpoints is refused.

    Raises:
        ValueError: with flag, stored and given value.
    """
    _seen.clear()
    found = _source(args)
    _keep_other_runs(args)
    recovery = recovery_of(args)  # which may refuse a folder of damaged checkpoints alone: this run would start over
    if found is None:
        return
    source, folder, _ = found
    checkpoint = _located(args, found)
    try:
        looked_at = source == "--load" and recovery is not None and checkpoint.name != "release"
        stored = stored_args(checkpoint, source, is_whole=looked_at)
    except ValueError:
        if looks_at_sizes() or recovery is None:
            raise
        return  # the first rank of this machine says so, or goes on from another
    check_shape(args, stored, f"{source} {folder}")
    changes = elastic_changes(args, stored)
    if changes and not starts_anew(args):
        raise ValueError(
            f"{source} {folder}: elastic settings differ from the stored ones: {'; '.join(changes)}. "
            "Keep them to continue this run, or start a new one from its weights with --finetune"
        )
    check_budgets(args, stored, f"{source} {folder}")
    if not (starts_anew(args) or args.no_load_optim or stored.no_save_optim or checkpoint.name == "release"):
        check_layout(args, stored, f"{source} {folder}")
    if not starts_anew(args) and checkpoint.name != "release":
        check_going_on(args, stored, f"{source} {folder}", report)
    for change in changes:
        report(f"elastic setting changed: {change}")
    if getattr(stored, "emoe_budget_scales", False) and not args.emoe_budget_scales:
        report(f"{source} {folder}: its learned scales by budget are left out, so the loss at every k' is another one")


def check_budgets(args: Namespace, stored: Namespace, source: str) -> None:
    """ValueError where learned scales by budget would be taken for those of other k: they are stored by place. A run
    without them, from a checkpoint that has some, is told so as of every other setting."""
    if not (args.emoe_budget_scales and getattr(stored, "emoe_budget_scales", False)):
        return
    now, before = (trained_ks(elastic_settings(each), each.moe_router_topk) for each in (args, stored))
    if now != before:
        raise ValueError(
            f"{source}: has learned scales for k = {', '.join(map(str, before))}, this run trains "
            f"{', '.join(map(str, now))}: keep --emoe-k-schedule and its k, or leave out --emoe-budget-scales"
        )


def _keep_other_runs(args: Namespace) -> None:
    """ValueError where a run would save among checkpoints that it does not go on from: it would overwrite them one by
    one, and its first save would already lead the next start astray."""
    if args.save is None or args.skip_train or _restarts(args):
        return
    newest = newest_whole(Path(args.save))
    tracker = Path(get_checkpoint_tracker_filename(args.save))
    if newest is not None:
        raise ValueError(
            f"--save {args.save}: holds iteration {newest} of another run, which this one would overwrite: go on from "
            f"there with --load {args.save} (without --finetune), or name another folder"
        )
    if tracker.is_file() and tracker.read_text(errors="replace").strip() == "release":
        raise ValueError(f"--save {args.save}: holds a model to start from, which would be lost: name another folder")


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
    if not _restarts(args) or args.ckpt_step is not None or args.ckpt_format != "torch_dist":
        return None
    if args.load not in _seen:
        _seen[args.load] = plan(Path(args.load))  # whatever is there by now: every rank has to come to the same
    return _seen[args.load]


_seen: dict[str, Recovery] = {}
"""Folders that this process has looked at since the last check_load: each rank looks once at a start."""


def _located(args: Namespace, found: tuple[str, str, int | None]) -> Path:
    source, folder, step = found
    recovery = recovery_of(args) if source == "--load" else None
    if recovery is not None and recovery.iteration is not None:
        return recovery.checkpoint
    return locate(folder, step, source)


def _restarts(args: Namespace) -> bool:
    """Whether a run goes on in the folder that it saves to, where anything is saved there yet."""
    return same_folder(args.load, args.save) and not args.finetune


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


def elastic_changes(args: Namespace, stored: Namespace) -> list[str]:
    """Every elastic setting, and k, that differs from the stored run, as 'flag: stored a, now b'. Model features are
    no such settings (see check_shape).

    A checkpoint without elastic settings is one of plain top-k: the defaults.
    """
    changes = []
    for field in fields(ElasticConfig):
        old, new = getattr(stored, field.name, field.default), getattr(args, field.name)
        if old != new and field.name not in (*ONLY_WATCHING, *MODEL_FEATURES):
            changes.append(f"{flag(field.name)}: stored {old}, now {new}")
    if stored.moe_router_topk != args.moe_router_topk:
        changes.append(f"--moe-router-topk: stored {stored.moe_router_topk}, now {args.moe_router_topk}")
    return changes
