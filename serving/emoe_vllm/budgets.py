"""Budgets with names: the file that `tools/pick_k.py --budgets` writes, or the same table inside the flag. Pure.

A table belongs to one checkpoint: its k of training, its experts and its layers are compared with the model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked

FILE = "emoe_budgets.json"
"""Beside config.json: the table of a server that names no other."""
Ks = int | tuple[int, ...]
"""A k' for all layers, or one for each layer with experts."""
_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
_Positive = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Budget:
    """k: one number for all layers, or one for each layer with experts. quality: exp(loss at the k of training - loss).
    expert_flops: as a multiple of those at the k of training. None: the table does not say."""

    name: str
    k: Ks
    quality: float | None = None
    expert_flops: float | None = None


@dataclass(frozen=True)
class Model:
    """What a table is compared with. most: experts that one token can have."""

    k_train: int
    experts: int
    layers: int
    most: int


@checked(frozen=True, kw_only=True, config=_STRICT)
class _Entry:
    name: str
    k: Any
    loss: float | None = None
    quality: _Positive | None = None
    expert_flops: _Positive | None = None
    latency_ms_batch1: _Positive | None = None
    latency_ms_large: _Positive | None = None


@checked(frozen=True, kw_only=True, config=_STRICT)
class _Table:
    version: Literal[1]
    k_train: int
    num_experts: int
    budgets: Annotated[list[_Entry], Field(min_length=1)]
    checkpoint: str = ""


_ADAPTER = TypeAdapter(_Table)


def read_budgets(source: Mapping[str, Any] | str, where: str, model: Model) -> tuple[Budget, ...]:
    """The budgets of a table, in its order. source: the table, or the path of its file; where: its name in an error.

    Raises:
        ValueError: path or flag, key, value and rule; also for the table of another model.
    """
    at, written = (where, json.dumps(source)) if isinstance(source, Mapping) else (source, _read(source))
    try:
        table = _ADAPTER.validate_json(written)
    except ValidationError as error:
        raise ValueError(f"{at}: {_first(error)}") from error
    for key, own in (("k_train", model.k_train), ("num_experts", model.experts)):
        if getattr(table, key) != own:
            raise ValueError(f"{at}: {key} {getattr(table, key)}: is another model's; this one has {own}")
    budgets = tuple(_budget(entry, f"{at}: budgets[{number}]", model) for number, entry in enumerate(table.budgets))
    _check_together(budgets, at)
    return budgets


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error


def _budget(entry: _Entry, where: str, model: Model) -> Budget:
    if not entry.name or not entry.name.isprintable() or _is_number(entry.name):
        raise ValueError(f"{where}.name {entry.name!r}: must be printable text that is no number")
    rule = f"must be a whole number in [1, {model.most}], or a list with one for each of the {model.layers} layers"
    ks = list(entry.k) if isinstance(entry.k, Sequence) and not isinstance(entry.k, str) else [entry.k]
    whole = all(type(k) is int and 1 <= k <= model.most for k in ks)
    if not whole or (len(ks) != model.layers and ks != [entry.k]):
        raise ValueError(f"{where}.k {entry.k!r}: {rule} with experts")
    return Budget(entry.name, ks[0] if len(set(ks)) == 1 else tuple(ks), entry.quality, entry.expert_flops)


def _check_together(budgets: tuple[Budget, ...], where: str) -> None:
    names = [budget.name for budget in budgets]
    for number, name in enumerate(names):
        if name in names[:number]:
            raise ValueError(f"{where}: budgets[{number}].name {name!r}: is there twice; names must be unique")
    least = 0.0
    for number, flops in enumerate(budget.expert_flops for budget in budgets):
        if flops is not None and flops < least:
            raise ValueError(f"{where}: budgets[{number}].expert_flops {flops}: must be ascending")
        least = flops or least


def _is_number(name: str) -> bool:
    """Whether an HTTP client could have meant a number by it."""
    try:
        return not math.isnan(float(name))
    except ValueError:
        return False


def _first(error: ValidationError) -> str:
    """Key, value and rule of the first thing that is wrong."""
    found = error.errors(include_url=False)[0]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in found["loc"]).lstrip(".")
    if found["type"] == "json_invalid":
        return f"is no JSON: {found['ctx']['error']}"
    if found["type"] == "missing":
        return f"{key}: is missing"
    if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return f"{key}: is not known"
    return f"{key} {found['input']!r}: {found['msg'][0].lower()}{found['msg'][1:]}".lstrip()
