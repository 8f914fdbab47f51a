"""From the command line to checked arguments: Megatron's flags plus the group "elastic MoE"."""

from __future__ import annotations

import argparse
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import parse_args, validate_args
from megatron.training.checkpointing import load_args_from_checkpoint
from megatron.training.global_vars import set_global_variables

from megatron_emoe import host_mode
from megatron_emoe.checkpoint import check_load
from megatron_emoe.data import check_data
from megatron_emoe.elastic_config import ElasticConfig
from megatron_emoe.transformer_config import elastic_config_from_args

_K_FLAG = "--moe-router-topk"


def add_arguments(parser: ArgumentParser) -> ArgumentParser:
    """Add the groups "elastic MoE" and "host mode"; flags, help and defaults come from the ElasticConfig fields."""
    ArgumentGroupFactory(ElasticConfig).build_group(parser, "elastic MoE")
    return host_mode.add_arguments(parser)


def parse(add_more: Callable[[ArgumentParser], ArgumentParser] | None = None, **defaults: object) -> Namespace:
    """Parse, complete and check the command line, then hand it to Megatron's globals.

    Everything that can be refused is refused before a folder, a log or a process group exists. add_more: flags of another
    entry point. defaults: Megatron's `args_defaults`.

    Raises:
        SystemExit: status 2 after one message on stderr (from rank 0).
    """
    args = parse_args(lambda parser: add_more(add_arguments(parser)) if add_more else add_arguments(parser))
    try:
        _complete(args, defaults)
        check_load(args, report=_say)
        check_data(args)
        elastic_config_from_args(args)
    except ValueError as error:
        if args.rank == 0:
            print(f"{os.path.basename(sys.argv[0])}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    set_global_variables(args)
    return args


def _complete(args: Namespace, defaults: dict) -> None:
    if args.yaml_cfg is not None:
        raise ValueError(f"--yaml-cfg {args.yaml_cfg}: elastic settings are flags; use a file of flags")
    if args.use_checkpoint_args:
        if args.load is None:
            raise ValueError("--use-checkpoint-args needs --load, which is not given")
        load_args_from_checkpoint(args)
        _keep_asked_k(args, sys.argv[1:])
    validate_args(args, defaults)


def _keep_asked_k(args: Namespace, argv: list[str]) -> None:
    """The core lets the stored k overwrite the one on the command line without a word; here the one asked for wins."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(_K_FLAG, type=int)
    asked = parser.parse_known_args(argv)[0].moe_router_topk
    if asked is not None and asked != args.moe_router_topk:
        _say(f"{_K_FLAG} {asked} as asked, although the checkpoint was saved with {args.moe_router_topk}")
        args.moe_router_topk = asked


def _say(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(message, flush=True)
