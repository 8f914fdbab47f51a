"""The whole of elastic continued training, on real text, on any machine: about eight minutes on two cores.

Corpus (the Python standard library's sources) -> SentencePiece -> Megatron data -> a base run with plain top-k and
expert parallelism -> two continued runs from it side by side, plain top-k and the recipe of docs/study.md -> the tail
scale of each, fitted -> sweeps over k', of plain top-k with and without its tail scale, for the elastic run also of
each layer alone and of the k' per layer that this suggests for a budget -> demo/card.html, demo/card.md, demo/wall.png.
Every step is one command of this repository, written at the top of its log; one whose output is complete is not run
again. All run on the CPU.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))  # forks.py
from demo_run import Lane, Spent, Step, run  # noqa: E402

from megatron_emoe.settings.atomic_file import write_atomically  # noqa: E402
from megatron_emoe.settings.tail_scale import TAIL_SCALE_FILE  # noqa: E402
from megatron_emoe.sweep.budget import flops_limit, name, proposals  # noqa: E402
from megatron_emoe.sweep.curve import (  # noqa: E402
    K,
    best_k,
    effective_range,
    load,
    markdown_table,
    missing_ks,
    sensitivity_budgets,
    wall,
)
from megatron_emoe.sweep.curve import curve as curve_of  # noqa: E402
from megatron_emoe.sweep.summary import answer  # noqa: E402
from megatron_emoe.sweep.uncertainty import difference  # noqa: E402

OUT = REPO / "demo"
VOCAB = 2048
LAYERS, TRAINED_K = 3, 4
BASE_ITERS, CONTINUED_ITERS = 400, 120
KS = (1, 2, 3, 4, 6, 8, 12, 16)
LAYER_KS = (1, 2, 3, 6)
"""The k' that each layer is measured at alone; with TRAINED_K, what a k' per layer is put together from."""
BUDGET = 0.6
"""Expert FLOPs per token that the last step asks a k' for, as a multiple of those at TRAINED_K."""

ELASTIC = "@examples/recipe.args"
"""What makes the elastic run elastic."""
FITTED_KS = (8, 16)
"""The k' that a tail scale is fitted at."""
HELD_OUT_TOKENS = 32768

MODEL = f"""--num-layers {LAYERS} --hidden-size 96 --num-attention-heads 4 --seq-length 256
    --max-position-embeddings 256 --num-experts 32 --moe-router-topk {TRAINED_K} --moe-ffn-hidden-size 48
    --ffn-hidden-size 48 --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights --moe-aux-loss-coeff 1e-2
    --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall"""
PARALLEL = "--expert-model-parallel-size 2"
"""The base run's. What follows from it runs on one rank each: Megatron's checkpoints load in any layout."""
TRAIN = """--global-batch-size 8 --adam-beta2 0.95 --clip-grad 1.0 --weight-decay 0.1
    --lr-decay-style cosine --log-interval 10 --eval-iters 4 --split 99,1,0 --no-create-attention-mask-in-dataloader"""


TITLES = {"topk": "topk", "topk_fitted": "topk + a(k')", "elastic": "elastic + a(k')"}
"""The curves by the name of their sweep: + a(k') is with the fitted tail scale, as in docs/study.md."""


def training(run: str, iterations: int, lr: str, extra: str, ranks: int = 1, micro_batch: int = 8) -> Step:
    save = OUT / "checkpoints" / run
    flags = f"""{MODEL} {TRAIN} --micro-batch-size {micro_batch} --train-iters {iterations} {lr}
        --eval-interval {iterations} --data-path {OUT}/data/stdlib --data-cache-path {OUT}/data/cache/{run}
        --tokenizer-type SentencePieceTokenizer --tokenizer-model {OUT}/data/stdlib.model --save {save}
        --save-interval {iterations} --tensorboard-dir {OUT}/tensorboard/{run} {extra}"""
    newest = save / "latest_checkpointed_iteration.txt"
    done = lambda: newest.exists() and newest.read_text().strip() == str(iterations)  # noqa: E731
    return Step(run, "pretrain_emoe.py", flags.split(), done, ranks, iterations, partial(forget_run, run))


def forget_run(run: str) -> None:
    """Remove what a run that is not done has left: with checkpoints there, --save is refused."""
    for kind in ("checkpoints", "tensorboard"):
        shutil.rmtree(OUT / kind / run, ignore_errors=True)


def sweep_file(curve: str) -> Path:
    return OUT / f"sweep_{curve}.json"


def sweep(run: str, title: str, extra: str, cells: Sequence[K], curve: str = "") -> Step:
    """A sweep of a run into its file, or that of another curve; done once the file has these cells under the curve's
    title."""
    out, label = sweep_file(curve or run), TITLES[curve or run]
    done = lambda: has_label(out, label) and not missing_ks(load(out), cells)  # noqa: E731
    prepare = lambda: None if has_label(out, label) else out.unlink(missing_ok=True)  # noqa: E731
    flags = f"--load {OUT}/checkpoints/{run} --out {out} {held_out(run, HELD_OUT_TOKENS)} {extra}"
    return Step(title, "tools/sweep_k.py", [*flags.split(), "--label", label], done, 1, prepare=prepare)


def has_label(file: Path, label: str) -> bool:
    """Whether it is a sweep of that title; one of an older demo may have been measured in another way."""
    return file.exists() and load(file).label == label


def fit(run: str) -> Step:
    """The tail scale of a run, fitted on other tokens than those of its sweep."""
    done = lambda: any((OUT / f"checkpoints/{run}").glob(f"*/{TAIL_SCALE_FILE}"))  # noqa: E731
    flags = f"--load {OUT}/checkpoints/{run} --k {numbers(FITTED_KS)} {held_out(run, 2 * HELD_OUT_TOKENS)}"
    return Step(f"fit {run}", "tools/fit_tail_scale.py", flags.split(), done, 1)


def held_out(run: str, tokens: int) -> str:
    """Flags of an evaluation: large micro-batches, so that small experts are worth their calls."""
    return f"""--data-path {OUT}/data/stdlib_heldout --data-cache-path {OUT}/data/cache/{run} --max-eval-tokens {tokens}
        --micro-batch-size 16 --global-batch-size 32 --no-create-attention-mask-in-dataloader
        --moe-token-dispatcher-type alltoall"""


def numbers(ks: Sequence[int]) -> str:
    return " ".join(map(str, ks))


def sources() -> list[str]:
    """The Python standard library: its modules and packages, without what was installed beside them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = [path for path in sorted(library.iterdir()) if path.name != "site-packages"]
    return [str(path) for path in parts if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))]


def stages() -> Iterator[tuple[Lane, ...]]:
    """What runs one after another; of each, the lanes that run side by side."""
    yield (base(),)
    yield topk(), elastic()
    yield (drawings(),)


def base() -> Lane:
    flags = ["--input", *sources(), "--suffix", ".py", "--train-tokenizer", str(VOCAB), "--append-eod"]
    flags += f"--output-prefix {OUT}/data/stdlib --holdout 0.05 --workers 2 --errors ignore".split()
    yield Step("corpus", "tools/preprocess_data.py", flags, (OUT / "data/stdlib.json").exists)
    yield training("base", BASE_ITERS, "--lr 2e-3 --min-lr 1e-3 --lr-warmup-iters 30", PARALLEL, ranks=2, micro_batch=4)


def continued(run: str, extra: str, micro_batch: int = 8) -> Step:
    low = "--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 10"
    start = f"--load {OUT}/checkpoints/base --finetune {extra}"
    return training(run, CONTINUED_ITERS, low, start, micro_batch=micro_batch)


def topk() -> Lane:
    yield continued("topk", "")
    yield sweep("topk", "sweep topk", f"--k {numbers(KS)} --emoe-tail-scale 1", KS)
    yield fit("topk")
    yield sweep("topk", "sweep topk fitted", f"--k {numbers(KS)}", KS, curve="topk_fitted")


def elastic() -> Lane:
    yield continued("elastic", f"{ELASTIC} --emoe-eval-k 4 8 12")
    yield fit("elastic")
    yield sweep("elastic", "sweep elastic", f"--k {numbers(KS)}", KS)
    alone = sensitivity_budgets(LAYER_KS, TRAINED_K, LAYERS)
    yield sweep("elastic", "sweep layers", f"--k {numbers(LAYER_KS)} --layer-sensitivity", alone)
    if allocations := suggested():
        words = " ".join(map(name, allocations))
        yield sweep("elastic", "sweep k' per layer", f"--k-per-layer {words}", allocations)


def suggested() -> list[tuple[int, ...]]:
    """The k' per layer that the measured layers suggest for BUDGET."""
    elastic = load(sweep_file("elastic"))
    return [proposal.k for proposal in proposals(elastic, flops_limit(elastic, BUDGET))]


def drawings() -> Lane:
    """The chart and the card, made anew where a sweep is newer."""
    files = [sweep_file(curve) for curve in TITLES]
    card = ["--baseline", str(files[0]), "--title", f"Demo: top-k, and {ELASTIC}"]
    for title, script, target, extra in (
        ("plot", "tools/plot_sweep.py", OUT / "wall.png", []),
        ("card", "tools/report.py", OUT / "card.html", card),
    ):
        words = [*map(str, files), *extra, "--out", str(target)]
        yield Step(title, script, words, lambda target=target: is_newer(target, files))


def is_newer(target: Path, files: Sequence[Path]) -> bool:
    return target.exists() and all(target.stat().st_mtime_ns > file.stat().st_mtime_ns for file in files)


def summary(spent: Sequence[Spent]) -> str:
    """The result in short; the card has it in full."""
    topk, fitted, elastic = (load(sweep_file(curve)) for curve in TITLES)
    lines = [f"Held-out loss (nats per token) at k' active experts; both runs continue one base at k = {topk.k_train}."]
    lines += [f"elastic: {ELASTIC}; + a(k'): with its fitted tail scale", "", markdown_table([topk, fitted, elastic])]
    for result in (topk, fitted, elastic):
        first = wall(result)
        end = f"wall at k' = {first}" if first else f"no wall up to k' = {max(KS)}"
        lines += [f"{result.label}: effective range {effective_range(result):.2f}, {end}"]
    cells, at_k = curve_of(elastic), curve_of(topk)[topk.k_train]
    cost = difference(cells[elastic.k_train], at_k)
    lines += [f"{elastic.label} at k against topk: {cost.text()} nats, {cost.value / at_k.loss:+.2%}"]
    for other, where in ((at_k, "topk at k"), (curve_of(fitted)[best_k(fitted)], f"{fitted.label} at its best k'")):
        gain = difference(cells[best_k(elastic)], other)
        lines += [f"{elastic.label} at its best k' = {best_k(elastic)} against {where}: {gain.text()}"]
    lines += ["", *(f"{result.label}: {answer(result)}" for result in (topk, fitted, elastic))]
    seconds = ", ".join(f"{one.step} {one.wall:.0f} ({one.processor:.0f})" for one in spent)
    return "\n".join([*lines, "", f"seconds by step, of processor time in brackets: {seconds}", ""])


def read_spent(file: Path) -> dict[str, Spent]:
    """What the steps that were run before took; nothing where an older demo wrote the file, in another form."""
    known = json.loads(file.read_text()) if file.exists() else []
    return {one["step"]: Spent(**one) for one in known} if isinstance(known, list) else {}


NEXT = """With a model of your own (README.md says what layout.args is):
python tools/convert_checkpoint.py import --hf MODEL --out CHECKPOINT
torchrun --nproc-per-node 8 pretrain_emoe.py @CHECKPOINT/model.args @examples/recipe.args @slurm/train.args \\
  @layout.args --pretrained-checkpoint CHECKPOINT --load OUT --save OUT --data-path data/text
torchrun --nproc-per-node 8 tools/sweep_k.py --load OUT --k 4 8 16 --data-path data/text_heldout --out sweep.json"""


def main() -> None:
    os.chdir(REPO)
    for folder in ("logs", "data", "checkpoints"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)
    timings = OUT / "seconds.json"
    spent = read_spent(timings)

    def note(one: Spent) -> None:
        spent[one.step] = one
        write_atomically(timings, json.dumps([asdict(each) for each in spent.values()]))

    for lanes in stages():
        run(lanes, OUT / "logs", note)
    print(f"\n{summary(list(spent.values()))}\nwhich k' for {BUDGET:g} of the expert FLOPs?", flush=True)
    question = ["tools/pick_k.py", str(sweep_file("elastic").relative_to(REPO)), "--max-flops", f"{BUDGET:g}"]
    print(f"python {' '.join(question)}\n", flush=True)
    subprocess.run([sys.executable, *question], check=True)
    print(f"\ncard: {OUT}/card.html, {OUT}/card.md\nfigure: {OUT}/wall.png\ntensorboard --logdir {OUT}/tensorboard")
    print(f"\n{NEXT}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on after the last step that is complete", file=sys.stderr)
        sys.exit(130)
