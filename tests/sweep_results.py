"""Sweep results made by hand, for tests of what reads them."""

from collections.abc import Iterable, Mapping

from megatron_emoe.sweep.curve import SweepCell, SweepData, SweepResult
from megatron_emoe.sweep.served import ServedCell, ServedResult, Times


def make_cell(k: int | Iterable[int], loss: float, *, layers: int = 2, **fields) -> SweepCell:
    """A measured k'. Each expert of each of the `layers` MoE layers has 1 million FLOPs and 50 million parameters."""
    experts = layers * k if isinstance(k, int) else sum(k)
    values = {
        "tokens": 64,
        "seconds": 1.0,
        "tokens_per_second": 64.0,
        "rows_per_layer": {},
        "expert_flops_per_token": 1e6 * experts,
        "active_params": 1_000_000_000 + 50_000_000 * experts,
    }
    return SweepCell(k=k, loss=loss, **(values | fields))


def make_result(
    label: str, cells: Mapping | Iterable[SweepCell], *, latency: Mapping | None = None, **fields
) -> SweepResult:
    """A sweep of a checkpoint that was trained with 4 of 16 experts.

    cells: or their losses by k'. latency: of those, milliseconds for one token alone by k'.
    """
    if isinstance(cells, Mapping):
        cells = [make_cell(k, loss, latency_ms_batch1=(latency or {}).get(k)) for k, loss in cells.items()]
    values = {
        "schema": 2,
        "label": label,
        "checkpoint": f"runs/{label}",
        "iteration": 1,
        "k_train": 4,
        "num_experts": 16,
        "data": SweepData(path=["held-out"], tokens=64),
        "cells": list(cells),
        "command": "",
        "date": "2026-01-31",
    }
    return SweepResult(**(values | fields))


def make_served(k_train: int = 4, **fields) -> ServedResult:
    """A load test of a server: k' = 2 and the server's own at 2 requests/s, and the latter at 8."""
    times = {"ttft_ms": Times(mean=20.0, p50=18.0, p99=40.0), "tpot_ms": Times(mean=5.0, p50=4.5, p99=9.0)}
    times |= {"seconds": 10.0, "requests_per_second": 1.9, "output_tokens_per_second": 61.5}
    cells = [
        ServedCell(
            rate=rate, k=k, completed=20, failed=0, tokens=[], mean_k=mean, mean_k_written=own, mean_loss=loss, **times
        )
        for rate, k, mean, own, loss in (
            (2.0, 2, 2.0, 2.0, 2.2),
            (2.0, None, 7.5, 7, 1.9),
            (8.0, None, 3.25, None, None),
        )
    ]
    values = {
        "version": 1,
        "model": "exported",
        "data": "held-out",
        "prompts": 20,
        "prompt_tokens": 64,
        "output_tokens": 32,
        "seed": 3,
        "server": {"k": 8, "k_train": k_train},
        "cells": cells,
        "vllm": "0.32.0",
        "command": "python tools/serve_bench.py",
        "date": "2026-01-31",
    }
    return ServedResult(**(values | fields))
