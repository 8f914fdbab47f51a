"""The cells of a sweep: measured one after another, written after each, checked against the data that they are of."""

from __future__ import annotations

import dataclasses
import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_emoe.settings.command_line import say
from megatron_emoe.settings.refusal import NoNumber, fail
from megatron_emoe.settings.tail_scale import TAIL_SCALE_FILE
from megatron_emoe.sweep.budget import name
from megatron_emoe.sweep.request import Budget, unfinished
from megatron_emoe.sweep.result import SweepCell, SweepResult, load, save, upsert_cell, with_digest

if TYPE_CHECKING:
    from megatron_emoe.training.evaluation import Digest


class Model(Protocol):
    """A built model with its held-out data, as `fill` measures it. Methods are collective."""

    digest: Digest

    def cell(self, k: Budget) -> SweepCell:
        """The plain cell: loss, speed, rows, cost. NoNumber: the loss is none."""

    def evidence(self, k: Budget) -> tuple[dict[str, Any], Mapping[int, Any]]:
        """The cell's fields of evidence, and the co-activation matrices by layer."""

    def agreement(self, k: Budget) -> dict[str, Any]:
        """The cell's fields of agreement with the k of training."""

    def latency(self, k: Budget) -> dict[str, Any]:
        """The cell's latency fields."""


def fill(args: Namespace, result: SweepResult, model: Model, writes: bool) -> SweepResult:
    """Measure what is unfinished; --out is rewritten after every cell where `writes`.

    Ends with status 2 where the finished cells are of other data, and with 1 where a loss is no number.
    """
    from tqdm import tqdm

    result = on_data(args, result, model.digest)
    for k in tqdm(unfinished(args, result), desc="k'", unit="k", disable=not writes):
        known = {cell.k: cell for cell in result.cells}
        try:
            cell = _measured(args, k, known.get(k), model, list(known) if writes else None)
        except NoNumber as error:
            fail(f"--k {name(k)}: {error}", status=1)
        except OSError as error:  # of the matrices beside --out
            fail(f"--out {args.out}: cannot be written ({error.strerror})", status=1)
        result = upsert_cell(result, cell)
        if writes:
            write(args, result)
    return result


def _measured(
    args: Namespace, k: Budget, known: SweepCell | None, model: Model, finished: list[Budget] | None
) -> SweepCell:
    """A cell with all that is asked for. known: what there is of it. finished: k' in the file, on the writing rank."""
    from megatron_emoe.sweep.evidence import save_matrices

    cell = known or model.cell(k)
    if args.evidence and cell.router_entropy is None:
        fields, matrices = model.evidence(k)
        cell = dataclasses.replace(cell, **fields)
        if finished is not None:
            save_matrices(Path(args.out), k, matrices, finished)
    if args.agreement and cell.agreement is None:
        cell = dataclasses.replace(cell, **model.agreement(k))
    if args.latency and cell.latency_ms_large is None:
        cell = dataclasses.replace(cell, **model.latency(k))
    return cell


def write(args: Namespace, result: SweepResult) -> None:
    """Write --out; the process ends with status 1 where that fails, as where the disk has run full."""
    try:
        save(result, args.out)
    except OSError as error:
        fail(f"--out {args.out}: cannot be written ({error.strerror})", status=1)


def on_data(args: Namespace, result: SweepResult, digest: Digest) -> SweepResult:
    """`result` with the digest of the data. SystemExit where its cells are of other data.

    Says so where a tail scale was fitted on some of these sequences.
    """
    try:
        result = with_digest(result, digest.whole)
    except ValueError as error:
        fail(f"--out {args.out}: {error}")
    if overlap := fitted_on(args, result, digest):
        say(overlap)
    return result


def fitted_on(args: Namespace, result: SweepResult, digest: Digest) -> str | None:
    """A warning where the sequences are in part those that the tail scale in use was fitted on; None if they are not,
    or nothing is known of the fit."""
    from megatron_emoe.model.checkpoint import locate

    if result.framework != "megatron" or result.tail_scale is None:
        return None
    fit = stored_fit(locate(args.load, args.ckpt_step))
    if fit is None or {key: float(a) for key, a in fit.get("tail_scale", {}).items()} != result.tail_scale:
        return None
    shared = len(set(map(str, fit["fitted_sequences"])) & set(digest.sequences))
    if not shared:
        return None
    return (
        f"warning: --data-path: at least {shared} of the {len(digest.sequences)} sequences are among those that the "
        "tail scale was fitted on, so losses past k look too good; give --max-eval-tokens "
        f"{fit.get('tokens_before')} or fewer, or other data"
    )


def stored_fit(checkpoint: Path) -> dict[str, Any] | None:
    """What tools/fit_tail_scale.py stored beside a checkpoint's weights; None where it is not there or not readable."""
    try:
        fit = json.loads((checkpoint / TAIL_SCALE_FILE).read_text())
    except (OSError, ValueError):
        return None
    known = isinstance(fit, dict) and isinstance(fit.get("fitted_sequences"), list)
    return fit if known else None  # one of an older version does not say what it was fitted on


def finish(args: Namespace, result: SweepResult, digest: Digest, writes: bool) -> SweepResult:
    """A sweep of which every cell was measured before: the data are those of the file, and a new label is stored."""
    if result.data.digest is not None:
        result = on_data(args, result, digest)
    stored = load(args.out)
    if writes and stored.label != result.label:
        write(args, dataclasses.replace(stored, label=result.label))
    return result
