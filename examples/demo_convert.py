"""A Hugging Face model into Megatron, trained elastically, and back: a few minutes on two cores.

A tiny OLMoE with random weights and a tokenizer trained on the Python library's sources -> import -> the two models
compared at three k' -> a few elastic steps on those sources -> export -> text from transformers at two k'. Every step
but the first and the last is one command of this repository. Everything lands in demo-convert/, which is made anew.

    python examples/demo_convert.py --only-model FOLDER

makes nothing but a model, with OLMoE's eight active experts, for README.md's commands on a CPU.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

REPO = Path(__file__).resolve().parent.parent
OUT = REPO / "demo-convert"
HF, MEGATRON, TRAINED, EXPORTED = (OUT / name for name in ("hf", "megatron", "trained", "exported"))
PACKAGES = "asyncio email http importlib json logging multiprocessing unittest xml"
VOCAB, LENGTH, K, POOL = 2048, 128, 4, 12
END = "<|endoftext|>"

TRAIN = f"""--seq-length {LENGTH} --micro-batch-size 4 --global-batch-size 8 --train-iters 40 --lr 4e-3 --min-lr 1e-3
    --lr-decay-style cosine --lr-warmup-iters 5 --clip-grad 1.0 --log-interval 10 --eval-interval 1000 --eval-iters 2
    --split 95,5,0 --save-interval 40 --no-create-attention-mask-in-dataloader --expert-model-parallel-size 2
    --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --emoe-selection coactivation --emoe-pool-k {POOL} --emoe-eval-k {K} {2 * K} {3 * K}"""


@dataclass(frozen=True)
class Step:
    """One command. show: which parts of its output belong on the terminal, a pattern or its groups; the log has all."""

    name: str
    command: list[str]
    show: str = "^.*$"


def sources() -> list[Path]:
    """A few packages of the Python library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return [library / name for name in PACKAGES.split()]


SHAPE = {
    "hidden_size": 96,
    "intermediate_size": 48,  # of an expert
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_experts": 16,
    "num_experts_per_tok": K,
    "max_position_embeddings": 256,
}
OLMOE_S_K = {
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts": 32,
    "num_experts_per_tok": 8,
    "max_position_embeddings": 128,  # as --seq-length in examples/cpu.args
}


def build(folder: Path, shape: dict[str, Any]) -> None:
    """A tokenizer of its own and a model with random weights, saved as transformers saves them."""
    files = [file for path in sources() for file in (path.rglob("*.py") if path.is_dir() else [path])]
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learn = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet, show_progress=False)
    inner.train([str(file) for file in files], learn)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=END, pad_token=END)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    OlmoeForCausalLM(OlmoeConfig(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def steps() -> list[Step]:
    def tool(script: str, *words: object) -> list[str]:
        return [sys.executable, str(REPO / "tools" / script), *map(str, words)]

    convert = "convert_checkpoint.py"
    every_k = ["--k", K // 2, K, 2 * K]
    corpus = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", HF, "--append-eod"]
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    training = [str(REPO / "pretrain_emoe.py"), f"@{MEGATRON}/model.args", "--load", str(MEGATRON), "--finetune"]
    training += ["--save", str(TRAINED), "--data-path", str(OUT / "data/library"), *TRAIN.split()]
    return [
        Step("import", tool(convert, "import", "--hf", HF, "--out", MEGATRON)),
        Step("verify", tool(convert, "verify", "--hf", HF, "--megatron", MEGATRON, *every_k)),
        Step(
            "data",
            tool(
                "preprocess_data.py",
                *("--input", *sources(), "--suffix", ".py", "--output-prefix", OUT / "data/library", *corpus),
                *("--workers", 2),
            ),
            "^.*(?:documents|files).*$",
        ),
        Step("train", [*ranks, *training], r"(iteration +\d+)/.* (lm loss: \S+) \||(validation loss.*k'=.*)"),
        Step("inspect", tool(convert, "inspect", TRAINED)),
        Step("export", tool(convert, "export", "--megatron", TRAINED, "--out", EXPORTED)),
        Step("verify the export", tool(convert, "verify", "--hf", EXPORTED, "--megatron", TRAINED, *every_k)),
    ]


def run(step: Step, logs: Path = OUT / "logs") -> None:
    """Run one step with its log in `logs`. SystemExit with the log's end if it fails."""
    log = logs / f"{step.name.replace(' ', '_')}.log"
    print(f"\n== {step.name}\n$ {shlex.join(_short(word) for word in step.command)}", flush=True)
    start = time.perf_counter()
    with log.open("w") as file:
        process = subprocess.Popen(step.command, cwd=REPO, stdout=subprocess.PIPE, stderr=file, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            file.write(line)
            if (text := shown(step, line)) is not None:
                print(text, flush=True)
    if process.wait() != 0:
        sys.exit(f"{step.name} failed; the end of {log}:\n" + "".join(log.read_text().splitlines(True)[-20:]))
    print(f"({time.perf_counter() - start:.0f} s)")


def shown(step: Step, line: str) -> str | None:
    """What of a line belongs on the terminal."""
    found = re.search(step.show, line)
    return found and (", ".join(filter(None, found.groups())) or found[0])


def _short(word: str) -> str:
    """A path in this repository as it is typed there."""
    return word.replace(f"{REPO}/", "").replace(sys.executable, "python")


def generate(k: int) -> str:
    """Forty tokens after a beginning, drawn from the exported model with k active experts."""
    tokenizer = AutoTokenizer.from_pretrained(EXPORTED)
    model = AutoModelForCausalLM.from_pretrained(EXPORTED, num_experts_per_tok=k).eval()
    assert model.config.num_experts_per_tok == k
    prompt = tokenizer("    def __init__(self", return_tensors="pt")
    torch.manual_seed(0)
    words = model.generate(**prompt, max_new_tokens=40, do_sample=True, temperature=0.7, pad_token_id=0)
    return tokenizer.decode(words[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only-model", type=Path, metavar="FOLDER", help="make a model there, and no more")
    folder = parser.parse_args().only_model
    if folder is None:
        demo()
    elif folder.exists():
        parser.error(f"--only-model {folder}: is there already")
    else:
        build(folder, OLMOE_S_K)
        print(f"a tiny OLMoE, random weights, k = 8 of 32 experts: {folder}")


def demo() -> None:
    start = time.perf_counter()
    shutil.rmtree(OUT, ignore_errors=True)
    for folder in ("logs", "data"):
        (OUT / folder).mkdir(parents=True)
    build(HF, SHAPE)
    print(f"a tiny OLMoE, random weights, k = {K} of 16 experts: {HF}")
    for step in steps():
        run(step)
    for k in (K, 2 * K):
        print(f"\n== text from transformers, {k} active experts\n{generate(k)}")
    print(f"\n{time.perf_counter() - start:.0f} s in all; everything is in {OUT}")


if __name__ == "__main__":
    main()
