"""Stock Megatron-Core top-k against elastic training on one GPU; writes the results section of docs/gpu.md.

    make bench-gpu                                         # everything: a quarter of an hour to half an hour
    make bench-gpu BENCH_ARGS="--quick"                    # live routing, two elastic settings, fewer pairs
    make bench-gpu BENCH_ARGS="--only bf16 recipe"         # the cells with all of these words; other results stay

A bare machine with torch (CUDA) and megatron-core suffices; what needs Transformer Engine is skipped without it. What
was measured is kept in docs/gpu.json. Exit status 2 where nothing can be measured, 1 where a cell failed.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # started as a file, Python puts benchmarks/ there alone; nothing need be installed
from gpu_cells import GB, Cell, chosen, layers_that_fit, why_skipped  # noqa: E402
from gpu_report import peak_of, section, with_results  # noqa: E402

PAIRS, QUICK_PAIRS, ROUNDS = 30, 10, 5
KERNEL = {"tokens": [8192, 262144], "samples": 20, "calls": 20, "copied": 1 << 30, "device": "cuda"}


def read_options(words: list[str]) -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--quick", action="store_true", help="Live routing, no mean-k, 10 pairs.")
    options.add_argument(
        "--only", nargs="+", default=[], metavar="WORD", help="Cells whose names have all these words."
    )
    options.add_argument("--layers", type=int, help="Layers of the models. Default: what memory holds, 4 at most.")
    options.add_argument("--repeats", type=int, help="Pairs of steps, after 5 of warm-up (30; 10 with --quick).")
    options.add_argument("--peak-tflops", type=float, help="bf16 peak of the GPU. Default: by its name.")
    options.add_argument("--results", type=Path, default=REPO / "docs/gpu.json", help="What was measured, as JSON.")
    options.add_argument("--out", type=Path, default=REPO / "docs/gpu.md", help="The page whose results are written.")
    chosen_options = options.parse_args(words)
    for name, least in (("layers", 1), ("repeats", 3), ("peak_tflops", 1)):
        value = getattr(chosen_options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value:g}: must be at least {least}")
    return chosen_options


def plan(options: argparse.Namespace) -> tuple[list[Cell], dict[str, Any]]:
    """The cells to measure, and what is said of this machine (ValueError where nothing can be measured)."""
    cells = chosen(options.only, options.quick)
    if not torch.cuda.is_available():
        raise ValueError("no CUDA device: torch.cuda.is_available() is False; nothing was measured")
    if not options.out.is_file():
        raise ValueError(f"--out {options.out}: no such file; it must hold the marks of the results")
    with_results(options.out.read_text(), "")
    memory = torch.cuda.get_device_properties(0).total_memory
    layers = options.layers or layers_that_fit(memory)
    if not layers:
        raise ValueError(
            f"the GPU has {memory / GB:.0f} GB: two models of one layer need 34 GB; --layers 1 tries anyway"
        )
    return cells, describe(options, layers, memory)


def describe(options: argparse.Namespace, layers: int, memory: int) -> dict[str, Any]:
    """Hardware, versions, date and command."""
    device = torch.cuda.get_device_name(0)
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    packages = {"torch": "torch", "triton": "triton", "Transformer Engine": "transformer-engine"}
    packages |= {"megatron-core": "megatron-core"}
    versions = {"CUDA": torch.version.cuda or "none"} | {name: _version(package) for name, package in packages.items()}
    return {
        "date": str(date.today()),
        "device": device,
        "memory": memory,
        "driver": driver[0] if driver else "unknown",
        "versions": versions,
        "command": " ".join(["make bench-gpu", *([f'BENCH_ARGS="{" ".join(sys.argv[1:])}"'] if sys.argv[1:] else [])]),
        "layers": layers,
        "pairs": options.repeats or (QUICK_PAIRS if options.quick else PAIRS),
        "peak_tflops": options.peak_tflops or peak_of(device),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def run_script(name: str, asked: dict[str, Any], env: dict[str, str] | None = None) -> dict[str, Any]:
    """What benchmarks/NAME.py measured, in a process of its own; where it failed, the last line of what it said."""
    with socket.socket() as probe, tempfile.TemporaryDirectory() as folder:
        probe.bind(("127.0.0.1", 0))
        rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        rank |= {"MASTER_PORT": str(probe.getsockname()[1]), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        probe.close()  # the measurement listens there
        cell, out = Path(folder) / "cell.json", Path(folder) / "result.json"
        cell.write_text(json.dumps(asked))
        path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, str(REPO / f"benchmarks/{name}.py"), str(cell), str(out)]
        full = os.environ | rank | {"PYTHONPATH": path} | (env or {})
        done = subprocess.run(command, cwd=REPO, env=full, capture_output=True, text=True)
        if done.returncode == 0:
            return {"measured": json.loads(out.read_text())}
    said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
    print("\n".join(said[-30:]), file=sys.stderr)
    cause = next((line for line in reversed(said) if "Error" in line), said[-1])
    return {"skipped": f"failed: {cause.strip().replace('|', '/')[:100]}", "failed": True}


def measure(cells: list[Cell], options: argparse.Namespace, machine: dict[str, Any]) -> dict[str, Any]:
    """Every cell after the other; those that this machine cannot serve say why."""
    engine, fp8 = find_spec("transformer_engine") is not None, torch.cuda.get_device_capability() >= (8, 9)
    found: dict[str, Any] = {}
    for cell in cells:
        if reason := why_skipped(cell, engine, fp8, cell.layers in options.only):
            found[cell.name] = {"skipped": f"skipped: {reason}"}
        else:
            found[cell.name] = run_script("measure_gpu", cell.job(machine["layers"], machine["pairs"], ROUNDS))
        print(f"{cell.name}: {found[cell.name].get('skipped', 'measured')}", flush=True)
    return found


def kept(path: Path, machine: dict[str, Any]) -> dict[str, Any]:
    """Results of before on the same machine and versions with as many layers; nothing where anything differs."""
    if not path.is_file():
        return {}
    old = json.loads(path.read_text())
    same = all(old["machine"][name] == machine[name] for name in ("device", "driver", "versions", "layers", "pairs"))
    return old["cells"] if same else {}


def main() -> int:
    try:
        options = read_options(sys.argv[1:])
        cells, machine = plan(options)
    except ValueError as error:
        print(f"bench_gpu.py: error: {error}", file=sys.stderr)
        return 2
    kernel = run_script("measure_gpu_router", KERNEL)
    kernel = kernel.get("measured", kernel)
    machine["copy"] = kernel.get("copy", float("nan"))
    cells_found = (kept(options.results, machine) if options.only else {}) | measure(cells, options, machine)
    results = {"machine": machine, "cells": cells_found, "kernel": kernel}
    options.results.write_text(json.dumps(results, indent=1) + "\n")
    options.out.write_text(with_results(options.out.read_text(), section(results)))
    print(f"written: {options.results}, {options.out}")
    return 1 if any("failed" in result for result in [kernel, *cells_found.values()]) else 0


if __name__ == "__main__":
    sys.exit(main())
