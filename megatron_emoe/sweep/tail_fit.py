"""Fits the tail scale a(k') on held-out data without touching a weight, and stores it with the checkpoint.

For each k' the loss is a function of one number. It is minimised on one half of the data (Brent's method, SciPy) and
judged on the other half, which it never saw. Both ends are tried too: a = 1 is plain top-k', and a = 0 plain top-k but
for the exceptions in tail_scale.py, so the fitted scale cannot do worse than these on the half it was fitted on.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.training.initialize import initialize_megatron
from scipy.optimize import minimize_scalar
from torch import nn
from tqdm import tqdm

from megatron_emoe.model.layer_spec import elastic_model_config
from megatron_emoe.routing.active_k import get_active_k
from megatron_emoe.routing.router import ElasticRouter
from megatron_emoe.settings.atomic_file import write_atomically
from megatron_emoe.settings.command_line import is_first_rank, say
from megatron_emoe.settings.refusal import NoNumber
from megatron_emoe.settings.tail_scale import TAIL_SCALE_FILE
from megatron_emoe.training.evaluation import Evaluator
from megatron_emoe.training.held_out import load_model, read_batches, wanted_sequences
from megatron_emoe.training.loop import ElasticLoop

_RESOLUTION = 0.05  # of a: the loss is flat around its minimum
_LARGEST_FACTOR = 4.0


@dataclass(frozen=True)
class Fitted:
    """What was found for one k'. scale: a(k'). Losses in nats per token; `fit` on the half that chose a, the others on
    the half that did not: with a, at a = 1 (plain top-k'), and at the model's own k. router_scale: what multiplies the
    router's weight instead of a tail scale, and `folded` the loss with it (None where not asked for)."""

    scale: float
    fit: float
    judged: float
    plain: float
    at_k: float
    router_scale: float | None = None
    folded: float | None = None


def minimise(loss: Callable[[float], float], highest: float) -> tuple[float, float]:
    """The scale in [0, highest] with the smallest loss, and that loss; the ends are tried too."""
    found = minimize_scalar(loss, bounds=(0.0, highest), method="bounded", options={"xatol": _RESOLUTION})
    tried = {float(found.x): float(found.fun), 0.0: loss(0.0), highest: loss(highest)}
    best = min(tried, key=lambda scale: tried[scale])
    return best, tried[best]


class TailFit:
    """A Megatron model, and its held-out data in two halves. Collective to construct and to use.

    tokens_before: of the data, before the half that is fitted on; a sweep of no more has none of it. progress: called
    with every micro-batch.

    Raises:
        ValueError: too little data for two halves.
        NoNumber: a loss that is none; `fit` and `loss` likewise.
    """

    def __init__(self, args: Namespace, progress: Callable[[], object] = lambda: None) -> None:
        initialize_megatron()
        config = elastic_model_config(args)
        self.model: list[nn.Module] = load_model(args, config)
        forward = ElasticLoop(args, config.transformer).forward
        self.evaluator = Evaluator(args, lambda *given: (progress(), forward(*given))[1])
        batches, self.steps, self.digest = read_batches(args)
        if self.steps < 2:
            enough = wanted_sequences(args) >= 2 * args.eval_global_batch_size
            cause = "--data-path" if enough else f"--max-eval-tokens {args.max_eval_tokens}"
            raise ValueError(f"{cause}: too few for two batches, one for each half")
        self.judging, self.fitting = _halves(batches, self.steps)
        before = self.steps - self.steps // 2
        self.tokens_before = before * args.eval_global_batch_size * args.seq_length
        self.fitted_sequences = self.digest.sequences[before * args.eval_global_batch_size :]
        self.at_k = self.loss(self.judging, args.moe_router_topk, 1.0)

    def loss(self, batches: Mapping[int, list[Any]], k: int, scale: float) -> float:
        """Mean loss at k' = `k` with a = `scale`, nats per token."""
        with get_active_k().scaling_tail(scale):
            measured = self.evaluator.loss_at_k(self.model, batches, k, self.steps // 2, by_sequence=True)
        try:
            return measured.checked().loss
        except NoNumber as error:
            half = "judged on" if batches is self.judging else "fitted on"
            raise NoNumber(f"--k {k}, a = {scale:.3f}, in the half that is {half}: {error}") from error

    def fit(self, k: int, highest: float, fold: bool = False) -> Fitted:
        """a(k) within [0, highest]; with `fold` the best factor of the router's weight too."""
        scale, loss = minimise(lambda a: self.loss(self.fitting, k, a), highest)
        judged, plain = (self.loss(self.judging, k, a) for a in (scale, 1.0))
        folded = self._fold(k) if fold else (None, None)
        return Fitted(scale, loss, judged, plain, self.at_k, *folded)

    def _fold(self, k: int) -> tuple[float, float]:
        """The factor in [1, 4] of every router's weight with the smallest loss at plain top-k', and that loss on the
        other half."""
        found = minimize_scalar(
            lambda factor: self._loss_with_router(self.fitting, k, factor),
            bounds=(1.0, _LARGEST_FACTOR),
            method="bounded",
            options={"xatol": _RESOLUTION},
        )
        return float(found.x), self._loss_with_router(self.judging, k, float(found.x))

    def _loss_with_router(self, batches: Mapping[int, list[Any]], k: int, factor: float) -> float:
        routers = [m for chunk in self.model for m in chunk.modules() if isinstance(m, ElasticRouter)]
        stored = [router.weight.detach().clone() for router in routers]
        try:
            for router in routers:
                router.weight.data.mul_(factor)
            return self.loss(batches, k, 1.0)
        finally:
            for router, weight in zip(routers, stored, strict=True):
                router.weight.data.copy_(weight)


def _halves(batches: Mapping[int, list[Any]], steps: int) -> tuple[dict[int, list[Any]], dict[int, list[Any]]]:
    """The first and the last half of the global batches, as micro-batches by pipeline chunk.

    Of an odd number the middle one is in neither: a sweep of half of the tokens may read a part of it.
    """
    sizes = {i: len(part) // steps * (steps // 2) for i, part in batches.items()}
    first = {i: part[: sizes[i]] for i, part in batches.items()}
    last = {i: part[len(part) - sizes[i] :] for i, part in batches.items()}
    return first, last


MOST_KEPT = 4096
"""Sequences that the file of a fit names at most, evenly spaced; a sweep looks for them among its own."""


def run_fit(args: Namespace, target: Path, header: dict[str, Any]) -> tuple[dict[int, Fitted], int]:
    """Fit a(k') at every --k and write `target` from rank 0. Collective; raises as TailFit does, and on rank 0 an
    `OSError` where the file cannot be written.

    Returns what was found, by k', and TailFit's tokens_before.
    """
    writes = is_first_rank()
    say(f"--max-eval-tokens {args.max_eval_tokens}: at most so many tokens, half to fit on and half to judge by")
    with tqdm(unit=" micro-batches", disable=not writes) as bar:
        fit = TailFit(args, bar.update)
        found = {}
        for done, k in enumerate(args.k, start=1):
            bar.set_postfix_str(f"k' = {k}, {done} of {len(args.k)}")
            found[k] = fit.fit(k, args.max_scale, args.fold)
    if writes:
        table = {str(k): round(fitted.scale, 4) for k, fitted in found.items()}
        cells = {str(k): {n: v for n, v in asdict(one).items() if v is not None} for k, one in found.items()}
        data = {"digest": fit.digest.whole, "tokens_before": fit.tokens_before, "sequence_length": args.seq_length}
        kept = fit.fitted_sequences[:: -(-len(fit.fitted_sequences) // MOST_KEPT)]
        stored = header | data | {"tail_scale": table, "fitted": cells, "fitted_sequences": kept}
        write_atomically(target, json.dumps(stored, indent=2) + "\n")
    torch.distributed.barrier()
    return found, fit.tokens_before


def tail_scale_path(checkpoint: Path) -> Path:
    """Where a checkpoint's fitted table lies: beside its weights."""
    return checkpoint / TAIL_SCALE_FILE
