"""lm-eval's tasks at one k' after another: which tasks there are, their data, and a cell for every (k', task).

The model is whatever has `lm` (lm-eval's model interface) and `active(k)`: MegatronTaskModel or on_transformers.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import os
import random
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import lm_eval.tasks
import numpy as np
import torch
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from tqdm import tqdm

from megatron_emoe.settings.command_line import is_first_rank
from megatron_emoe.settings.refusal import NoNumber, fail
from megatron_emoe.tasks.agreement import answers_of
from megatron_emoe.tasks.request import PAPER_TASKS, check_asked
from megatron_emoe.tasks.results import (
    Passage,
    TaskCell,
    TasksResult,
    add_cell,
    markdown_table,
    measures,
    missing,
    rename,
    save,
)

_ROOT = Path(lm_eval.tasks.__file__).parent
SEED = 1234
"""Of examples in prompts and of sampled generations: lm-eval's default."""


class TaskModel(Protocol):
    """A model that runs at any k' and counts what passes through it."""

    lm: LM

    def active(self, k: int) -> AbstractContextManager[Passage]: ...


def check(args: Namespace, num_experts: int, longest: int) -> int:
    """The number of tokens that the model may see. num_experts, longest: of the model.

    Raises:
        ValueError: flag, value and rule, for the first number out of range, else as check_asked.
    """
    for k in args.k:
        if not 1 <= k <= num_experts:
            raise ValueError(f"--k {k}: must lie in [1, {num_experts}], the number of experts")
    check_asked(args)
    if args.max_length is not None and not 2 <= args.max_length <= longest:
        raise ValueError(f"--max-length {args.max_length}: must lie in [2, {longest}], what the model can see")
    return args.max_length or longest


def check_selection(args: Namespace) -> None:
    """ValueError for a Megatron model in which k' does not say how many experts a token reaches."""
    if args.emoe_selection == "null-experts":
        raise ValueError(
            f"--emoe-selection null-experts, as --load {args.load} was trained: a token reaches fewer experts than k' "
            "where null experts are among its choices, so no score can be had at a k'; tools/sweep_k.py sweeps it"
        )


def find_tasks(args: Namespace) -> tuple[TaskManager, list[str]]:
    """Where the tasks are, and their names, tags replaced by the tasks they stand for. No data are read.

    Raises:
        ValueError: a task that does not exist, or one that runs code which nobody allowed.
    """
    manager = _manager(args.tasks, args.include_path)
    for name in args.tasks:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=5, cutoff=0.5)
            known = f"closest: {', '.join(close)}" if close else f"lm-eval {_version('lm_eval')} has none like it"
            raise ValueError(f"--tasks {name}: no such task; {known}")
    names = [name for asked in args.tasks for name in _untagged(manager, asked)]
    for name in names:
        unsafe = [task for task in leaves(manager, name) if manager.task_index[task].cfg.get("unsafe_code")]
        if unsafe and not args.allow_code_execution:
            raise ValueError(
                f"--tasks {name}: runs programs that the model writes; allow it with --allow-code-execution "
                "(in a container), or leave the task out"
            )
    if args.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"  # read by the metric when the task is loaded
    return manager, list(dict.fromkeys(names))


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """An index with all `names`, of a few folders if they suffice, else of everything."""
    folders = {_ROOT / PAPER_TASKS[name] for name in names if name in PAPER_TASKS}
    own = [] if include_path is None else [include_path]
    few = TaskManager(include_path=[*sorted(folders), *own], include_defaults=False)
    if all(name in few.task_index for name in names):
        return few
    return TaskManager(include_path=[_ROOT, *own], include_defaults=False)


def _untagged(manager: TaskManager, name: str) -> list[str]:
    return sorted(manager.task_index[name].tags) if name in manager.all_tags else [name]


def leaves(manager: TaskManager, name: str) -> list[str]:
    """The tasks that a task, a group or a tag stands for, by name."""
    if name not in manager.task_index:
        return []  # defined within its group
    if name in manager.all_tags:
        return [leaf for task in _untagged(manager, name) for leaf in leaves(manager, task)]
    if name not in manager.all_groups:
        return [name]
    members = manager.task_index[name].cfg.get("task") or []
    named = [member if isinstance(member, str) else member.get("task", member.get("group")) for member in members]
    return [leaf for member in named if isinstance(member, str) for leaf in leaves(manager, member)]


def load_tasks(manager: TaskManager, names: Sequence[str]) -> dict[str, Any]:
    """Every task with its data, fetched where they are not here yet, by name.

    Raises:
        ValueError: data that cannot be had.
    """
    loaded = {}
    for name in names:
        try:
            loaded[name] = manager.load([name])
        except Exception as error:  # of the network, of files, of the task's own code
            reason = (str(error) or type(error).__name__).strip().splitlines()[0]
            raise ValueError(f"--tasks {name}: its data cannot be loaded ({reason})") from error
    return loaded


def run_cells(
    args: Namespace,
    result: TasksResult,
    model: TaskModel,
    tasks: dict[str, Any],
    report: Callable[[str], None] = print,
) -> TasksResult:
    """Evaluate what has no cell yet; --out is rewritten after every cell. SystemExit where that fails (status 1)."""
    todo = missing(result, args.k, list(tasks))
    for k, name in tqdm(todo, desc="k' x task", disable=None):
        cell = evaluate_task(model, name, tasks[name], k, shots=args.num_fewshot, limit=args.limit)
        result = add_cell(result, cell)
        try:
            save(result, args.out)
        except OSError as error:
            fail(f"--out {args.out}: cannot be written ({error.strerror})", status=1)
        report(f"k' = {k}, {name}: {_line(cell)}")
    return result


def finished(args: Namespace, result: TasksResult, manager: TaskManager, names: Sequence[str]) -> bool:
    """Whether nothing is left to do; the file then has the label that is asked for, and its scores are printed.

    Raises:
        ValueError: a cell that another version of its task made.
    """
    _check_versions(args, result, manager, names)
    if missing(result, args.k, list(names)):
        return False
    if is_first_rank():
        rename(args.out, result.label)
    report_table(result)
    return True


def _check_versions(args: Namespace, result: TasksResult, manager: TaskManager, names: Sequence[str]) -> None:
    for cell in result.cells:
        if cell.k in args.k and cell.task in names:
            now = (manager.task_index[cell.task].cfg.get("metadata") or {}).get("version")
            if None not in (now, cell.version) and str(now) != cell.version:
                raise ValueError(
                    f"--out {args.out}: {cell.task} at k' = {cell.k} was made by version {cell.version} of the task, "
                    f"which is now version {now}; write to another file"
                )


def report_table(result: TasksResult) -> None:
    """Print every score: the end of a run, from the first rank."""
    if is_first_rank():
        print(f"\n{markdown_table(result)}", end="")


def _line(cell: TaskCell) -> str:
    scores = ", ".join(f"{name.removesuffix(',none')} {found.value:.4f}" for name, found in cell.metrics.items())
    return f"{scores} ({cell.samples} samples, {cell.tokens} tokens x {cell.k} rows in each MoE layer)"


def evaluate_task(
    model: TaskModel, name: str, loaded: Any, k: int, *, shots: int | None = None, limit: int | None = None
) -> TaskCell:
    """One task, or group of tasks, at k'. loaded: as lm-eval's TaskManager.load gives it.

    Examples in prompts and random numbers are the same at every k'.

    Raises:
        ValueError: other rows than tokens x k' reached the experts of a layer; a document that cannot be scored.
        NoNumber: logits that are none.
    """
    for task in loaded["tasks"].values():
        _set_shots(task, shots)
        task.set_fewshot_seed(seed=SEED)
    random.seed(0)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    started = time.perf_counter()
    try:
        with model.active(k) as passage:
            found = evaluate(model.lm, loaded, limit=limit, log_samples=True, confirm_run_unsafe_code=True)
    except (ValueError, NoNumber) as error:
        kind = NoNumber if isinstance(error, NoNumber) else ValueError
        raise kind(f"--k {k} --tasks {name}: {error}") from error
    for layer, rows in passage.rows.items():
        if rows != passage.tokens * k:
            raise ValueError(f"--k {k}: {rows} rows reached the experts of layer {layer}, not {passage.tokens} x {k}")
    used = {found["n-shot"].get(task) for task in loaded["tasks"]}
    version = found["versions"].get(name)
    return TaskCell(
        k=k,
        task=name,
        metrics=measures(found["results"].get(name, {})),
        samples=sum(found["n-samples"][task]["effective"] for task in loaded["tasks"]),
        shots=used.pop() if len(used) == 1 else None,
        version=None if version is None else str(version),
        tokens=passage.tokens,
        rows_per_layer={str(layer): rows for layer, rows in sorted(passage.rows.items())},
        seconds=time.perf_counter() - started,
        members={task: measures(raw) for task, raw in found["results"].items() if task != name},
        answers=answers_of(found["samples"]),
    )


def _set_shots(task: Any, shots: int | None) -> None:
    """As lm-eval does: a task that is written for no examples keeps none."""
    own = task.get_config("num_fewshot")
    if own is None or (shots is not None and own != 0):
        task.set_config(key="num_fewshot", value=shots or 0)


def versions() -> dict[str, str]:
    """Of the libraries that the scores depend on."""
    return {name: _version(name) for name in ("lm_eval", "torch", "transformers", "megatron-core")}


def _version(name: str) -> str:
    return importlib.metadata.version(name)
