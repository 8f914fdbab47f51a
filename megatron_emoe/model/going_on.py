"""A run that goes on from a checkpoint with its optimizer: what may differ from the stored run, and what that means.

Megatron-Core restores the optimizer's groups of parameters with all their settings, whatever the command line says, and
finds them by their learning rates. Its schedule is compared, by an assertion after the model is built. Nothing else is.
Each setting here is equal, or told, or refused with both values and the flag that allows it. Tried setting by setting
in host mode (tests/training/test_going_on.py).
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import Any

from megatron_emoe.settings.elastic_config import flag

OF_THE_OPTIMIZER = (
    *("optimizer", "bf16", "fp16", "use_distributed_optimizer", "lr", "min_lr", "decoupled_lr", "decoupled_min_lr"),
    *("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum"),
)
"""What the stored state of the optimizer has in it: the stored value stays, or the state cannot be loaded."""

TAKES_EFFECT = (
    *("global_batch_size", "micro_batch_size", "rampup_batch_size", "clip_grad"),
    *("data_path", "train_data_path", "valid_data_path", "test_data_path", "data_args_path", "split", "mock_data"),
    *("seed", "seq_length", "sft", "reset_position_ids", "reset_attention_mask", "eod_mask_loss"),
    *("tokenizer_type", "tokenizer_model", "attention_dropout", "hidden_dropout"),
    *("moe_router_load_balancing_type", "moe_aux_loss_coeff", "moe_z_loss_coeff", "moe_router_bias_update_rate"),
    *("moe_expert_capacity_factor", "moe_token_drop_policy", "moe_router_dtype", "moe_input_jitter_eps"),
)
"""What is read anew from the command line in every start."""

OVERRIDE, STORED = "--override-opt-param-scheduler", "--use-checkpoint-opt_param-scheduler"


def check_going_on(args: Namespace, stored: Namespace, source: str, report: Callable[[str], None]) -> None:
    """Compare a run that goes on with the stored one; `report` gets one line about what differs and takes effect.

    source: flag and folder of the checkpoint, for messages.

    Raises:
        ValueError: a setting that would be ignored or could not be loaded, with both values and what to give.
    """
    if args.no_load_optim:
        if args.use_checkpoint_opt_param_scheduler:
            raise ValueError(f"{STORED}: excludes --no-load-optim, with which the stored schedule is not read")
    elif not stored.no_save_optim:
        _refuse_of_the_optimizer(args, stored, source)
        _check_schedule(args, stored, source, report)
    changes = _changes(args, stored, TAKES_EFFECT)
    if changes:
        report(f"goes on from {source} with other settings, which take effect: {'; '.join(changes)}")


def _refuse_of_the_optimizer(args: Namespace, stored: Namespace, source: str) -> None:
    changes = _changes(args, stored, OF_THE_OPTIMIZER)
    if changes:
        raise ValueError(
            f"{'; '.join(changes)}: the state of the optimizer in {source} has its own; keep the stored value, or go "
            "on from the weights alone with --no-load-optim, or as a new run with --finetune"
        )


def _check_schedule(args: Namespace, stored: Namespace, source: str, report: Callable[[str], None]) -> None:
    """Schedules of learning rate and weight decay, as the core compares them: in samples."""
    changes = []
    for name, value in _SCHEDULE.items():
        old, new = value(stored), value(args)
        if old != new:
            changes.append(f"{name}: stored {old}, now {new}")
    if changes and args.override_opt_param_scheduler:
        report(f"the schedule changes, as {OVERRIDE} says: {'; '.join(changes)}")
    elif changes and args.use_checkpoint_opt_param_scheduler:
        report(f"the stored schedule stays, as {STORED} says: {'; '.join(changes)}")
    elif changes:
        raise ValueError(
            f"{'; '.join(changes)}: the schedule stored in {source} is another; give {OVERRIDE} for the new one, or "
            f"{STORED} for the stored one"
        )


def _changes(args: Namespace, stored: Namespace, names: tuple[str, ...]) -> list[str]:
    """'--flag: stored a, now b' of each that differs; a setting that the stored run did not know is none."""
    pairs = [(name, getattr(stored, name, _UNKNOWN), getattr(args, name, _UNKNOWN)) for name in names]
    return [
        f"{flag(name)}: stored {_words(old)}, now {_words(new)}"
        for name, old, new in pairs
        if _UNKNOWN not in (old, new) and old != new
    ]


_UNKNOWN = "unknown to that run"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _decay(args: Namespace) -> Any:
    if args.train_samples:
        return args.lr_decay_samples or args.train_samples
    return (args.lr_decay_iters or args.train_iters or 0) * args.global_batch_size


def _warmup(args: Namespace) -> Any:
    if args.lr_warmup_fraction is not None:
        return args.lr_warmup_fraction * _decay(args)
    return args.lr_warmup_samples if args.train_samples else args.lr_warmup_iters * args.global_batch_size


def _decay_of_weights(args: Namespace) -> Any:
    """Where weight decay grows; the core compares it where it does not, too."""
    return args.train_samples or (args.train_iters or 0) * args.global_batch_size


_SCHEDULE: dict[str, Callable[[Namespace], Any]] = {
    "--lr-decay-style": lambda args: args.lr_decay_style,
    "samples of warm-up (--lr-warmup-iters, -samples, -fraction)": _warmup,
    "samples of decay (--lr-decay-iters, -samples, or the run's length)": _decay,
    "--weight-decay": lambda args: args.start_weight_decay,
    "--end-weight-decay": lambda args: args.end_weight_decay,
    "--weight-decay-incr-style": lambda args: args.weight_decay_incr_style,
    "samples of the run (--train-iters, --train-samples)": _decay_of_weights,
}
