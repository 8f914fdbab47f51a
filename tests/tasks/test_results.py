"""The file of scores: a cell without the rows of its k' is none, and cells of two kinds are not mixed."""

import dataclasses
import json
import re
from typing import Any

import pytest

from megatron_emoe.tasks import results as task_results
from megatron_emoe.tasks.results import Measure, TaskCell, TaskSettings, TasksResult


def cell(k: int = 4, task: str = "arc_easy", **changes: Any) -> TaskCell:
    settings: dict[str, Any] = {
        "metrics": {"acc,none": Measure(value=0.5, stderr=0.25)},
        "samples": 4,
        "shots": 0,
        "version": "1.0",
        "tokens": 10,
        "rows_per_layer": {"1": 10 * k, "2": 10 * k},
        "seconds": 1.5,
    }
    return TaskCell(k=k, task=task, **(settings | changes))


def result(*cells: TaskCell, **changes: Any) -> TasksResult:
    settings: dict[str, Any] = {
        "label": "model",
        "framework": "megatron",
        "checkpoint": "checkpoints/a",
        "iteration": 7,
        "k_train": 4,
        "num_experts": 8,
        "tail_scale": {},
        "settings": TaskSettings(shots=None, limit=None, max_length=64, dtype="bfloat16"),
        "versions": {"lm_eval": "0.4.13"},
        "command": "eval_tasks.py",
        "date": "2026-01-01T00:00:00+00:00",
    }
    return TasksResult(cells=cells, **(settings | changes))


def test_a_file_is_read_as_it_was_written(tmp_path):
    written = result(cell(), cell(8), cell(8, "gsm8k", members={"part": {}}, shots=None))
    task_results.save(written, tmp_path / "tasks.json")
    assert task_results.load(tmp_path / "tasks.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["tasks.json"]


def test_rows_of_another_k_make_no_cell():
    message = "arc_easy at k' = 4: 41 rows reached the experts of layer 2; must be 10 tokens x 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        cell(rows_per_layer={"1": 40, "2": 41})
    with pytest.raises(ValueError, match="rows_per_layer"):
        cell(rows_per_layer={})


def test_a_cell_is_there_once_and_within_the_experts():
    with pytest.raises(ValueError, match=re.escape("cells[1]: arc_easy at k' = 4 is there twice")):
        result(cell(), cell())
    with pytest.raises(ValueError, match=re.escape("cells[0].k: 9; must be at most num_experts (8)")):
        result(cell(9))


def test_a_damaged_file_is_refused_by_its_key(tmp_path):
    path = tmp_path / "tasks.json"
    task_results.save(result(cell()), path)
    stored = json.loads(path.read_text())
    stored["cells"][0]["metrics"]["acc,none"]["value"] = "good"
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=re.escape(f"{path}: cells[0].metrics.acc,none.value: 'good'; Input")):
        task_results.load(path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        task_results.load(tmp_path / "nowhere.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint": "checkpoints/b"}, "checkpoint: 'checkpoints/a'; must equal this run's 'checkpoints/b'"),
        ({"iteration": 8}, "iteration: 7; must equal this run's 8"),
        ({"tail_scale": {"8": 0.5}}, "tail_scale: {}; must equal this run's {'8': 0.5}"),
        ({"versions": {"lm_eval": "0.4.14"}}, "versions: {'lm_eval': '0.4.13'}; must equal"),
        ({"framework": "transformers"}, "framework: 'megatron'; must equal this run's 'transformers'"),
        ({"settings": TaskSettings(shots=5, limit=None, max_length=64, dtype="bfloat16")}, "settings: "),
    ],
)
def test_cells_of_another_run_are_not_mixed_in(tmp_path, changes, message):
    path = tmp_path / "tasks.json"
    assert task_results.resume(path, result()).cells == ()
    task_results.save(result(cell()), path)
    assert task_results.resume(path, result(label="other")) == result(cell())
    assert task_results.resume(path, result(), "other") == result(cell(), label="other")
    task_results.rename(path, "other")
    assert task_results.load(path) == result(cell(), label="other")
    with pytest.raises(ValueError, match=re.escape(message)):
        task_results.resume(path, result(**changes))


def test_what_is_missing_comes_k_by_k():
    done = result(cell(4, "b"))
    assert task_results.missing(done, [8, 4, 8], ["a", "b"]) == [(8, "a"), (8, "b"), (4, "a")]
    assert task_results.missing(task_results.add_cell(done, cell(8, "b")), [8], ["b"]) == []


def test_only_numbers_are_measures():
    raw = {
        "alias": "x",
        "sample_len": 4,
        "acc,none": 0.5,
        "acc_stderr,none": 0.25,
        "exact_match,strict-match": 1,
        "exact_match_stderr,strict-match": "N/A",
        "word_perplexity,none": float("nan"),
    }
    assert task_results.measures(raw) == {
        "acc,none": Measure(value=0.5, stderr=0.25),
        "exact_match,strict-match": Measure(value=1.0),
    }


def test_the_table_leaves_empty_what_was_not_evaluated():
    other = dataclasses.replace(cell(4, "gsm8k"), metrics={"exact_match,strict-match": Measure(value=0.125)})
    assert task_results.markdown_table(result(cell(8), cell(4), other)) == (
        "| task | metric | samples | k' = 4 | k' = 8 |\n"
        "| --- | --- | ---: | ---: | ---: |\n"
        "| arc_easy | acc | 4 | 0.5000 ± 0.2500 | 0.5000 ± 0.2500 |\n"
        "| gsm8k | exact_match,strict-match | 4 | 0.1250 |  |\n"
    )
