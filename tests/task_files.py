"""Two small local tasks for lm-eval, and requests to a model, in the words of hf_models' tokenizer (w4, w5, ...)."""

import json
import random
from pathlib import Path
from typing import Any

STOPS = ["w3", "w77"]
"""Texts that end a generation; the first is a part of many words."""
NEW_TOKENS = 10

_CHOICE = """task: tiny_choice
tag: tiny_all
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {shots}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
num_fewshot: 1
doc_to_text: "{{{{context}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
metadata: {{version: 3}}
"""
_GENERATE = """task: tiny_generate
tag: tiny_all
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: {stops}, max_gen_toks: {new}, do_sample: false}}
metric_list:
  - metric: exact_match
metadata: {{version: 1}}
"""
_GROUP = """group: tiny_group
task: [tiny_choice]
aggregate_metric_list:
  - metric: acc
metadata: {version: 7}
"""
_UNSAFE = """task: tiny_unsafe
dataset_path: json
dataset_kwargs: {data_files: {test: nowhere.jsonl}}
output_type: generate_until
unsafe_code: true
"""


def words(rng: random.Random, count: int) -> str:
    return " ".join(f"w{rng.randrange(4, 128)}" for _ in range(count))


def write(folder: Path, answers: list[str] | None = None) -> Path:
    """Tasks tiny_choice (12 documents), tiny_generate (6), tiny_group, tiny_unsafe; answers: of tiny_generate."""
    folder.mkdir(parents=True)
    rng = random.Random(5)
    choices = [
        {
            "context": words(rng, rng.randrange(1, 20)),
            "choices": [f" {words(rng, n)}" for n in (1, 1, 3, 2)],
            "answer": i % 4,
        }
        for i in range(16)
    ]
    prompts = [
        {"context": context, "answer": (answers or [""] * 6)[i]} for i, context in enumerate(generation_contexts())
    ]
    for name, documents in (("choice", choices[:12]), ("shots", choices[12:]), ("generate", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "choice.yaml").write_text(_CHOICE.format(data=folder / "choice.jsonl", shots=folder / "shots.jsonl"))
    text = _GENERATE.format(data=folder / "generate.jsonl", stops=json.dumps(STOPS), new=NEW_TOKENS)
    (folder / "generate.yaml").write_text(text)
    (folder / "group.yaml").write_text(_GROUP)
    (folder / "unsafe.yaml").write_text(_UNSAFE)
    return folder


def generation_contexts() -> list[str]:
    rng = random.Random(9)
    return [words(rng, count) for count in (1, 30, 7, 12, 3, 21)]


def scored() -> list[tuple[str, str]]:
    """Pairs of context and continuation: an empty context, shared contexts, one longer than the model may see, special
    tokens, and one whose first word ends in the continuation, where the tokens of the context are not of the whole."""
    rng = random.Random(1)
    shared = words(rng, 9)
    pairs = [("", f" {words(rng, 3)}"), (words(rng, 70), f" {words(rng, 4)}")]
    pairs += [("<s> w9 w30", " w7"), ("", "<s> w8"), ("w50 w1", "2 w71 w8"), ("w50 w1 ", "w72")]
    pairs += [(shared, f" {words(rng, 1)}") for _ in range(4)]
    return pairs + [(words(rng, rng.randrange(1, 40)), f" {words(rng, rng.randrange(1, 6))}") for _ in range(9)]


MERGED = ("w50 w1", "2")
"""Together the words w50 and w12: nothing is left for the continuation."""


def rolled() -> list[str]:
    """Whole texts, the second in several windows."""
    rng = random.Random(2)
    return [words(rng, 5), words(rng, 120), words(rng, 47)]


def instances(kind: str, arguments: list[tuple]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]
