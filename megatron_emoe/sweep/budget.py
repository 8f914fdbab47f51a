"""Which k' for a budget: the best measured cell of a sweep within a limit, and what a k' per MoE layer would give.

Pure functions over sweep results. Losses in nats per token. An answer rests on measured cells alone; an allocation (one
k' per MoE layer, see `megatron_emoe.sweep.allocation`) that was not measured comes with a predicted loss, and says so.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_emoe.sweep.allocation import Allocation, allocate, cheapest, complete, rise, sensitivities
from megatron_emoe.sweep.curve import SweepCell, SweepResult, curve, loss_at

_ROUNDING = 1e-9  # a limit given in decimal digits is not missed by the last binary one


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a cell must keep to. of: the limited quantity of a cell, None where it was not measured."""

    flag: str
    value: float
    what: str
    of: Callable[[SweepCell], float | None]
    at_least: bool = False

    def bound(self) -> str:
        """The limit in words."""
        return f"at {'least' if self.at_least else 'most'} {self.value:g} {self.what}"

    def allows(self, cell: SweepCell) -> bool:
        """Whether the cell keeps to the limit; a cell without the quantity does not."""
        value = self.of(cell)
        if value is None:
            return False
        return value >= self.value * (1 - _ROUNDING) if self.at_least else value <= self.value * (1 + _ROUNDING)


def flops_limit(result: SweepResult, value: float) -> Limit:
    """Expert FLOPs per token, at most `value` times those at the k of training. ValueError without a cell there."""
    _check_limit(result, "--max-flops", value)
    return Limit(
        flag="--max-flops",
        value=value,
        what=f"times the expert FLOPs at k = {result.k_train}",
        of=lambda cell: flops_share(result, cell),
    )


def latency_limit(result: SweepResult, value: float, at: Literal["batch1", "large"] = "batch1") -> Limit:
    """Milliseconds per token, one token alone or in a full batch.

    Raises `ValueError` where no cell has a latency, or there is none at the k of training.
    """
    _check_limit(result, "--max-latency-ms", value)
    field = f"latency_ms_{at}"
    if all(getattr(cell, field) is None for cell in result.cells):
        raise ValueError(
            f"--max-latency-ms: {result.label} has no {field}; must be measured, by tools/sweep_k.py --latency"
        )
    what = "ms per token, one token alone" if at == "batch1" else "ms per token in a full batch"
    return Limit(flag="--max-latency-ms", value=value, what=what, of=lambda cell: getattr(cell, field))


def quality_limit(result: SweepResult, value: float) -> Limit:
    """Quality, at least `value`. ValueError without a cell at the k of training."""
    _check_limit(result, "--min-quality", value)
    return Limit(
        flag="--min-quality",
        value=value,
        what=f"times the quality at k = {result.k_train}",
        of=lambda cell: quality(result, cell),
        at_least=True,
    )


def _check_limit(result: SweepResult, flag: str, value: float) -> None:
    loss_at(result, result.k_train)  # what limits refer to must be measured
    if not 0 < value < math.inf:
        raise ValueError(f"{flag} {value:g}: must be a finite number above 0")


def flops_share(result: SweepResult, cell: SweepCell) -> float:
    """Expert FLOPs of a cell as a multiple of those at the k of training."""
    return cell.expert_flops_per_token / curve(result)[result.k_train].expert_flops_per_token


def quality(result: SweepResult, cell: SweepCell) -> float:
    """exp(loss at k - loss of the cell): the mean probability of the right token (geometric) relative to that at k."""
    return math.exp(loss_at(result, result.k_train) - cell.loss)


def pick(result: SweepResult, limit: Limit, cells: Sequence[SweepCell] | None = None) -> SweepCell:
    """The best measured cell within the limit: of the lowest loss or, under a least quality, of the fewest FLOPs.

    Where two are equal in that, one k' for all layers comes first: it is easier to serve. `cells`: those to choose
    from, by default all. Raises `ValueError` that names the nearest where none fits.
    """
    chosen: Sequence[SweepCell] = result.cells if cells is None else cells
    fitting = [cell for cell in chosen if limit.allows(cell)]
    if not fitting:
        raise ValueError(_nothing_fits(result, limit, chosen))
    return min(fitting, key=lambda cell: _cost(cell) if limit.at_least else (cell.loss, *_cost(cell)))


def _cost(cell: SweepCell) -> tuple[float, bool, float]:
    return cell.expert_flops_per_token, not is_uniform(cell), cell.loss


def _nothing_fits(result: SweepResult, limit: Limit, cells: Sequence[SweepCell]) -> str:
    measured = {name(cell.k): value for cell in cells if (value := limit.of(cell)) is not None}
    rule = f"{limit.flag} {limit.value:g}: no measured k' of {result.label} has {limit.bound()}"
    if not measured:
        return f"{rule}; none was measured"
    nearest = (max if limit.at_least else min)(measured, key=lambda k: measured[k])
    return f"{rule}; the nearest is k' = {nearest} with {measured[nearest]:.4g}"


def is_uniform(cell: SweepCell) -> bool:
    """Whether all MoE layers run the same k'."""
    return isinstance(cell.k, int) or len(set(cell.k)) == 1


def name(k: int | Allocation) -> str:
    """A k' as it is written on a command line: `4`, or `2,4,4`."""
    return str(k) if isinstance(k, int) else ",".join(map(str, k))


@dataclass(frozen=True)
class Proposal:
    """An allocation with its loss: measured where `cell` is there, else predicted."""

    k: Allocation
    loss: float
    cell: SweepCell | None


@dataclass(frozen=True)
class Answer:
    """best: the measured cell to use. single: the best with one k' for all layers, None if none fits. per_layer: what
    the search over layers found."""

    best: SweepCell
    single: SweepCell | None
    per_layer: list[Proposal]


def answer(result: SweepResult, limit: Limit) -> Answer:
    """The best k' within a limit. Raises `ValueError` like `pick`."""
    best, uniform = pick(result, limit), _uniform_within(result, limit)
    return Answer(best, pick(result, limit, uniform) if uniform else None, proposals(result, limit))


def _uniform_within(result: SweepResult, limit: Limit) -> list[SweepCell]:
    return [cell for cell in result.cells if is_uniform(cell) and limit.allows(cell)]


def proposals(result: SweepResult, limit: Limit) -> list[Proposal]:
    """Allocations that may be better within the limit than the same k' everywhere; empty without sensitivities.

    Under a limit on FLOPs: at the experts of the best uniform k', and at all that the limit allows. On latency:
    likewise with the experts of the largest uniform k' that fits. On quality: fewer experts than the cheapest uniform
    k' has. A prediction starts at the measured loss of that uniform k' and adds what the layers that differ add; one
    that is worse than the uniform k' is left out.
    """
    table = complete(sensitivities(result))
    if not table:
        return []
    fitting = _uniform_within(result, limit)
    best = pick(result, limit, fitting) if fitting else None
    # Where no layer was measured at the uniform k' alone, the prediction starts at the k of training.
    known = best is not None and _spread(best, len(table))[0] in table[0]
    anchor = best if best is not None and known else curve(result)[result.k_train]
    base = rise(table, _spread(anchor, len(table)))
    found: list[Allocation | None]
    if limit.at_least:
        fewest = cheapest(table, base + loss_at(result, result.k_train) - math.log(limit.value) - anchor.loss)
        found = [fewest] if fewest and best and sum(fewest) < sum(_spread(best, len(table))) else []
    else:
        found = [allocate(table, experts) for experts in sorted(_totals(result, limit, fitting, len(table)))]
    ks = dict.fromkeys(k for k in found if k and len(set(k)) > 1)
    made = [_proposal(result, k, anchor.loss + rise(table, k) - base) for k in ks]
    return [each for each in made if each.cell or limit.at_least or best is None or each.loss < best.loss]


def _totals(result: SweepResult, limit: Limit, fitting: Sequence[SweepCell], layers: int) -> set[int]:
    """Numbers of experts over all layers to look for an allocation at."""
    best = {sum(_spread(pick(result, limit, fitting), layers))} if fitting else set()
    if limit.flag == "--max-flops":
        return best | {math.floor(limit.value * result.k_train * layers * (1 + _ROUNDING))}
    return best | {max((sum(_spread(cell, layers)) for cell in fitting), default=0)}


def _proposal(result: SweepResult, k: Allocation, predicted: float) -> Proposal:
    measured = next((cell for cell in result.cells if cell.k == k), None)
    return Proposal(k, predicted if measured is None else measured.loss, measured)


def _spread(cell: SweepCell, layers: int) -> Allocation:
    return (cell.k,) * layers if isinstance(cell.k, int) else cell.k
