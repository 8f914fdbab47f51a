"""What goes with a model's weights: configuration, tokenizer, tensors that are only carried along.

An imported checkpoint has them in its folder hf/. Training takes that folder along to where it saves, so that an export
finds it; nothing in here needs torch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from megatron_emoe.settings.companion_folder import HF_FOLDER

CARRIED = "carried.safetensors"
_KEPT = ("*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*", "NOTICE*")
_WEIGHTS = (".safetensors.index.json", ".bin.index.json")


def copy_companions(source: Path, target: Path) -> None:
    """Copy everything but weights and code from one folder to another, which exists."""
    for pattern in _KEPT:
        for path in source.glob(pattern):
            if not path.name.endswith(_WEIGHTS):
                shutil.copyfile(path, target / path.name)


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
