"""Writes the tables and the figure of docs/study.md from the cells in docs/study, between the report's markers."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import study_methods as plan
from matplotlib.figure import Figure
from pydantic import TypeAdapter

from megatron_emoe.settings.atomic_file import write_atomically, written_whole
from megatron_emoe.sweep.curve import best_k, curve, loss_at, range_end, upsert_cell
from megatron_emoe.sweep.result import SweepResult

REPO = Path(__file__).resolve().parent.parent
_SWEEP = TypeAdapter(SweepResult)


@dataclasses.dataclass(frozen=True)
class Curve:
    """One row of the tables for one seed. fitted: with the fitted tail scale above k, else plain top-k'. experts: per
    token and layer in training. scale: losses are at k' times this (null experts count as experts in k')."""

    method: str
    seed: int
    fitted: bool
    experts: float
    sweep: SweepResult
    scale: int = 1

    @property
    def row(self) -> str:
        return f"{self.method} + a(k')" if self.fitted else self.method

    def loss(self, k: int) -> float | None:
        measured = curve(self.sweep).get(k * self.scale)
        return None if measured is None else measured.loss

    @property
    def reach(self) -> float:
        """Effective range R."""
        return range_end(self.sweep) / self.sweep.k_train

    @property
    def best(self) -> float:
        return loss_at(self.sweep, best_k(self.sweep))


def read(folder: Path) -> list[Curve]:
    """Every curve of every finished cell, in the order of the study's plan."""
    return read_curves(folder, [method.name for method in plan.METHODS], plan.K)


def read_curves(folder: Path, order: Sequence[str], k: int) -> list[Curve]:
    """The same of any study with these methods, whose base is trained at `k`."""
    curves = []
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        plain = _SWEEP.validate_json(json.dumps(record["sweep"]))
        scale = record["k"] // k if record["method"] == "null-experts" else 1
        one = Curve(record["method"], record["seed"], False, record["active_experts"], plain, scale)
        curves.append(one)
        if "fitted_sweep" in record:
            curves.append(dataclasses.replace(one, fitted=True, sweep=_with_low_k(record["fitted_sweep"], plain)))
    return sorted(curves, key=lambda one: (order.index(one.method), one.fitted, one.seed))


def _with_low_k(fitted: dict[str, Any], plain: SweepResult) -> SweepResult:
    """The fitted sweep, and below k the plain one: nothing is scaled there."""
    result = _SWEEP.validate_json(json.dumps(fitted))
    for k, cell in curve(plain).items():
        if k < plain.k_train:
            result = upsert_cell(result, cell)
    return result


def table(curves: Sequence[Curve], methods: Sequence[plan.Method], against: str = "topk") -> str:
    """Markdown: losses at each k', then what they amount to; mean and standard deviation over the seeds. against: name
    of the method that the others' cost and gain are measured from."""
    baseline = {one.seed: one for one in curves if one.method == against and not one.fitted}
    head = ["method", "experts", *(f"k' = {k}" for k in plan.KS), "R", "cost at k", "peak gain", "seeds"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for row in dict.fromkeys(one.row for one in curves if one.method in {method.name for method in methods}):
        seeds = [one for one in curves if one.row == row]
        lines.append("| " + " | ".join([row, *_numbers(seeds, baseline)]) + " |")
    return "\n".join(lines) + "\n"


def _numbers(seeds: Sequence[Curve], baseline: dict[int, Curve]) -> list[str]:
    def paired(value: Callable[[Curve, Curve], float], form: str, unit: str = "") -> str:
        return mean_of([value(one, baseline[one.seed]) for one in seeds if one.seed in baseline], form, unit)

    comparable = seeds[0].sweep.k_train == plan.K
    losses = [mean_of([loss for one in seeds if (loss := one.loss(k)) is not None], ".4f") for k in plan.KS]
    reach = sorted({f"{one.reach:.1f}" for one in seeds}, key=float)
    return [
        f"{statistics.mean(one.experts for one in seeds):.2f}",
        *losses,
        " to ".join(dict.fromkeys((reach[0], reach[-1]))) if comparable else "",
        paired(_relative_cost, "+.2f", "%") if comparable else "",
        paired(lambda one, base: loss_at(base.sweep, plan.K) - one.best, "+.4f"),
        str(len(seeds)),
    ]


def _relative_cost(one: Curve, base: Curve) -> float:
    """Loss at k against plain top-k continued with the same seed, in percent."""
    return 100 * (loss_at(one.sweep, plan.K) / loss_at(base.sweep, plan.K) - 1)


def mean_of(values: Sequence[float], form: str, unit: str = "") -> str:
    """Mean, with the standard deviation where there are several values; nothing where there is none."""
    if not values:
        return ""
    mean = format(round(statistics.mean(values), 4) + 0.0, form) + unit  # never -0
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):{form.lstrip('+')}}{unit}"


def scales(curves: Sequence[Curve]) -> str:
    """Markdown: the fitted a(k') of every method, mean over the seeds."""
    lines = ["| method | " + " | ".join(f"k' = {k}" for k in plan.FITTED_KS) + " |"]
    lines.append("| --- |" + " ---: |" * len(plan.FITTED_KS))
    fitted = [one for one in curves if one.fitted]
    for method in dict.fromkeys(one.method for one in fitted):
        tables = [one.sweep.tail_scale or {} for one in fitted if one.method == method]
        values = [mean_of([t[str(k)] for t in tables if str(k) in t], ".2f") for k in plan.FITTED_KS]
        lines.append(f"| {method} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"


def provenance(folder: Path) -> str:
    """When and with what the cells were made."""
    records = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    dates = sorted({record["date"] for record in records})
    versions = {f"{name} {number}" for record in records for name, number in record["versions"].items()}
    minutes = sum(sum(record["seconds"].values()) for record in records) / 60
    tokens = {record["sweep"]["cells"][0]["tokens"] for record in records}
    return (
        f"{len(records)} cells of {', '.join(dates)}, {minutes:.0f} minutes in sum, {', '.join(sorted(versions))}; "
        f"each loss on {', '.join(f'{count:,}' for count in tokens)} held-out tokens.\n"
    )


def figure(curves: Sequence[Curve], target: Path) -> None:
    """Loss over k' of the main methods, mean over the seeds."""
    drawn = Figure(figsize=(8, 5), layout="constrained")
    axes = drawn.subplots()
    main = {method.name for method in plan.MAIN}
    for row in dict.fromkeys(one.row for one in curves if one.method in main):
        seeds = [one for one in curves if one.row == row]
        points = [(k, [loss for one in seeds if (loss := one.loss(k)) is not None]) for k in plan.KS]
        points = [(k, statistics.mean(losses)) for k, losses in points if losses and k >= plan.K]
        axes.plot(*zip(*points, strict=True), marker="o", label=row, linestyle="--" if seeds[0].fitted else "-")
    axes.set(xlabel="k' (experts per token in evaluation)", ylabel="held-out loss, nats per token")
    axes.axvline(plan.K, color="grey", linewidth=0.8)
    axes.legend(fontsize=8)
    with written_whole(target) as file:
        drawn.savefig(file, format="png", dpi=120)


def write(folder: Path, report: Path) -> None:
    """Replace what stands between the report's markers.

    Raises:
        ValueError: the report lacks a marker.
    """
    curves = read(folder)
    parts = {
        "main": table(curves, plan.MAIN),
        "ablations": table(curves, plan.ABLATIONS),
        "raw": table(curves, plan.RAW, against="topk-raw"),
        "scales": scales(curves),
        "provenance": provenance(folder),
    }
    replace_parts(report, parts)
    figure(curves, report.with_suffix(".png"))


def replace_parts(report: Path, parts: Mapping[str, str]) -> None:
    """Put each part between the markers of its name (ValueError where the report lacks one)."""
    text = report.read_text()
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"{report}: the marker {begin.strip()} or {end} is missing")
        text = text.partition(begin)[0] + begin + part + end + text.partition(end)[2]
    write_atomically(report, text)
