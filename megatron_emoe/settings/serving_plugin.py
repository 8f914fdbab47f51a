"""The command that serves an export with the vLLM plugin in serving/, by the scales of the block "emoe" in it."""

import json
import shlex
from collections.abc import Sequence


def serve_command(folder: str, k: int | Sequence[int]) -> str:
    """vLLM with the plugin; k: experts, for all layers or for each one with experts."""
    asked = json.dumps({"emoe": {"k": k if isinstance(k, int) else list(k)}})
    return f"VLLM_PLUGINS=emoe vllm serve {shlex.quote(folder)} --additional-config {shlex.quote(asked)}"
