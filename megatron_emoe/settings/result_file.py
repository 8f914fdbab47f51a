"""What all result files have in common: the kinds of their fields, reading with a clear error, whole writing."""

import os
import reprlib
from datetime import datetime
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError

from megatron_emoe.settings.atomic_file import write_atomically

Result = TypeVar("Result")  # serving's tests compare with our hooks on Python 3.11, which reads no newer syntax
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _check_date(date: str) -> str:
    try:
        datetime.fromisoformat(date)
    except ValueError as error:
        raise ValueError("must be an ISO 8601 date") from error
    return date


Date = Annotated[str, AfterValidator(_check_date)]
Number = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
"""A number as a key of JSON: of a layer, or a k'."""
Whole = Annotated[int, Field(ge=0, le=2**63 - 1)]
Count = Annotated[int, Field(ge=1, le=2**63 - 1)]
Positive = Annotated[float, Field(ge=1e-30, le=1e30)]
"""Bounds that no measurement comes near; beyond them arithmetic fails."""


def _check_text(text: str) -> str:
    if not text or not text.isprintable():
        raise ValueError("must be printable text on one line")
    return text


Text = Annotated[str, AfterValidator(_check_text)]
"""What stands in tables and charts."""


def check_label(flag: str, label: str | None) -> None:
    """ValueError where a label, given with `flag`, cannot stand in a table. None: not given."""
    if label is not None:
        try:
            _check_text(label)
        except ValueError as error:
            raise ValueError(f"{flag} {label!r}: {error}") from error


def read_checked(adapter: TypeAdapter[Result], path: str | os.PathLike) -> Result:  # noqa: UP047
    """Read a JSON file and check every field. Raises `ValueError` with path, key, value and rule."""
    try:
        return adapter.validate_json(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ValueError(f"{path}: {_describe(error)}") from error


def write_checked(adapter: TypeAdapter, result: object, path: str | os.PathLike, *, exclude_none: bool = False) -> None:
    """Write a result as JSON; the file at `path` is replaced only once the new one is complete."""
    write_atomically(path, adapter.dump_json(result, indent=2, exclude_none=exclude_none) + b"\n")


def demand_same(path: str | os.PathLike, key: str, stored: object, now: object) -> None:
    """ValueError with path, key and both values where the file at `path` is not of the run that now goes on."""
    if stored != now:
        raise ValueError(f"--out {path}: {key}: {stored!r}; must equal this run's {now!r}, or write to another file")


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    rule = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{_shown(part)}" for part in first["loc"]).lstrip(".")
    if not key:
        return rule
    return f"{key}: {rule}" if first["type"] == "missing" else f"{key}: {reprlib.repr(first['input'])}; {rule}"


def _shown(key: str) -> str:
    return key if key.isprintable() else reprlib.repr(key)
