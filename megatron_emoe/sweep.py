"""The result of a k' sweep: its file, and the numbers that are read off its curve.

A sweep evaluates one checkpoint, trained with k active experts, at several budgets k' and stores one cell per k'.
Everything here is a pure function over such results; nothing imports torch. Losses are in nats per token.

The numbers (effective range, wall, peak gain) extend "Elastic MoE: Unlocking the Inference-Time Scalability of
Mixture-of-Experts", arXiv 2509.21892, which shows the curves but does not condense them.
"""

import contextlib
import dataclasses
import math
import os
import reprlib
from collections.abc import Callable, Sequence
from datetime import datetime
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.dataclasses import dataclass

TOLERANCE = 0.001
"""Share of the loss at k by which a k' may be worse and still count as "not worse"."""

_STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


def _check_k(k: Any) -> int | tuple[int, ...]:
    ks = tuple(k) if isinstance(k, list | tuple) else (k,)
    if not ks or any(type(each) is not int or each < 1 for each in ks):
        raise ValueError("must be an integer >= 1, or a list with one such integer per MoE layer")
    return ks if isinstance(k, list | tuple) else ks[0]


def _check_date(date: str) -> str:
    try:
        datetime.fromisoformat(date)
    except ValueError as error:
        raise ValueError("must be an ISO 8601 date") from error
    return date


LayerNumber = Annotated[str, Field(pattern=r"^\d+$")]
K = Annotated[int | tuple[int, ...], BeforeValidator(_check_k)]
Metric = Literal["loss", "tokens_per_second", "expert_flops_per_token", "active_params"]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SweepCell:
    """One evaluation. `k` is the number of active experts, or one number per MoE layer in layer order.

    loss: mean held-out loss, nats per token. tokens: tokens evaluated. seconds: wall time of the evaluation.
    rows_per_layer: rows dispatched to experts, keyed by layer number. expert_flops_per_token: see the function below.
    """

    k: K
    loss: PositiveFloat
    tokens: PositiveInt
    seconds: PositiveFloat
    tokens_per_second: PositiveFloat
    rows_per_layer: dict[LayerNumber, NonNegativeInt]
    expert_flops_per_token: PositiveFloat
    active_params: PositiveInt


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SweepData:
    """The held-out data: dataset paths (none for mock data) and the number of tokens."""

    path: Annotated[tuple[str, ...], Field(strict=False)]
    tokens: PositiveInt


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SweepResult:
    """The sweep of one checkpoint; a k' that was not measured has no cell.

    Constructing one checks every field and raises a `ValueError` that names the key and the rule.
    """

    schema: Literal[1]
    label: Annotated[str, Field(min_length=1)]
    checkpoint: str
    iteration: NonNegativeInt
    k_train: PositiveInt
    num_experts: PositiveInt
    data: SweepData
    cells: Annotated[tuple[SweepCell, ...], Field(strict=False)]
    command: str
    date: Annotated[str, AfterValidator(_check_date)]

    @model_validator(mode="after")
    def _check_cells(self) -> "SweepResult":
        if self.k_train > self.num_experts:
            raise ValueError(f"k_train: {self.k_train}; must be at most num_experts ({self.num_experts})")
        first_with: dict[K, int] = {}
        for index, cell in enumerate(self.cells):
            largest = cell.k if isinstance(cell.k, int) else max(cell.k)
            if largest > self.num_experts:
                raise ValueError(f"cells[{index}].k: {cell.k}; must be at most num_experts ({self.num_experts})")
            if first_with.setdefault(cell.k, index) != index:
                raise ValueError(f"cells[{index}].k: {cell.k}; is already in cells[{first_with[cell.k]}], each k once")
            if cell.tokens != self.cells[0].tokens:
                raise ValueError(
                    f"cells[{index}].tokens: {cell.tokens}; must equal cells[0].tokens ({self.cells[0].tokens}): "
                    "losses over different tokens are not one curve"
                )
        return self


_ADAPTER = TypeAdapter(SweepResult)


def load(path: str | os.PathLike) -> SweepResult:
    """Read and check a sweep file. Raises `ValueError` with path, key, value and rule."""
    try:
        return _ADAPTER.validate_json(Path(path).read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise ValueError(f"{path}: {_describe(error)}") from error


def _describe(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    rule = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    if not key:
        return rule
    return f"{key}: {rule}" if first["type"] == "missing" else f"{key}: {reprlib.repr(first['input'])}; {rule}"


def save(result: SweepResult, path: str | os.PathLike) -> None:
    """Write a sweep file; the file at `path` is replaced only once the new one is complete."""
    text = _ADAPTER.dump_json(result, indent=2) + b"\n"
    write_atomically(path, lambda file: file.write(text))


def write_atomically(path: str | os.PathLike, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it to `path`. On an error nothing is left."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()


def resume(path: str | os.PathLike, header: SweepResult) -> SweepResult:
    """`header` with the cells already stored at `path`, or `header` itself where there is no file yet.

    Raises `ValueError` where the file belongs to another checkpoint, model or data set.
    """
    if not Path(path).exists():
        return header
    stored = load(path)
    for key in ("checkpoint", "iteration", "k_train", "num_experts", "data"):
        old, new = getattr(stored, key), getattr(header, key)
        if old != new:
            raise ValueError(f"{path}: {key}: {old!r}; must equal this sweep's {new!r}, or write to another file")
    return dataclasses.replace(header, cells=stored.cells)


def upsert_cell(result: SweepResult, cell: SweepCell) -> SweepResult:
    """`result` with `cell` added, in place of an older cell with the same k. Cells are ordered: k, then k lists."""
    cells = [old for old in result.cells if old.k != cell.k] + [cell]
    return dataclasses.replace(result, cells=tuple(sorted(cells, key=_order)))


def _order(cell: SweepCell) -> tuple[bool, tuple[int, ...]]:
    return (False, (cell.k,)) if isinstance(cell.k, int) else (True, cell.k)


def missing_ks(result: SweepResult, requested: Sequence[int | Sequence[int]]) -> list[int | tuple[int, ...]]:
    """The requested budgets that have no cell yet, in the order requested, each once."""
    measured = {cell.k for cell in result.cells}
    return [k for k in dict.fromkeys(map(_check_k, requested)) if k not in measured]


def curve(result: SweepResult) -> dict[int, SweepCell]:
    """The measured k' in ascending order. Cells with one k per layer are not on the curve."""
    return {cell.k: cell for cell in sorted(result.cells, key=_order) if isinstance(cell.k, int)}


def loss_at(result: SweepResult, k: int) -> float:
    """Loss at k'. Raises `ValueError` where that k' was not measured."""
    measured = curve(result)
    if k not in measured:
        raise ValueError(
            f"{result.label}: no cell at k' = {k} (k_train = {result.k_train}); measured: {list(measured)}"
        )
    return measured[k].loss


def range_end(result: SweepResult, tolerance: float = TOLERANCE) -> int:
    """Largest measured k' such that no measured k'' in [k, k'] is worse than at k by more than `tolerance` x loss at k.

    Budgets below k = k_train play no part. Raises `ValueError` without a cell at k or with a negative tolerance.
    """
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise ValueError(f"tolerance: {tolerance}; must be a finite number >= 0")
    end = result.k_train
    reference = loss_at(result, result.k_train)
    for k, cell in curve(result).items():
        if k > result.k_train:
            if _is_worse(cell.loss, reference, tolerance):
                break
            end = k
    return end


def _is_worse(loss: float, reference: float, tolerance: float) -> bool:
    # Exact in the decimal digits that the file shows: in binary, 2.002 > 2.0 * 1.001.
    exact_loss, exact_reference, exact_tolerance = (Fraction(str(float(x))) for x in (loss, reference, tolerance))
    return exact_loss > exact_reference * (1 + exact_tolerance)


def effective_range(result: SweepResult, tolerance: float = TOLERANCE) -> float:
    """R = `range_end` / k. 1.0 means that the next measured budget is already worse, or that there is none."""
    return range_end(result, tolerance) / result.k_train


def wall(result: SweepResult, tolerance: float = TOLERANCE) -> int | None:
    """The first measured k' past the effective range, or None where no measured budget is worse."""
    end = range_end(result, tolerance)
    return next((k for k in curve(result) if k > end), None)


def best_k(result: SweepResult) -> int:
    """The k' with the lowest loss, the smallest where several tie. Raises `ValueError` without any cell."""
    measured = curve(result)
    if not measured:
        raise ValueError(f"{result.label}: no cell with a single k")
    return min(measured, key=lambda k: (measured[k].loss, k))


def peak_gain(method: SweepResult, baseline: SweepResult) -> float:
    """Loss of plain top-k at k minus the best loss of `method` over k', nats per token; positive is better.

    Raises `ValueError` where the two differ in k_train, experts or held-out data, or the baseline lacks the k cell.
    """
    _check_comparable(method, baseline)
    return loss_at(baseline, baseline.k_train) - loss_at(method, best_k(method))


def cost_at_k(method: SweepResult, baseline: SweepResult) -> float:
    """Loss of `method` at k' = k minus that of plain top-k there, nats per token; positive: the method costs quality.

    Raises `ValueError` like `peak_gain`.
    """
    _check_comparable(method, baseline)
    return loss_at(method, method.k_train) - loss_at(baseline, baseline.k_train)


def _check_comparable(method: SweepResult, baseline: SweepResult) -> None:
    left, right = _basis(method), _basis(baseline)
    for key in left:
        if left[key] != right[key]:
            raise ValueError(f"{key}: {left[key]} in {method.label}, {right[key]} in {baseline.label}; must be equal")


def _basis(result: SweepResult) -> dict[str, object]:
    held_out = {"data.path": list(result.data.path), "data.tokens": result.data.tokens}
    evaluated = {"cells.tokens": sorted({cell.tokens for cell in result.cells})}
    return {"k_train": result.k_train, "num_experts": result.num_experts} | held_out | evaluated


def expert_flops_per_token(
    *, hidden_size: int, moe_ffn_hidden_size: int, num_moe_layers: int, k: int | Sequence[int], gated: bool
) -> int:
    """Forward FLOPs of the routed experts for one token, over all MoE layers; a multiply-add counts as 2 FLOPs.

    An expert is 2 matrices of hidden x ffn, 3 where it is gated (SwiGLU). Router, shared experts, biases and
    activation functions are not counted. `k` is one number, or one per MoE layer.
    """
    return 2 * (3 if gated else 2) * hidden_size * moe_ffn_hidden_size * _experts_per_token(k, num_moe_layers)


def active_parameters(
    *,
    total_parameters: int,
    num_experts: int,
    hidden_size: int,
    moe_ffn_hidden_size: int,
    num_moe_layers: int,
    k: int | Sequence[int],
    gated: bool,
    bias: bool = False,
) -> int:
    """Parameters one token uses: all of the model, embeddings included, less the routed experts it skips.

    Per expert: 2 matrices of hidden x ffn (3 where gated), with `bias` also ffn (2 ffn where gated) + hidden.
    `total_parameters` counts the whole model, not one rank. Raises `ValueError` for a k outside 1..num_experts.
    """
    routed = _experts_per_token(k, num_moe_layers)
    if max([k] if isinstance(k, int) else k) > num_experts:
        raise ValueError(f"k: {k}; must be at most num_experts ({num_experts})")
    matrices = 3 if gated else 2
    per_expert = matrices * hidden_size * moe_ffn_hidden_size
    if bias:
        per_expert += (matrices - 1) * moe_ffn_hidden_size + hidden_size
    return total_parameters - (num_experts * num_moe_layers - routed) * per_expert


def _experts_per_token(k: int | Sequence[int], num_moe_layers: int) -> int:
    checked = _check_k(k)
    if isinstance(checked, int):
        return checked * num_moe_layers
    if len(checked) != num_moe_layers:
        raise ValueError(f"k: {k}; must have one entry for each of the {num_moe_layers} MoE layers")
    return sum(checked)


_FORMATS = {"loss": ".4f", "tokens_per_second": ",.0f", "expert_flops_per_token": ",.0f", "active_params": ",d"}


def markdown_table(results: Sequence[SweepResult], metric: Metric = "loss") -> str:
    """A Markdown table: a row per k', a column per result. What was not measured stays empty.

    Raises `ValueError` without results or where two have the same label.
    """
    check_labels([result.label for result in results])
    curves = [curve(result) for result in results]
    rows = [["k'", *(result.label.replace("|", "\\|") for result in results)], ["---:"] * (len(results) + 1)]
    for k in sorted(set().union(*curves)):
        rows.append([str(k), *(_text(measured.get(k), metric) for measured in curves)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n"


def check_labels(labels: Sequence[str]) -> None:
    """Raises `ValueError` where there is no label or one occurs twice: a reader could not tell the curves apart."""
    if not labels:
        raise ValueError("results: none given; must be at least one")
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"label: {label!r} is given {labels.count(label)} times; must be unique")


def _text(cell: SweepCell | None, metric: Metric) -> str:
    return "" if cell is None else format(getattr(cell, metric), _FORMATS[metric])
