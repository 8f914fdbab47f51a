"""The study of docs/study.md: a small base model, every way to continue it, three seeds, a sweep of k' for each.

    make study                                       # all cells; hours on two cores; goes on where it was stopped
    make study STUDY_ARGS="--only topk,tail,emoe --seeds 1"

Corpus: the Python standard library's sources. Every cell (a method and a seed) ends as one JSON file in docs/study:
flags, times, sweep, fitted tail scale. Checkpoints and logs go to study/, and a cell whose file exists is not run
again. docs/study.md is written from the files, whatever is there.
"""

import forks  # first: it sets the number of threads

# isort: split
import argparse
import json
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import study_methods as plan
import study_report
from study_cell import BASES, REPO, Cell, finish, forget_if_changed, steps
from tqdm import tqdm

from megatron_emoe.settings.atomic_file import write_atomically


class Progress:
    """What is left to do for one cell, and how long its steps took."""

    def __init__(self, cell: Cell) -> None:
        forget_if_changed(cell)
        self.cell = cell
        self.left = [step for step in steps(cell) if not step.done()]
        self.process: BaseProcess | None = None
        self.began = 0.0

    def next(self) -> bool:
        """Start the next step; False where none is left."""
        if not self.left:
            return False
        step = self.left[0]
        step.prepare()
        log = self.cell.work / "logs" / f"{self.cell.name}.{Path(step.script).stem}.{len(self.left)}.log"
        self.began = time.perf_counter()
        self.process = forks.start(REPO / step.script, step.flags(), log)
        return True

    def ended(self) -> bool:
        """Take note of the step that ended; False where it failed."""
        assert self.process is not None
        self.process.join()
        step = self.left.pop(0)
        if self.process.exitcode != 0 or not step.done():
            return False
        _note_seconds(self.cell, Path(step.script).stem, time.perf_counter() - self.began)
        return True


def _note_seconds(cell: Cell, script: str, seconds: float) -> None:
    path = cell.part("seconds")
    known = json.loads(path.read_text()) if path.exists() else {}
    known[script] = round(known.get(script, 0.0) + seconds, 1)
    write_atomically(path, json.dumps(known))


def corpus(work: Path) -> None:
    """The tokenizer and the two data sets, unless they are there."""
    if (work / "data/stdlib.json").exists():
        return
    sys.path.insert(0, str(REPO / "examples"))
    from demo import sources

    words = [sys.executable, str(REPO / "tools/preprocess_data.py"), "--input", *sources(), "--suffix", ".py"]
    words += f"--output-prefix {work}/data/stdlib --train-tokenizer {plan.VOCAB} --append-eod --holdout 0.05".split()
    subprocess.run([*words, "--workers", "2", "--errors", "ignore"], check=True)


def run(cells: list[Cell], jobs: int) -> None:
    """Bring every cell to its end, `jobs` of them at a time (SystemExit names those that failed, after the others)."""
    failed = []
    waiting = [Progress(cell) for cell in cells if not cell.result.exists()]
    running: list[Progress] = []
    with tqdm(total=len(cells), initial=len(cells) - len(waiting), desc="cells", unit="cell") as bar:
        while waiting or running:
            while waiting and len(running) < jobs:
                _go_on(waiting.pop(0), running, bar)
            if running:
                ended = forks.wait_for_one([progress.process for progress in running if progress.process])
                progress = next(one for one in running if one.process is ended)
                running.remove(progress)
                if progress.ended():
                    _go_on(progress, running, bar)
                else:
                    failed.append(progress.cell.name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their logs are in {cells[0].work}/logs, and they start anew next time")


def _go_on(progress: Progress, running: list[Progress], bar: tqdm) -> None:
    if progress.next():
        running.append(progress)
    else:
        finish(progress.cell)
        bar.update()


def base_run(base: str, work: Path) -> None:
    """A checkpoint that cells start from; it has a training step alone (SystemExit where it fails)."""
    progress = Progress(Cell(BASES[base], 1, work, work))
    progress.left = [step for step in progress.left if step.script == "pretrain_emoe.py"]
    if progress.next() and not progress.ended():
        sys.exit(f"the run {base} failed; its log is in {work}/logs")


def chosen_cells(options: argparse.Namespace) -> list[Cell]:
    """Those that say most first, for a study that is stopped early."""
    names = [method.name for method in plan.METHODS]
    wanted = options.only.split(",") if options.only else names
    for name in wanted:
        if name not in names:
            sys.exit(f"--only {name}: must be one of {', '.join(names)}")
    first, *others = plan.SEEDS
    core = [method for method in plan.MAIN if method.name in plan.CORE]
    rest = [method for method in plan.MAIN if method.name not in plan.CORE]
    order = [(method, first) for method in plan.MAIN] + [(method, seed) for seed in others for method in core]
    order += [(method, seed) for seed in plan.SEEDS for method in plan.RAW]
    order += [(method, first) for method in plan.ABLATIONS] + [(method, seed) for seed in others for method in rest]
    return [
        Cell(method, seed, options.work, options.results)
        for method, seed in order
        if method.name in wanted and seed in options.seeds
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="Names of methods, with commas between them. Default: all.")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(plan.SEEDS), choices=plan.SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="Cells at a time, each on one core.")
    parser.add_argument("--work", type=Path, default=REPO / "study", help="Data, checkpoints and logs.")
    parser.add_argument("--results", type=Path, default=REPO / "docs/study", help="One JSON file per cell.")
    options = parser.parse_args()
    for folder in ("data", "checkpoints", "logs", "parts"):
        (options.work / folder).mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    corpus(options.work)
    cells = chosen_cells(options)
    for base in dict.fromkeys(cell.method.base for cell in cells):
        base_run(base, options.work)
    run(cells, options.jobs)
    study_report.write(options.results, REPO / "docs/study.md")


if __name__ == "__main__":
    main()
