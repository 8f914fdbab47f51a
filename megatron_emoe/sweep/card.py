"""The content of an elasticity card: what sweeps measured, as tables of text. An empty cell was not measured.

Pure functions over sweep results; `card_page` lays a card out as HTML and as Markdown. Losses are in nats per token;
"to k" is the loss less the loss at the k of training.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.allocation import moe_layers, sensitivities
from megatron_emoe.sweep.budget import flops_share, is_uniform, name
from megatron_emoe.sweep.curve import SweepCell, SweepResult
from megatron_emoe.sweep.serving import tail_scale_at

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Table:
    """Texts by row and column; the first column names the row. note: what a reader must know to read it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One heading of the card and the tables under it. command: the command line that produced them, if one did."""

    title: str
    tables: tuple[Table, ...]
    command: str = ""


@dataclass(frozen=True)
class Card:
    """title, then sections in order. The first section is the summary; charts come after it."""

    title: str
    sections: tuple[Section, ...]


def make_card(
    results: Sequence[SweepResult],
    *,
    baseline: SweepResult | None = None,
    seeds: Sequence[int] | None = None,
    title: str = "",
) -> Card:
    """The card of one or more sweeps over the same data.

    baseline: plain top-k, which peak gain and cost at k refer to; it may be one of the results. seeds: of the training
    runs, one per result; results of one label are then different seeds of one method.

    Raises:
        ValueError: labels that repeat, another number of seeds, results that cannot be compared, or one without a cell
            at the k of training.
    """
    named = name_seeds(results, seeds)
    everything = [*named, *([baseline] if baseline is not None and baseline not in results else [])]
    check_together(everything)
    overview = [_summary(everything, baseline)]
    overview += [_curves(everything)] if len(everything) > 1 else []
    overview += _over_seeds(results) if seeds else []
    own_seeds = [*(map(str, seeds) if seeds else [""] * len(named)), ""]
    sections = [_section(result, seed) for result, seed in zip(everything, own_seeds, strict=False)]
    labels = ", ".join(dict.fromkeys(result.label for result in results))
    return Card(title or f"Elasticity card: {labels}", (Section("Summary", tuple(overview)), *sections))


def name_seeds(results: Sequence[SweepResult], seeds: Sequence[int] | None) -> list[SweepResult]:
    """The results, each label with its seed where seeds are given. Raises `ValueError` for another number of seeds."""
    if seeds is None:
        return list(results)
    if len(seeds) != len(results):
        raise ValueError(f"--seeds: {len(seeds)} given; must be one for each of the {len(results)} results")
    pairs = zip(results, seeds, strict=True)
    return [dataclasses.replace(result, label=f"{result.label}, seed {seed}") for result, seed in pairs]


def check_together(results: Sequence[SweepResult]) -> None:
    """Raises `ValueError` where the results do not belong on one card, naming key, both values and both labels."""
    sweep.check_labels([result.label for result in results])
    for result in results:
        sweep.range_end(result)  # raises without a cell at the k of training, which everything refers to
    sweep.check_same_data(results)
    for other in results[1:]:
        sweep.cost_at_k(other, results[0])  # raises where models or data differ


def _summary(results: Sequence[SweepResult], baseline: SweepResult | None) -> Table:
    head = ("sweep", "k", "loss at k", "best k'", "loss there", "effective range", "wall", "peak gain", "cost at k")
    rows = [(result.label, *_numbers(result), *_against(result, baseline)) for result in results]
    note = (
        f"Effective range: the largest measured k' before every loss more than {sweep.TOLERANCE:.1%} above the loss at "
        "k, over k. Wall: the first measured k' past it, none where there is none. "
    )
    if baseline is not None:
        note += f"Peak gain: loss of {baseline.label} at k less the best loss. Cost at k: loss at k less its loss at k."
    return Table("Effective range, wall and gain", head, tuple(rows), note)


def _numbers(result: SweepResult) -> list[str]:
    best, wall = sweep.best_k(result), sweep.wall(result)
    return [
        str(result.k_train),
        f"{sweep.loss_at(result, result.k_train):.4f}",
        str(best),
        f"{sweep.loss_at(result, best):.4f}",
        f"{sweep.effective_range(result):.3g}",
        "none" if wall is None else str(wall),
    ]


def _against(result: SweepResult, baseline: SweepResult | None) -> list[str]:
    if baseline is None:
        return ["", ""]
    return [f"{sweep.peak_gain(result, baseline):+.4f}", f"{sweep.cost_at_k(result, baseline):+.4f}"]


def _curves(results: Sequence[SweepResult]) -> Table:
    curves = [sweep.curve(result) for result in results]
    rows = [
        (str(k), *(f"{curve[k].loss:.4f}" if k in curve else "" for curve in curves))
        for k in sorted(set().union(*curves))
    ]
    return Table("Held-out loss", ("k'", *(result.label for result in results)), tuple(rows))


def _over_seeds(results: Sequence[SweepResult]) -> list[Table]:
    """Mean and standard deviation per label; a k' that some seed lacks stays empty."""
    by_label: dict[str, list[dict[int, SweepCell]]] = {}
    for result in results:
        by_label.setdefault(result.label, []).append(sweep.curve(result))
    curves = {label: group for label, group in by_label.items() if len(group) > 1}
    if not curves:
        return []
    ks = sorted({k for group in curves.values() for curve in group for k in curve})
    rows = tuple((str(k), *(_mean([c[k].loss for c in g if k in c], len(g)) for g in curves.values())) for k in ks)
    head = ("k'", *(f"{label}, {len(group)} seeds" for label, group in curves.items()))
    return [Table("Held-out loss over seeds", head, rows, "Mean ± standard deviation (n - 1) of the seeds.")]


def _mean(losses: Sequence[float], seeds: int) -> str:
    if len(losses) < seeds:
        return ""
    return f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}"


def _section(result: SweepResult, seed: str) -> Section:
    tables = [_cells(result), *_evidence(result), *_sensitivity(result), *_per_layer(result), _origin(result, seed)]
    return Section(result.label, tuple(tables), result.command)


Column = tuple[str, Callable[[SweepCell], str]]


def _cells(result: SweepResult) -> Table:
    """A row per k'."""
    reference = sweep.loss_at(result, result.k_train)
    columns: list[Column] = [
        ("loss", lambda cell: f"{cell.loss:.4f}"),
        ("to k", lambda cell: f"{cell.loss - reference:+.4f}"),
        ("to k, %", lambda cell: f"{(cell.loss / reference - 1) * 100:+.2f}"),
        ("tail scale", lambda cell: _tail_scale(result, cell)),
        ("tokens/s", lambda cell: f"{cell.tokens_per_second:.4g}"),
        ("ms/token, alone", lambda cell: _number(cell.latency_ms_batch1)),
        ("ms/token, full batch", lambda cell: _number(cell.latency_ms_large)),
        ("FLOPs/token", lambda cell: with_unit(cell.flops_per_token)),
        ("expert FLOPs/token", lambda cell: with_unit(cell.expert_flops_per_token)),
        ("active parameters", lambda cell: with_unit(cell.active_params)),
    ]
    note = "Forward FLOPs. Alone: one token by itself. Full batch: a token of an evaluation micro-batch."
    return _by_k("Quality and cost", result, columns, note)


def _by_k(title: str, result: SweepResult, columns: Sequence[Column], note: str) -> Table:
    rows = tuple((str(k), *(text(cell) for _, text in columns)) for k, cell in sweep.curve(result).items())
    return Table(title, ("k'", *(head for head, _ in columns)), rows, note)


def _tail_scale(result: SweepResult, cell: SweepCell) -> str:
    """a(k') past the k of training where the sweep says so; elsewhere there is no tail to scale."""
    if result.tail_scale is None or not isinstance(cell.k, int) or cell.k <= result.k_train:
        return ""
    return f"{tail_scale_at(result, cell.k):.4g}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def with_unit(value: float | None) -> str:
    """A count to three digits with its unit, `12.3 M`; empty where there is none."""
    if value is None:
        return ""
    scale, unit = next((entry for entry in UNITS if value >= entry[0]), (1.0, ""))
    return f"{value / scale:.3g} {unit}".strip()


def _evidence(result: SweepResult) -> list[Table]:
    """How the routers used the experts, over the MoE layers; no table where no cell has any of it."""
    measured = [(c.router_entropy, c.load, c.coverage) for c in sweep.curve(result).values()]
    if not any(any(part) for part in measured):
        return []
    columns: list[Column] = [
        ("router entropy", lambda cell: _over(statistics.mean, cell.router_entropy)),
        ("load: least", lambda cell: _load(min, cell, "min")),
        ("5 %", lambda cell: _load(min, cell, "p5")),
        ("median", lambda cell: _load(statistics.median, cell, "p50")),
        ("95 %", lambda cell: _load(max, cell, "p95")),
        ("most", lambda cell: _load(max, cell, "max")),
        ("dead experts", lambda cell: _load(sum, cell, "dead")),
        ("coverage, mean", lambda cell: _over(statistics.mean, cell.coverage)),
        ("coverage, least", lambda cell: _over(min, cell.coverage)),
    ]
    note = (
        "Over the MoE layers: entropy in nats per token, mean of layers. Load in multiples of the even share: the "
        "lowest layer's least and 5th percentile, the median of the medians, the highest layer's 95th percentile and "
        "most; experts without a token, in all. Coverage: share of the pairs active together at k' that were so for "
        f"{result.coverage_at_least or 1} or more tokens in training."
    )
    return [_by_k("Routing", result, columns, note)]


def _over(reduce: Callable, by_layer: dict[str, float] | None) -> str:
    return f"{reduce(by_layer.values()):.3g}" if by_layer else ""


def _load(reduce: Callable, cell: SweepCell, key: Literal["min", "p5", "p50", "p95", "max", "dead"]) -> str:
    return f"{reduce([load[key] for load in cell.load.values()]):.3g}" if cell.load else ""


def _sensitivity(result: SweepResult) -> list[Table]:
    """Layer by k': what that k' at this layer alone adds to the loss."""
    table = sensitivities(result)
    ks = sorted(set().union(*table) - {result.k_train}) if table else []
    if not ks:
        return []
    rows = [
        (layer, *(f"{added[k]:+.4f}" if k in added else "" for k in ks))
        for layer, added in zip(layer_names(result), table, strict=True)
    ]
    note = f"Loss to k where only this layer runs k' and all others run k = {result.k_train}."
    return [Table("Layer sensitivity", ("layer", *(f"k' = {k}" for k in ks)), tuple(rows), note)]


def layer_names(result: SweepResult) -> list[str]:
    """Numbers of the MoE layers as counted rows have them; 1, 2, ... where nothing was counted."""
    counted = next((cell.rows_per_layer for cell in result.cells if cell.rows_per_layer), None)
    return sorted(counted, key=int) if counted else [str(n + 1) for n in range(moe_layers(result) or 0)]


def _per_layer(result: SweepResult) -> list[Table]:
    """Measured allocations that change more than one layer, beside the uniform k' of the same number of experts."""
    cells = [cell for cell in result.cells if not isinstance(cell.k, int) and _changed(result, cell.k) > 1]
    if not cells:
        return []
    uniform = {round(flops_share(result, cell), 6): cell for cell in sweep.curve(result).values()}
    rows = []
    for cell in cells:
        same = uniform.get(round(flops_share(result, cell), 6))
        rows.append((*_allocation(result, cell), *_beside(cell, same)))
    head = ("k' per layer", "experts", "expert FLOPs to k", "loss", "to k", "same cost, one k'", "loss there", "to it")
    return [Table("One k' per layer", head, tuple(rows), "Measured. Negative in the last column: better.")]


def _changed(result: SweepResult, ks: Sequence[int]) -> int:
    return sum(k != result.k_train for k in ks)


def _allocation(result: SweepResult, cell: SweepCell) -> list[str]:
    experts = sum(cell.k) if not isinstance(cell.k, int) else cell.k
    to_k = cell.loss - sweep.loss_at(result, result.k_train)
    return [name(cell.k), str(experts), f"{flops_share(result, cell):.3g}", f"{cell.loss:.4f}", f"{to_k:+.4f}"]


def _beside(cell: SweepCell, same: SweepCell | None) -> list[str]:
    if same is None or is_uniform(cell):
        return ["", "", ""]
    return [name(same.k), f"{same.loss:.4f}", f"{cell.loss - same.loss:+.4f}"]


def _origin(result: SweepResult, seed: str) -> Table:
    tail = result.tail_scale
    scales = "none: plain top-k'" if tail is None else ", ".join(map(_entry, sorted(tail.items(), key=_first)))
    rows = [
        ("checkpoint", result.checkpoint),
        ("framework", result.framework),
        ("iteration", str(result.iteration)),
        ("k of training", f"{result.k_train} of {result.num_experts} experts"),
        ("MoE layers", str(moe_layers(result) or "")),
        ("seed of training", seed),
        ("tail scale", scales),
        ("data", ", ".join(result.data.path) or "mock data"),
        ("tokens", str(result.cells[0].tokens)),
        ("digest of the tokens", result.data.digest or ""),
        ("date", result.date),
    ]
    return Table("How it was produced", ("", "value"), tuple(rows))


def _first(item: tuple[str, float]) -> int:
    return int(item[0])


def _entry(item: tuple[str, float]) -> str:
    return f"{item[1]:g}" + (f" at k' = {item[0]}" if item[0] != "0" else " at every k'")
