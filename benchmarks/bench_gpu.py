"""Stock Megatron-Core top-k against elastic training on one GPU; writes the results section of docs/gpu.md.

    make bench-gpu                                         # everything
    make bench-gpu BENCH_ARGS="--quick"                    # live routing, two elastic settings, fewer pairs
    make bench-gpu BENCH_ARGS="--only bf16 recipe"         # the cells with all of these words

A bare machine with torch (CUDA) and megatron-core suffices; what needs Transformer Engine is skipped without it. What
was measured is kept in docs/gpu.json and written after each cell: a run can be ended at any time, and go on with other
cells later. Exit status 2 where nothing can be measured, 1 where a cell failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # started as a file, Python puts benchmarks/ there alone; nothing need be installed
from gpu_cells import GB, Cell, chosen, layers_that_fit, why_skipped  # noqa: E402
from gpu_report import peak_of, section, with_results  # noqa: E402
from gpu_results import better, results_of  # noqa: E402

from megatron_emoe.settings.atomic_file import write_atomically  # noqa: E402

PYTHON = sys.executable
PAIRS, QUICK_PAIRS, ROUNDS = 30, 10, 5
LIMIT = 1200  # seconds of one cell: no measurement, a guard against one that hangs
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


def plan(options: argparse.Namespace) -> tuple[list[Cell], dict[str, Any], dict[str, Any]]:
    """The cells to measure, what results there are, and what is said of this run.

    Raises:
        ValueError: nothing can be measured, or what was measured before is another machine's.
    """
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
    return cells, results_of(options.results, describe_machine(options, memory)), describe_run(options, layers)


def describe_machine(options: argparse.Namespace, memory: int) -> dict[str, Any]:
    """What all results of one page have in common."""
    device = torch.cuda.get_device_name(0)
    peak = options.peak_tflops or peak_of(device)
    versions = {"torch": _version("torch"), "megatron-core": _version("megatron-core")}
    return {"device": device, "memory": memory, "peak_tflops": peak} | versions


def describe_run(options: argparse.Namespace, layers: int) -> dict[str, Any]:
    """What may differ from cell to cell: date, command, driver, versions, sizes."""
    driver = _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").splitlines()
    versions = {"CUDA": torch.version.cuda or "none", "triton": _version("triton")}
    versions |= {"Transformer Engine": _version("transformer-engine")}
    return {
        "date": str(date.today()),
        "command": " ".join(["make bench-gpu", *([f'BENCH_ARGS="{" ".join(sys.argv[1:])}"'] if sys.argv[1:] else [])]),
        "driver": driver[0] if driver else "unknown",
        "versions": versions,
        "layers": layers,
        "pairs": options.repeats or (QUICK_PAIRS if options.quick else PAIRS),
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


def run_script(
    name: str, asked: dict[str, Any], log: Path, env: dict[str, str] | None = None, limit: float = LIMIT
) -> dict[str, Any]:
    """What benchmarks/NAME.py measured, in a process of its own; its streams go to the end of `log`.

    Where it failed, or took longer than `limit` seconds: why, and the parts that were measured before.
    """
    with tempfile.TemporaryDirectory() as folder:
        cell, out = Path(folder) / "cell.json", Path(folder) / "result.json"
        cell.write_text(json.dumps(asked))
        command = [PYTHON, str(REPO / f"benchmarks/{name}.py"), str(cell), str(out)]
        with open(log, "ab") as stream:
            begin = stream.tell()
            cause = _run(command, os.environ | _rank() | (env or {}), stream, limit)
        found = {"measured": json.loads(out.read_text())} if out.is_file() else {}
    if cause is None:
        return found
    said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()[-30:]
    print("\n".join(said), file=sys.stderr)
    told = next((line for line in reversed(said) if "Error" in line), said[-1] if said else cause)
    why = told if cause.startswith("exit") else cause
    return found | {"failed": f"failed: {why.strip().replace('|', '/')[:100]}"}


def _run(command: list[str], env: dict[str, str], stream: BinaryIO, limit: float) -> str | None:
    """Why the command failed; None: it did not."""
    try:
        done = subprocess.run(command, cwd=REPO, env=env, stdout=stream, stderr=stream, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no end within {limit:g} s"
    return f"exit status {done.returncode}" if done.returncode else None


def _rank() -> dict[str, str]:
    """The environment of an only rank; its port is any that is free."""
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    path = os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))
    return rank | {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": path}


def measure(cells: list[Cell], options: argparse.Namespace, results: dict[str, Any], run: dict[str, Any]) -> bool:
    """Router kernel and every cell, one after the other; each is written before the next begins. False: one failed.

    Cells that this machine cannot serve say why.
    """
    log = options.results.with_suffix(".log")
    kernel = run_script("measure_gpu_router", KERNEL, log)
    kernel |= {name: kernel["measured"].pop(name) for name in ("skipped",) if name in kernel.get("measured", {})}
    results["kernel"] = better(results["kernel"], kernel | {"run": run})
    write(options, results)
    engine, fp8 = find_spec("transformer_engine") is not None, torch.cuda.get_device_capability() >= (8, 9)
    well = "failed" not in kernel
    for cell in cells:
        if reason := why_skipped(cell, engine, fp8, cell.layers in options.only):
            found: dict[str, Any] = {"skipped": f"skipped: {reason}"}
        else:
            found = run_script("measure_gpu", cell.job(run["layers"], run["pairs"], ROUNDS), log)
        well &= "failed" not in found
        results["cells"][cell.name] = better(results["cells"].get(cell.name), found | {"run": run})
        write(options, results)
        print(f"{cell.name}: {found.get('skipped') or found.get('failed') or 'measured'}", flush=True)
    return well


def write(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Numbers and page as they now are."""
    write_atomically(options.results, json.dumps(results, indent=1) + "\n")
    write_atomically(options.out, with_results(options.out.read_text(), section(results)))


def main() -> int:
    try:
        options = read_options(sys.argv[1:])
        cells, results, run = plan(options)
    except ValueError as error:
        print(f"bench_gpu.py: error: {error}", file=sys.stderr)
        return 2
    well = measure(cells, options, results, run)
    print(f"written: {options.results}, {options.out}; log: {options.results.with_suffix('.log')}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
