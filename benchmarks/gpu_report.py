"""The results section of docs/gpu.md, from what was measured, or saying of every row that it was not run."""

from __future__ import annotations

import statistics
from typing import Any

from gpu_cells import Cell, all_cells
from paired import ratio_with_interval

BEGIN, END = "<!-- results: make bench-gpu -->", "<!-- end of results -->"
PEAKS = {"B200": 2250, "GB200": 2500, "H200": 989, "H100 PCIe": 756, "H100": 989, "GH200": 989, "A100": 312}
PEAKS |= {"L40S": 362, "L4": 121, "RTX 4090": 165, "RTX 6000 Ada": 364}
"""Part of a device's name -> its bf16 peak, dense, TFLOP/s, by NVIDIA's data sheets. FP8 has twice that."""
NOT_RUN = "not run yet"
VARIANTS = ("stock", "elastic")
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
    head = _machine(found) if results else "`make bench-gpu` was not run yet: no GPU was at hand. Every row says so."
    tables = [_steps(found), _throughput(found), _sweep(found), _kernel(found.get("kernel"))]
    return "\n\n".join([head, *tables])


def _machine(found: dict[str, Any]) -> str:
    machine, kernel = found["machine"], (found.get("kernel") or {}).get("measured", {})
    peak, copy = machine["peak_tflops"], kernel.get("copy")
    stated = f"{peak:g} TFLOP/s (bf16, dense; twice that in FP8)" if peak else "not known: no MFU is stated"
    copied = f"; copy bandwidth measured: {copy / 1e12:.2f} TB/s" if copy else ""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "megatron-core"))
    lines = [f"- {machine['device']}, {machine['memory'] / GIB:.0f} GiB; {versions}", f"- peak: {stated}{copied}"]
    return "\n".join([*lines, *_runs(found)])


def _runs(found: dict[str, Any]) -> list[str]:
    """A line for each run that results are of, and how many of the cells."""
    cells = [result["run"] for result in found["cells"].values() if "measured" in result]
    kinds = [run for number, run in enumerate(cells) if run not in cells[:number]]
    kernel = found.get("kernel")
    of_kernel = [f"- router kernel: {_run(kernel['run'])}"] if kernel and "measured" in kernel else []
    return [f"- {_run(run)}: {cells.count(run)} cells" for run in kinds] + of_kernel


def _run(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    sizes = f"{run['layers']} layers, {run['pairs']} pairs of steps"
    return f"{run['date']}, `{run['command']}`, driver {run['driver']}, {versions}; {sizes}"


def _why(result: dict[str, Any] | None, part: str) -> str | None:
    """Why this part of a result is not there; None: it is."""
    if part in (result or {}).get("measured", {}):
        return None
    return NOT_RUN if result is None else result.get("skipped") or result.get("failed") or "-"


def _rows(found: dict[str, Any], columns: int, row: Any, cells: list[Cell] | None = None) -> list[str]:
    """A line for each cell: its numbers, or in the first column why there are none."""
    lines = []
    for cell in cells or all_cells():
        result = found["cells"].get(cell.name)
        what = f"| {cell.layers} | {cell.precision} | {cell.routing} | {cell.elastic} "
        if why := _why(result, "step"):
            lines.append(what + f"| {why} " + "| " * (columns - 1) + "|")
        else:
            lines.append(what + "".join(f"| {value} " for value in row(cell, result["measured"])) + "|")
    return lines


def _steps(found: dict[str, Any]) -> str:
    def row(_: Cell, measured: dict[str, Any]) -> list[str]:
        ratio, low, high = ratio_with_interval(measured["step"]["elastic"], measured["step"]["stock"])
        stock, elastic = (1000 * statistics.median(measured["step"][name]) for name in VARIANTS)
        flops = measured["flops"]["elastic"] / measured["flops"]["stock"]
        sums = sum(measured["step"]["elastic"]) / sum(measured["step"]["stock"])
        shares = [f"{router_share(measured, name):.1%}" if "router" in measured else "-" for name in VARIANTS]
        return [
            f"{measured['mean_k']:.2f}",
            f"{stock:.1f}",
            f"{elastic:.1f}",
            f"{ratio:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{sums:.3f}",
            f"{flops:.3f}",
            *(f"{measured['load'][name]:.2f}" for name in VARIANTS),
            *shares,
        ]

    head = "| layers | precision | routing | elastic | mean k | stock, ms | elastic, ms | ratio | 95 % interval "
    head += "| ratio of sums | FLOPs ratio | busiest expert, stock | elastic | router share, stock | elastic |\n"
    head += "| --- " * 4 + "| ---: " * 4 + "| --- " + "| ---: " * 6 + "|"
    return "\n".join(["### Training step, elastic against stock top-k", "", head, *_rows(found, 11, row)])


def router_share(measured: dict[str, Any], name: str) -> float:
    """One router's median time, as often as a step runs one, over the median step."""
    router, step = (statistics.median(measured[what][name]) for what in ("router", "step"))
    return measured["routers_per_step"] * router / step


def _throughput(found: dict[str, Any]) -> str:
    peak = found["machine"].get("peak_tflops")

    def row(cell: Cell, measured: dict[str, Any]) -> list[str]:
        values: list[str] = []
        for name in VARIANTS:
            seconds = statistics.fmean(measured["step"][name])  # as FLOPs: of all measured steps together
            tflops = measured["flops"][name] / seconds / 1e12
            share = f"{tflops / (peak * (2 if cell.precision == 'fp8' else 1)):.1%}" if peak else "-"
            memory = measured.get("peak_bytes")
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
        result = found["cells"].get(cell.name)
        for k in cell.sweep:
            start = f"| {cell.layers} | {cell.precision} | {k} | "
            if why := _why(result, "sweep"):
                lines.append(start + f"{why} | | |")
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
    if why := _why(kernel, "passes"):
        return "\n".join([head, *(f"| {name} | {why} | | | | |" for name in ("forward", "forward + backward"))])
    rows, measured = [], kernel["measured"]
    for name, row in measured["passes"].items():
        floor, seconds, reference = row["bytes"] / measured["copy"], *(statistics.median(row[of]) for of in TIMED)
        times = f"{1e6 * floor:.1f} | {1e6 * seconds:.1f} | {floor / seconds:.2f} | {1e6 * reference:.1f}"
        rows.append(f"| {name} | {row['bytes'] / 1e6:.1f} | {times} |")
    return "\n".join([head, *rows])


TIMED = ("kernel", "reference")
