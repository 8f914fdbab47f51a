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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import study_methods as plan
import study_report
from study_methods import Method
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tqdm import tqdm

from megatron_emoe.sweep_result import write_atomically

REPO = Path(__file__).resolve().parent.parent
BASES = {name: Method(name, "", "a run to continue", lr=plan.BASE_LR, base=name) for name in plan.BASES}


@dataclass(frozen=True)
class Cell:
    """A method with a seed. work: folder of checkpoints, logs and data. results: folder of the finished cells."""

    method: Method
    seed: int
    work: Path
    results: Path

    @property
    def name(self) -> str:
        return f"{self.method.name}-s{self.seed}"

    @property
    def checkpoint(self) -> Path:
        return self.work / "checkpoints" / (self.method.name if self.is_base else self.name)

    @property
    def is_base(self) -> bool:
        return self.method.name in BASES

    @property
    def tensorboard(self) -> Path:
        return self.work / "tensorboard" / self.name

    @property
    def result(self) -> Path:
        return self.results / f"{self.name}.json"

    def part(self, name: str) -> Path:
        """A file of this cell that only counts until the cell is finished."""
        return self.work / "parts" / f"{self.name}.{name}.json"

    def training(self) -> list[str]:
        """Flags of pretrain_emoe.py."""
        iterations = plan.BASE_ITERS if self.is_base else plan.CONTINUED_ITERS
        start = "" if self.is_base else f"--load {self.work}/checkpoints/{self.method.base} --finetune"
        data = f"""--data-path {self.work}/data/stdlib --tokenizer-type SentencePieceTokenizer
            --tokenizer-model {self.work}/data/stdlib.model"""
        steps = f"--train-iters {iterations} --save-interval {iterations} --eval-interval {iterations}"
        seeds = f"--seed {self.seed} --emoe-seed {self.seed}"
        words = f"{plan.MODEL} {plan.TRAIN} {data} {steps} {self.method.lr} {seeds} {start} --save {self.checkpoint}"
        words += f" --tensorboard-dir {self.tensorboard} {plan.BASES[self.method.base]}"
        return _last_wins(f"{words} --moe-router-topk {self.method.k} {self.method.flags}".split())

    def sweep(self, ks: tuple[int, ...], tail_scale: str, out: Path) -> list[str]:
        """Flags of tools/sweep_k.py."""
        words = f"""--load {self.checkpoint} --label {self.method.name} --k {" ".join(map(str, ks))} --out {out}
            {self._held_out(plan.HELD_OUT_TOKENS)}"""
        scale = f"--emoe-tail-scale {tail_scale}" if self.method.fit else ""  # others know of none
        return f"{words} {scale}".split()

    def fit(self) -> list[str]:
        """Flags of tools/fit_tail_scale.py."""
        ks = " ".join(map(str, plan.FITTED_KS))
        words = f"--load {self.checkpoint} --k {ks} --out {self.part('fit')} {self._held_out(plan.FIT_TOKENS)}"
        return words.split()

    def _held_out(self, tokens: int) -> str:
        return f"--data-path {self.work}/data/stdlib_heldout --max-eval-tokens {tokens} {plan.EVALUATION}"

    def fitted_words(self) -> str:
        """The fitted table as the words of --emoe-tail-scale."""
        table = json.loads(self.part("fit").read_text())["tail_scale"]
        return " ".join(f"{k}:{scale}" for k, scale in table.items())


def _last_wins(words: list[str]) -> list[str]:
    """The words without the earlier of two --moe-router-topk."""
    first = words.index("--moe-router-topk")
    return words[:first] + words[first + 2 :] if words.count("--moe-router-topk") > 1 else words


def steps(cell: Cell) -> Iterator[tuple[str, Callable[[], list[str]], Path]]:
    """Script, its flags (known when it is due) and the file that exists once it has succeeded."""
    done = cell.checkpoint / "latest_checkpointed_iteration.txt"
    yield "pretrain_emoe.py", cell.training, done
    yield "tools/sweep_k.py", lambda: cell.sweep(cell.method.ks, "1", cell.part("sweep")), cell.part("sweep")
    if cell.method.fit:
        fitted = cell.part("fitted-sweep")
        yield "tools/fit_tail_scale.py", cell.fit, cell.part("fit")
        ks = tuple(k for k in cell.method.ks if k >= cell.method.k)
        yield "tools/sweep_k.py", lambda: cell.sweep(ks, cell.fitted_words(), fitted), fitted


class Progress:
    """What is left to do for one cell, and how long its steps took."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.left = [step for step in steps(cell) if not step[2].exists()]
        self.process: BaseProcess | None = None
        self.began = 0.0

    def next(self) -> bool:
        """Start the next step; False where none is left."""
        if not self.left:
            return False
        script, flags, _ = self.left[0]
        log = self.cell.work / "logs" / f"{self.cell.name}.{Path(script).stem}.{len(self.left)}.log"
        self.began = time.perf_counter()
        self.process = forks.start(REPO / script, flags(), log)
        return True

    def ended(self) -> bool:
        """Take note of the step that ended; False where it failed."""
        assert self.process is not None
        self.process.join()
        script, _, done = self.left.pop(0)
        if self.process.exitcode != 0 or not done.exists():
            return False
        _note_seconds(self.cell, Path(script).stem, time.perf_counter() - self.began)
        return True


def _note_seconds(cell: Cell, script: str, seconds: float) -> None:
    path = cell.part("seconds")
    known = json.loads(path.read_text()) if path.exists() else {}
    known[script] = round(known.get(script, 0.0) + seconds, 1)
    write_atomically(path, lambda file: file.write(json.dumps(known).encode()))


def finish(cell: Cell) -> None:
    """One file with everything about the cell, without the paths of this machine."""
    method = cell.method
    record: dict[str, Any] = {
        "method": method.name,
        "about": method.about,
        "seed": cell.seed,
        "k": method.k,
        "flags": f"{plan.BASES[method.base]} {method.flags}".strip(),
        "learning_rate": method.lr,
        "iterations": plan.CONTINUED_ITERS,
        "seconds": _read(cell.part("seconds")),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("megatron-core", "torch")},
        "active_experts": measured_experts(cell.tensorboard),
        "sweep": _read(cell.part("sweep")),
    }
    if method.fit:
        fit = _read(cell.part("fit"))
        record |= {"tail_scale": fit["tail_scale"], "fitted_sweep": _read(cell.part("fitted-sweep"))}
    text = json.dumps(record, indent=2).replace(f"{cell.work}/", "study/").replace(f"{REPO}/", "") + "\n"
    write_atomically(cell.result, lambda file: file.write(text.encode()))


def measured_experts(folder: Path) -> float:
    """Experts per token and layer in training: the mean over logged steps."""
    events = EventAccumulator(str(folder))
    events.Reload()
    values = [event.value for event in events.Scalars("emoe/active k")]
    return sum(values) / len(values)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


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
    progress.left = [step for step in progress.left if step[0] == "pretrain_emoe.py"]
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
