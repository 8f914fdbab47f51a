"""Budgets with names, for a server: which k' of a sweep are worth offering, and the file that lists them.

Worth offering is a measured k' that no cheaper one equals in loss. Of those, `fast` is the cheapest within a floor of
quality, below which nothing is listed, `default` the k of training, `best` that of the lowest loss; the others are
named by their k': `k6`, or `k6-4` for one k' per layer. Pure functions over sweep results. Losses in nats per token.
"""

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from megatron_emoe.settings.paths import check_out, same_folder
from megatron_emoe.settings.result_file import STRICT, Count, Positive, Text, read_checked, write_checked
from megatron_emoe.settings.serving_plugin import serve_with_budgets
from megatron_emoe.sweep.budget import flops_share, is_uniform, name, quality, quality_limit
from megatron_emoe.sweep.curve import SweepResult, curve
from megatron_emoe.sweep.result import K, Nats, SweepCell, cell_order
from megatron_emoe.sweep.summary import to_k

FLOOR = 0.95
"""Quality of the cheapest budget where nobody says another: a loss at most 0.0513 nats above that at the k of training,
a perplexity 5 % higher. Who asks for "fast" should not have to look whether the answer is still a good one."""
DEFAULT = "default"
_DIGITS = 6  # after the point, in a file


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NamedBudget:
    """k: experts per token, one number or one for each layer with experts. quality: exp(loss at the k of training -
    loss). expert_flops: of the routed experts, as a multiple of those at the k of training. latency_ms_batch1,
    latency_ms_large: milliseconds per token, alone and in a full batch, where the sweep measured them."""

    name: Text
    k: K
    loss: Nats
    quality: Positive
    expert_flops: Positive
    latency_ms_batch1: Positive | None = None
    latency_ms_large: Positive | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BudgetTable:
    """The budgets of one checkpoint, ascending in expert_flops. Raises `ValueError` that names key and rule."""

    version: Literal[1]
    checkpoint: str
    k_train: Count
    num_experts: Count
    budgets: Annotated[tuple[NamedBudget, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "BudgetTable":
        names = [budget.name for budget in self.budgets]
        if DEFAULT not in names or len(set(names)) < len(names):
            raise ValueError(f"budgets: names {', '.join(names)}; must be unique, and one of them {DEFAULT}")
        costs = [budget.expert_flops for budget in self.budgets]
        if costs != sorted(costs):
            raise ValueError("budgets: must be ascending in expert_flops")
        return self


_ADAPTER = TypeAdapter(BudgetTable)


def load(path: str | os.PathLike) -> BudgetTable:
    """Read and check a table. Raises `ValueError` with path, key, value and rule."""
    return read_checked(_ADAPTER, path)


def save(table: BudgetTable, path: str | os.PathLike) -> None:
    """Write a table; the file at `path` is replaced only once the new one is complete."""
    write_checked(_ADAPTER, table, path, exclude_none=True)


def check_target(path: Path, sweep: Path) -> None:
    """Raises `ValueError` where no table can be written at `path`: it is the sweep, or no file can stand there."""
    check_out(path, "--budgets")
    if same_folder(path, sweep):
        raise ValueError(f"--budgets {path}: is the sweep itself; must be another file")


def budget_table(result: SweepResult, floor: float = FLOOR) -> BudgetTable:
    """The table of a sweep.

    Raises:
        ValueError: there is no cell at the k of training, or `floor` is not in (0, 1].
    """
    if floor > 1:
        raise ValueError(f"--min-quality {floor:g}: must be at most 1, the quality of the budget {DEFAULT}")
    limit, default = quality_limit(result, floor), curve(result)[result.k_train]
    offered = [cell for cell in frontier(result) if limit.allows(cell)]
    cells = sorted([*offered, *([] if default in offered else [default])], key=lambda cell: cell.expert_flops_per_token)
    names = _names(cells, default)
    return BudgetTable(
        version=1,
        checkpoint=result.checkpoint,
        k_train=result.k_train,
        num_experts=result.num_experts,
        budgets=tuple(_named(result, cell, word) for cell, word in zip(cells, names, strict=True)),
    )


def frontier(result: SweepResult) -> list[SweepCell]:
    """The cells, ascending in expert FLOPs, that have a lower loss than every cheaper one. Of two that are equal in
    both, one k' for all layers comes first."""
    kept: list[SweepCell] = []
    for cell in sorted(_cells(result).values(), key=lambda cell: (cell.expert_flops_per_token, cell.loss)):
        if not kept or cell.loss < kept[-1].loss:
            kept.append(cell)
    return kept


def _cells(result: SweepResult) -> dict[int | tuple[int, ...], SweepCell]:
    """The cells by k', one k' for all layers first. One that is spelt out for every layer is no other budget."""
    cells: dict[int | tuple[int, ...], SweepCell] = {}
    for cell in sorted(result.cells, key=cell_order):
        cells.setdefault(_k(cell), cell)
    return cells


def _k(cell: SweepCell) -> int | tuple[int, ...]:
    return cell.k[0] if not isinstance(cell.k, int) and is_uniform(cell) else cell.k


def _names(cells: Sequence[SweepCell], default: SweepCell) -> list[str]:
    """A budget that is two of the three has the first of these names alone."""
    found = [(default, DEFAULT), (cells[0], "fast"), (min(cells, key=lambda cell: cell.loss), "best")]
    return [
        next((word for each, word in found if each is cell), f"k{name(_k(cell)).replace(',', '-')}") for cell in cells
    ]


def _named(result: SweepResult, cell: SweepCell, word: str) -> NamedBudget:
    return NamedBudget(
        name=word,
        k=_k(cell),
        loss=cell.loss,
        quality=round(quality(result, cell), _DIGITS),
        expert_flops=round(flops_share(result, cell), _DIGITS),
        latency_ms_batch1=cell.latency_ms_batch1,
        latency_ms_large=cell.latency_ms_large,
    )


def lines(result: SweepResult, table: BudgetTable, path: Path, floor: float = FLOOR) -> list[str]:
    """What is printed of a table that was written to `path`: the budgets, what is not among them, how to serve them."""
    return [
        f"{result.label} ({result.checkpoint}), trained at k = {result.k_train} of {result.num_experts} experts",
        "",
        *_markdown(result, table),
        "",
        *_left_out(result, table, floor),
        f"{path}: written",
        "",
        *_serve(result, path),
    ]


def _markdown(result: SweepResult, table: BudgetTable) -> list[str]:
    cells = _cells(result)
    latencies = {"latency_ms_batch1": "ms/token, alone", "latency_ms_large": "ms/token, full batch"}
    timed = [key for key in latencies if any(getattr(each, key) is not None for each in table.budgets)]
    head = [
        "budget",
        "k'",
        "expert FLOPs",
        "loss",
        f"to k = {result.k_train}",
        "quality",
        *(latencies[k] for k in timed),
    ]
    rows = [
        [
            each.name,
            name(each.k),
            f"{each.expert_flops:.3g}",
            f"{each.loss:.4f}",
            to_k(result, cells[each.k]).text(),
            f"{each.quality:.4f}",
            *("" if getattr(each, key) is None else f"{getattr(each, key):.4g}" for key in timed),
        ]
        for each in table.budgets
    ]
    return ["| " + " | ".join(row) + " |" for row in (head, ["---", *["---:"] * (len(head) - 1)], *rows)]


def _left_out(result: SweepResult, table: BudgetTable, floor: float) -> list[str]:
    """Which of the three names is missing and why, and the measured k' that are not offered."""
    listed, on_it = {each.name: each for each in table.budgets}, frontier(result)
    said = [f"fast: the cheapest k' with a quality of at least {floor:g} (--min-quality sets another floor)"]
    if "fast" not in listed:
        said = [f"no budget fast: nothing cheaper than {DEFAULT} has a quality of at least {floor:g} (--min-quality)"]
    lowest = min(table.budgets, key=lambda each: each.loss)
    said += [] if "best" in listed else [f"no budget best: {lowest.name} has the lowest loss"]
    if listed[DEFAULT].k not in map(_k, on_it):
        said += [f"{DEFAULT} is listed although a cheaper k' is as good"]
    left = {k: cell for k, cell in _cells(result).items() if k not in [each.k for each in table.budgets]}
    low = [name(k) for k, cell in left.items() if cell in on_it]
    said += [f"below that quality: k' = {'; '.join(low)}"] if low else []
    dear = [name(k) for k, cell in left.items() if cell not in on_it]
    return said + ([f"no better than a cheaper k': k' = {'; '.join(dear)}"] if dear else [])


def _serve(result: SweepResult, path: Path) -> list[str]:
    said, model = "vLLM with the plugin in serving/, with the scales that the folder has", result.checkpoint
    if result.framework != "transformers":
        export = f"tools/convert_checkpoint.py export --megatron {shlex.quote(result.checkpoint)} --out EXPORTED"
        said, model = f"{said}, after {export}", "EXPORTED"
    return [f"{said}:", f"  {serve_with_budgets(model, str(path))}"]
