"""What elasticity costs: paired ratios, elastic to stock Megatron-Core, interleaved in one run.

    make bench                    # on CPU: host mode, two gloo ranks; prints a table and writes docs/performance.md

Three measurements: one optimizer step of the same model with stock top-k and with co-activation sampling plus the
hierarchical loss; the router alone, forward and backward, plain and sampling; the bytes handed to the all-to-all.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
STEP_GOAL, ROUTER_GOAL = 1.01, 1.5


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--steps", type=int, default=40, help="Measured pairs of steps, after 5 pairs of warm-up.")
    options.add_argument("--out", default=REPO / "docs/performance.md", type=Path, help="Report (Markdown).")
    chosen = options.parse_args()
    if chosen.steps < 30:
        sys.exit(f"--steps {chosen.steps}: must be at least 30, or the interval says little")
    results = {name: _measure(name, ranks, chosen.steps) for name, ranks in (("router", 1), ("step", 2))}
    table = _table(results)
    print(table)
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(_report(table, chosen.steps))
    print(f"written: {chosen.out}")


def _measure(name: str, ranks: int, steps: int) -> dict:
    """Run one measurement under torchrun and read the JSON that its first rank writes."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [*launcher, str(REPO / f"benchmarks/measure_{name}.py"), str(steps), str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)
        if run.returncode != 0:
            sys.exit(f"{' '.join(command)} failed:\n{(run.stdout + run.stderr)[-4000:]}")
        return json.loads(out.read_text())


def ratio_with_interval(elastic: list[float], stock: list[float]) -> tuple[float, float, float]:
    """Median of the paired ratios and its 95 % bootstrap interval (2000 resamples, fixed seed)."""
    ratios = [a / b for a, b in zip(elastic, stock, strict=True)]
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return statistics.median(ratios), medians[50], medians[1949]


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


def _report(table: str, steps: int) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "megatron-core"))
    return f"""# Performance

What elastic training costs against the same Megatron-Core with stock top-k. Written by `make bench`.

{date.today()}, {os.cpu_count()} cores of {cpu}, Python {platform.python_version()}, {versions}. Host mode (CPU, gloo,
one thread per rank): ratios are meaningful here, absolute times are not.

{table}

The two variants take turns within one process: {steps} pairs after 5 pairs of warm-up; the ratio is the median of the
paired ratios, the interval a 95 % bootstrap over the pairs.

- Step: 2 ranks, expert parallelism 2, alltoall; 4 layers, hidden size 256, 32 experts of width 256, k = 4, 2 x 2
  sequences of 256 tokens per rank; elastic: co-activation sampling from pools up to 12, a pool size per token,
  hierarchical loss 1e-3.
- Router: T = 8192 tokens, E = 64, k = 8, K = 24, load-balancing loss on, no hierarchical loss (a loss that stock top-k
  does not have is measured in a row of its own); forward and backward, once from hidden states of size 2048 (OLMoE)
  and once from the logits.
- Bytes: what the ranks together hand to `all_to_all_single` in one step, a rank's share to itself included.

No GPU figure is stated: none has been measured yet.
"""


if __name__ == "__main__":
    main()
