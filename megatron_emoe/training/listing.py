"""Megatron-Core prints all of its 900 arguments at every start: here those that are not the defaults."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron.training import arguments


@contextmanager
def short_listing(parser: ArgumentParser) -> Iterator[None]:
    """Inside, Megatron's list of arguments is of those that differ from the parser's defaults, with their number."""
    defaults: dict[str, Any] = {}
    for action in parser._actions:
        defaults.setdefault(action.dest, action.default)
    print_all = arguments._print_args

    def print_some(title: str, args: Namespace) -> None:
        others = {name: value for name, value in vars(args).items() if name not in defaults or value != defaults[name]}
        left = len(vars(args)) - len(others)
        print_all(f"{title} ({left} more have Megatron's defaults)", Namespace(**others))

    arguments._print_args = print_some
    try:
        yield
    finally:
        arguments._print_args = print_all
