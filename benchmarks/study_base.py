"""The base that a study's cells continue: trained, or kept in the repository, with its tokenizer and its log."""

import json
import shutil
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from study_cell import REPO, Cell
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_emoe.settings.atomic_file import write_atomically

TOKENIZER = "tokenizer.model"
LOGGED_EVERY = 10
"""Of the logged steps, how many are one in the kept log."""


def is_kept(cell: Cell, folder: Path | None) -> bool:
    """Whether `folder` has this base."""
    return folder is not None and (folder / cell.method.name).is_dir()


def take(cell: Cell, folder: Path) -> None:
    """Put the kept base where the cells look for it."""
    shutil.rmtree(cell.checkpoint, ignore_errors=True)
    shutil.copytree(folder / cell.method.name, cell.checkpoint)


def keep(cell: Cell, folder: Path) -> None:
    """Put a base that was trained into `folder`, with its tokenizer and a summary of its log."""
    shutil.rmtree(folder / cell.method.name, ignore_errors=True)
    shutil.copytree(cell.checkpoint, folder / cell.method.name, ignore=shutil.ignore_patterns(".run.lock"))
    _forget_where(folder / cell.method.name)
    shutil.copy(cell.work / f"data/{cell.family.data}.model", folder / TOKENIZER)
    record = {
        "flags": " ".join(cell.training()).replace(f"{cell.work}/", "study/"),
        "tokens": cell.tokens,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("megatron-core", "torch")},
        "data": json.loads((cell.work / f"data/{cell.family.data}.json").read_text())["tokens"],
        "loss": _losses(cell.tensorboard),
    }
    write_atomically(folder / f"{cell.method.name}.json", json.dumps(record, indent=2) + "\n")


def _forget_where(checkpoint: Path) -> None:
    """Make the paths of this machine among the stored arguments relative to the repository, in place: ./// is as long
    as what it stands for, and strings are stored with their length."""
    here = f"{REPO}/".encode()
    for file in checkpoint.rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes().replace(here, b"." + b"/" * (len(here) - 1)))


def _losses(tensorboard: Path) -> dict[int, float]:
    """Training loss by step, the mean of some logged steps each."""
    events = EventAccumulator(str(tensorboard))
    events.Reload()
    logged = [(event.step, event.value) for event in events.Scalars("lm loss")]
    parts = [logged[start : start + LOGGED_EVERY] for start in range(0, len(logged), LOGGED_EVERY)]
    return {part[-1][0]: round(sum(value for _, value in part) / len(part), 4) for part in parts}
