"""What the settings of low-rank experts must satisfy, and the one place that makes a dense model's flags theirs."""

from __future__ import annotations

from argparse import Namespace

from megatron_emoe.settings.command_line import say
from megatron_emoe.settings.elastic_config import ElasticConfig, flag


def check_lora_settings(elastic: ElasticConfig) -> None:
    """ValueError, with flag, value and rule, for the first setting of low-rank experts that cannot hold. Pure."""
    experts, alpha = elastic.emoe_lora_experts, elastic.emoe_lora_alpha
    for name in ("emoe_lora_rank", "emoe_lora_alpha"):
        if getattr(elastic, name) is not None and experts is None:
            _refuse(name, getattr(elastic, name), "needs --emoe-lora-experts, which is not given")
    if experts is not None and experts < 2:
        _refuse("emoe_lora_experts", experts, "must be at least 2")
    if elastic.lora_rank < 1:
        _refuse("emoe_lora_rank", elastic.lora_rank, "must be at least 1")
    if alpha is not None and not 0 < alpha < float("inf"):
        _refuse("emoe_lora_alpha", alpha, "must be a finite number above 0")


def settle_experts(args: Namespace) -> None:
    """Give a model with low-rank experts their number as its number of experts, which Megatron-Core's routers, losses
    and logs read. args: parsed, not yet completed by Megatron.

    Raises:
        ValueError: the model has experts of its own.
    """
    experts = args.emoe_lora_experts
    if experts is None:
        return
    check_no_experts(args)
    args.num_experts = experts
    args.moe_ffn_hidden_size = args.ffn_hidden_size  # nothing reads it; Megatron would set it to this, with a warning
    for name, (value, unset) in _LEFT_OUT.items():
        if getattr(args, name) == value:
            setattr(args, name, unset)
            say(
                f"{flag(name)}{'' if value is True else f' {value}'}: left out; low-rank experts are two dense products"
            )


_LEFT_OUT: dict[str, tuple[object, object]] = {
    "moe_grouped_gemm": (True, False),
    "moe_token_dispatcher_type": ("alltoall", "allgather"),
}
"""How experts run, which files of flags for all models say: value -> Megatron's default."""


def check_no_experts(args: Namespace) -> None:
    """ValueError where --num-experts stands beside --emoe-lora-experts: experts of a dense model's are all there are.

    A checkpoint of such a model has the same number for both.
    """
    experts, own = args.emoe_lora_experts, args.num_experts
    if experts is not None and own not in (None, experts):
        rule = "low-rank experts are for a dense model; leave one of the two out"
        raise ValueError(f"{flag('emoe_lora_experts')} {experts} cannot be combined with --num-experts {own}: {rule}")


def _refuse(name: str, value: object, rule: str) -> None:
    raise ValueError(f"{flag(name)} {value}: {rule}")
