"""Instruction tuning at every k', on any machine: chats of the Python library's docstrings, some minutes on two cores.

A tiny OLMoE and a tokenizer as in demo_convert.py -> import -> a base run on the library's sources -> chats (what does
this function do, and which arguments does it take: its docstring and its signature) -> ids of which the answers alone
count -> three tunings of the same base, packed: plain top-k, EMoE's co-activation sampling, the recipe of docs/study.md
-> a sweep of each on held-out chats -> export, and answers from transformers at two k'. Every step is one command of
this repository, written at the top of its log; one whose output is complete is not run again. All run on the CPU.
Everything is in demo-sft/.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded: processes are forked here

import ast
import json
import multiprocessing
import shutil
import sys
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO / "benchmarks"))  # forks.py
import demo_convert  # noqa: E402
from demo_run import Lane, Spent, Step, run  # noqa: E402

OUT = REPO / "demo-sft"
HF, MEGATRON, EXPORTED = OUT / "hf", OUT / "megatron", OUT / "exported"
K, LENGTH = demo_convert.K, 256
KS = (2, 4, 6, 8, 12)
SHAPE = demo_convert.SHAPE | {"max_position_embeddings": LENGTH}
BASE_ITERS, TUNED_ITERS = 150, 80
HELD_OUT_TOKENS = 24576
METHODS = {
    "topk": "",
    "emoe": f"--emoe-selection coactivation --emoe-pool-k {3 * K}",
    "recipe": "@examples/recipe.args",
}
"""What makes each tuning elastic."""

TRAIN = f"""--seq-length {LENGTH} --global-batch-size 8 --adam-beta2 0.95 --clip-grad 1.0 --weight-decay 0.1
    --lr-decay-style cosine --log-interval 10 --eval-iters 2 --split 98,2,0 --no-create-attention-mask-in-dataloader
    --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2"""
TOKENIZER = f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {HF}"


def chats() -> Iterator[dict]:
    """Two questions about every documented function of the packages that demo_convert.py reads, with their answers."""
    for folder in demo_convert.sources():
        for file in sorted(folder.rglob("*.py")):
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(file.read_text(encoding="utf-8", errors="ignore"))
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                    yield {"messages": _turns(f"{folder.name}.{file.stem}", node, text)}


def _turns(module: str, function: ast.FunctionDef, text: str) -> list[dict[str, str]]:
    names = [argument.arg for argument in function.args.args]
    said = (
        f"What does {function.name} in {module} do?",
        " ".join(text.split("\n\n")[0].split()),
        "Which arguments does it take?",
        f"It takes {', '.join(names)}." if names else "It takes none.",
    )
    return [{"role": ("user", "assistant")[turn % 2], "content": words} for turn, words in enumerate(said)]


def write_chats(path: Path) -> int:
    """The chats as a file of JSONL; how many."""
    lines = [json.dumps(chat) + "\n" for chat in chats()]
    path.write_text("".join(lines))
    return len(lines)


def stages() -> Iterator[tuple[Lane, ...]]:
    """What runs one after another; of each, the lanes that run side by side."""
    yield (base(),)
    yield tuple(map(tuned, METHODS))
    yield (results(),)


def base() -> Lane:
    convert = f"import --hf {HF} --out {MEGATRON}".split()
    yield Step("import", "tools/convert_checkpoint.py", convert, (MEGATRON / "model.args").exists)
    text = ["--input", *map(str, demo_convert.sources()), "--suffix", ".py", *TOKENIZER.split()]
    text += f"--output-prefix {OUT}/data/library --append-eod --holdout 0.02 --workers 2 --overwrite".split()
    yield Step("text", "tools/preprocess_data.py", text, (OUT / "data/library.json").exists)
    words = f"""--chat --chat-template tulu --input {OUT}/data/chats.jsonl --output-prefix {OUT}/data/chats {TOKENIZER}
        --seq-length {LENGTH} --holdout 0.1 --workers 2 --overwrite"""
    yield Step("chats", "tools/preprocess_data.py", words.split(), (OUT / "data/chats.json").exists)
    start = f"--load {MEGATRON} --finetune --data-path {OUT}/data/library --lr 3e-3 --min-lr 1e-3 --lr-warmup-iters 10"
    yield training("base", BASE_ITERS, f"{start} --micro-batch-size 4 --expert-model-parallel-size 2", ranks=2)


def training(name: str, iterations: int, extra: str, ranks: int = 1) -> Step:
    save = OUT / "checkpoints" / name
    words = f"""@{MEGATRON}/model.args {TRAIN} --train-iters {iterations} --eval-interval {iterations} --save {save}
        --save-interval {iterations} --data-cache-path {OUT}/data/cache/{name} {extra}"""
    newest = save / "latest_checkpointed_iteration.txt"
    done = lambda: newest.exists() and newest.read_text().strip() == str(iterations)  # noqa: E731
    return Step(name, "pretrain_emoe.py", words.split(), done, ranks, iterations, partial(forget, save))


def forget(save: Path) -> None:
    """Remove what a run that is not done has left: with checkpoints there, --save is refused."""
    shutil.rmtree(save, ignore_errors=True)


def tuned(name: str) -> Lane:
    start = f"--load {OUT}/checkpoints/base --finetune --sft --data-path {OUT}/data/chats --micro-batch-size 1"
    rates = "--lr 2e-3 --min-lr 2e-4 --lr-warmup-iters 5"
    yield training(name, TUNED_ITERS, f"{start} {rates} {METHODS[name]}")
    yield sweep(name)


def sweep(name: str) -> Step:
    out = OUT / f"sweep_{name}.json"
    words = f"""--load {OUT}/checkpoints/{name} --k {" ".join(map(str, KS))} --out {out} --label {name} --sft
        --data-path {OUT}/data/chats_heldout --seq-length {LENGTH} --max-eval-tokens {HELD_OUT_TOKENS}
        --micro-batch-size 4 --global-batch-size 8 --no-create-attention-mask-in-dataloader
        --moe-token-dispatcher-type alltoall"""
    return Step(f"sweep {name}", "tools/sweep_k.py", words.split(), lambda: is_finished(out))


def is_finished(file: Path) -> bool:
    """Whether a sweep has all its cells."""
    from megatron_emoe.sweep.curve import load, missing_ks

    return file.exists() and not missing_ks(load(file), KS)


def results() -> Lane:
    yield sweep("base")
    files = [str(OUT / f"sweep_{name}.json") for name in METHODS]
    yield Step("plot", "tools/plot_sweep.py", [*files, "--out", f"{OUT}/sft.png"], (OUT / "sft.png").exists)
    words = f"export --megatron {OUT}/checkpoints/recipe --out {EXPORTED}"
    yield Step("export", "tools/convert_checkpoint.py", words.split(), (EXPORTED / "config.json").exists)


def answers() -> Iterator[str]:
    """What the recipe's export says to a question of the held-out kind, at two k'."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import megatron_emoe

    tokenizer = AutoTokenizer.from_pretrained(EXPORTED)
    tokenizer.chat_template = (OUT / "data/chats.jinja").read_text()
    model = AutoModelForCausalLM.from_pretrained(EXPORTED).eval()
    asked = [{"role": "user", "content": "What does close in asyncio.transports do?"}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    for k in (K, 2 * K):
        megatron_emoe.set_active_experts(model, k)
        torch.manual_seed(0)
        words = model.generate(**prompt, max_new_tokens=32, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        yield f"k' = {k}: {tokenizer.decode(words[0, prompt['input_ids'].shape[1] :], skip_special_tokens=True)!r}"


def main() -> None:
    from megatron_emoe.sweep.curve import load, markdown_table

    os.chdir(REPO)
    for folder in ("logs", "data", "checkpoints"):
        (OUT / folder).mkdir(parents=True, exist_ok=True)
    if not (HF / "config.json").exists():
        build = multiprocessing.get_context("spawn").Process(target=demo_convert.build, args=(HF, SHAPE))
        build.start()  # elsewhere, as it starts threads
        build.join()
    print(f"{write_chats(OUT / 'data/chats.jsonl')} chats: {OUT}/data/chats.jsonl", flush=True)
    spent: list[Spent] = []
    for lanes in stages():
        run(lanes, OUT / "logs", spent.append)
    print("\nHeld-out loss of the answers (nats per token) at k' active experts; all three go on from the base.\n")
    print(markdown_table([load(OUT / f"sweep_{name}.json") for name in ("base", *METHODS)]))
    print("\n" + "\n".join(answers()))
    seconds = ", ".join(f"{one.step} {one.wall:.0f} ({one.processor:.0f})" for one in spent)
    print(f"\nseconds by step, of processor time in brackets: {seconds}\nfigure: {OUT}/sft.png")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on after the last step that is complete", file=sys.stderr)
        sys.exit(130)
