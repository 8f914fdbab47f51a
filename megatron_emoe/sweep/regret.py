"""Regret: how much worse one checkpoint is at k' than a specialist, a model continued at that k' alone.

regret(k') = loss(checkpoint at k') - loss(the specialist of k' at its own k'), nats per token, on the same held-out
tokens; at or below 0 one checkpoint serves as well as a model for every budget. It means what it says where specialists
continue the same base on the same number of tokens. Pure functions over sweep results.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.card_table import Table
from megatron_emoe.sweep.curve import SweepCell, SweepResult
from megatron_emoe.sweep.uncertainty import Difference, difference, signed


def specialists(results: Sequence[SweepResult]) -> dict[int, SweepCell]:
    """Each specialist's cell at the k that it was trained with, by that k, ascending.

    Raises:
        ValueError: two of one k, one that was trained at several, one without a cell at its own, or results that were
            not measured on the same tokens.
    """
    sweep.check_same_data(results)
    found: dict[int, SweepCell] = {}
    named: dict[int, str] = {}
    for result in results:
        k = result.k_train
        if k in named:
            raise ValueError(f"--specialists: {result.label} was trained with k = {k}, and so was {named[k]}")
        if schedule := (result.training or {}).get("--emoe-k-schedule"):
            raise ValueError(f"--specialists: {result.label} was trained at several k (--emoe-k-schedule {schedule})")
        if k not in sweep.curve(result):
            raise ValueError(f"--specialists: {result.label} has no cell at k' = {k}, the k of its training")
        found[k], named[k] = sweep.curve(result)[k], result.label
    return dict(sorted(found.items()))


def regrets(result: SweepResult, envelope: Mapping[int, SweepCell]) -> dict[int, Difference]:
    """Regret at every measured k' that has a specialist, ascending in k'. envelope: as `specialists` gives it.

    Raises:
        ValueError: there is no such k'.
    """
    measured = sweep.curve(result)
    found = {k: difference(measured[k], cell) for k, cell in envelope.items() if k in measured}
    if not found:
        raise ValueError(
            f"--specialists: none of their k ({', '.join(map(str, envelope))}) is a measured k' of {result.label}"
        )
    return found


def percent(regret: Difference, specialist: SweepCell) -> str:
    """`-0.05 ± 0.02`, of the specialist's loss."""
    error = "" if not regret.error else f" ± {100 * regret.error / specialist.loss:.2f}"
    return signed(100 * regret.value / specialist.loss, 2) + error


def regret_line(result: SweepResult, envelope: Mapping[int, SweepCell]) -> str:
    """`elastic: regret to specialists k' = 2: -0.10 %, k' = 8: +0.02 %; mean -0.04 %, worst +0.02 % at k' = 8`."""
    shares = {k: 100 * one.value / envelope[k].loss for k, one in regrets(result, envelope).items()}
    each = ", ".join(f"k' = {k}: {signed(share, 2)} %" for k, share in shares.items())
    worst = max(shares, key=lambda k: shares[k])
    mean = signed(statistics.mean(shares.values()), 2)
    most = f"worst {signed(shares[worst], 2)} % at k' = {worst}"
    return f"{result.label}: regret to specialists {each}; mean {mean} %, {most}"


def regret_table(results: Sequence[SweepResult], envelope: Mapping[int, SweepCell]) -> Table:
    """A row per k' with a specialist: its loss, and each sweep's regret in percent of it."""
    every = [regrets(result, envelope) for result in results]
    rows = tuple(
        (str(k), f"{cell.loss:.4f}", *(percent(found[k], cell) if k in found else "" for found in every))
        for k, cell in envelope.items()
    )
    note = (
        "Loss less that of the specialist, a model continued at this k' alone, in percent of it; at or below 0 the one "
        "checkpoint serves as well. The effective range does not say this: a tail that weighs nothing has the largest."
    )
    return Table("Regret", ("k'", "specialist", *(result.label for result in results)), rows, note)
