"""The flags of a dataclass of settings: one for each field, whose type, default and string below it say the rest.

Megatron-Core makes its own flags by the same rules (megatron.training.argument_utils.ArgumentGroupFactory), but needs
ten seconds of imports first, which no help text and no refusal of a mistyped value should wait for. A test compares.
"""

from __future__ import annotations

import ast
import inspect
import types
import typing
from argparse import ArgumentParser
from dataclasses import fields
from functools import cache
from itertools import pairwise
from typing import Any

from megatron_emoe.settings.elastic_config import ElasticConfig, flag


def add_elastic_flags(parser: ArgumentParser) -> None:
    """Add the group "elastic MoE", a flag for each field of ElasticConfig."""
    add_field_flags(parser, ElasticConfig, "elastic MoE")


def add_field_flags(parser: ArgumentParser, cls: type, title: str) -> None:
    """Add a group with a flag for each field of the dataclass: its types are those that `kind_of` knows."""
    group = parser.add_argument_group(title, cls.__doc__)
    texts = field_texts(cls)
    for field in fields(cls):
        group.add_argument(
            flag(field.name), dest=field.name, default=field.default, help=texts[field.name], **kind_of(field.type)
        )


@cache
def field_texts(cls: type) -> dict[str, str]:
    """The string under each field of the class, in one line; fields without one are left out."""
    (body,) = [node.body for node in ast.parse(inspect.getsource(cls)).body if isinstance(node, ast.ClassDef)]
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }


def kind_of(kind: Any) -> dict[str, Any]:
    """What argparse is told of a field of this type: a switch, one word, several (a list), or one of a few (Literal).

    Raises:
        TypeError: another type, or a union of more than one with None.
    """
    of = typing.get_args(kind)
    if kind is bool:
        return {"action": "store_true"}
    if typing.get_origin(kind) is types.UnionType and len(of) == 2 and of[1] is types.NoneType:
        return kind_of(of[0])
    if typing.get_origin(kind) is list:
        return kind_of(of[0]) | {"nargs": "+"}
    if typing.get_origin(kind) is typing.Literal:
        return {"type": type(of[0]), "choices": of}
    if kind in (int, float, str):
        return {"type": kind}
    raise TypeError(f"no flag can be made of a field of type {kind}")
