"""The command that serves an export with the vLLM plugin in serving/, by the scales of the block "emoe" in it."""

import json
import shlex
from collections.abc import Sequence


def serve_command(folder: str, k: int | Sequence[int]) -> str:
    """vLLM with the plugin; k: experts, for all layers or for each one with experts."""
    return _command(folder, {"k": k if isinstance(k, int) else list(k)})


def serve_with_budgets(folder: str, table: str) -> str:
    """The same with a table of named budgets, as tools/pick_k.py --budgets writes it."""
    return _command(folder, {"budgets": table})


def _command(folder: str, settings: dict[str, object]) -> str:
    asked = json.dumps({"emoe": settings})
    return f"VLLM_PLUGINS=emoe vllm serve {shlex.quote(folder)} --additional-config {shlex.quote(asked)}"
