"""One cell of the study, a method with a seed: what has to be run for it, and the file it ends as."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import study_methods
from study_family import Family, Method, elastic_config
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_emoe.routing.active_k import Place, scheduled_k
from megatron_emoe.settings.atomic_file import write_atomically
from megatron_emoe.sweep.curve import missing_ks
from megatron_emoe.sweep.result import load

REPO = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Cell:
    """A method with a seed. work: folder of checkpoints, logs and data. results: folder of the finished cells."""

    method: Method
    seed: int
    work: Path
    results: Path
    family: Family = study_methods.FAMILY

    @property
    def name(self) -> str:
        return f"{self.method.name}-s{self.seed}"

    @property
    def checkpoint(self) -> Path:
        return self.work / "checkpoints" / (self.method.name if self.is_base else self.name)

    @property
    def is_base(self) -> bool:
        return self.method.name in self.family.bases

    @property
    def iterations(self) -> int:
        return self.family.base_iters if self.is_base else self.family.iterations(self.method)

    @property
    def tokens(self) -> int:
        """That it is trained on."""
        words = f"{self.family.model} {self.family.base_train if self.is_base else self.family.train}".split()
        sequence, batch = (int(words[words.index(flag) + 1]) for flag in ("--seq-length", "--global-batch-size"))
        return self.iterations * sequence * batch

    def is_trained(self) -> bool:
        tracker = self.checkpoint / "latest_checkpointed_iteration.txt"
        return tracker.exists() and tracker.read_text().strip() == str(self.iterations)

    def forget_run(self) -> None:
        """Delete what its training has left: checkpoints and logs."""
        for folder in (self.checkpoint, self.tensorboard):
            shutil.rmtree(folder, ignore_errors=True)

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
        base = self.work / "checkpoints" / self.method.base
        start = "" if self.is_base else f"--load {base} --finetune"
        data = f"""--data-path {self.work}/data/{self.family.data} --tokenizer-type SentencePieceTokenizer
            --tokenizer-model {self.work}/data/{self.family.data}.model"""
        steps = " ".join(f"--{what} {self.iterations}" for what in ("train-iters", "save-interval", "eval-interval"))
        seeds = f"--seed {self.seed} --emoe-seed {self.seed}"
        family = self.family
        batches = family.base_train if self.is_base else family.train
        words = f"{family.model} {batches} {data} {steps} {self.method.lr} {seeds} {start} --save {self.checkpoint}"
        words += f" --tensorboard-dir {self.tensorboard} {family.bases[self.method.base]}"
        return _last_wins(f"{words} --moe-router-topk {self.method.k} {self.method.flags.format(base=base)}".split())

    def sweep(self, ks: tuple[int, ...], tail_scale: str, out: Path) -> list[str]:
        """Flags of tools/sweep_k.py."""
        words = f"""--load {self.checkpoint} --label {self.method.name} --k {" ".join(map(str, ks))} --out {out}
            {self._held_out(self.family.held_out_tokens)}"""
        scale = f"--emoe-tail-scale {tail_scale}" if self.method.fit else ""  # others know of none
        return f"{words} {scale}".split()

    def fit(self) -> list[str]:
        """Flags of tools/fit_tail_scale.py."""
        ks = " ".join(map(str, self.family.fitted_ks))
        held_out = self._held_out(self.family.fit_tokens)
        words = f"--load {self.checkpoint} --k {ks} --out {self.part('fit')} {held_out}"
        return words.split()

    def _held_out(self, tokens: int) -> str:
        data = f"{self.work}/data/{self.family.data}_heldout"
        return f"--data-path {data} --max-eval-tokens {tokens} {self.family.evaluation}"

    def fitted_words(self) -> str:
        """The fitted table as the words of --emoe-tail-scale."""
        table = json.loads(self.part("fit").read_text())["tail_scale"]
        return " ".join(f"{k}:{scale}" for k, scale in table.items())


def _last_wins(words: list[str]) -> list[str]:
    """The words without the earlier of two --moe-router-topk."""
    first = words.index("--moe-router-topk")
    return words[:first] + words[first + 2 :] if words.count("--moe-router-topk") > 1 else words


@dataclass(frozen=True)
class Step:
    """A script, its flags (known when it is due), whether all that it makes is there, and what is called before it is
    started: a training run begins anew, and refuses to write over the checkpoints of one that was ended."""

    script: str
    flags: Callable[[], list[str]]
    done: Callable[[], bool]
    prepare: Callable[[], None] = lambda: None


def steps(cell: Cell) -> Iterator[Step]:
    """What has to be run for a cell, in order."""
    yield Step("pretrain_emoe.py", cell.training, cell.is_trained, cell.forget_run)
    yield _sweep_step(cell, cell.method.ks, lambda: "1", cell.part("sweep"))
    if cell.method.fit:
        yield Step("tools/fit_tail_scale.py", cell.fit, cell.part("fit").exists)
        ks = tuple(k for k in cell.method.ks if k >= cell.method.k)
        yield _sweep_step(cell, ks, cell.fitted_words, cell.part("fitted-sweep"))


def _sweep_step(cell: Cell, ks: tuple[int, ...], tail_scale: Callable[[], str], out: Path) -> Step:
    def done() -> bool:
        return out.exists() and not missing_ks(load(out), ks)  # the tool writes each k' when it has it

    return Step("tools/sweep_k.py", lambda: cell.sweep(ks, tail_scale(), out), done)


def forget_if_changed(cell: Cell) -> None:
    """Delete what a cell has so far where its flags were others, so that nothing old is finished under new flags."""
    flags = cell.part("flags")
    now = [*cell.training(), *cell.fit(), *map(str, cell.method.ks)]
    if flags.exists() and json.loads(flags.read_text()) != now:
        for path in flags.parent.glob(f"{cell.name}.*.json"):
            path.unlink()
        cell.forget_run()
    write_atomically(flags, json.dumps(now))


def note_seconds(cell: Cell, script: str, seconds: float) -> None:
    """Add to the time that a script took for this cell."""
    path = cell.part("seconds")
    known = _read(path) if path.exists() else {}
    known[script] = round(known.get(script, 0.0) + seconds, 1)
    write_atomically(path, json.dumps(known))


def finish(cell: Cell) -> None:
    """One file with everything about the cell, without the paths of this machine."""
    method = cell.method
    record: dict[str, Any] = {
        "method": method.name,
        "about": method.about,
        "seed": cell.seed,
        "k": method.k,
        "flags": f"{cell.family.bases[method.base]} {method.flags}".strip(),
        "learning_rate": method.lr,
        "iterations": cell.iterations,
        "tokens": cell.tokens,
        "seconds": _read(cell.part("seconds")),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {name: version(name) for name in ("megatron-core", "torch")},
        "active_experts": active_experts(method, cell.seed, cell.tensorboard, cell.family),
        "passes": 2 if elastic_config(method, cell.seed).emoe_second_pass else 1,
        "teacher": elastic_config(method, cell.seed).emoe_teacher is not None,
        "sweep": _read(cell.part("sweep")),
    }
    if method.fit:
        fit = _read(cell.part("fit"))
        record |= {"tail_scale": fit["tail_scale"], "fitted_sweep": _read(cell.part("fitted-sweep"))}
    text = json.dumps(record, indent=2).replace(f"{cell.work}/", "study/").replace(f"{REPO}/", "") + "\n"
    write_atomically(cell.result, text)


def active_experts(method: Method, seed: int, tensorboard: Path, family: Family = study_methods.FAMILY) -> float:
    """Experts per token, layer and pass in training: the mean of what was drawn over all steps, micro-batches and
    layers, or over the logged steps where every token has its own count."""
    elastic = elastic_config(method, seed)
    if elastic.counts_vary:
        return _logged_experts(tensorboard)
    steps, number = range(family.iterations(method)), family.micro_batches
    seconds = (False, True) if elastic.emoe_second_pass else (False,)
    places = itertools.product(steps, range(number), range(1, family.layers + 1), seconds)
    drawn = [
        scheduled_k(elastic, method.k, Place(step, place, layer, number, second))
        for step, place, layer, second in places
    ]
    return sum(drawn) / len(drawn)


def _logged_experts(folder: Path) -> float:
    events = EventAccumulator(str(folder))
    events.Reload()
    values = [event.value for event in events.Scalars("emoe/active k")]
    return sum(values) / len(values)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
