"""Paired measurements, interleaved in one run; each part of docs/performance.md is written by its own.

    make bench                                      # on CPU: all parts
    make bench BENCH_ARGS="--only conversion"       # one of them: elastic, conversion

elastic: one optimizer step of the same model with stock top-k and with co-activation sampling plus the hierarchical
loss; the router alone, forward and backward, plain and sampling; the bytes handed to the all-to-all. conversion: import
and export of a checkpoint against copying its bytes, and the memory they take.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

from paired import ratio_with_interval
from parts import fill, with_part

REPO = Path(__file__).resolve().parent.parent
STEP_GOAL, ROUTER_GOAL, CONVERSION_GOAL = 1.01, 1.5, 0.5


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", choices=list(PARTS), help="Measure one part and leave the rest of the report.")
    options.add_argument("--steps", type=int, default=40, help="Measured pairs of steps, after 5 pairs of warm-up.")
    options.add_argument("--repeats", type=int, default=5, help="Measured pairs of copy and conversion.")
    options.add_argument("--folder", default=tempfile.gettempdir(), help="Where conversions happen; 16 GB are needed.")
    options.add_argument("--out", default=REPO / "docs/performance.md", type=Path, help="Report (Markdown).")
    chosen = options.parse_args()
    if chosen.steps < 30:
        sys.exit(f"--steps {chosen.steps}: must be at least 30, or the interval says little")
    if chosen.repeats < 3:
        sys.exit(f"--repeats {chosen.repeats}: must be at least 3, or the median says little")
    chosen.out.parent.mkdir(exist_ok=True)
    for part in [chosen.only] if chosen.only else PARTS:
        text = PARTS[part](chosen)
        print(text)
        old = chosen.out.read_text() if chosen.out.exists() else ""
        chosen.out.write_text(with_part(old, part, text))
        print(f"written: {chosen.out}")


def _measure(name: str, *words: str, ranks: int | None = None) -> dict:
    """Run one measurement, under torchrun where it has ranks, and read the JSON that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launcher = [sys.executable]
        if ranks:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, str(REPO / f"benchmarks/measure_{name}.py"), *words, str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _python_path()}
        run = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{(run.stdout + run.stderr)[-4000:]}")
        return json.loads(out.read_text())


def _table(results: dict) -> str:
    rows = [
        "| measurement | stock, ms | elastic, ms | ratio | 95 % interval | goal |",
        "| --- | ---: | ---: | ---: | --- | --- |",
    ]
    for result, goal in ((results["step"], STEP_GOAL), (results["router"], ROUTER_GOAL)):
        for name, times in result["times"].items():
            ratio, low, high = ratio_with_interval(times["elastic"], times["stock"])
            stock, elastic = (1000 * statistics.median(times[kind]) for kind in ("stock", "elastic"))
            rows.append(f"| {name} | {stock:.2f} | {elastic:.2f} | {ratio:.3f} | {low:.3f} to {high:.3f} | {goal} |")
    sent = results["step"]["bytes"]
    rows.append(
        f"| all-to-all, bytes per step | {sent['stock']} | {sent['elastic']} | "
        f"{sent['elastic'] / sent['stock']:.3f} | counted | 1 |"
    )
    return "\n".join(rows)


def elastic(chosen: argparse.Namespace) -> str:
    """The part on what elastic training costs."""
    ranks = {"router": 1, "step": 2}
    results = {name: _measure(name, str(chosen.steps), ranks=count) for name, count in ranks.items()}
    what = f"""Elastic training against the same Megatron-Core with stock top-k. {_machine()} Host mode (CPU, gloo, one
    thread per rank): ratios are meaningful here, absolute times are not."""
    return f"""## What elastic training costs

{fill(what)}

{_table(results)}

The two variants take turns within one process: {chosen.steps} pairs after 5 pairs of warm-up; the ratio is the median
of the paired ratios, the interval a 95 % bootstrap over the pairs.

- Step: 2 ranks, expert parallelism 2, alltoall; 4 layers, hidden size 256, 32 experts of width 256, k = 4, 2 x 2
  sequences of 256 tokens per rank; elastic: co-activation sampling from pools up to 12, a pool size per token,
  hierarchical loss 1e-3.
- Router: T = 8192 tokens, E = 64, k = 8, K = 24, load-balancing loss on, no hierarchical loss (a loss that stock top-k
  does not have is measured in a row of its own); forward and backward, once from hidden states of size 2048 (OLMoE)
  and once from the logits.
- Bytes: what the ranks together hand to `all_to_all_single` in one step, a rank's share to itself included.
"""


def conversion(chosen: argparse.Namespace) -> str:
    """The part on import and export."""
    load = os.getloadavg()[0]
    result = _measure("conversion", "--repeats", str(chosen.repeats), "--folder", chosen.folder)
    size, group = result["bytes"] / 1e9, result["group_bytes"] / 1e9
    rows = [_conversion_row(kind, result, 2 * group + 1) for kind in ("import", "export")]
    head = "| | copy, s | conversion, s | ratio | 95 % interval | goal | whole process, s | peak memory, GB | bound |"
    what = f"""A checkpoint of {size:.2f} GB in bfloat16: OLMoE's widths, 4 layers, the largest group of tensors (a
    layer) {group:.2f} GB. Random weights, no check of the result (`--no-verify`). {_machine()} Load average when it
    began, from other programs: {load:.1f}."""
    return f"""## Import and export against copying

{fill(what)}

{head}
| --- | ---: | ---: | ---: | --- | --- | ---: | ---: | ---: |
{"\n".join(rows)}

{chosen.repeats} pairs in each direction; a copy and a conversion take turns, each with its source dropped from the page
cache before it starts and its output on the disk (fsync) when the clock stops. Ratio: throughput of the conversion to
that of the copy, median of the paired ratios; the interval is a 95 % bootstrap over the pairs. The process's time
includes the start of Python and its libraries. Peak memory: the largest resident set of the process, mapped files
included, largest of all repeats; the bound is twice the largest group and 1 GB.
"""


def _conversion_row(kind: str, result: dict, bound: float) -> str:
    runs = result[kind]
    copies, seconds, process = ([run[name] for run in runs] for name in ("copy", "seconds", "process"))
    ratio, low, high = ratio_with_interval(copies, seconds)
    times = " | ".join(f"{statistics.median(values):.1f}" for values in (copies, seconds))
    peak = max(run["peak_bytes"] for run in runs) / 1e9
    return (
        f"| {kind} | {times} | {ratio:.2f} | {low:.2f} to {high:.2f} | {CONVERSION_GOAL} | "
        f"{statistics.median(process):.1f} | {peak:.2f} | {bound:.2f} |"
    )


def _machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    python = platform.python_version()
    return f"{date.today()}, {os.cpu_count()} cores of {cpu}, Python {python}, {versions}."


def _python_path() -> str:
    return os.pathsep.join(filter(None, [str(REPO), os.environ.get("PYTHONPATH")]))


PARTS = {"elastic": elastic, "conversion": conversion}


if __name__ == "__main__":
    main()
