"""The documents of the tasks in this folder, wherever a program is started from: lm-eval takes the paths of data files
from the current folder."""

import json
from pathlib import Path
from typing import Any

from datasets import Dataset

HERE = Path(__file__).parent


def choice(**_: Any) -> dict[str, Dataset]:
    """Of python_choice."""
    return _read("python_choice.jsonl")


def line(**_: Any) -> dict[str, Dataset]:
    """Of python_line."""
    return _read("python_line.jsonl")


def _read(name: str) -> dict[str, Dataset]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return {"test": Dataset.from_list([json.loads(line) for line in lines])}
