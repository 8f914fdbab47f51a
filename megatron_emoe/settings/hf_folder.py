"""A Hugging Face model as a flag names it: a folder, or a name on the hub; and its config.json as it stands there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CONFIG = "config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WANTED = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py", "LICENSE*", "NOTICE*"]
"""Files of a model on the hub: nothing pickled, no other framework's weights."""


def hf_folder(name: str, given: str | Path) -> Path:
    """The folder of the model that was `given` with the flag `name`: itself, or where huggingface_hub keeps the
    snapshot of the model org/name, which it fetches if need be. Its environment (HF_HUB_OFFLINE, HF_HOME) counts.

    Raises:
        ValueError: no such folder, none of that name on the hub, or a config.json that is missing or no JSON object.
    """
    folder = Path(given)
    if not folder.exists() and _HUB_NAME.fullmatch(str(given)) and not folder.parent.is_file():
        folder = _from_hub(name, str(given))
    read_config_json(folder)
    return folder


def check_tokenizer_place(model: str | None) -> None:
    """ValueError for a path, of a file or a folder, that is not there. A name that may be one on the hub passes, and so
    does None."""
    if model is None or Path(model).exists() or "/" not in model or _HUB_NAME.fullmatch(model):
        return
    raise ValueError(f"--tokenizer-model {model}: no such file or folder")


def model_name(folder: str | Path) -> str:
    """What a model is called in tables: its folder, or its name on the hub without the organisation."""
    path = Path(folder).resolve()
    *_, repository, snapshots, _ = ("", "", "", *path.parts)
    return repository.split("--")[-1] if snapshots == "snapshots" and "--" in repository else path.name


def _from_hub(name: str, model: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model, allow_patterns=_WANTED))
    except Exception as error:  # offline, not found, gated, no space: a class for each
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(
            f"{name} {model}: no such folder, and not fetched from the Hugging Face hub ({reason})"
        ) from error


def read_config_json(folder: Path) -> dict[str, Any]:
    """What stands in `folder`/config.json.

    Raises:
        ValueError: path and reason: no such file, or no JSON object.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {folder} is no Hugging Face model")
    try:
        raw = json.loads(path.read_text(encoding="utf-8-sig"))  # as some editors begin a text
    except RecursionError:
        raise ValueError(f"{path}: not valid JSON (nested too deeply)") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must be a JSON object, not {str(raw)[:40]!r}")
    return raw
