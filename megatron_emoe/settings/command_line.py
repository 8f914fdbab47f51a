"""argparse as every program here uses it: --version, no abbreviated flags, and what is refused is one line."""

import argparse
import difflib
import importlib.metadata
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from megatron_emoe.settings.refusal import fail

Adder = Callable[[argparse.ArgumentParser], argparse.ArgumentParser]
"""Adds flags to a parser and returns it."""

HELP_ALL = "--help-all"
"""Asks for the help of Megatron's flags too."""

_OWN_WORDS = (
    (r"argument (\S+): invalid int value: '(.*)'", r"\1 \2: must be a whole number"),
    (r"argument (\S+): invalid float value: '(.*)'", r"\1 \2: must be a number"),
    (r"argument (\S+): invalid choice: '(.*)' \(choose from (.*)\)", r"\1 \2: must be one of \3"),
    (r"argument (\S+): (expected .*|ignored .*|not allowed .*)", r"\1: \2"),
    (r"argument (\S+): (.*)", r"\1 \2"),  # of a function of flag_types.py, which begins with the value
)
"""argparse's messages -> flag, value and rule, as all other refusals here."""


class CommandLine(argparse.ArgumentParser):
    """A parser whose help is said by the first rank alone, and whose refusals end the program by fail()."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"allow_abbrev": False} | settings)

    def error(self, message: str) -> NoReturn:
        """End with status 2 and one line."""
        fail(in_own_words(message, self))

    def print_help(self, file: Any = None) -> None:
        """One help text is enough."""
        if is_first_rank():
            super().print_help(file)


def in_own_words(message: str, parser: argparse.ArgumentParser) -> str:
    """What argparse's error says as flag, value and rule; of an unknown flag, which of the parser's comes closest."""
    for pattern, words in _OWN_WORDS:
        if re.fullmatch(pattern, message, re.DOTALL):
            return re.sub(pattern, words, message, flags=re.DOTALL)
    if found := re.match(r"unrecognized arguments: (--[^\s=]+)", message):
        close = difflib.get_close_matches(found[1], parser._option_string_actions, n=1)
        return message + (f"; did you mean {close[0]}?" if close else "")
    return message


def command_line(text: str | None, *, epilog: str | None = None) -> CommandLine:
    """The parser of a program, with --version. text: the program's docstring, printed as it stands."""
    shape = argparse.RawDescriptionHelpFormatter
    parser = CommandLine(description=text, epilog=epilog, formatter_class=shape)
    parser.add_argument("--version", action=_Version)
    return parser


def is_first_rank() -> bool:
    """Whether this process is the one that speaks for all of torchrun's."""
    return os.environ.get("RANK", "0") == "0"


SAID: list[str] = []
"""The lines of say() so far: a program that hides what is printed can still show them."""


def say(message: str) -> None:
    """Print a line from the first rank."""
    if is_first_rank():
        SAID.append(message)
        print(message, flush=True)


def version_line(program: str) -> str:
    """`program (megatron_emoe 1.0.0, megatron-core 0.19.2, torch 2.14.1)`, as installed; nothing is imported."""
    parts = {"megatron_emoe": "megatron-emoe", "megatron-core": "megatron-core", "torch": "torch"}
    return f"{program} ({', '.join(f'{name} {installed(package)}' for name, package in parts.items())})"


def installed(package: str) -> str:
    """The version of a package, without importing it, or `not installed`."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class _Version(argparse.Action):
    def __init__(self, option_strings: Sequence[str], dest: str) -> None:
        text = "Print the versions of this package, Megatron-Core and torch."
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=text)

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        if is_first_rank():
            print(version_line(parser.prog))
        parser.exit()
