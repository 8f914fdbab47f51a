"""The content of an elasticity card: the answer, then what sweeps measured, as tables of text.

Pure functions over sweep results; `card_sweep` has the part of one sweep, `card_page` lays a card out as HTML and as
Markdown. Losses are in nats per token, with four digits after the point, other numbers have three digits; ± is a
standard error over the held-out data. An empty cell was not measured.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.card_served import served_section
from megatron_emoe.sweep.card_sweep import section_of
from megatron_emoe.sweep.card_table import Section, Table
from megatron_emoe.sweep.curve import SweepCell, SweepResult
from megatron_emoe.sweep.regret import regret_line, regret_table, specialists
from megatron_emoe.sweep.served import ServedResult
from megatron_emoe.sweep.summary import answer, scaled, shown_label, to_k
from megatron_emoe.sweep.uncertainty import difference


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
    experts: Sequence[SweepResult] = (),
    served: Sequence[ServedResult] = (),
    title: str = "",
) -> Card:
    """The card of one or more sweeps over the same data.

    baseline: plain top-k, which peak gain and cost at k refer to; it may be one of the results. seeds: of the training
    runs, one per result; results of one label are then different seeds of one method.
    experts: specialists, one for each k', which regret refers to (regret.py). served: load tests of servers of these
    models.

    Raises:
        ValueError: labels that repeat, another number of seeds, results that cannot be compared, or one without a cell
            at the k of training; a load test of a model with another k.
    """
    apart = [baseline] if baseline is not None and baseline not in results else []
    everything = shown([*name_seeds(results, seeds), *apart])
    check_together(everything)
    against = None if baseline is None else shown([baseline])[0]
    overview = [_summary(everything, against)]
    envelope = specialists(experts) if experts else {}
    if envelope:
        sweep.check_same_data([*everything, *experts])
        overview.append(regret_table(everything, envelope))
    overview += [_curves(everything)] if len(everything) > 1 else []
    overview += _over_seeds(results) if seeds else []
    own_seeds = [*(map(str, seeds) if seeds else [""] * len(results)), ""]
    sections = [section_of(result, seed) for result, seed in zip(everything, own_seeds, strict=False)]
    sections += [served_section(found, everything[0]) for found in served]
    labels = ", ".join(dict.fromkeys(result.label for result in shown(results)))
    answers = (*(f"{result.label}: {answer(result)}" for result in everything), *_unlike(everything, against))
    answers += tuple(regret_line(result, envelope) for result in everything) if envelope else ()
    return Card(title or f"Elasticity card: {labels}", (Section("Summary", tuple(overview), lines=answers), *sections))


def shown(results: Sequence[SweepResult]) -> list[SweepResult]:
    """The results under the labels that tables and charts give them."""
    return [dataclasses.replace(result, label=shown_label(result)) for result in results]


def _unlike(results: Sequence[SweepResult], baseline: SweepResult | None) -> list[str]:
    """Says so where results with a tail scale stand against a baseline that is shown without one alone."""
    if baseline is None or scaled(baseline):
        return []
    others = [result.label for result in results if scaled(result) and result.checkpoint != baseline.checkpoint]
    of_baseline = [result for result in results if result.checkpoint == baseline.checkpoint and scaled(result)]
    if not others or of_baseline:
        return []
    return [
        f"{', '.join(others)} with a tail scale, {baseline.label} without: a part of the difference past k is the "
        f"scale's. Fit one for {baseline.checkpoint} too (tools/fit_tail_scale.py) and add its sweep."
    ]


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
    head: tuple[str, ...] = ("sweep", "k", "loss at k", "best k'", "loss there", "to k", "effective range", "wall")
    head += ("peak gain", "cost at k") if baseline is not None else ()
    rows = [(result.label, *_numbers(result), *_against(result, baseline)) for result in results]
    note = (
        f"Effective range: the largest measured k' before every loss more than {sweep.TOLERANCE:.1%} above the loss at "
        "k, over k. Wall: the first measured k' past it, none where there is none. Best k': of the lowest loss; the "
        "k' to use, above, is the smallest one that is not surely worse, by two standard errors. "
    )
    if baseline is not None:
        note += (
            f"Peak gain: loss of {baseline.label} at k less the best loss. Cost at k: loss at k less its loss at k. "
        )
    if not any(cell.block_losses for result in results for cell in result.cells):
        note += "These sweeps are older than errors: nothing says how sure a difference is."
    return Table("Effective range, wall and gain", head, tuple(rows), note.strip())


def _numbers(result: SweepResult) -> list[str]:
    best, wall = sweep.best_k(result), sweep.wall(result)
    return [
        str(result.k_train),
        f"{sweep.loss_at(result, result.k_train):.4f}",
        str(best),
        f"{sweep.loss_at(result, best):.4f}",
        to_k(result, sweep.curve(result)[best]).text(),
        f"{sweep.effective_range(result):.3g}",
        "none" if wall is None else str(wall),
    ]


def _against(result: SweepResult, baseline: SweepResult | None) -> list[str]:
    """Peak gain and cost at k (curve.peak_gain, cost_at_k), with errors: both were measured on the same data."""
    if baseline is None:
        return []
    theirs, ours = sweep.curve(baseline)[baseline.k_train], sweep.curve(result)
    gain, cost = difference(theirs, ours[sweep.best_k(result)]), difference(ours[result.k_train], theirs)
    return [gain.text(), cost.text()]


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
