"""What goes with a model's weights: configuration, tokenizer, tensors that are only carried along.

An imported checkpoint has them in its folder hf/. Training takes that folder along to where it saves, so that an export
finds it; nothing in here needs torch.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from megatron_emoe.settings.companion_folder import HF_FOLDER

CARRIED = "carried.safetensors"
_KEPT = ("*.json", "*.model", "*.txt", "*.jinja", "*.md", "*.py", "LICENSE*", "NOTICE*")
_WEIGHTS = (".safetensors.index.json", ".bin.index.json")


def companions(source: Path) -> list[Path]:
    """Every file of a model's folder but its weights: configuration, tokenizer, code (of which nothing is run here).

    Raises:
        ValueError: a link to a file that is not there, as in a snapshot that was cleaned up or is not whole.
    """
    found = [path for pattern in _KEPT for path in source.glob(pattern) if not path.name.endswith(_WEIGHTS)]
    for path in found:
        if path.is_symlink() and not path.exists():
            raise ValueError(
                f"{path}: is a link to {os.readlink(path)}, and there is no such file; fetch the model anew"
            )
    return [path for path in found if path.is_file()]


def copy_companions(source: Path, target: Path) -> None:
    """Copy them to another folder, which exists. ValueError as there."""
    for path in companions(source):
        shutil.copyfile(path, target / path.name)
    for path in target.glob("*.json"):
        _drop_lost_code(path)


def _drop_lost_code(path: Path) -> None:
    """Leave out of "auto_map" the classes whose file is not beside it: transformers would look for them, and fail."""
    if b'"auto_map"' not in path.read_bytes():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        named = dict(content["auto_map"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return  # whatever it is, it names no code
    kept = {name: classes for name, classes in named.items() if _is_there(classes, path.parent)}
    if kept != named:
        rest = {key: value for key, value in content.items() if key != "auto_map"}
        path.write_text(json.dumps(rest | ({"auto_map": kept} if kept else {}), indent=2) + "\n")


def _is_there(classes: Any, folder: Path) -> bool:
    """Whether module.Class, or each of a list of them, is in the folder; org/name--module.Class is on the hub."""
    each = [name for name in (classes if isinstance(classes, list) else [classes]) if name is not None]
    return all("--" in str(name) or os.path.isfile(folder / f"{str(name).split('.')[0]}.py") for name in each)


def keep_companions(load: str | None, save: str | None) -> None:
    """Copy `load`/hf to `save`/hf, whole or not at all, unless it is there. Called on one rank of a training run."""
    if load is None or save is None:
        return
    source, target = Path(load) / HF_FOLDER, Path(save) / HF_FOLDER
    if not source.is_dir() or target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    begun = target.with_name(f"{HF_FOLDER}.{os.getpid()}")
    shutil.copytree(source, begun)
    os.rename(begun, target)
