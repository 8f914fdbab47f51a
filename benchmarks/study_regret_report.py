"""The regret tables of docs/study.md, from the cells in docs/study/regret, between the report's markers.

Regret at k' is the loss of one checkpoint there minus that of the specialist: plain top-k continued at that k' from the
same base, with the same seed, on the same tokens at the same learning rate.
"""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import study_regret_methods as plan
from study_report import Curve, mean_of, read_curves, replace_parts

FLOOR = 0.1
"""Percent: what a regret may be at each k' for the goal to count as nearly met."""
GRID_HEAD = [f"k' = {k}" for k in plan.GRID]


@dataclasses.dataclass(frozen=True)
class Row:
    """A method's regrets, one for each seed. passes: over every batch, in training. taught: by the base, at k. tokens:
    of training; share: of the specialists'."""

    name: str
    curves: Sequence[Curve]
    passes: int
    taught: bool
    tokens: int
    share: float
    regrets: Sequence[dict[int, float]]
    nats: Sequence[dict[int, float]]

    def at(self, k: int) -> list[float]:
        """In percent, one for each seed."""
        return [one[k] for one in self.regrets]

    @property
    def mean(self) -> list[float]:
        return [statistics.mean(one.values()) for one in self.regrets]

    @property
    def worst(self) -> list[float]:
        return [max(one.values()) for one in self.regrets]

    @property
    def flops(self) -> float:
        """Expert FLOPs of training against plain top-k. A teacher's forward pass is a third of a step's at k."""
        own = self.passes * statistics.mean(one.experts for one in self.curves) / plan.K
        return self.share * (own + self.taught / 3)


def curves_of(folder: Path, base: str) -> list[Curve]:
    """Every curve of the methods that continue a base."""
    mine = {method.name for method in plan.methods(base)}
    every = read_curves(folder, [method.name for method in plan.METHODS], plan.K)
    return [one for one in every if one.method in mine]


def rows(folder: Path, base: str = "base") -> list[Row]:
    """Every method with seeds of which all specialists are there."""
    curves = curves_of(folder, base)
    records = {one["method"]: one for one in _records(folder)}
    experts = specialists(curves, base)
    found = []
    for name in dict.fromkeys(one.row for one in curves):
        own = [one for one in curves if one.row == name and one.seed in experts and _is_whole(one)]
        nats = [{k: _loss(one, k) - experts[one.seed][k] for k in plan.GRID} for one in own]
        percent = [
            {k: 100 * value / experts[one.seed][k] for k, value in regret.items()}
            for one, regret in zip(own, nats, strict=True)
        ]
        if own:
            record = records[own[0].method]
            share = record["tokens"] / records[plan.specialist(plan.K, base)]["tokens"]
            taught = record.get("teacher", False)
            found.append(Row(name, own, record["passes"], taught, record["tokens"], share, percent, nats))
    return found


def _is_whole(one: Curve) -> bool:
    return all(one.loss(k) is not None for k in plan.GRID)


def _loss(one: Curve, k: int) -> float:
    loss = one.loss(k)
    assert loss is not None
    return loss


def specialists(curves: Sequence[Curve], base: str = "base") -> dict[int, dict[int, float]]:
    """The loss of each seed's specialists at their k', where all of them are there."""
    found: dict[int, dict[int, float]] = {}
    for k in plan.GRID:
        for one in curves:
            if one.method == plan.specialist(k, base) and not one.fitted and (loss := one.loss(k)) is not None:
                found.setdefault(one.seed, {})[k] = loss
    return {seed: losses for seed, losses in found.items() if len(losses) == len(plan.GRID)}


def table(found: Sequence[Row]) -> str:
    """Markdown: regret in percent at each k', its mean and its worst over them, and what training cost."""
    head = ["method", *GRID_HEAD, "mean", "worst", "expert FLOPs", "tokens", "seeds"]
    lines = _table_head(head)
    for row in found:
        numbers = [mean_of(row.at(k), "+.2f") for k in plan.GRID]
        numbers += [mean_of(row.mean, "+.2f"), mean_of(row.worst, "+.2f"), f"{row.flops:.2f}", f"{row.tokens:,}"]
        lines.append("| " + " | ".join([row.name, *numbers, str(len(row.regrets))]) + " |")
    return "\n".join(lines) + "\n"


def nats_table(found: Sequence[Row]) -> str:
    """Markdown: the same regrets in nats."""
    lines = _table_head(["method", *GRID_HEAD, "seeds"])
    for row in found:
        numbers = [mean_of([one[k] for one in row.nats], "+.4f") for k in plan.GRID]
        lines.append("| " + " | ".join([row.name, *numbers, str(len(row.nats))]) + " |")
    return "\n".join(lines) + "\n"


def specialists_table(folder: Path, base: str = "base") -> str:
    """Markdown: the loss of every specialist at every k' of the grid. Its own is what the others are measured from."""
    curves = curves_of(folder, base)
    lines = _table_head(["specialist at", *GRID_HEAD, "seeds"])
    for trained in plan.GRID:
        own = [one for one in curves if one.method == plan.specialist(trained, base) and not one.fitted]
        losses = [mean_of([loss for one in own if (loss := one.loss(k)) is not None], ".4f") for k in plan.GRID]
        if own:
            lines.append("| " + " | ".join([f"k' = {trained}", *losses, str(len(own))]) + " |")
    return "\n".join(lines) + "\n"


def _table_head(head: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]


def answer(found: Sequence[Row]) -> str:
    """One line: the method with the smallest worst regret among those with most seeds, and whether the goal is met."""
    methods = [row for row in found if not row.name.startswith("specialist-")]
    if not methods:
        return "**No regret yet**: the specialists' cells are missing.\n"
    most = max(len(row.regrets) for row in methods)
    best = min((row for row in methods if len(row.regrets) == most), key=lambda row: statistics.mean(row.worst))
    at = {k: statistics.mean(best.at(k)) for k in plan.GRID}
    numbers = ", ".join(f"{mean_of([value], '+.2f')} % at k' = {k}" for k, value in at.items())
    seeds = f"{most} seed" + "s" * (most != 1)
    about = f"{seeds}, {best.flops:.2f} times the expert FLOPs of plain top-k"
    return f"**Regret of the best method, {best.name}** ({about}): {numbers}. {_verdict(max(at.values()))}\n"


def _verdict(worst: float) -> str:
    if worst <= 0:
        return "Goal, at most 0 at each: **met**."
    return (
        f"Goal, at most 0 at each: **not met**; floor, {FLOOR} % at each: **{'met' if worst <= FLOOR else 'not met'}**."
    )


def provenance(folder: Path) -> str:
    """When and with what the cells were made."""
    records = _records(folder)
    dates = sorted({record["date"] for record in records})
    versions = {f"{name} {number}" for record in records for name, number in record["versions"].items()}
    minutes = sum(sum(record["seconds"].values()) for record in records) / 60
    tokens = sorted({record["sweep"]["cells"][0]["tokens"] for record in records})
    return (
        f"{len(records)} cells of {', '.join(dates)}, {minutes:.0f} minutes in sum, {', '.join(sorted(versions))}; "
        f"each loss on {', '.join(f'{count:,}' for count in tokens)} held-out tokens.\n"
    )


def _records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def parts(folder: Path) -> dict[str, str]:
    """What belongs between the report's markers."""
    found, raw = rows(folder), rows(folder, "base-raw")
    return {
        "regret answer": answer(found),
        "regret": table(found),
        "regret nats": nats_table(found),
        "specialists": specialists_table(folder),
        "regret raw": table(raw),
        "specialists raw": specialists_table(folder, "base-raw"),
        "regret provenance": provenance(folder),
    }


def write(folder: Path, report: Path) -> None:
    """Replace what stands between the report's markers.

    Raises:
        ValueError: the report lacks a marker.
    """
    replace_parts(report, parts(folder))
