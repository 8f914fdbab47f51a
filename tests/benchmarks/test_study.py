"""The study: its methods are valid settings, its tables follow from its cells, and docs/study.md says what they say."""

import dataclasses
import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_emoe.settings.baseline_rules import check_baseline_settings
from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.elastic_rules import validate_elastic
from tests.distributed import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import study_cell
import study_methods as plan
import study_report


@pytest.mark.parametrize("method", plan.METHODS, ids=lambda method: method.name)
def test_a_method_is_a_valid_setting(method):
    settings = plan.elastic_config(method, seed=1)
    validate_elastic(settings, model_k=method.k, num_experts=plan.E)
    check_baseline_settings(settings, model_k=method.k, num_experts=plan.E)
    differs = settings != ElasticConfig(emoe_seed=1) or method.k != plan.K or method.lr != plan.HIGH_LR
    assert differs == (method.name not in ("topk", "topk-raw"))


def test_names_are_unique_and_the_core_is_of_the_main_ones():
    names = [method.name for method in plan.METHODS]
    assert len(set(names)) == len(names)
    assert set(plan.CORE) <= {method.name for method in plan.MAIN}


def sweep(k_train: int, losses: dict[int, float], tail: dict[str, float] | None = None) -> dict:
    cells = [
        {
            "k": k,
            "loss": loss,
            "tokens": 64,
            "seconds": 1.0,
            "tokens_per_second": 64.0,
            "rows_per_layer": {"1": 64 * k},
            "expert_flops_per_token": 10.0 * k,
            "active_params": 100,
        }
        for k, loss in losses.items()
    ]
    header = {"schema": 2, "label": "x", "checkpoint": "c", "iteration": 1, "k_train": k_train, "num_experts": plan.E}
    data = {"path": ["d"], "tokens": 64}
    return header | {"data": data, "cells": cells, "command": "", "date": "2026-01-31", "tail_scale": tail}


def record(folder: Path, method: str, seed: int, losses: dict[int, float], fitted: dict | None = None, **more) -> None:
    k = more.get("k", plan.K)
    values = {
        "method": method,
        "seed": seed,
        "k": k,
        "active_experts": float(k),
        "seconds": {"pretrain_emoe": 60.0},
        "date": "2026-01-31",
        "versions": {"torch": "2"},
        "sweep": sweep(k, losses),
    }
    if fitted:
        values["fitted_sweep"] = sweep(k, fitted, {"4": 0.5, "8": 0.25})
    (folder / f"{method}-s{seed}.json").write_text(json.dumps(values))


@pytest.fixture
def cells(tmp_path) -> Path:
    record(tmp_path, "topk", 1, {1: 3.3, 2: 3.0, 4: 3.01, 8: 3.1})
    record(tmp_path, "topk", 2, {1: 3.5, 2: 3.2, 4: 3.21, 8: 3.3})
    record(tmp_path, "recipe", 1, {1: 3.4, 2: 3.003, 4: 2.9, 8: 2.99}, {2: 3.003, 4: 2.8, 8: 2.98})
    record(tmp_path, "topk-3k", 1, {2: 3.1, 6: 2.7}, k=3 * plan.K)
    return tmp_path


def rows(text: str) -> dict[str, dict[str, str]]:
    lines = [[cell.strip() for cell in line.strip("| \n").split("|")] for line in text.splitlines()]
    return {line[0]: dict(zip(lines[0], line, strict=False)) for line in lines[2:]}


def test_the_table_by_hand(cells):
    table = rows(study_report.table(study_report.read(cells), plan.MAIN))
    assert list(table) == ["topk", "recipe", "recipe + a(k')", "topk-3k"]  # a method without a cell has no row
    topk, recipe, fitted = table["topk"], table["recipe"], table["recipe + a(k')"]
    assert topk["k' = 2"] == "3.1000 ± 0.1414"  # 3.0 and 3.2: sqrt(2 * 0.1^2 / 1)
    assert topk["k' = 3"] == ""  # not measured
    assert (topk["R"], topk["cost at k"], topk["peak gain"]) == ("1.0", "+0.00% ± 0.00%", "+0.0000 ± 0.0000")
    assert recipe["cost at k"] == "+0.10%"  # 3.003 / 3.0, seed 1 alone
    assert recipe["R"] == "4.0" and recipe["peak gain"] == "+0.1000"  # 3.0 - 2.9
    assert fitted["k' = 1"] == "3.4000"  # below k nothing is scaled: the plain sweep's
    assert (fitted["k' = 4"], fitted["peak gain"]) == ("2.8000", "+0.2000")
    assert (table["topk-3k"]["R"], table["topk-3k"]["cost at k"]) == ("", "")  # it has another k
    assert table["topk-3k"]["peak gain"] == "+0.3000"


def test_the_scales_by_hand(cells):
    assert rows(study_report.scales(study_report.read(cells))) == {
        "recipe": {"method": "recipe", "k' = 4": "0.50", "k' = 8": "0.25"}
    }


def test_without_a_cell_to_compare_with_cost_and_gain_stay_empty(tmp_path):
    record(tmp_path, "emoe", 1, {2: 3.0, 4: 3.1})
    row = rows(study_report.table(study_report.read(tmp_path), plan.MAIN))["emoe"]
    assert (row["k' = 2"], row["cost at k"], row["peak gain"]) == ("3.0000", "", "")


def cell(folder: Path, name: str = "topk", **changes) -> study_cell.Cell:
    for part in ("parts", "checkpoints", "results"):
        (folder / part).mkdir(exist_ok=True)
    method = next(method for method in plan.METHODS if method.name == name)
    return study_cell.Cell(dataclasses.replace(method, **changes), 1, folder, folder / "results")


def scripts_left(one: study_cell.Cell) -> list[str]:
    study_cell.forget_if_changed(one)
    return [Path(step.script).stem for step in study_cell.steps(one) if not step.done()]


def test_a_step_is_done_when_all_that_it_makes_is_there(tmp_path):
    one = cell(tmp_path)
    steps = ["pretrain_emoe", "sweep_k", "fit_tail_scale", "sweep_k"]
    assert scripts_left(one) == steps
    one.checkpoint.mkdir()
    tracker = one.checkpoint / "latest_checkpointed_iteration.txt"
    tracker.write_text(str(plan.CONTINUED_ITERS - 1))
    assert scripts_left(one) == steps
    tracker.write_text(str(plan.CONTINUED_ITERS))
    one.part("sweep").write_text(json.dumps(sweep(plan.K, dict.fromkeys(plan.KS[:-1], 3.0))))
    assert scripts_left(one) == steps[1:]  # a k' is missing: the sweep was interrupted
    one.part("sweep").write_text(json.dumps(sweep(plan.K, dict.fromkeys(plan.KS, 3.0))))
    assert scripts_left(one) == steps[2:]


def test_what_was_made_under_other_flags_is_forgotten(tmp_path):
    one = cell(tmp_path, "recipe")
    assert scripts_left(one)[0] == "pretrain_emoe"
    one.checkpoint.mkdir()
    (one.checkpoint / "latest_checkpointed_iteration.txt").write_text(str(plan.CONTINUED_ITERS))
    one.part("fit").write_text("{}")
    other = cell(tmp_path, "topk-3k")
    study_cell.forget_if_changed(other)
    assert scripts_left(one)[0] == "sweep_k"
    assert scripts_left(cell(tmp_path, "recipe", flags=plan.EMOE))[0] == "pretrain_emoe"
    assert not one.checkpoint.exists() and not one.part("fit").exists()
    assert other.part("flags").exists()  # another cell keeps what it has


def test_a_training_run_that_is_started_again_finds_an_empty_folder(tmp_path, monkeypatch):
    """A whole checkpoint in --save is refused, and a run can be ended before the tracker names it."""
    one, found = cell(tmp_path), []
    (tmp_path / "logs").mkdir()

    def start(script: Path, words: list[str], log: Path) -> None:
        found.append((script.name, one.checkpoint.exists(), one.tensorboard.exists()))

    monkeypatch.setitem(sys.modules, "forks", SimpleNamespace(start=start))
    study = importlib.import_module("study")
    del sys.modules["study"]  # another test's would have the forks of this one
    progress = study.Progress(one)
    for folder in (one.checkpoint / "iter_0000500", one.tensorboard):
        folder.mkdir(parents=True)
    assert progress.next() and found == [("pretrain_emoe.py", False, False)]
    one.checkpoint.mkdir()
    progress.left.pop(0)
    assert progress.next() and found[1:] == [("sweep_k.py", True, False)]  # what it reads is left


def test_experts_in_training_are_those_that_were_drawn():
    counted = {path.stem: json.loads(path.read_text()) for path in (REPO / "docs/study").glob("*.json")}
    methods = {method.name: method for method in plan.METHODS}
    for name, found in counted.items():
        method = methods[found["method"]]
        if not plan.elastic_config(method, found["seed"]).counts_vary:
            assert found["active_experts"] == study_cell.active_experts(method, found["seed"], Path("none")), name
    assert study_cell.active_experts(methods["topk"], 1, Path("none")) == plan.K
    # The recipe: half of the draws at 2, half uniform in 3 to 6 (mean 4.5): 3.25 in expectation, 500 draws.
    assert study_cell.active_experts(methods["recipe"], 1, Path("none")) == pytest.approx(3.25, abs=0.25)


def test_a_report_without_its_markers_is_refused(cells, tmp_path):
    report = tmp_path / "report.md"
    report.write_text("# Nothing here\n")
    with pytest.raises(ValueError, match=r"the marker <!-- main --> or <!-- end of main --> is missing"):
        study_report.write(cells, report)
    assert report.read_text() == "# Nothing here\n"


def test_the_committed_report_is_what_the_committed_cells_give(tmp_path):
    report = tmp_path / "study.md"
    shutil.copy(REPO / "docs/study.md", report)
    study_report.write(REPO / "docs/study", report)
    assert report.read_text() == (REPO / "docs/study.md").read_text()
    assert report.with_suffix(".png").stat().st_size > 10_000
