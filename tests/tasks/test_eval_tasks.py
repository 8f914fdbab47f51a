"""lm-eval's tasks at any k': a Megatron checkpoint against transformers through HFLM, batches, ranks, refusals.

The two sides share no code below lm-eval: MegatronLM scores rows on Megatron's model, HFLM is lm-eval's own.
"""

import contextlib
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_emoe.tasks import results as task_results
from tests import hf_models, task_files
from tests.distributed import REPO, run_ranks
from tests.sweeps import run_tool

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install 'megatron-emoe[eval]'"
)

KS = [1, 2, 5]  # the models have 8 experts and k = 2
MAX_LENGTH = 48
HF_TYPES = ["olmoe", "deepseek_v2"]
LAYOUTS = {
    "experts split": ["--expert-model-parallel-size", "2"],
    "tensors split": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "layers split": ["--pipeline-model-parallel-size", "2"],
}


def offline(folder: Path) -> None:
    """Before datasets is imported: no network, no files outside `folder`."""
    os.environ |= {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


def flags(tasks: Path, *names: str) -> list[Any]:
    return ["--k", *KS, "--tasks", *names, "--include-path", tasks, "--max-length", MAX_LENGTH]


def answers(model: Any, k: int) -> dict[str, Any]:
    """What a model says to the same requests at k', and the tokens and rows that it took."""
    limits = {"until": task_files.STOPS, "max_gen_toks": task_files.NEW_TOKENS}
    asked = [(context, dict(limits)) for context in task_files.generation_contexts()]
    rolled = [(text,) for text in task_files.rolled()]
    instances = task_files.instances
    with model.active(k) as passage:
        said = {
            "scores": model.lm.loglikelihood(instances("loglikelihood", task_files.scored()), True),
            "rolled": model.lm.loglikelihood_rolling(instances("loglikelihood_rolling", rolled), True),
            "texts": model.lm.generate_until(instances("generate_until", asked), True),
            "merged": refusal(model.lm.loglikelihood, [task_files.scored()[0], task_files.MERGED]),
            "nothing": refusal(model.lm.loglikelihood, [("", "")]),
        }
    return said | {"tokens": passage.tokens, "rows": passage.rows}


def refusal(score: Any, pairs: list[tuple[str, str]]) -> str:
    try:
        return f"scored: {score(task_files.instances('loglikelihood', pairs), True)}"
    except ValueError as error:
        return str(error)


def both(model_type: str, folder: Path) -> dict[str, Any]:
    """The answers of both sides at every k', Megatron's with one row and with eight at a time, and their files."""
    offline(folder)
    import torch

    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.tasks.on_transformers import CheckedHFLM, HfTaskModel, load_model, load_tokenizer

    hf = hf_models.save(model_type, folder / "hf", tokenizer=True)
    import_model(hf, folder / "megatron", report=lambda _: None)
    model = load_model(hf, "auto", torch.device("cpu"))
    theirs = HfTaskModel(CheckedHFLM(model, tokenizer=load_tokenizer(hf), batch_size=4, max_length=MAX_LENGTH))
    found: dict[str, Any] = {"folder": folder, "hf": [answers(theirs, k) for k in KS]}
    tasks = task_files.write(folder / "tasks", found["hf"][1]["texts"])
    shared = flags(tasks, "tiny_choice", "tiny_generate")
    found["hf tool"] = run_tool("eval_tasks", "--model", "hf", "--load", hf, "--out", folder / "hf.json", *shared)
    words = ["--model", "megatron", "--load", folder / "megatron", "--out", folder / "megatron.json", *shared]
    return found | run_megatron(words)


def run_megatron(words: list[Any], batches: tuple[int, ...] = (1, 8)) -> dict[str, Any]:
    """The tool on Megatron, and on rank 0 the answers of the model that it built, so many rows at a time."""
    from megatron_emoe.tasks import on_megatron as task_megatron

    kept: dict[str, Any] = {}
    make = task_megatron.make_lm

    def make_and_ask(*given: Any) -> Any:
        lm = make(*given)
        usual = lm.rows_at_once
        for batch in batches:
            lm.rows_at_once = batch
            kept[f"batch {batch}"] = [answers(task_megatron.MegatronTaskModel(lm), k) for k in KS]
        lm.rows_at_once = usual
        return lm

    task_megatron.make_lm = make_and_ask
    kept["megatron tool"] = run_tool("eval_tasks", *words)
    task_megatron.make_lm = make
    return kept


@pytest.fixture(scope="module")
def agreement(tmp_path_factory):
    """What both sides say of a model, found out once."""
    done: dict[str, dict] = {}

    def get(model_type: str) -> dict:
        if model_type not in done:
            done[model_type] = run_ranks(both, 1, model_type, tmp_path_factory.mktemp(model_type))[0]
        return done[model_type]

    return get


def same(found: list[dict], expected: list[dict], tolerance: float) -> None:
    """Equal within `tolerance` nats, or, where a text has hundreds of them, within a few units of fp32's last place."""

    def near(scores: list[float]) -> Any:
        return pytest.approx(scores, abs=tolerance, rel=2e-7)

    for ours, theirs in zip(found, expected, strict=True):
        assert [score for score, _ in ours["scores"]] == near([score for score, _ in theirs["scores"]])
        assert [greedy for _, greedy in ours["scores"]] == [greedy for _, greedy in theirs["scores"]]
        assert ours["rolled"] == near(theirs["rolled"])
        assert ours["texts"] == theirs["texts"]


@pytest.mark.slow
@pytest.mark.parametrize("model_type", HF_TYPES)
def test_megatron_and_transformers_give_the_same_answers_at_every_k(agreement, model_type):
    found = agreement(model_type)
    assert found["megatron tool"][0] == found["hf tool"][0] == 0, found["megatron tool"][2] + found["hf tool"][2]
    same(found["batch 8"], found["hf"], 1e-4)
    few, many = found["hf"][0], found["hf"][2]
    assert all(abs(a - b) > 1e-3 for (a, _), (b, _) in zip(few["scores"], many["scores"], strict=True))  # k' matters
    assert len(set(few["texts"])) > 3 and few["texts"] != many["texts"]


def test_a_continuation_without_a_token_of_its_own_is_refused_by_both(agreement):
    for side in ("hf", "batch 1", "batch 8"):
        for said in agreement("olmoe")[side]:
            assert said["merged"] == (
                "document None, request 1: the continuation '2' has no token of its own after 'w50 w1' with this "
                "tokenizer, which merges the two; let continuations begin with a space"
            )
            assert said["nothing"] == "document None, request 0: context and continuation are empty: nothing to score"


@pytest.mark.parametrize("model_type", HF_TYPES)
def test_what_else_is_in_the_batch_does_not_matter(agreement, model_type):
    found = agreement(model_type)
    same(found["batch 8"], found["batch 1"], 1e-5)
    assert found["batch 8"][0]["tokens"] > found["batch 1"][0]["tokens"]  # eight rows do need padding


@pytest.mark.parametrize("model_type", HF_TYPES)
def test_every_answer_was_given_at_its_k(agreement, model_type):
    found = agreement(model_type)
    layers = {"olmoe": {1, 2}, "deepseek_v2": {2, 3}}[model_type]  # the first of DeepSeek-V2 is dense
    for side in ("hf", "batch 1", "batch 8"):
        for k, said in zip(KS, found[side], strict=True):
            assert said["tokens"] > 500
            assert said["rows"] == dict.fromkeys(layers, k * said["tokens"])


@pytest.mark.parametrize("model_type", HF_TYPES)
def test_both_files_hold_the_same_scores(agreement, model_type):
    folder = agreement(model_type)["folder"]
    hf, megatron = (json.loads((folder / f"{name}.json").read_text()) for name in ("hf", "megatron"))
    assert (hf["framework"], megatron["framework"]) == ("transformers", "megatron")
    assert hf["settings"] == megatron["settings"]
    assert hf["versions"]["lm_eval"] and hf["k_train"] == megatron["k_train"] == 2
    order = [(k, task) for k in KS for task in ("tiny_choice", "tiny_generate")]
    for result in (hf, megatron):
        assert [(cell["k"], cell["task"]) for cell in result["cells"]] == order
        for cell in result["cells"]:
            assert set(cell["rows_per_layer"].values()) == {cell["tokens"] * cell["k"]}
    for theirs, ours in zip(hf["cells"], megatron["cells"], strict=True):
        assert ours["metrics"] == theirs["metrics"] and ours["answers"] == theirs["answers"]
        assert (ours["samples"], ours["shots"]) == ((12, 1) if ours["task"] == "tiny_choice" else (6, 0))
    exact = [cell["metrics"]["exact_match,none"]["value"] for cell in hf["cells"][1::2]]
    assert exact[1] == 1 > exact[2]  # the right answers are those of k' = 2
    for answers in (cell["answers"] for cell in hf["cells"]):
        (task,) = answers
        assert len(answers[task]) == {"tiny_choice": 12, "tiny_generate": 6}[task]
    table = task_results.markdown_table(task_results.load(folder / "hf.json"))
    shares = table[table.index("| tiny_generate | same answer as at k' = 2 |") :].splitlines()[0].strip("| ")
    assert [float(share) for share in shares.split(" | ")[3:]] == pytest.approx(exact, abs=1e-4)
    choice = megatron["cells"][0]["metrics"]["acc,none"]
    p = choice["value"]
    assert 0 < p < 1 and choice["stderr"] == pytest.approx((p * (1 - p) / 11) ** 0.5)  # sample deviation, 12 documents


def test_the_table_is_printed(agreement):
    _, out, _ = agreement("olmoe")["megatron tool"]
    assert "| task | metric | samples | k' = 1 | k' = 2 | k' = 5 |" in out
    row = next(line for line in out.splitlines() if line.startswith("| tiny_generate | exact_match | 6 |"))
    assert row.split(" | ")[4].startswith("1.0000")


def on_two_ranks(folder: Path) -> dict[str, dict]:
    """The same checkpoint in every layout, one after another."""
    offline(folder)
    from megatron.core import parallel_state
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import unset_global_variables

    found = {}
    for name, layout in LAYOUTS.items():
        out = folder / f"{name}.json"
        words = ["--model", "megatron", "--load", folder / "megatron", "--out", out, "--micro-batch-size", 3, *layout]
        task_flags = flags(folder / "tasks", "tiny_choice", "tiny_generate")
        found[name] = run_megatron([*words, *task_flags], batches=(8,))
        unset_global_variables()
        destroy_rerun_state_machine()
        parallel_state.destroy_model_parallel()
    return found


@pytest.mark.slow
def test_two_ranks_answer_as_one(agreement):
    one = agreement("olmoe")
    first, second = run_ranks(on_two_ranks, 2, one["folder"], timeout=900)
    cells = json.loads((one["folder"] / "megatron.json").read_text())["cells"]
    for name in LAYOUTS:
        assert first[name]["megatron tool"][0] == second[name]["megatron tool"][0] == 0, first[name]["megatron tool"][2]
        assert set(second[name]) == {"megatron tool"}  # only rank 0 runs tasks
        same(first[name]["batch 8"], one["batch 8"], 1e-4)
        for k, said in zip(KS, first[name]["batch 8"], strict=True):
            assert said["rows"] == {1: k * said["tokens"], 2: k * said["tokens"]}
        found = json.loads((one["folder"] / f"{name}.json").read_text())["cells"]
        assert [cell["metrics"] for cell in found] == [cell["metrics"] for cell in cells]


def refusals(folder: Path) -> dict[str, tuple[int, str, str]]:
    """What the tool says without loading a model, and two runs into one file."""
    offline(folder)
    import lm_eval.tasks

    from megatron_emoe.hf.import_model import import_model
    from megatron_emoe.tasks import on_transformers as task_model
    from megatron_emoe.tasks import run as task_run

    task_run._ROOT = Path(lm_eval.tasks.__file__).parent / "arc"  # reading all of lm-eval's tasks takes half a minute
    hf, tasks = hf_models.save("olmoe", folder / "hf", tokenizer=True), task_files.write(folder / "tasks")
    import_model(hf_models.save("olmoe", folder / "no-text"), folder / "mute", report=lambda _: None)
    said: dict[str, tuple[int, str, str]] = {}

    def ask(name: str, *words: Any, load: Path = hf, model: str = "hf") -> None:
        paths = ["--model", model, "--load", load, "--out", folder / "out.json", "--include-path", tasks]
        said[name] = run_tool("eval_tasks", *paths, *words)

    load_model, task_model.load_model = task_model.load_model, None  # a call would be a TypeError
    ask("unknown", "--k", 2, "--tasks", "arc_chalenge")
    ask("unlike any", "--k", 2, "--tasks", "qqqqqqqq")
    ask("unsafe", "--k", 2, "--tasks", "tiny_unsafe")
    ask("no data", "--k", 2, "--tasks", "tiny_unsafe", "--allow-code-execution")
    ask("k", "--k", 2, 9, "--tasks", "tiny_choice")
    ask("limit", "--k", 2, "--tasks", "tiny_choice", "--limit", 0)
    ask("length", "--k", 2, "--tasks", "tiny_choice", "--max-length", 5000)
    ask("folder", "--k", 2, "--tasks", "tiny_choice", load=folder / "nowhere")
    ask("no tokenizer", "--k", 2, "--tasks", "tiny_choice", load=folder / "no-text")
    ask("tail", "--k", 2, "--tasks", "tiny_choice", "--emoe-tail-scale", "4:x")
    ask("range", "--k", 2, "--tasks", "tiny_choice", "--emoe-tail-scale", "3:0.5", "2:0.1")
    ask("mute", "--k", 2, "--tasks", "tiny_choice", load=folder / "mute", model="megatron")
    words = ["--emoe-selection", "null-experts", "--emoe-null-experts", 4, "--tokenizer-type", "NullTokenizer"]
    ask("null experts", "--k", 2, "--tasks", "tiny_choice", *words, load=folder / "mute", model="megatron")
    ask("unknown to Megatron", "--k", 2, "--tasks", "arc_chalenge", load=folder / "speaking", model="megatron")
    task_model.load_model = load_model
    ask("first", "--k", 2, "--tasks", "tiny_group", "tiny_all", "--limit", 3)
    kept = (folder / "out.json").read_text()
    ask("second", "--k", 2, 3, "--tasks", "tiny_group", "--limit", 3)
    ask("other settings", "--k", 2, "--tasks", "tiny_group")
    said["kept"] = (0, kept, (folder / "out.json").read_text())
    ask("renamed", "--k", 2, "--tasks", "tiny_group", "--limit", 3, "--label", "new")
    said["label"] = (0, (folder / "out.json").read_text(), "")
    (tasks / "choice.yaml").write_text((tasks / "choice.yaml").read_text().replace("{version: 3}", "{version: 4}"))
    ask("version", "--k", 2, "--tasks", "tiny_choice", "--limit", 3)
    ask("scaled", "--k", 3, "--tasks", "tiny_group", "--emoe-tail-scale", "0.5")
    with contextlib.chdir(folder):
        shipped = ["--tasks", "python_choice", "python_line", "--limit", 2, "--include-path", REPO / "examples/tasks"]
        ask("shipped", "--k", 2, *shipped, "--out", folder / "shipped.json")
    return said | without_numbers(hf, tasks)


def without_numbers(hf: Path, tasks: Path) -> dict[str, tuple[int, str, str]]:
    """The same model with one expert of NaN, of either kind: k' = 8 meets it, with every token."""
    from megatron_emoe.hf.import_model import import_model

    broken = hf_models.break_expert(hf, hf.parent / "broken")
    import_model(broken, hf.parent / "broken_megatron", report=lambda _: None)
    said = {}
    for model, folder in (("hf", broken), ("megatron", hf.parent / "broken_megatron")):
        for task in ("tiny_choice", "tiny_generate"):
            words = ["--model", model, "--load", folder, "--out", hf.parent / "broken.json", "--include-path", tasks]
            said[f"{model} {task}"] = run_tool("eval_tasks", *words, "--k", 8, "--tasks", task, "--limit", 2)
    assert not (hf.parent / "broken.json").exists()
    return said


@pytest.fixture(scope="module")
def refused(tmp_path_factory):
    return run_ranks(refusals, 1, tmp_path_factory.mktemp("refused"))[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "--tasks arc_chalenge: no such task; closest: arc_challenge"),
        ("unlike any", "--tasks qqqqqqqq: no such task; lm-eval 0."),
        ("unsafe", "--tasks tiny_unsafe: runs programs that the model writes; allow it with --allow-code-execution"),
        ("no data", "--tasks tiny_unsafe: its data cannot be loaded (Unable to find"),
        ("k", "--k 9: must lie in [1, 8], the number of experts"),
        ("limit", "--limit 0: must be at least 1"),
        ("length", "--max-length 5000: must lie in [2, 4096], what the model can see"),
        ("folder", "nowhere/config.json: no such file"),
        ("no tokenizer", "no-text: no tokenizer in it"),
        ("tail", "--emoe-tail-scale 4:x"),
        ("range", "--emoe-tail-scale 2:0.1: k' must lie in [3, 8], above k"),
        ("mute", "mute: no tokenizer for text (it was saved with NullTokenizer"),
        ("null experts", "mute was trained: a token reaches fewer experts than k' where null experts are among its"),
        ("unknown to Megatron", "speaking: no such folder"),
        ("other settings", "settings: TaskSettings(shots=None, limit=3"),
        (
            "version",
            "out.json: tiny_choice at k' = 2 was made by version 3 of the task, which is now version 4; write to",
        ),
        ("scaled", "tail_scale: {}; must equal this run's {'0': 0.5}"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(refused, name, message):
    status, out, err = refused[name]
    assert status == 2 and err.splitlines()[-1].startswith("eval_tasks.py: error: ")
    assert message in err.splitlines()[-1]
    assert "Traceback" not in err and "k' = " not in out


@pytest.mark.parametrize("model", ["hf", "megatron"])
def test_a_model_without_numbers_has_no_score(refused, model):
    places = {
        "tiny_choice": "document 0, request 0: the log-probability is nan",
        "tiny_generate": "document 1, request 0: the logits of the next token are no numbers",  # the longest first
    }
    for task, place in places.items():
        status, _, err = refused[f"{model} {task}"]
        assert status == 1 and "Traceback" not in err
        if (model, task) == ("hf", "tiny_generate"):
            place = "': the logits of the next token are no numbers"
        (line,) = (line for line in err.splitlines() if line.startswith("eval_tasks.py: error: "))
        assert f"--k 8 --tasks {task}: " in line and line.endswith(place)


def test_the_tasks_in_examples_run_from_anywhere(refused):
    status, out, err = refused["shipped"]
    assert status == 0, err
    assert "| python_choice | acc | 2 |" in out and "| python_line | exact_match | 2 |" in out


def test_a_second_run_keeps_the_cells_of_the_first(refused):
    assert refused["first"][0] == refused["second"][0] == 0, refused["first"][2] + refused["second"][2]
    _, before, after = refused["kept"]
    old, new = json.loads(before)["cells"], json.loads(after)["cells"]
    assert [(cell["k"], cell["task"]) for cell in old] == [(2, "tiny_group"), (2, "tiny_choice"), (2, "tiny_generate")]
    renamed = json.loads(refused["label"][1])
    assert refused["renamed"][0] == 0 and renamed["label"] == "new" and renamed["cells"] == new
    assert new[:3] == old and [(cell["k"], cell["task"]) for cell in new[3:]] == [(3, "tiny_group")]


def test_a_group_has_the_scores_of_its_members(refused):
    group, member, _ = json.loads(refused["kept"][1])["cells"]
    assert group["samples"] == 3 and group["version"] == "7"
    assert group["members"] == {"tiny_choice": member["metrics"]}
    assert group["metrics"]["acc,none"]["value"] == member["metrics"]["acc,none"]["value"]


def test_without_lm_eval_the_tool_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    monkeypatch.setattr(sys, "argv", ["eval_tasks.py"])
    status, _, err = run_tool("eval_tasks", "--model", "hf")
    assert status == 2 and "pip install 'megatron-emoe[eval]'" in err


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", {"padding": 10}), ("tokenizer_config.json", {"tokenizer_class": {"a": 1}})]
)
def test_a_tokenizer_that_no_library_can_read_is_one_line(name, content, tmp_path):
    from megatron_emoe.tasks.on_transformers import load_tokenizer

    folder = hf_models.save("olmoe", tmp_path / "hf", tokenizer=True)
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | content))
    with pytest.raises(ValueError, match=rf"^--load {folder}: its tokenizer cannot be loaded \(\w+: [^\n]*\)$"):
        load_tokenizer(folder)
