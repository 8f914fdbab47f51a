"""The whole of elastic continued training, on real text, on any machine: about a quarter of an hour on two cores.

Corpus (the Python standard library's sources) -> SentencePiece -> Megatron data -> a base run with plain top-k and
expert parallelism -> two continued runs from it, plain top-k and the recipe of docs/study.md -> the tail scale of the
second, fitted -> sweeps over k', for the elastic run also of each layer alone and of the k' per layer that this
suggests for a budget -> demo/card.html, demo/card.md, demo/wall.png.
Every step is one command of this repository; one whose output is complete is not run again.
"""

import json
import re
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_emoe.settings.tail_scale import TAIL_SCALE_FILE
from megatron_emoe.sweep.budget import flops_limit, name, proposals
from megatron_emoe.sweep.curve import (
    K,
    cost_at_k,
    effective_range,
    load,
    markdown_table,
    missing_ks,
    peak_gain,
    sensitivity_budgets,
    wall,
)

REPO = Path(__file__).resolve().parent.parent
OUT = REPO / "demo"
VOCAB = 2048
LAYERS, TRAINED_K = 3, 4
BASE_ITERS, CONTINUED_ITERS = 400, 120
KS = (1, 2, 3, 4, 6, 8, 12, 16)
LAYER_KS = (1, 2, 3, 6)
"""The k' that each layer is measured at alone; with TRAINED_K, what a k' per layer is put together from."""
BUDGET = 0.6
"""Expert FLOPs per token that the last step asks a k' for, as a multiple of those at TRAINED_K."""
LATENCY = ("latency_ms_batch1", "latency_ms_large")

ELASTIC = "@examples/recipe.args"
"""What makes the elastic run elastic."""
FITTED_KS = (8, 16)
"""The k' that its tail scale is fitted at."""
HELD_OUT_TOKENS = 32768

MODEL = f"""--num-layers {LAYERS} --hidden-size 96 --num-attention-heads 4 --seq-length 256
    --max-position-embeddings 256 --num-experts 32 --moe-router-topk {TRAINED_K} --moe-ffn-hidden-size 48
    --ffn-hidden-size 48 --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights --moe-aux-loss-coeff 1e-2
    --moe-router-dtype fp32"""
PARALLEL = "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
TRAIN = """--micro-batch-size 4 --global-batch-size 8 --adam-beta2 0.95 --clip-grad 1.0 --weight-decay 0.1
    --lr-decay-style cosine --log-interval 10 --eval-iters 4 --split 99,1,0 --no-create-attention-mask-in-dataloader"""


@dataclass(frozen=True)
class Step:
    """One command; `done` tells whether it has succeeded. iterations: what its log counts up to, for the progress
    bar."""

    name: str
    command: list[str]
    done: Callable[[], bool]
    iterations: int = 0


def python(script: str, *words: object) -> list[str]:
    return [sys.executable, str(REPO / script), *map(str, words)]


def torchrun(script: str, flags: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, str(REPO / script), *flags.split()]


def training(name: str, iterations: int, lr: str, extra: str) -> Step:
    save = OUT / "checkpoints" / name
    flags = f"""{MODEL} {PARALLEL} {TRAIN} --train-iters {iterations} {lr} --eval-interval {iterations}
        --data-path {OUT}/data/stdlib --tokenizer-type SentencePieceTokenizer --tokenizer-model {OUT}/data/stdlib.model
        --save {save} --save-interval {iterations} --tensorboard-dir {OUT}/tensorboard/{name} {extra}"""
    done = (save / "latest_checkpointed_iteration.txt").exists
    return Step(name, torchrun("pretrain_emoe.py", flags), done, iterations)


def sweep_file(run: str) -> Path:
    return OUT / f"sweep_{run}.json"


def sweep(run: str, title: str, extra: str, cells: Sequence[K], fields: Sequence[str] = ()) -> Step:
    """A sweep of a run into its file, done once the file has these cells with these fields."""
    out = sweep_file(run)
    flags = f"--load {OUT}/checkpoints/{run} --label {run} --out {out} {held_out(HELD_OUT_TOKENS)} {extra}"
    done = lambda: out.exists() and not missing_ks(load(out), cells, fields)  # noqa: E731
    return Step(title, torchrun("tools/sweep_k.py", flags), done)


def fit(run: str) -> Step:
    """The tail scale of a run, fitted on other tokens than those of its sweep."""
    done = lambda: any((OUT / f"checkpoints/{run}").glob(f"*/{TAIL_SCALE_FILE}"))  # noqa: E731
    flags = f"--load {OUT}/checkpoints/{run} --k {numbers(FITTED_KS)} {held_out(2 * HELD_OUT_TOKENS)}"
    return Step("fit tail scale", torchrun("tools/fit_tail_scale.py", flags), done)


def held_out(tokens: int) -> str:
    """Flags of an evaluation: large micro-batches, so that small experts are worth their calls."""
    return f"""--data-path {OUT}/data/stdlib_heldout --max-eval-tokens {tokens} --micro-batch-size 16
        --global-batch-size 32 --no-create-attention-mask-in-dataloader {PARALLEL}"""


def numbers(ks: Sequence[int]) -> str:
    return " ".join(map(str, ks))


def sources() -> list[str]:
    """The Python standard library: its modules and packages, without what was installed beside them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = [path for path in sorted(library.iterdir()) if path.name != "site-packages"]
    return [str(path) for path in parts if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))]


def steps() -> Iterator[Step]:
    """All steps in order. Ask for the next one only once a step is done: some read what the steps before them wrote."""
    corpus = python("tools/preprocess_data.py", "--input", *sources())
    corpus += f"--suffix .py --output-prefix {OUT}/data/stdlib --train-tokenizer {VOCAB} --append-eod".split()
    yield Step(
        "corpus", [*corpus, *"--holdout 0.05 --workers 2 --errors ignore".split()], (OUT / "data/stdlib.json").exists
    )
    continued = f"--load {OUT}/checkpoints/base --finetune"
    low = "--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 10"
    yield training("base", BASE_ITERS, "--lr 2e-3 --min-lr 1e-3 --lr-warmup-iters 30", "")
    yield training("topk", CONTINUED_ITERS, low, continued)
    yield training("elastic", CONTINUED_ITERS, low, f"{continued} {ELASTIC} --emoe-eval-k 4 8 12")
    yield fit("elastic")
    for run in ("topk", "elastic"):
        yield sweep(run, f"sweep {run}", f"--k {numbers(KS)} --latency", KS, LATENCY)
    alone = sensitivity_budgets(LAYER_KS, TRAINED_K, LAYERS)
    yield sweep("elastic", "sweep layers", f"--k {numbers(LAYER_KS)} --layer-sensitivity", alone)
    if allocations := suggested():
        words = " ".join(map(name, allocations))
        yield sweep("elastic", "sweep k' per layer", f"--k-per-layer {words}", allocations)
    yield from drawings()


def suggested() -> list[tuple[int, ...]]:
    """The k' per layer that the measured layers suggest for BUDGET."""
    elastic = load(sweep_file("elastic"))
    return [proposal.k for proposal in proposals(elastic, flops_limit(elastic, BUDGET))]


def drawings() -> Iterator[Step]:
    """The chart and the card, made anew where a sweep is newer."""
    files = [sweep_file("topk"), sweep_file("elastic")]
    for title, script, target, extra in (
        ("plot", "tools/plot_sweep.py", OUT / "wall.png", []),
        (
            "card",
            "tools/report.py",
            OUT / "card.html",
            ["--baseline", files[0], "--title", f"Demo: top-k, and {ELASTIC}"],
        ),
    ):
        yield Step(
            title, python(script, *files, *extra, "--out", target), lambda target=target: is_newer(target, files)
        )


def is_newer(target: Path, files: Sequence[Path]) -> bool:
    return target.exists() and all(target.stat().st_mtime_ns > file.stat().st_mtime_ns for file in files)


def run(step: Step, seconds: dict[str, float]) -> None:
    """Run one step, its output in demo/logs, its progress on the terminal. SystemExit with the log's end if it
    fails."""
    log = OUT / "logs" / f"{re.sub('[^a-z]+', '_', step.name)}.log"
    start = time.perf_counter()
    total = step.iterations or None
    form = "{desc:18} {bar:20} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]" if total else "{desc:18} [{elapsed}]"
    every = {"miniters": 0, "mininterval": 0.5 if sys.stderr.isatty() else 30}
    with open(log, "w") as file, tqdm(total=total, desc=step.name, bar_format=form, **every) as bar:
        process = subprocess.Popen(step.command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            reached = re.search(r"iteration +(\d+)/ *\d+ \|", line)
            bar.update(int(reached[1]) - bar.n if reached else 0)
    if process.wait() != 0 or not step.done():
        sys.exit(f"{step.name} failed; the end of {log}:\n" + "".join(log.read_text().splitlines(True)[-20:]))
    seconds[step.name] = round(time.perf_counter() - start, 1)


def summary(seconds: dict[str, float]) -> str:
    """The result in short; the card has it in full."""
    topk, elastic = load(sweep_file("topk")), load(sweep_file("elastic"))
    lines = [f"Held-out loss (nats per token) at k' active experts; both runs continue one base at k = {topk.k_train}."]
    lines += [f"elastic: {ELASTIC}", "", markdown_table([topk, elastic])]
    for result in (topk, elastic):
        first = wall(result)
        end = f"wall at k' = {first}" if first else f"no wall up to k' = {max(KS)}"
        lines += [f"{result.label}: effective range {effective_range(result):.2f}, {end}"]
    lines += [f"elastic against top-k: at k {cost_at_k(elastic, topk):+.4f} nats (positive: worse),"]
    lines += [f"at its best k' {-peak_gain(elastic, topk):+.4f} against top-k at k", ""]
    spent = ", ".join(f"{step} {value:.0f}" for step, value in seconds.items())
    return "\n".join([*lines, f"seconds: {spent}", ""])


def main() -> None:
    for folder in ("logs", "data", "checkpoints"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)
    timings = OUT / "seconds.json"
    seconds = json.loads(timings.read_text()) if timings.exists() else {}
    for step in steps():
        if step.done():
            continue
        run(step, seconds)
        timings.write_text(json.dumps(seconds))
    print(f"\n{summary(seconds)}\nwhich k' for {BUDGET:g} of the expert FLOPs?", flush=True)
    question = ["tools/pick_k.py", str(sweep_file("elastic").relative_to(REPO)), "--max-flops", f"{BUDGET:g}"]
    print(f"python {' '.join(question)}\n", flush=True)
    subprocess.run([sys.executable, *question], cwd=REPO, check=True)
    print(f"\ncard: {OUT}/card.html, {OUT}/card.md\nfigure: {OUT}/wall.png\ntensorboard --logdir {OUT}/tensorboard")


if __name__ == "__main__":
    main()
