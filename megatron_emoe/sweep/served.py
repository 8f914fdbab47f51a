"""What a running server gave at each k' under load: the file of tools/serve_bench.py. Pure, nothing imports torch.

A cell is one run: requests that arrive at random (a Poisson process) at an offered rate, at one k', or at whatever the
server gives requests that name none (`k` is None), which may follow the load.
"""

import math
import os
import statistics
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, TypeAdapter
from pydantic.dataclasses import dataclass

from megatron_emoe.settings.result_file import STRICT, Count, Date, Positive, Whole, read_checked, write_checked
from megatron_emoe.sweep.result import K, Nats

OWN = "the server's own"
"""In tables and charts, k' of requests that name none."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Times:
    """Milliseconds over the requests of a cell."""

    mean: Positive
    p50: Positive
    p99: Positive


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TokensAt:
    """Tokens, of prompts too, that ran at a k'."""

    k: K
    tokens: Count


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServedCell:
    """rate: requests/s that were offered. completed, failed: requests. seconds: until the last answer.
    output_tokens_per_second: over these. ttft_ms: until the first token of a request. tpot_ms: for each token after it;
    None where answers have one token. tokens: what ran at which k', by the server's own count. mean_k: over these;
    mean_k_written: over those of answers alone. mean_loss: of all these, the held-out loss of each one's k', nats per
    token; None where it is not known for all."""

    rate: Positive
    k: K | None = None
    completed: Whole
    failed: Whole
    seconds: Positive
    requests_per_second: Positive
    output_tokens_per_second: Positive
    ttft_ms: Times
    tpot_ms: Times | None = None
    tokens: Annotated[tuple[TokensAt, ...], Field(strict=False)]
    mean_k: Positive | None = None
    mean_k_written: Positive | None = None
    mean_loss: Nats | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ServedResult:
    """One run of the tool. server: what GET /emoe said before the first cell, but for its counts. prompts: requests of
    a cell, the same in each, cut from `data` by `seed`, which draws the arrivals too. losses: the file they are from.
    """

    version: Literal[1]
    model: str
    data: str
    prompts: Count
    prompt_tokens: Count
    output_tokens: Count
    seed: Whole
    server: dict[str, Any]
    cells: Annotated[tuple[ServedCell, ...], Field(strict=False)]
    losses: str | None = None
    vllm: str | None = None
    command: str
    date: Date


_ADAPTER = TypeAdapter(ServedResult)


def load(path: str | os.PathLike) -> ServedResult:
    """Read and check a file. Raises `ValueError` with path, key, value and rule."""
    return read_checked(_ADAPTER, path)


def save(result: ServedResult, path: str | os.PathLike) -> None:
    """Write a file; the one at `path` is replaced only once the new one is complete."""
    write_checked(_ADAPTER, result, path, exclude_none=True)


Losses = Mapping[int | tuple[int, ...], float]
Counts = Mapping[int | tuple[int, ...], int]


class Counted(NamedTuple):
    """Tokens by k', all and those of answers."""

    all: Counts
    written: Counts

    def since(self, before: "Counted") -> "Counted":
        """What ran between two answers of GET /emoe."""
        return Counted(between(before.all, self.all), between(before.written, self.written))


def counted(status: Mapping[str, Any]) -> Counted:
    """The counts in what GET /emoe answers."""
    return Counted(counts(status["tokens"]), counts(status.get("decode", [])))


def cell(
    rate: float, k: int | tuple[int, ...] | None, found: Mapping[str, Any], ran: Counted, losses: Losses
) -> ServedCell:
    """The cell of a run. found: what emoe_vllm.bench answers. ran: tokens by k'. losses: held-out, by k'.

    Raises:
        ValueError: no request came to its end; with the first reason.
    """
    done = [each for each in zip(found["ttfts"], found["latencies"], found["output_lens"], strict=True) if each[2]]
    if not done:
        reason = next((line for line in found["errors"] if line), "no reason given").strip().splitlines()[-1]
        raise ValueError(f"k' = {name_of(k)} at {rate:g} requests/s: no request came to its end: {reason}")
    per_token = [(latency - first) / (tokens - 1) for first, latency, tokens in done if tokens > 1]
    return ServedCell(
        rate=rate,
        k=k,
        completed=found["completed"],
        failed=found["failed"],
        seconds=found["duration"],
        requests_per_second=found["completed"] / found["duration"],
        output_tokens_per_second=sum(found["output_lens"]) / found["duration"],
        ttft_ms=times([first for first, _, _ in done]),
        tpot_ms=times(per_token) if per_token else None,
        tokens=tuple(TokensAt(k=each, tokens=tokens) for each, tokens in ran.all.items()),
        mean_k=_mean_k(ran.all),
        mean_k_written=_mean_k(ran.written),
        mean_loss=weighted(ran.all, losses),
    )


def times(seconds: Sequence[float]) -> Times:
    """Of some durations; a percentile lies between two of them as it does between their ranks."""
    return Times(mean=1e3 * statistics.fmean(seconds), p50=1e3 * _at(seconds, 0.5), p99=1e3 * _at(seconds, 0.99))


def _at(values: Sequence[float], share: float) -> float:
    ordered, place = sorted(values), share * (len(values) - 1)
    low = math.floor(place)
    return ordered[low] + (ordered[min(low + 1, len(ordered) - 1)] - ordered[low]) * (place - low)


def _mean_k(ran: Counts) -> float | None:
    return weighted(ran, {k: statistics.fmean(k) if isinstance(k, tuple) else k for k in ran})


def weighted(ran: Counts, values: Mapping[int | tuple[int, ...], float]) -> float | None:
    """The mean over the tokens that ran; None without any, or where a value is not known."""
    total = sum(ran.values())
    if not total or any(k not in values for k, tokens in ran.items() if tokens):
        return None
    return sum(tokens * values[k] for k, tokens in ran.items() if tokens) / total


def counts(pairs: Sequence[Sequence[Any]]) -> dict[int | tuple[int, ...], int]:
    """Tokens by k', as GET /emoe lists them."""
    return {tuple(k) if isinstance(k, list) else k: tokens for k, tokens in pairs}


def between(before: Counts, after: Counts) -> dict[int | tuple[int, ...], int]:
    """What ran since."""
    return {k: tokens - before.get(k, 0) for k, tokens in after.items() if tokens > before.get(k, 0)}


def name_of(k: int | tuple[int, ...] | None) -> str:
    """A k' in a table."""
    return OWN if k is None else str(k) if isinstance(k, int) else ",".join(map(str, k))


_TIMES = ("TTFT ms", "TTFT p50", "TTFT p99", "ms/token", "ms/token p50", "ms/token p99")
HEAD = ("rate", "k'", "mean k'", "of answers", "loss", "requests/s", "tokens/s", *_TIMES)
"""Of `row`: TTFT is the time to the first token, ms/token that of each after it; their means, then percentiles."""


def row(cell: ServedCell) -> list[str]:
    """A cell in a table, under HEAD. An empty field is not known."""
    texts = [f"{cell.rate:g}", name_of(cell.k), _number(cell.mean_k, ".2f"), _number(cell.mean_k_written, ".2f")]
    texts += [_number(cell.mean_loss, ".4f")]
    failed = f" ({cell.failed} failed)" if cell.failed else ""
    texts += [f"{cell.requests_per_second:.3g}{failed}", f"{cell.output_tokens_per_second:.4g}"]
    return [*texts, *(text for part in (cell.ttft_ms, cell.tpot_ms) for text in _times(part))]


def _times(part: Times | None) -> list[str]:
    return [""] * 3 if part is None else [f"{value:.4g}" for value in (part.mean, part.p50, part.p99)]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
