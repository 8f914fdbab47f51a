"""docs/gpu.json: what was measured on one machine, cell by cell; a later run adds to it and takes nothing away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MACHINE = ("device", "torch", "megatron-core")
"""What must be the same for two results to stand in one table."""


def results_of(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """What the file holds, or nothing yet, with this machine's description.

    Raises:
        ValueError: it is of another machine.
    """
    old = json.loads(path.read_text()) if path.is_file() else {"machine": machine, "cells": {}, "kernel": None}
    for name in MACHINE:
        if old["machine"][name] != machine[name]:
            raise ValueError(
                f"--results {path}: measured with {name} {old['machine'][name]}, here it is {machine[name]}; "
                "they cannot stand in one table: --results OTHER.json --out OTHER.md (a copy of the page)"
            )
    return old | {"machine": machine}


def better(old: dict[str, Any] | None, new: dict[str, Any]) -> dict[str, Any]:
    """Which of two results of a cell stays: the new one, unless something was measured that it lacks."""
    had, has = ((result or {}).get("measured", {}).keys() for result in (old, new))
    return new if old is None or has >= had else old
