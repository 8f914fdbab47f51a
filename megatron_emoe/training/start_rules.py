"""What Megatron-Core finds only once the model or the data are built, or never: said before, by flag, value, rule."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path

from megatron.core.tensor_parallel import layers

from megatron_emoe.host import mode as host_mode
from megatron_emoe.settings.command_line import say
from megatron_emoe.settings.elastic_config import flag
from megatron_emoe.settings.paths import why_not_written

FORMAT = "torch_dist"
"""The one format of checkpoints that this package's conversion, recovery and evaluation read."""


def check_start(args: Namespace) -> None:
    """Refuse (ValueError) what would end a training run later. args: parsed, not yet completed by Megatron."""
    _check_length(args)
    _check_format(args)
    for name in ("save", "tensorboard_dir", "data_cache_path"):
        if getattr(args, name):
            check_folder_to_write(flag(name), getattr(args, name))
    check_cache(args)
    _check_wandb(args)
    tensor = args.tensor_model_parallel_size
    if tensor > 1 and args.num_experts and not args.sequence_parallel:
        raise ValueError(
            f"--tensor-model-parallel-size {tensor}: a model with experts needs --sequence-parallel with it"
        )
    if tensor > 1 and args.transformer_impl == "local" and args.normalization == "RMSNorm" and not host_mode.is_on():
        rule = "local layers have no --sequence-parallel with RMSNorm; it needs Transformer Engine"
        raise ValueError(f"--tensor-model-parallel-size {tensor}: {rule}")
    if args.padded_vocab_size and args.padded_vocab_size % tensor:
        raise ValueError(
            f"--tensor-model-parallel-size {tensor}: must divide --padded-vocab-size {args.padded_vocab_size}"
        )


def _check_length(args: Namespace) -> None:
    if args.skip_train:
        return
    for name in ("train_iters", "train_samples", "eval_interval", "micro_batch_size", "global_batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)} {value}: must be at least 1")
    if args.train_iters is None and args.train_samples is None:
        raise ValueError("--train-iters is not given, nor --train-samples: how long?")
    if args.lr is None:
        raise ValueError("--lr is not given: which learning rate?")
    unit = "iters" if args.train_iters else "samples"
    warmup = getattr(args, f"lr_warmup_{unit}")
    decay = getattr(args, f"lr_decay_{unit}") or getattr(args, f"train_{unit}")
    if warmup and warmup >= decay:
        raise ValueError(f"--lr-warmup-{unit} {warmup}: must be below the {decay} of --lr-decay-{unit}, or of the run")


def _check_format(args: Namespace) -> None:
    if args.ckpt_format != FORMAT and (args.save or args.load):
        raise ValueError(
            f"--ckpt-format {args.ckpt_format}: only {FORMAT} can be continued, evaluated and exported here"
        )


def check_folder_to_write(name: str, folder: str | Path) -> None:
    """A folder that is made where it is not there can be: what is there is a folder, and takes files (ValueError)."""
    there = Path(folder)
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{name} {folder}: {there} is a file; must be a folder")
    if why := why_not_written(there):
        raise ValueError(f"{name} {folder}: {there} cannot be written ({why})")


def _check_wandb(args: Namespace) -> None:
    project = getattr(args, "wandb_project", "")
    if not project:
        return
    if not args.wandb_exp_name:
        raise ValueError(f"--wandb-project {project}: needs --wandb-exp-name, the name of the run there")
    if not args.wandb_save_dir and not args.save:
        raise ValueError(f"--wandb-project {project}: needs --save or --wandb-save-dir, the folder for what it keeps")
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(f"--wandb-project {project}: needs the Python package 'wandb', which is not installed")


def check_cache(args: Namespace) -> None:
    """Megatron keeps the order of documents beside the data where no other folder is named (ValueError)."""
    prefixes = [word for word in args.data_path or [] if Path(f"{word}.idx").is_file()]
    if args.data_cache_path or args.mock_data:
        return
    for prefix in prefixes:
        if why_not_written(Path(prefix).parent):
            rule = "Megatron would write the order of its documents there; name a folder with --data-cache-path"
            raise ValueError(f"--data-path {prefix}: its folder cannot be written: {rule}")


def settle_accumulation(args: Namespace) -> None:
    """Switch the fused accumulation of gradients off where its kernel, a part of Apex, is not installed: it is
    Megatron's default, and ends the run when the output layer is built. Says so from the first rank."""
    if args.gradient_accumulation_fusion and not layers._grad_accum_fusion_available:
        args.gradient_accumulation_fusion = False
        say("--no-gradient-accumulation-fusion: Apex's fused_weight_gradient_mlp_cuda is not installed; same gradients")
