"""The results section of docs/gpu.md, from what was measured, or saying of every row that it was not run."""

from __future__ import annotations

import statistics
from typing import Any

from bench import ratio_with_interval
from gpu_cells import Cell, all_cells

BEGIN, END = "<!-- results: make bench-gpu -->", "<!-- end of results -->"
PEAKS = {"B200": 2250, "GB200": 2500, "H200": 989, "H100 PCIe": 756, "H100": 989, "GH200": 989, "A100": 312}
PEAKS |= {"L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 6000 Ada": 364}
"""Part of a device's name -> its bf16 peak, dense, TFLOP/s, by NVIDIA's data sheets. FP8 has twice that."""
NOT_RUN = "not run yet"
GIB = 2**30


def peak_of(device: str) -> float | None:
    """bf16 TFLOP/s of a device by its name, the longest part that fits; None where it is not known."""
    fitting = [part for part in PEAKS if part in device]
    return PEAKS[max(fitting, key=len)] if fitting else None


def with_results(page: str, section: str) -> str:
    """docs/gpu.md with this section between its two marks (ValueError where they are not)."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"docs/gpu.md: must hold {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{section.strip()}\n{END}{after}"


def section(results: dict[str, Any] | None) -> str:
    """Everything between the marks; None: nothing was run."""
    found = results or {"cells": {}, "machine": {}}
    head = _machine(found["machine"]) if results else "Not run yet: no GPU was at hand. Every row below says so."
    tables = [_steps(found), _throughput(found), _sweep(found), _kernel(found.get("kernel"))]
    return "\n\n".join([head, *tables])


def _machine(machine: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    peak = machine["peak_tflops"]
    stated = f"{peak:g} TFLOP/s (bf16, dense; twice that in FP8)" if peak else "not known: no MFU is stated"
    return "\n".join(
        [
            f"- {machine['date']}, {machine['device']}, {machine['memory'] / GIB:.0f} GiB, driver {machine['driver']}",
            f"- {versions}",
            f"- `{machine['command']}`; {machine['layers']} layers, {machine['pairs']} pairs of steps",
            f"- peak: {stated}; copy bandwidth measured: {machine['copy'] / 1e12:.2f} TB/s",
        ]
    )


def _rows(found: dict[str, Any], columns: int, row: Any, cells: list[Cell] | None = None) -> list[str]:
    """A line for each cell: its numbers, or in the first column why there are none."""
    lines = []
    for cell in cells or all_cells():
        result = found["cells"].get(cell.name, {"skipped": NOT_RUN})
        what = f"| {cell.layers} | {cell.precision} | {cell.routing} | {cell.elastic} "
        if "skipped" in result:
            lines.append(what + f"| {result['skipped']} " + "| " * (columns - 1) + "|")
        else:
            lines.append(what + "".join(f"| {value} " for value in row(cell, result["measured"])) + "|")
    return lines


def _steps(found: dict[str, Any]) -> str:
    def row(_: Cell, measured: dict[str, Any]) -> list[str]:
        ratio, low, high = ratio_with_interval(measured["step"]["elastic"], measured["step"]["stock"])
        stock, elastic = (1000 * statistics.median(measured["step"][name]) for name in ("stock", "elastic"))
        flops = measured["flops"]["elastic"] / measured["flops"]["stock"]
        shares = [f"{router_share(measured, name):.1%}" for name in ("stock", "elastic")]
        mean = f"{measured['mean_k']:.2f}"
        return [
            mean,
            f"{stock:.1f}",
            f"{elastic:.1f}",
            f"{ratio:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{flops:.3f}",
            *shares,
        ]

    head = "| layers | precision | routing | elastic | mean k | stock, ms | elastic, ms | ratio | 95 % interval "
    head += (
        "| FLOPs ratio | router share, stock | elastic |\n"
        + "| --- " * 4
        + "| ---: " * 4
        + "| --- "
        + "| ---: " * 3
        + "|"
    )
    return "\n".join(["### Training step, elastic against stock top-k", "", head, *_rows(found, 8, row)])


def router_share(measured: dict[str, Any], name: str) -> float:
    """One router's median time, as often as a step runs one, over the median step."""
    router, step = (statistics.median(measured[what][name]) for what in ("router", "step"))
    return measured["routers_per_step"] * router / step


def _throughput(found: dict[str, Any]) -> str:
    peak = found["machine"].get("peak_tflops")

    def row(cell: Cell, measured: dict[str, Any]) -> list[str]:
        values: list[str] = []
        for name in ("stock", "elastic"):
            seconds = statistics.median(measured["step"][name])
            tflops = measured["flops"][name] / seconds / 1e12
            share = f"{tflops / (peak * (2 if cell.precision == 'fp8' else 1)):.1%}" if peak else "-"
            memory = measured["peak_bytes"]
            held = f"{memory[name] / 1e9:.1f}" if memory else "-"
            values += [f"{measured['tokens'] / seconds:,.0f}", f"{tflops:.1f}", share, held]
        return values

    columns = "| tokens/s | TFLOP/s | MFU | peak memory, GB "
    head = f"| layers | precision | routing | elastic | stock: {columns[2:]}| elastic: {columns[2:]}|\n"
    head += "| --- " * 4 + "| ---: " * 8 + "|"
    return "\n".join(["### Throughput and memory", "", head, *_rows(found, 8, row)])


def _sweep(found: dict[str, Any]) -> str:
    lines = [
        "### Sweep: forward passes at k'",
        "",
        "| layers | precision | k' | tokens/s | TFLOP/s | of the speed at k |",
    ]
    lines.append("| --- | --- | ---: | ---: | ---: | ---: |")
    for cell in (cell for cell in all_cells() if cell.sweep):
        result = found["cells"].get(cell.name, {"skipped": NOT_RUN})
        for k in cell.sweep:
            start = f"| {cell.layers} | {cell.precision} | {k} | "
            if "skipped" in result:
                lines.append(start + f"{result['skipped']} | | |")
                continue
            at, base = (result["measured"]["sweep"][str(which)] for which in (k, cell.sweep[0]))
            rate, first = (point["tokens"] / statistics.median(point["seconds"]) for point in (at, base))
            lines.append(start + f"{rate:,.0f} | {rate * at['flops'] / 1e12:.1f} | {rate / first:.2f} |")
    return "\n".join(lines)


def _kernel(kernel: dict[str, Any] | None) -> str:
    head = (
        "### Router kernel against the bandwidth floor\n\n| pass | bytes it must move, MB | floor, us | kernel, us | "
    )
    head += "floor / kernel | reference, us |\n| --- | ---: | ---: | ---: | ---: | ---: |"
    if kernel is None or "skipped" in kernel:
        why = kernel["skipped"] if kernel else NOT_RUN
        return "\n".join([head, *(f"| {name} | {why} | | | | |" for name in ("forward", "forward + backward"))])
    rows = []
    for name, row in kernel["passes"].items():
        floor, seconds, reference = row["bytes"] / kernel["copy"], *(statistics.median(row[of]) for of in TIMED)
        times = f"{1e6 * floor:.1f} | {1e6 * seconds:.1f} | {floor / seconds:.2f} | {1e6 * reference:.1f}"
        rows.append(f"| {name} | {row['bytes'] / 1e6:.1f} | {times} |")
    return "\n".join([head, *rows])


TIMED = ("kernel", "reference")
