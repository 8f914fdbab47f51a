"""The studies of docs/study.md: a small base model, every way to continue it, three seeds, a sweep of k' for each.

    make study                            # regret: all cells, some hours on two cores; goes on where it was stopped
    make study STUDY_ARGS=--quick         # the same table at small size, one seed; printed
    make study STUDY_ARGS="--only topk,emoe --seeds 1"
    make study STUDY_ARGS="--study reach" # the older one, on another base: hours

Every cell (a method and a seed) ends as one JSON file in docs/study/regret, or docs/study: flags, times, sweep, fitted
tail scale. Checkpoints and logs go to study/, and a cell whose file exists is not run again. docs/study.md is written
from the files, whatever is there. The text is that of this machine (study_corpus.py). The regret study's base and
tokenizer are in benchmarks/regret_base; --new-base trains them anew.
"""

import forks  # first: it sets the number of threads

# isort: split
import argparse
import shutil
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import study_base
from study_cell import REPO, Cell, finish, forget_if_changed, note_seconds, steps
from study_plans import PLANS, Plan
from tqdm import tqdm


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
        note_seconds(self.cell, Path(step.script).stem, time.perf_counter() - self.began)
        return True


def corpus(plan: Plan, work: Path, new_base: bool) -> None:
    """The two data sets and their tokenizer, unless they are there: that of the kept base, or a new one."""
    prefix = work / "data" / plan.family.data
    if prefix.with_suffix(".json").exists():
        return
    inputs, suffixes, missing = plan.text()
    if missing:
        names = " ".join(missing)
        print(f"study: {names}: not installed, so the text is less than that of docs/study.md", file=sys.stderr)
    kept = kept_base(plan, new_base)
    if kept:
        shutil.copy(kept / study_base.TOKENIZER, prefix.with_suffix(".model"))
        tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{prefix}.model"]
    else:
        tokenizer = ["--train-tokenizer", str(plan.vocabulary)]
    words = [sys.executable, str(REPO / "tools/preprocess_data.py"), "--input", *inputs, "--suffix", *suffixes]
    words += [*f"--output-prefix {prefix} --append-eod --holdout {plan.held_out}".split(), *tokenizer]
    subprocess.run([*words, "--workers", "2", "--errors", "ignore"], check=True)


def kept_base(plan: Plan, new_base: bool) -> Path | None:
    """The folder with the base and its tokenizer, where they are not to be trained."""
    return None if new_base or plan.kept_base is None or not plan.kept_base.exists() else plan.kept_base


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


def base_run(base: str, plan: Plan, work: Path, new_base: bool) -> None:
    """A checkpoint that cells start from: the kept one, or a training run (SystemExit where it fails)."""
    cell = Cell(plan.family.base_method(base), 1, work, work, plan.family)
    kept = kept_base(plan, new_base)
    if kept and study_base.is_kept(cell, kept):
        study_base.take(cell, kept)
        return
    progress = Progress(cell)
    progress.left = [step for step in progress.left if step.script == "pretrain_emoe.py"]
    if progress.next() and not progress.ended():
        sys.exit(f"the run {base} failed; its log is in {work}/logs")
    if new_base and plan.kept_base:
        plan.kept_base.mkdir(exist_ok=True)
        study_base.keep(cell, plan.kept_base)


def chosen_cells(options: argparse.Namespace, plan: Plan) -> list[Cell]:
    """Those that say most first, for a study that is stopped early."""
    names = [method.name for method in plan.methods]
    wanted = options.only.split(",") if options.only else names
    for name in wanted:
        if name not in names:
            sys.exit(f"--only {name}: must be one of {', '.join(names)}")
    return [
        Cell(method, seed, options.work, options.results, plan.family)
        for method, seed in plan.order
        if method.name in wanted and seed in options.seeds
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", choices=tuple(PLANS), default="regret", help="Which of them. Default: regret.")
    parser.add_argument("--quick", action="store_true", help="Regret at small size, one seed; writes to study/ alone.")
    parser.add_argument("--only", help="Names of methods, with commas between them. Default: all.")
    parser.add_argument("--seeds", type=int, nargs="+", choices=(1, 2, 3), help="Default: all, with --quick 1.")
    parser.add_argument("--jobs", type=int, default=2, help="Cells at a time, each on one core.")
    parser.add_argument("--new-base", action="store_true", help="Train and keep regret's base and tokenizer anew.")
    parser.add_argument("--work", type=Path, help="Data, checkpoints and logs. Default: a folder in study/.")
    parser.add_argument("--results", type=Path, help="One JSON file per cell. Default: where docs/study.md reads them.")
    options = parser.parse_args()
    if options.quick and options.new_base:
        parser.error("--new-base would keep the base of another study: without --quick")
    if options.quick and options.study != "regret":
        parser.error("--quick needs --study regret")
    plan = PLANS["quick" if options.quick else options.study]
    options.plan, options.seeds = plan, options.seeds or ([1] if options.quick else [1, 2, 3])
    options.work = options.work or plan.work
    options.results = options.results or plan.results
    return options


def main() -> None:
    options = parse_args()
    plan: Plan = options.plan
    for folder in ("data", "checkpoints", "logs", "parts"):
        (options.work / folder).mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    corpus(plan, options.work, options.new_base)
    cells = chosen_cells(options, plan)
    for base in dict.fromkeys(cell.method.base for cell in cells):
        base_run(base, plan, options.work, options.new_base)
        run([cell for cell in cells if cell.method.base == base], options.jobs)
    plan.report(options.results)


if __name__ == "__main__":
    main()
