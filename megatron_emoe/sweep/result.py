"""The file of a k' sweep: its fields, their rules, reading and writing. Nothing here imports torch.

Each schema has what the one before lacks as optional fields: what was not measured is absent, never 0 or NaN. Files of
all schemas can be read.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, Literal, TypedDict

from pydantic import BeforeValidator, Field, TypeAdapter, model_validator
from pydantic.dataclasses import dataclass

from megatron_emoe.settings.result_file import (
    STRICT,
    Count,
    Date,
    Number,
    Positive,
    Text,
    Whole,
    demand_same,
    read_checked,
    write_checked,
)


def check_k(k: Any) -> int | tuple[int, ...]:
    """k' as one number or a tuple; ValueError for anything else."""
    ks = tuple(k) if isinstance(k, list | tuple) else (k,)
    if not ks or any(type(each) is not int or each < 1 for each in ks):
        raise ValueError("must be an integer >= 1, or a list with one such integer per MoE layer")
    return ks if isinstance(k, list | tuple) else ks[0]


Nats = Annotated[float, Field(gt=0, le=500)]
"""A loss per token; exp of it is a number."""
BlockLoss = Annotated[float, Field(ge=0, le=1e6)]
NotNegative = Annotated[float, Field(ge=0, le=1e30)]


class Load(TypedDict):
    """Load of a layer's experts as multiples of the even share; dead: experts without a token."""

    __pydantic_config__ = STRICT  # type: ignore[misc]

    min: NotNegative
    p5: NotNegative
    p50: NotNegative
    p95: NotNegative
    max: NotNegative
    dead: Whole


Share = Annotated[float, Field(ge=0, le=1)]
K = Annotated[int | tuple[int, ...], BeforeValidator(check_k)]
Framework = Literal["megatron", "transformers"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepCell:
    """One evaluation. `k` is the number of active experts, or one number per MoE layer in layer order.

    loss: mean held-out loss, nats per token. tokens: tokens evaluated. seconds: wall time of the evaluation.
    rows_per_layer: rows dispatched to experts. expert_flops_per_token: of the routed experts alone.

    Optional. flops_per_token: forward FLOPs of the whole model. latency_ms_batch1, latency_ms_large: milliseconds per
    token, for a token alone and in a full micro-batch. router_entropy: mean entropy of the router's softmax, nats.
    load: see `Load`. coverage: share of the expert pairs used together here that were together in training.
    block_losses: of equally many consecutive sequences each, the sum of the token losses over the mean number of tokens
    of a block, so that their mean is `loss`; the same blocks at every k', for errors of differences (uncertainty.py).
    agreement: share of the tokens whose likeliest next token is that at the k of training. kl_to_k: mean divergence of
    the predictions from those there, nats.
    device: where it ran, "cpu" or the name of the GPU. ranks: how many ran it together.

    Layers are keyed by number: from 1 over all decoder layers, MoE layers only.
    """

    k: K
    loss: Nats
    tokens: Count
    seconds: Positive
    tokens_per_second: Positive
    rows_per_layer: dict[Number, Whole]
    expert_flops_per_token: Positive
    active_params: Count
    flops_per_token: Positive | None = None
    latency_ms_batch1: Positive | None = None
    latency_ms_large: Positive | None = None
    router_entropy: dict[Number, NotNegative] | None = None
    load: dict[Number, Load] | None = None
    coverage: dict[Number, Share] | None = None
    block_losses: Annotated[tuple[BlockLoss, ...], Field(strict=False, min_length=2)] | None = None
    agreement: Share | None = None
    kl_to_k: NotNegative | None = None
    device: Annotated[str, Field(min_length=1)] | None = None
    ranks: Count | None = None

    @model_validator(mode="after")
    def _check_blocks(self) -> "SweepCell":
        if self.block_losses and not math.isclose(fmean(self.block_losses), self.loss, rel_tol=1e-4):
            raise ValueError(f"block_losses: have the mean {fmean(self.block_losses):g}; must be loss ({self.loss:g})")
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepData:
    """The held-out data: dataset paths (none for mock data), the number of tokens asked for, and a digest.

    digest: SHA-256 of the evaluated tokens in order (evaluation.data_digest); None in files of schema 1.
    sequence_length: tokens of a sequence; None in files before schema 3.
    """

    path: Annotated[tuple[str, ...], Field(strict=False)]
    tokens: Count
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    sequence_length: Count | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepResult:
    """The sweep of one checkpoint; a k' that was not measured has no cell.

    framework: what ran the model. num_moe_layers: entries of a k' per layer. tail_scale: a(k') by k' as
    --emoe-tail-scale has it, the key 0 alone for one number at every k'; None for plain top-k'. coverage_at_least:
    how many training tokens must have used a pair for it to count as covered. dtype: of the parameters, as torch names
    it. selection, combine: --emoe-selection and --emoe-combine. versions: of the libraries that ran. training: elastic
    settings of the run that made the checkpoint, as flags and their words, {} for plain top-k; trained_tokens: how many
    it had seen. None where the file is older than the field, or nothing is known.

    Constructing one checks every field and raises a `ValueError` that names the key and the rule.
    """

    schema: Literal[1, 2, 3]
    label: Text
    checkpoint: str
    iteration: Whole
    k_train: Count
    num_experts: Count
    data: SweepData
    cells: Annotated[tuple[SweepCell, ...], Field(strict=False)]
    command: str
    date: Date
    framework: Framework = "megatron"
    num_moe_layers: Count | None = None
    tail_scale: dict[Number, NotNegative] | None = None
    coverage_at_least: Count | None = None
    dtype: str | None = None
    selection: str | None = None
    combine: str | None = None
    versions: dict[str, str] | None = None
    training: dict[str, str] | None = None
    trained_tokens: Whole | None = None

    @model_validator(mode="after")
    def _check_cells(self) -> "SweepResult":
        if self.k_train > self.num_experts:
            raise ValueError(f"k_train: {self.k_train}; must be at most num_experts ({self.num_experts})")
        first_with: dict[K, int] = {}
        for index, cell in enumerate(self.cells):
            ks = (cell.k,) if isinstance(cell.k, int) else cell.k
            if max(ks) > self.num_experts:
                raise ValueError(f"cells[{index}].k: {cell.k}; must be at most num_experts ({self.num_experts})")
            if not isinstance(cell.k, int) and self.num_moe_layers not in (None, len(ks)):
                rule = f"must have one entry for each of the {self.num_moe_layers} MoE layers"
                raise ValueError(f"cells[{index}].k: {list(ks)}; {rule}")
            if first_with.setdefault(cell.k, index) != index:
                raise ValueError(f"cells[{index}].k: {cell.k}; is already in cells[{first_with[cell.k]}], each k once")
            if cell.tokens != self.cells[0].tokens:
                raise ValueError(
                    f"cells[{index}].tokens: {cell.tokens}; must equal cells[0].tokens ({self.cells[0].tokens}): "
                    "losses over different tokens are not one curve"
                )
        blocks = {len(cell.block_losses) for cell in self.cells if cell.block_losses}
        if len(blocks) > 1:
            raise ValueError(f"cells: block_losses of {sorted(blocks)} blocks; must be the same blocks in every cell")
        return self


_ADAPTER = TypeAdapter(SweepResult)


def load(path: str | os.PathLike) -> SweepResult:
    """Read and check a sweep file. Raises `ValueError` with path, key, value and rule."""
    return read_checked(_ADAPTER, path)


def save(result: SweepResult, path: str | os.PathLike) -> None:
    """Write a sweep file; the file at `path` is replaced only once the new one is complete."""
    write_checked(_ADAPTER, result, path, exclude_none=True)


_SAME_SWEEP = ("framework", "checkpoint", "iteration", "k_train", "num_experts", "tail_scale")
_SAME_WHERE_BOTH_SAY = ("dtype", "selection", "combine", "coverage_at_least", "versions")


def resume(path: str | os.PathLike, header: SweepResult) -> SweepResult:
    """`header` with the cells and the digest stored at `path`, or `header` itself where there is no file yet.

    What an older file does not say about its cells is not compared, and stays unsaid. Raises `ValueError` where the
    file belongs to another checkpoint, model, data set or tail scale, or was measured in another way.
    """
    if not Path(path).exists():
        return header
    stored = load(path)
    resumed = agreed(header, stored, partial(demand_same, path))
    return dataclasses.replace(resumed, cells=stored.cells)


def agreed(one: SweepResult, other: SweepResult, demand: Callable[[str, object, object], None]) -> SweepResult:
    """`one` as far as both agree on how they were measured: what only one says of all its cells is unsaid.

    demand: called with a key and the values of `other` and `one`; raises where they are not equal.
    """
    if 1 in (other.schema, one.schema):  # without a digest: nobody knows which tokens
        demand("schema", other.schema, one.schema)
    for key in _SAME_SWEEP:
        demand(key, getattr(other, key), getattr(one, key))
    demand("data", _asked(other.data), _asked(one.data))
    both = {key: (getattr(other, key), getattr(one, key)) for key in _SAME_WHERE_BOTH_SAY}
    digests = (other.data.digest, one.data.digest)
    lengths = (other.data.sequence_length, one.data.sequence_length)
    for key, values in (both | {"data.digest": digests, "data.sequence_length": lengths}).items():
        if None not in values:
            demand(key, *values)
    known: dict[str, Any] = {key: None if None in values else values[0] for key, values in both.items()}
    known["coverage_at_least"] = one.coverage_at_least or other.coverage_at_least  # of the cells with a coverage
    data = dataclasses.replace(
        one.data, digest=digests[1] or digests[0], sequence_length=None if None in lengths else lengths[0]
    )
    known |= {key: getattr(one, key) or getattr(other, key) for key in ("num_moe_layers", "trained_tokens")}
    known["training"] = other.training if one.training is None else one.training
    return dataclasses.replace(one, schema=max(one.schema, other.schema), data=data, **known)


def _asked(data: SweepData) -> Mapping[str, object]:
    return {"path": list(data.path), "tokens": data.tokens}


def with_digest(result: SweepResult, digest: str) -> SweepResult:
    """`result` with the digest of the data it is measured on. Raises `ValueError` where it has another one."""
    if result.data.digest not in (None, digest):
        raise ValueError(
            f"{result.label}: data.digest: {result.data.digest}; the data now give {digest}: "
            "the finished cells are of other tokens; write to another file"
        )
    return dataclasses.replace(result, data=dataclasses.replace(result.data, digest=digest))


def upsert_cell(result: SweepResult, cell: SweepCell) -> SweepResult:
    """`result` with `cell` added, in place of an older cell with the same k. Cells are ordered: k, then k lists."""
    cells = [old for old in result.cells if old.k != cell.k] + [cell]
    return dataclasses.replace(result, cells=tuple(sorted(cells, key=cell_order)))


def cell_order(cell: SweepCell) -> tuple[bool, tuple[int, ...]]:
    """Sorts cells: one k' first, then those per layer, each in ascending order."""
    return (False, (cell.k,)) if isinstance(cell.k, int) else (True, cell.k)


def missing_ks(
    result: SweepResult, requested: Sequence[int | Sequence[int]], fields: Sequence[str] = ()
) -> list[int | tuple[int, ...]]:
    """The requested budgets that have no cell yet, or none with all optional `fields`; as requested, each once."""
    measured = {cell.k for cell in result.cells if all(getattr(cell, field) is not None for field in fields)}
    return [k for k in dict.fromkeys(map(check_k, requested)) if k not in measured]


def check_same_data(results: Sequence[SweepResult]) -> None:
    """Raises `ValueError` where two results with digests were measured on different tokens: they are not one chart."""
    known = [result for result in results if result.data.digest is not None]
    for other in known[1:]:
        if other.data.digest != known[0].data.digest:
            left, right = (f"{str(each.data.digest)[:12]}... in {each.label}" for each in (known[0], other))
            raise ValueError(f"data.digest: {left}, {right}; must be equal: losses over different tokens")
