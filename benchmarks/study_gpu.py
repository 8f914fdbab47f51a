"""The regret study at the size of a small real model, on one GPU in eight minutes: base, specialists, two methods.

    python benchmarks/study_gpu.py --prepare              # anywhere: text of this machine into study/gpu/data, 40 MB
    python benchmarks/study_gpu.py                        # one GPU, no network; goes on where it was stopped
    python benchmarks/study_gpu.py --toy --work /tmp/toy  # the same program at toy size, in host mode

A model of OLMoE's shape with 100 million parameters in bf16, on local layers, so torch and megatron-core suffice. Each
cell (a method and a seed) ends as one JSON file in docs/study/gpu; docs/study.md gets the table. What would begin after
--minutes is left for the next call, which goes on there.
"""

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPO), str(REPO / "benchmarks")]  # on a bare machine nothing is installed

from megatron_emoe.settings.quiet import leave_out_noise  # noqa: E402

leave_out_noise()
import study_corpus  # noqa: E402
import study_regret_methods as regret  # noqa: E402
import study_regret_report  # noqa: E402
from study_cell import Cell, Step, finish, forget_if_changed, note_seconds, steps  # noqa: E402
from study_family import Family, Method  # noqa: E402

from megatron_emoe.host import flags as host_flags  # noqa: E402

PYTHON = sys.executable
NAMES = ("topk", "specialist-2", "specialist-8", "specialist-12", "stratified-teacher", "stratified-scales")
MOST_TOKENS = 19_000_000  # of two bytes each
LR = "--lr 6e-4 --min-lr 6e-5 --lr-warmup-iters 10"
KERNELS = f"--bf16 {' '.join(host_flags.words_of(host_flags.LOCAL_LAYERS))}"
SHARED = f"{KERNELS} --distributed-backend nccl {regret.SHARED}"
GPU = Family(
    layers=8,
    k=regret.K,
    fitted_ks=(8, 12),
    model=f"""--num-layers 8 --hidden-size 512 --num-attention-heads 8 --seq-length 512 --max-position-embeddings 512
        --num-experts 32 --moe-router-topk {regret.K} --moe-ffn-hidden-size 256 --ffn-hidden-size 256 --swiglu
        --disable-bias-linear --normalization RMSNorm --position-embedding-type rope --qk-layernorm
        --attention-dropout 0 --hidden-dropout 0 --untie-embeddings-and-output-weights --moe-aux-loss-coeff 1e-2
        --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall""",
    base_train=f"--micro-batch-size 64 --global-batch-size 64 {SHARED}",
    train=f"--micro-batch-size 8 --global-batch-size {8 * regret.MICRO_BATCHES} {SHARED}",
    base_lr="--lr 2e-3 --min-lr 2e-4 --lr-warmup-iters 50",
    bases={"base": ""},
    base_iters=1000,
    continued_iters=120,
    micro_batches=regret.MICRO_BATCHES,
    evaluation=f"{KERNELS} --micro-batch-size 32 --global-batch-size 32 --no-create-attention-mask-in-dataloader",
    held_out_tokens=262_144,
    data="text",
)
TOY_LR = "--lr 1.5e-3 --min-lr 1.5e-4 --lr-warmup-iters 2"
TOY = dataclasses.replace(
    regret.FAMILY, bases={"base": ""}, base_lr=TOY_LR, base_iters=4, continued_iters=4, held_out_tokens=8192
)


def methods(family: Family) -> list[Method]:
    """Of the regret study, at this family's learning rate and without a fit, which takes as long as a run."""
    lr = LR if family is GPU else TOY_LR
    found = [dataclasses.replace(method, lr=lr, fit=False, ks=regret.GRID) for method in regret.MAIN]
    return [method for name in NAMES for method in found if method.name == name]


def prepare(work: Path, vocabulary: int = 8192) -> None:
    """Tokenizer and data sets of at most MOST_TOKENS, to be carried to the GPU."""
    inputs, suffixes, missing = study_corpus.text()
    if missing:
        print(f"study_gpu: {' '.join(missing)}: not installed, so there is less text", file=sys.stderr)
    prefix = work / "data" / GPU.data
    prefix.parent.mkdir(parents=True, exist_ok=True)
    words = [PYTHON, str(REPO / "tools/preprocess_data.py"), "--input", *inputs, "--suffix", *suffixes]
    words += f"--output-prefix {prefix} --append-eod --holdout 0.03 --train-tokenizer {vocabulary} --workers 2".split()
    subprocess.run([*words, "--errors", "ignore"], check=True)
    size = prefix.with_suffix(".bin").stat().st_size
    if size > 2 * MOST_TOKENS:
        sys.exit(f"{prefix}.bin: {size / 1e6:.0f} MB; must be at most {2 * MOST_TOKENS / 1e6:.0f}")


def run(step: Step, log: Path, toy: bool) -> None:
    """One program, as one rank (SystemExit where it fails)."""
    step.prepare()
    words = [PYTHON, str(REPO / step.script), *step.flags(), *(["--host-mode"] if toy else [])]
    with log.open("w") as file:
        status = subprocess.run(words, stdout=file, stderr=subprocess.STDOUT, env=_alone()).returncode
    if status != 0 or not step.done():
        sys.exit(f"{step.script} ended with {status}: {log}\n{log.read_text()[-2000:]}")


def _alone() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPO), "CUDA_DEVICE_MAX_CONNECTIONS": "1"}


def to_do(options: argparse.Namespace) -> Iterator[tuple[Cell, Step, bool]]:
    """Every step that is left, in order, with its cell, and whether it is the cell's last."""
    family = TOY if options.toy else GPU
    base = Cell(family.base_method("base"), 1, options.work, options.results, family)
    yield from ((base, step, False) for step in steps(base) if step.script == "pretrain_emoe.py" and not step.done())
    for method in methods(family):
        cell = Cell(method, options.seed, options.work, options.results, family)
        if cell.result.exists():
            continue
        forget_if_changed(cell)
        *left, last = steps(cell)
        yield from ((cell, step, False) for step in left if not step.done())
        yield cell, last, True


def main() -> None:
    options = read_options()
    if options.prepare:
        prepare(options.work)
        return
    for folder in ("checkpoints", "logs", "parts"):
        (options.work / folder).mkdir(parents=True, exist_ok=True)
    options.results.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for cell, step, ends in to_do(options):
        if time.monotonic() - began > 60 * options.minutes:
            print(f"study_gpu: {options.minutes:g} minutes are over; the same command goes on at {cell.name}")
            break
        if not step.done():
            started, name = time.monotonic(), Path(step.script).stem
            run(step, options.work / "logs" / f"{cell.name}.{name}.log", options.toy)
            note_seconds(cell, name, time.monotonic() - started)
        if ends:
            finish(cell)
            shutil.rmtree(cell.checkpoint, ignore_errors=True)
            print(f"{cell.name}: {time.monotonic() - began:.0f} s", flush=True)
    found = study_regret_report.rows(options.results)
    print(study_regret_report.table(found), end="")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepare", action="store_true", help="Make the data only; needs no GPU.")
    parser.add_argument("--toy", action="store_true", help="Toy size, in host mode: whether the program works.")
    parser.add_argument("--seed", type=int, default=1, help="Of batches and draws. Default: 1.")
    parser.add_argument("--minutes", type=float, default=8.0, help="No step begins after them. Default: 8.")
    parser.add_argument("--work", type=Path, default=REPO / "study/gpu", help="Data, checkpoints, logs.")
    parser.add_argument("--results", type=Path, default=REPO / "docs/study/gpu", help="One JSON file per cell.")
    options = parser.parse_args()
    if not options.prepare and not (options.work / f"data/{GPU.data}.idx").is_file():
        parser.error(f"--work {options.work}: no data in it; run with --prepare first")
    return options


if __name__ == "__main__":
    main()
