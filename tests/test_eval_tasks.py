"""lm-eval's tasks at any k': a Megatron checkpoint against transformers through HFLM, batches, ranks, the result file.

The two sides share no code below lm-eval: MegatronLM scores rows on Megatron's model, HFLM is lm-eval's own.
"""

import contextlib
import importlib.util
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import hf_models, task_files
from tests.distributed import REPO, run_ranks

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'megatron-emoe[eval]'"
)

KS = [1, 2, 5]  # the models have 8 experts and k = 2
MAX_LENGTH = 48
HF_TYPES = ["olmoe", "deepseek_v2"]


def offline(folder: Path) -> None:
    """Before datasets is imported: no network, no files outside `folder`."""
    os.environ |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def imported(model_type: str, folder: Path) -> tuple[Path, Path]:
    from megatron_emoe.hf.import_model import import_model

    hf = hf_models.save(model_type, folder / "hf", tokenizer=True)
    import_model(hf, folder / "megatron", report=lambda _: None)
    return hf, folder / "megatron"


def tool(*words: Any) -> tuple[int, str, str]:
    """tools/eval_tasks.py in this process: exit status, stdout, stderr."""
    spec = importlib.util.spec_from_file_location("eval_tasks", REPO / "tools" / "eval_tasks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.argv = ["eval_tasks.py", *map(str, words)]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = module.main()
        except SystemExit as leave:
            status = leave.code
    return status, out.getvalue(), err.getvalue()


def answers(model: Any, k: int) -> dict[str, list]:
    """What a model says to the same requests at k', and the tokens and rows that it took."""
    asked = [(context, {"until": list(task_files.STOPS), "max_gen_toks": task_files.NEW_TOKENS}) for context in task_files.generation_contexts()]
    with model.active(k) as passage:
        said = {
            "scores": model.lm.loglikelihood(task_files.instances("loglikelihood", task_files.scored()), True),
            "rolled": model.lm.loglikelihood_rolling(
                task_files.instances("loglikelihood_rolling", [(text,) for text in task_files.rolled()]), True
            ),
            "texts": model.lm.generate_until(task_files.instances("generate_until", asked), True),
        }
    return said | {"tokens": passage.tokens, "rows": passage.rows}


def both(model_type: str, folder: Path) -> dict[str, Any]:
    """The answers of both sides at every k', Megatron's with one row and with eight at a time, and its task cells."""
    offline(folder)
    hf, megatron = imported(model_type, folder)
    from lm_eval.models.huggingface import HFLM

    from megatron_emoe.hf.task_model import HfTaskModel, load_model, load_tokenizer

    import torch

    model = load_model(hf, "auto", torch.device("cpu"))
    theirs = HfTaskModel(HFLM(model, tokenizer=load_tokenizer(hf), batch_size=4, max_length=MAX_LENGTH))
    found: dict[str, Any] = {"hf": [answers(theirs, k) for k in KS]}
    tasks = task_files.write(folder / "tasks", [text or "w5" for text in found["hf"][1]["texts"]])
    shared = ["--k", *KS, "--tasks", "tiny_choice", "tiny_generate", "--include-path", tasks, "--max-length", MAX_LENGTH]
    found["hf tool"] = tool("--model", "hf", "--load", hf, "--out", folder / "hf.json", *shared)
    words = ["--model", "megatron", "--load", megatron, "--out", folder / "megatron.json", *shared]
    found |= run_megatron(words)
    found["files"] = [json.loads((folder / f"{name}.json").read_text()) for name in ("hf", "megatron")]
    return found


def run_megatron(words: list) -> dict[str, Any]:
    """The tool on Megatron, and the answers of the model that it built."""
    from megatron_emoe import task_megatron

    kept: dict[str, Any] = {}
    make = task_megatron.make_lm

    def make_and_keep(*given: Any) -> Any:
        kept["lm"] = make(*given)
        for batch in (1, 8):
            kept["lm"].rows_at_once = batch
            kept[f"batch {batch}"] = [answers(task_megatron.MegatronTaskModel(kept["lm"]), k) for k in KS]
        return kept["lm"]

    task_megatron.make_lm = make_and_keep
    kept["megatron tool"] = tool(*words)
    del kept["lm"]
    return kept


@pytest.fixture(scope="module")
def agreement(tmp_path_factory):
    done: dict[str, dict] = {}

    def get(model_type: str) -> dict:
        if model_type not in done:
            done[model_type] = run_ranks(both, 1, model_type, tmp_path_factory.mktemp(model_type))[0]
        return done[model_type]

    return get


@pytest.mark.parametrize("model_type", HF_TYPES)
def test_megatron_and_transformers_give_the_same_answers_at_every_k(agreement, model_type):
    found = agreement(model_type)
    assert found["megatron tool"][0] == found["hf tool"][0] == 0, found["megatron tool"][2] + found["hf tool"][2]
    for theirs, ours in zip(found["hf"], found["batch 8"], strict=True):
        for (expected, greedy), (got, ours_greedy) in zip(theirs["scores"], ours["scores"], strict=True):
            assert got == pytest.approx(expected, abs=1e-4) and ours_greedy == greedy
        assert ours["rolled"] == pytest.approx(theirs["rolled"], abs=1e-4)
        assert ours["texts"] == theirs["texts"]
    assert found["batch 8"][0]["scores"][3] != pytest.approx(found["batch 8"][2]["scores"][3], abs=1e-2)  # k' matters
    assert len({text for text in found["batch 8"][1]["texts"]}) > 3
