"""The whole of elastic continued training, on real text, on any machine: about ten minutes on two cores.

Corpus (the Python standard library's sources) -> SentencePiece -> Megatron data -> a base run with plain top-k and
expert parallelism -> two continued runs from it, plain top-k and elastic -> sweeps over k' -> demo/wall.png and
demo/report.md. Every step is one command of this repository; a step whose output exists is not run again.
"""

import json
import re
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from megatron_emoe.sweep import cost_at_k, effective_range, load, markdown_table, peak_gain, wall

REPO = Path(__file__).resolve().parent.parent
OUT = REPO / "demo"
KS = (2, 4, 6, 8, 12, 16)
VOCAB = 2048
BASE_ITERS, CONTINUED_ITERS = 400, 120

MODEL = """--num-layers 3 --hidden-size 96 --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256
    --num-experts 32 --moe-router-topk 4 --moe-ffn-hidden-size 48 --ffn-hidden-size 48 --swiglu --disable-bias-linear
    --normalization RMSNorm --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
    --untie-embeddings-and-output-weights --moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32"""
PARALLEL = "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
TRAIN = """--micro-batch-size 4 --global-batch-size 8 --adam-beta2 0.95 --clip-grad 1.0 --weight-decay 0.1
    --lr-decay-style cosine --log-interval 10 --eval-iters 4 --split 99,1,0 --no-create-attention-mask-in-dataloader"""
ELASTIC = "--emoe-selection prefix --emoe-k-schedule uniform --emoe-k-min 4 --emoe-k-max 12"


@dataclass(frozen=True)
class Step:
    """One command; `done` exists once it has succeeded. iterations: what its log counts up to, for the progress bar."""

    name: str
    command: list[str]
    done: Path
    iterations: int = 0


def torchrun(script: str, flags: str) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, str(REPO / script), *flags.split()]


def training(name: str, iterations: int, lr: str, extra: str) -> Step:
    save = OUT / "checkpoints" / name
    flags = f"""{MODEL} {PARALLEL} {TRAIN} --train-iters {iterations} {lr} --eval-interval {iterations}
        --data-path {OUT}/data/stdlib --tokenizer-type SentencePieceTokenizer --tokenizer-model {OUT}/data/stdlib.model
        --save {save} --save-interval {iterations} --tensorboard-dir {OUT}/tensorboard/{name} {extra}"""
    return Step(name, torchrun("pretrain_emoe.py", flags), save / "latest_checkpointed_iteration.txt", iterations)


def sweep(name: str) -> Step:
    out = OUT / f"{name}.json"
    flags = f"""--load {OUT}/checkpoints/{name} --label {name} --out {out} --data-path {OUT}/data/stdlib_heldout
        --k {" ".join(map(str, KS))} --max-eval-tokens 32768 --no-create-attention-mask-in-dataloader {PARALLEL}"""
    return Step(f"sweep {name}", torchrun("tools/sweep_k.py", flags), out)


def sources() -> list[str]:
    """The Python standard library: its modules and packages, without what was installed beside them."""
    library = Path(sysconfig.get_paths()["stdlib"])
    parts = [path for path in sorted(library.iterdir()) if path.name != "site-packages"]
    return [str(path) for path in parts if path.suffix == ".py" or (path.is_dir() and any(path.rglob("*.py")))]


def steps() -> list[Step]:
    corpus = [sys.executable, str(REPO / "tools/preprocess_data.py"), "--input", *sources()]
    corpus += f"--suffix .py --output-prefix {OUT}/data/stdlib --train-tokenizer {VOCAB} --append-eod".split()
    corpus += ["--holdout", "0.05", "--workers", "2", "--errors", "ignore"]
    continued = f"--load {OUT}/checkpoints/base --finetune"
    low = "--lr 1e-3 --min-lr 1e-4 --lr-warmup-iters 10"
    plot = [sys.executable, str(REPO / "tools/plot_sweep.py"), *(str(OUT / f"{n}.json") for n in ("topk", "elastic"))]
    return [
        Step("corpus", corpus, OUT / "data/stdlib.json"),
        training("base", BASE_ITERS, "--lr 2e-3 --min-lr 1e-3 --lr-warmup-iters 30", ""),
        training("topk", CONTINUED_ITERS, low, continued),
        training("elastic", CONTINUED_ITERS, low, f"{continued} {ELASTIC} --emoe-eval-k 4 8 12"),
        sweep("topk"),
        sweep("elastic"),
        Step("plot", [*plot, "--out", str(OUT / "wall.png")], OUT / "wall.png"),
    ]


def run(step: Step, seconds: dict[str, float]) -> None:
    """Run one step, its output in demo/logs, its progress on the terminal. SystemExit with the log's end if it
    fails."""
    log = OUT / "logs" / f"{step.name.replace(' ', '_')}.log"
    start = time.perf_counter()
    total = step.iterations or None
    form = "{desc:14} {bar:20} {n_fmt}/{total_fmt} [{elapsed}<{remaining}]" if total else "{desc:14} [{elapsed}]"
    with open(log, "w") as file, tqdm(total=total, desc=step.name, bar_format=form, leave=True) as bar:
        process = subprocess.Popen(step.command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if reached := re.search(r"iteration +(\d+)/ *\d+ \|", line):
                bar.update(int(reached[1]) - bar.n)
            bar.refresh()
    if process.wait() != 0 or not step.done.exists():
        sys.exit(f"{step.name} failed; the end of {log}:\n" + "".join(log.read_text().splitlines(True)[-20:]))
    seconds[step.name] = round(time.perf_counter() - start, 1)


def report(seconds: dict[str, float]) -> str:
    topk, elastic = load(OUT / "topk.json"), load(OUT / "elastic.json")
    lines = ["# Elastic continued training: one base model, two ways to continue it", ""]
    lines += [
        f"Held-out loss (nats per token) at k' active experts. Both continue one base, which used {topk.k_train}."
    ]
    lines += ["", markdown_table([topk, elastic])]
    for result in (topk, elastic):
        end = wall(result)
        lines.append(
            f"- {result.label}: effective range R = {effective_range(result):.2f}, "
            + (f"worse than at k from k' = {end}" if end else "no wall up to the largest k'")
        )
    lines += [f"- cost of elastic training at k' = k: {cost_at_k(elastic, topk):+.4f} nats (positive: worse)"]
    lines += [f"- peak gain of elastic training over plain top-k at k: {peak_gain(elastic, topk):+.4f} nats", ""]
    lines += ["| step | seconds |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in seconds.items()), ""]
    lines += [
        f"Elastic setting: `{ELASTIC}` (top-k at a k drawn every step: E[k] = 8, so twice the expert FLOPs per step"
    ]
    lines += ["of plain top-k at 4; the same data, steps and learning rate).", "", "![loss over k'](wall.png)", ""]
    return "\n".join(lines)


def main() -> None:
    for folder in ("logs", "data", "checkpoints"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)
    timings = OUT / "seconds.json"
    seconds = json.loads(timings.read_text()) if timings.exists() else {}
    for step in steps():
        if step.done.exists():
            continue
        run(step, seconds)
        timings.write_text(json.dumps(seconds))
    text = report(seconds)
    (OUT / "report.md").write_text(text)
    print(f"\n{text}\nfigure: {OUT}/wall.png\nreport: {OUT}/report.md\ntensorboard --logdir {OUT}/tensorboard")


if __name__ == "__main__":
    main()
