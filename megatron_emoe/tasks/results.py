"""What tools/eval_tasks.py writes: scores on lm-eval's tasks, one cell per k' and task, each with the proof of its k'.

Pure data and functions over it; nothing imports torch or lm-eval.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from megatron_emoe.settings.result_file import (
    STRICT,
    Count,
    Date,
    Number,
    Text,
    Whole,
    demand_same,
    read_checked,
    write_checked,
)
from megatron_emoe.tasks.agreement import agreement


@dataclasses.dataclass
class Passage:
    """What went through a model. tokens: padding included. rows: (token, expert) pairs that reached the experts, by
    number of the MoE layer."""

    tokens: int = 0
    rows: dict[int, int] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Measure:
    """A metric of a task. stderr: standard error of its mean over samples; None where lm-eval gives none."""

    value: float
    stderr: NonNegativeFloat | None = None


Metrics = dict[Text, Measure]
"""By lm-eval's name of the metric and its filter, such as "acc_norm,none" or "exact_match,strict-match"."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskCell:
    """One task, or a group of tasks such as mmlu, at one k'.

    samples: documents evaluated. shots: examples in the prompt (None: the members of a group differ). version: of the
    task. members: metrics of the tasks in a group. tokens: that went through the model, padding included.
    rows_per_layer: (token, expert) pairs that reached the experts, by MoE layer: tokens x k', or this is no cell.
    """

    k: Count
    task: Text
    metrics: Metrics
    samples: Count
    shots: Whole | None
    version: str | None
    tokens: Count
    rows_per_layer: Annotated[dict[Number, Whole], Field(min_length=1)]
    seconds: NonNegativeFloat
    members: dict[str, Metrics] = dataclasses.field(default_factory=dict)
    answers: dict[Text, Annotated[tuple[Text, ...], Field(strict=False)]] = dataclasses.field(default_factory=dict)

    @model_validator(mode="after")
    def _check_rows(self) -> TaskCell:
        for layer, rows in self.rows_per_layer.items():
            if rows != self.tokens * self.k:
                raise ValueError(
                    f"{self.task} at k' = {self.k}: {rows} rows reached the experts of layer {layer}; "
                    f"must be {self.tokens} tokens x {self.k}"
                )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskSettings:
    """What cells of one file have in common. shots, limit: None is each task's own number, all documents.
    max_length: tokens that the model sees at most. dtype: of its weights."""

    shots: Whole | None
    limit: Count | None
    max_length: Count
    dtype: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TasksResult:
    """The scores of one checkpoint; what was not evaluated has no cell.

    tail_scale: a(k') in force, {} for none. versions: of lm_eval, torch, transformers and megatron-core.
    Constructing one checks every field and raises a `ValueError` that names the key and the rule.
    """

    schema: Literal[1] = 1
    label: Text
    framework: Literal["megatron", "transformers"]
    checkpoint: str
    iteration: Whole
    k_train: Count
    num_experts: Count
    tail_scale: dict[Number, float]
    settings: TaskSettings
    versions: dict[str, str]
    cells: Annotated[tuple[TaskCell, ...], Field(strict=False)] = ()
    command: str
    date: Date

    @model_validator(mode="after")
    def _check_cells(self) -> TasksResult:
        seen = set()
        for index, cell in enumerate(self.cells):
            if cell.k > self.num_experts:
                raise ValueError(f"cells[{index}].k: {cell.k}; must be at most num_experts ({self.num_experts})")
            if (cell.k, cell.task) in seen:
                raise ValueError(f"cells[{index}]: {cell.task} at k' = {cell.k} is there twice")
            seen.add((cell.k, cell.task))
        return self


_ADAPTER = TypeAdapter(TasksResult)


def load(path: str | os.PathLike) -> TasksResult:
    """Read and check a result file. Raises `ValueError` with path, key, value and rule."""
    return read_checked(_ADAPTER, path)


def save(result: TasksResult, path: str | os.PathLike) -> None:
    """Write a result file; the file at `path` is replaced only once the new one is complete."""
    write_checked(_ADAPTER, result, path)


_SAME = ("framework", "checkpoint", "iteration", "k_train", "num_experts", "tail_scale", "settings", "versions")


def resume(path: str | os.PathLike, header: TasksResult, label: str | None = None) -> TasksResult:
    """`header` with the cells already stored at `path`, or `header` itself where there is no file yet.

    label: the name that was asked for; None keeps the stored one.

    Raises `ValueError` where they were made from another checkpoint, with other settings or other versions.
    """
    if not Path(path).exists():
        return header
    stored = load(path)
    for key in _SAME:
        demand_same(path, key, getattr(stored, key), getattr(header, key))
    return dataclasses.replace(header, cells=stored.cells, label=label or stored.label)


def rename(path: str | os.PathLike, label: str) -> None:
    """Give a finished file another label, where it has another one."""
    stored = load(path)
    if stored.label != label:
        save(dataclasses.replace(stored, label=label), path)


def add_cell(result: TasksResult, cell: TaskCell) -> TasksResult:
    """`result` with one cell more."""
    return dataclasses.replace(result, cells=(*result.cells, cell))


def missing(result: TasksResult, ks: list[int], tasks: list[str]) -> list[tuple[int, str]]:
    """What was asked for and has no cell yet: k' by k', each once."""
    done = {(cell.k, cell.task) for cell in result.cells}
    return [pair for pair in dict.fromkeys((k, task) for k in ks for task in tasks) if pair not in done]


def measures(raw: dict[str, Any]) -> Metrics:
    """lm-eval's results of a task: every finite number with its standard error."""
    found = {}
    for name, value in raw.items():
        metric, comma, chosen = name.partition(",")
        if comma and not metric.endswith("_stderr") and (number := _number(value)) is not None:
            found[name] = Measure(value=number, stderr=_number(raw.get(f"{metric}_stderr,{chosen}")))
    return found


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def markdown_table(result: TasksResult) -> str:
    """A row per task and metric, and one for the answers that agree with those at the trained k; a column per k'. What
    was not evaluated stays empty."""
    ks = sorted({cell.k for cell in result.cells})
    cells = {(cell.task, cell.k): cell for cell in result.cells}
    rows = [["task", "metric", "samples", *(f"k' = {k}" for k in ks)], ["---", "---", "---:", *["---:"] * len(ks)]]
    for task in dict.fromkeys(cell.task for cell in result.cells):
        of_task = [cell for cell in result.cells if cell.task == task]
        for metric in dict.fromkeys(name for cell in of_task for name in cell.metrics):
            values = [_text(cells.get((task, k)), metric) for k in ks]
            rows.append([task, metric.removesuffix(",none"), str(of_task[0].samples), *values])
        rows += _agreement_row(result.k_train, of_task, ks)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def _agreement_row(k_train: int, of_task: Sequence[TaskCell], ks: Sequence[int]) -> list[list[str]]:
    """None where there are no answers at the trained k, or at no other k'."""
    answers = {cell.k: cell.answers for cell in of_task}
    if not answers.get(k_train) or len(answers) == 1:
        return []
    shares = [agreement(answers.get(k, {}), answers[k_train]) for k in ks]
    texts = ["" if share is None else f"{share:.4f}" for share in shares]
    return [[of_task[0].task, f"same answer as at k' = {k_train}", str(of_task[0].samples), *texts]]


def _text(cell: TaskCell | None, metric: str) -> str:
    if cell is None or metric not in cell.metrics:
        return ""
    found = cell.metrics[metric]
    return f"{found.value:.4f}" + ("" if found.stderr is None else f" ± {found.stderr:.4f}")
