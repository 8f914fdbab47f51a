"""A command line before Megatron is imported, which takes ten seconds: help, version, and all that can be refused then.

For the programs that take Megatron's flags too. What only Megatron's parser knows is left to it (arguments.py), and the
elastic flags are made by the same code for both.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable
from dataclasses import fields

from megatron_emoe.host import flags as host_flags
from megatron_emoe.host import mode as host_mode
from megatron_emoe.settings import flag_files
from megatron_emoe.settings.baseline_rules import check_baseline_settings
from megatron_emoe.settings.command_line import HELP_ALL, Adder, CommandLine, command_line
from megatron_emoe.settings.elastic_config import ElasticConfig, elastic_settings, flag
from megatron_emoe.settings.elastic_rules import read_tail_scale, validate_elastic
from megatron_emoe.settings.field_flags import add_elastic_flags
from megatron_emoe.settings.flag_types import path_word
from megatron_emoe.settings.hf_folder import hf_folder
from megatron_emoe.settings.lora_rules import check_no_experts
from megatron_emoe.settings.paths import check_folder, same_folder
from megatron_emoe.settings.quiet import leave_out_noise
from megatron_emoe.settings.refusal import fail
from megatron_emoe.training.megatron_flags import refuse_unserved

_ALL_FLAGS = "All of Megatron-Core's flags work as well, and @FILE stands for the flags in FILE."


def look_at_training(text: str | None) -> None:
    """Look at this program's command line as that of a training run. text: its docstring.

    Raises:
        SystemExit: help or version was asked for (status 0), or something is refused (status 2, one line).
    """
    _look(text, lambda parser: parser, check_training)


def look_at_evaluation(text: str | None, add_own: Adder, check: Callable[[Namespace], None]) -> None:
    """The same for a program that evaluates --load. add_own: its own flags; check: raises ValueError for them."""

    def add_all(parser: ArgumentParser) -> ArgumentParser:
        add_own(parser).add_argument("--load", type=path_word, help="Folder of the Megatron checkpoint.")
        return parser

    def check_all(args: Namespace) -> None:
        check_source(args)
        check(args)

    _look(text, add_all, check_all)


def check_training_words(words: list[str]) -> None:
    """Look at the flags of a training run that another program was given; flag files are already read.

    Raises:
        SystemExit: status 2 after one line.
    """
    parser = CommandLine(add_help=False)
    _check(_add_shared(parser), words, check_training)


def _look(text: str | None, add_own: Adder, check: Callable[[Namespace], None]) -> None:
    leave_out_noise()
    try:
        words = flag_files.expand(sys.argv[1:])
    except ValueError as error:
        fail(error)
    if HELP_ALL in words:
        sys.argv[1:] = ["--help"]  # Megatron's parser answers
        return
    parser = command_line(text, epilog=_ALL_FLAGS)
    parser.add_argument(HELP_ALL, action="store_true", help="Print the help of Megatron-Core's flags too, and exit.")
    _check(_add_shared(add_own(parser)), words, check)


def _add_shared(parser: ArgumentParser) -> ArgumentParser:
    """The flags that every one of these programs takes, and those of Megatron that the first look reads."""
    add_elastic_flags(parser)
    host_mode.add_arguments(parser)
    taken = {option for action in parser._actions for option in action.option_strings}
    for name in {"--load", "--save", "--pretrained-checkpoint"} - taken:
        parser.add_argument(name, type=path_word, help=argparse.SUPPRESS)
    for name in ("--num-experts", "--moe-router-topk", "--moe-router-num-groups", "--moe-router-group-topk"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    for name in ("--finetune", "--use-checkpoint-args"):
        parser.add_argument(name, action="store_true", help=argparse.SUPPRESS)
    return parser


def _check(parser: ArgumentParser, words: list[str], check: Callable[[Namespace], None]) -> None:
    args, unknown = parser.parse_known_args(words)
    try:
        refuse_mistyped(unknown)
        if args.host_mode:
            host_flags.refuse_gpu_flags(words)
        refuse_unserved(words)
        if args.emoe_tail_scale is not None:
            read_tail_scale(args.emoe_tail_scale)
        check(args)
    except ValueError as error:
        fail(error)


def refuse_mistyped(words: Iterable[str]) -> None:
    """ValueError for the first word that looks like an elastic flag and is none, with the one that comes closest."""
    known = [flag(field.name) for field in fields(ElasticConfig)]
    for word in words:
        given = word.partition("=")[0]
        if given.startswith("--emoe"):
            (closest,) = difflib.get_close_matches(given.replace("_", "-"), known, n=1, cutoff=0)
            raise ValueError(f"{given}: no such flag; did you mean {closest}?")


def check_source(args: Namespace) -> None:
    """An evaluation has one model, and it is there as far as its folder tells (ValueError)."""
    hf = getattr(args, "hf", None)
    if hf is not None and args.load is not None:
        raise ValueError(f"--hf {hf} excludes --load {args.load}: one model at a time")
    if hf is not None:
        args.hf = str(hf_folder("--hf", hf))
    elif args.load is None:
        raise ValueError("--load is not given: which checkpoint?")
    else:
        check_folder("--load", args.load)


def check_training(args: Namespace) -> None:
    """What a training run's elastic settings must satisfy where the command line has the model's k and number of
    experts, and that --load is there (ValueError). A run that goes on where it saves may find nothing there yet."""
    if args.load is not None and (args.finetune or not same_folder(args.load, args.save)):
        check_folder("--load", args.load)
    model_k, num_experts = args.moe_router_topk, args.num_experts or args.emoe_lora_experts
    if not model_k or not num_experts or args.use_checkpoint_args:  # the checkpoint's may be others
        return
    check_no_experts(args)
    elastic = elastic_settings(args)
    groups = {"num_groups": args.moe_router_num_groups, "group_topk": args.moe_router_group_topk}
    validate_elastic(elastic, model_k=model_k, num_experts=num_experts, **groups)
    check_baseline_settings(elastic, model_k=model_k, num_experts=num_experts)
