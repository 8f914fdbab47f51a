"""What `make demo-serve` serves, and the test that the promised curve is the served one: a real, tiny export.

A tiny OLMoE with random weights -> import -> a few steps of the recipe (examples/recipe.args: learned scales, a tail
scale) on the Python library's sources -> export -> a sweep of the export, and its table of named budgets.

    python examples/served_export.py FOLDER

makes FOLDER with `exported`, `sweep.json`, `budgets.json`, and `tokens.json`: the very tokens of the sweep.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import demo_convert
from demo_convert import Step

REPO = Path(__file__).resolve().parent.parent
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 64,  # of an expert
    "num_hidden_layers": 3,
    "num_attention_heads": 4,  # of 32: vLLM's kernels on a CPU take no smaller ones
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.04,  # of this width, so that experts have a say after few steps
}
LENGTH, KS = 128, (1, 2, 3, 4, 6, 8, 12, 16)
PER_LAYER = ((2, 4, 8), (8, 4, 2))
SWEPT = "--seq-length 128 --micro-batch-size 8 --max-eval-tokens 4096"
TRAIN = f"""--seq-length {LENGTH} --micro-batch-size 4 --global-batch-size 16 --train-iters 45 --lr 4e-3 --min-lr 1e-3
    --lr-decay-style cosine --lr-warmup-iters 5 --clip-grad 1.0 --log-interval 10 --eval-interval 1000 --eval-iters 2
    --split 95,5,0 --save-interval 45 --no-create-attention-mask-in-dataloader --emoe-eval-k 4 8"""


def steps(out: Path) -> list[Step]:
    """From a Hugging Face folder to a sweep of the export: each a command of this repository."""

    def tool(script: str, *words: object) -> list[str]:
        return [sys.executable, str(REPO / "tools" / script), *map(str, words)]

    hf, megatron, trained, exported = (out / name for name in ("hf", "megatron", "trained", "exported"))
    text = ["--input", *demo_convert.sources(), "--suffix", ".py", "--output-prefix", out / "data/library"]
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", hf, "--append-eod"]
    recipe = [f"@{megatron}/model.args", f"@{REPO}/examples/recipe.args", *TRAIN.split()]
    moved = ["--load", str(megatron), "--finetune", "--save", str(trained), "--data-path", str(out / "data/library")]
    learned = r"(iteration +\d+)/.* (lm loss: \S+) \||(validation loss.*k'=.*)"
    return [
        Step("import", tool("convert_checkpoint.py", "import", "--hf", hf, "--out", megatron), "^.*parameters.*$"),
        Step(
            "data", tool("preprocess_data.py", *text, *tokenizer, "--holdout", 0.05, "--workers", 2), "^.*documents.*$"
        ),
        Step("train", [sys.executable, str(REPO / "pretrain_emoe.py"), *recipe, *moved], learned),
        Step("export", tool("convert_checkpoint.py", "export", "--megatron", trained, "--out", exported)),
        Step("sweep", tool("sweep_k.py", *sweep_words(out)), r"^\|.*$|^use .*$"),
        Step(
            "tokens", [sys.executable, str(REPO / "examples/served_export.py"), str(out), "--only-tokens"], "^wrote .*$"
        ),
        Step("budgets", tool("pick_k.py", out / "sweep.json", "--budgets", out / "budgets.json")),
    ]


def sweep_words(out: Path) -> list[str]:
    """The flags of the sweep."""
    per_layer = [",".join(map(str, ks)) for ks in PER_LAYER]
    words = ["--hf", out / "exported", "--k", *KS, "--k-per-layer", *per_layer, *SWEPT.split()]
    return [*map(str, words), "--data-path", str(out / "data/library_heldout"), "--out", str(out / "sweep.json")]


def make(out: Path) -> None:
    """Everything, in a folder that is not there yet."""
    for folder in ("logs", "data"):
        (out / folder).mkdir(parents=True)
    demo_convert.build(out / "hf", SHAPE)
    print(f"a tiny OLMoE, random weights, k = 4 of 16 experts: {out / 'hf'}")
    for step in steps(out):
        demo_convert.run(step, out / "logs")


def write_tokens(out: Path) -> None:
    """tokens.json: `digest` as the sweep has it, and of each sequence its tokens with the one after them, and which of
    the tokens after the first count."""
    from megatron_emoe.host import mode

    sys.argv = ["sweep_k.py", *sweep_words(out)]
    sys.path.insert(0, str(REPO / "tools"))
    mode.start()  # before anything imports Megatron
    import sweep_k

    from megatron_emoe.hf.one_process import alone
    from megatron_emoe.sweep.on_transformers import read_batches

    args = sweep_k.asked()
    with alone():
        batches, digest = read_batches(args)
    sequences = [
        {"tokens": [*tokens, labels[-1]], "counts": counts}
        for batch in batches
        for tokens, labels, counts in zip(
            *(batch[key].tolist() for key in ("tokens", "labels", "loss_mask")), strict=True
        )
    ]
    (out / "tokens.json").write_text(json.dumps({"digest": digest.whole, "sequences": sequences}))
    print(f"wrote {out / 'tokens.json'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("--only-tokens", action="store_true", help="write tokens.json into a folder that has the rest")
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.only_tokens:
        write_tokens(folder)
    elif folder.exists():
        parser.error(f"{folder}: is there already")
    else:
        make(folder)
