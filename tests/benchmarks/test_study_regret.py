"""The regret study: methods are valid settings, tables follow from cells, docs/study.md says what they say."""

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_emoe.settings.baseline_rules import check_baseline_settings
from megatron_emoe.settings.elastic_rules import validate_elastic
from tests.benchmarks.test_study import rows, sweep
from tests.distributed import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import study_cell
import study_family
import study_regret_methods as plan
import study_regret_report as report


@pytest.mark.parametrize("method", plan.METHODS, ids=lambda method: method.name)
def test_a_method_is_a_valid_setting(method):
    settings = study_family.elastic_config(method, seed=1)
    validate_elastic(settings, model_k=method.k, num_experts=plan.E)
    check_baseline_settings(settings, model_k=method.k, num_experts=plan.E)


@pytest.mark.parametrize("base", plan.FAMILY.bases)
def test_every_k_of_the_grid_has_its_specialist(base):
    methods = {method.name: method for method in plan.methods(base)}
    for k in plan.GRID:
        specialist = methods[plan.specialist(k, base)]
        assert (specialist.k, specialist.flags, specialist.base) == (k, "", base)
    assert {method.lr for method in methods.values()} == {plan.LR}  # nothing but the method differs


def test_names_are_unique():
    names = [method.name for method in plan.METHODS]
    assert len(set(names)) == len(names)


def record(folder: Path, method: str, seed: int, losses: dict[int, float], fitted: dict | None = None, **more) -> None:
    k = more.get("k", plan.K)
    values = {
        "method": method,
        "seed": seed,
        "k": k,
        "active_experts": more.get("experts", float(k)),
        "passes": more.get("passes", 1),
        "tokens": more.get("tokens", 1000),
        "seconds": {"pretrain_emoe": 60.0},
        "date": "2026-01-31",
        "versions": {"torch": "2"},
        "sweep": sweep(k, losses),
    }
    if fitted:
        values["fitted_sweep"] = sweep(k, fitted, {"8": 0.5, "12": 0.25})
    (folder / f"{method}-s{seed}.json").write_text(json.dumps(values))


@pytest.fixture
def cells(tmp_path) -> Path:
    for seed, worse in ((1, 0.0), (2, 0.4)):
        record(tmp_path, "topk", seed, {2: 2.2 + worse, 4: 2.0 + worse, 8: 2.1 + worse, 12: 2.3 + worse})
        for k, loss in ((2, 2.0), (8, 1.6), (12, 1.5)):
            record(tmp_path, f"specialist-{k}", seed, {2: 3.0, 4: 3.0, 8: 3.0, 12: 3.0} | {k: loss + worse}, k=k)
    record(tmp_path, "mmoe", 1, {2: 2.02, 4: 2.1, 8: 1.68, 12: 1.53}, {4: 2.1, 8: 1.6, 12: 1.485}, experts=6.0)
    record(tmp_path, "second-pass", 1, {2: 1.99, 4: 2.0, 8: 1.6, 12: 1.5015}, experts=5.5, passes=2)
    record(tmp_path, "second-pass-equal-flops", 1, {2: 2.0, 4: 2.0, 8: 1.6, 12: 1.5}, experts=5.0, passes=2, tokens=400)
    record(tmp_path, "second-pass", 2, {2: 2.4, 4: 2.4, 8: 2.0, 12: 1.9}, experts=5.5, passes=2)
    record(tmp_path, "stratified", 3, {2: 1.0, 4: 1.0, 8: 1.0, 12: 1.0})  # this seed has no specialists
    return tmp_path


def test_regret_by_hand(cells):
    table = rows(report.table(report.rows(cells)))
    assert "stratified" not in table
    mmoe, fitted = table["mmoe"], table["mmoe + a(k')"]
    # 2.02 against 2.0, 2.1 against 2.0, 1.68 against 1.6, 1.53 against 1.5.
    assert [mmoe[f"k' = {k}"] for k in plan.GRID] == ["+1.00", "+5.00", "+5.00", "+2.00"]
    assert (mmoe["mean"], mmoe["worst"], mmoe["expert FLOPs"], mmoe["seeds"]) == ("+3.25", "+5.00", "1.50", "1")
    assert [fitted[f"k' = {k}"] for k in plan.GRID] == ["+1.00", "+5.00", "+0.00", "-1.00"]  # below k as it was
    second = table["second-pass"]
    assert second["k' = 2"] == "-0.25 ± 0.35"  # -0.5 % and 0: half of 0.5, and 0.5 / sqrt(2)
    assert second["k' = 12"] == "+0.05 ± 0.07"  # 0.0015 of 1.5, and 0
    assert (second["expert FLOPs"], second["tokens"]) == ("2.75", "1,000")  # two passes of 5.5 experts, against 4
    fewer = table["second-pass-equal-flops"]
    assert (fewer["expert FLOPs"], fewer["tokens"]) == ("1.00", "400")  # 0.4 of the tokens, two passes of 5 experts
    assert table["topk"]["k' = 4"] == "+0.00 ± 0.00"  # it is the specialist there
    assert table["specialist-12"]["k' = 12"] == "+0.00 ± 0.00"


def test_regret_in_nats_by_hand(cells):
    table = rows(report.nats_table(report.rows(cells)))
    assert table["mmoe"]["k' = 2"] == "+0.0200" and table["mmoe"]["k' = 8"] == "+0.0800"


def test_the_specialists_by_hand(cells):
    table = rows(report.specialists_table(cells))
    assert list(table) == ["k' = 2", "k' = 4", "k' = 8", "k' = 12"]
    assert table["k' = 12"]["k' = 12"] == "1.7000 ± 0.2828"  # 1.5 and 1.9
    assert table["k' = 4"]["k' = 12"] == "2.5000 ± 0.2828"


def test_the_answer_names_the_best_of_the_methods_with_most_seeds(cells):
    """Specialists are none: they have one k' each."""
    line = report.answer(report.rows(cells))
    assert "second-pass** (2 seeds, 2.75 times the expert FLOPs of plain top-k)" in line
    assert "-0.25 % at k' = 2, +0.00 % at k' = 4" in line
    assert line.endswith("Goal, at most 0 at each: **not met**; floor, 0.1 % at each: **met**.\n")


@pytest.mark.parametrize(
    ("loss", "says"),
    [(1.499, "Goal, at most 0 at each: **met**"), (1.51, "**not met**; floor, 0.1 % at each: **not met**")],
)
def test_what_the_answer_says_of_the_goal(cells, loss, says):
    for seed in (1, 2):
        worse = 0.4 * (seed - 1)
        losses = {2: 2.0 + worse, 4: 2.0 + worse, 8: 1.6 + worse, 12: loss + worse}
        record(cells, "second-pass", seed, losses, experts=5.5, passes=2)
    assert says in report.answer(report.rows(cells))


def test_without_specialists_there_is_no_regret(tmp_path):
    record(tmp_path, "topk", 1, {2: 2.2, 4: 2.0, 8: 2.1, 12: 2.3})
    assert report.rows(tmp_path) == []
    assert "No regret yet" in report.answer(report.rows(tmp_path))


@pytest.mark.parametrize(
    ("name", "experts"),
    [
        ("topk", 4.0),
        ("specialist-12", 12.0),
        ("stratified", (4 + 22 / 3) / 2),  # half at 4, half in turn at 2, 8 and 12
        ("stratified-3-of-4", 0.75 * 4 + 0.25 * 22 / 3),
        ("below-half", 3.0),
        ("below-6-of-8", 2.5),  # a quarter at 4, the rest at 2
        ("second-pass", (4 + 22 / 3) / 2),  # of each pass, and there are two
        ("mmoe", 6.5),  # 2, 4, 8 and 12 alike
    ],
)
def test_experts_in_training(name, experts):
    method = next(method for method in plan.METHODS if method.name == name)
    drawn = study_cell.active_experts(method, 1, Path("none"), plan.FAMILY)
    assert drawn == pytest.approx(experts, rel=0.05 if name == "mmoe" else 0.002)


@pytest.mark.parametrize("name", ["stratified-scales", "second-pass"])
def test_rows_of_equal_flops_cost_what_plain_top_k_does(name):
    method = next(method for method in plan.METHODS if method.name == f"{name}-equal-flops")
    passes = 2 if name == "second-pass" else 1
    steps = plan.FAMILY.iterations(method)
    cost = steps * passes * study_cell.active_experts(method, 1, Path("none"), plan.FAMILY)
    assert cost == pytest.approx(plan.FAMILY.continued_iters * plan.K, rel=0.01)
    assert method.flags == next(one for one in plan.METHODS if one.name == name).flags


def test_a_cell_trains_in_eight_micro_batches_of_its_own_data(tmp_path):
    method = next(method for method in plan.METHODS if method.name == "specialist-8")
    one = study_cell.Cell(method, 2, tmp_path, tmp_path, plan.FAMILY)
    words = " ".join(one.training())
    for part in ("--micro-batch-size 4 --global-batch-size 32", f"--data-path {tmp_path}/data/text ", "--seed 2"):
        assert part in words
    assert words.count("--moe-router-topk") == 1 and "--moe-router-topk 8" in words
    assert f"--load {tmp_path}/checkpoints/base --finetune" in words
    assert one.tokens == 300 * 32 * 128
    base = study_cell.Cell(plan.FAMILY.base_method("base-raw"), 1, tmp_path, tmp_path, plan.FAMILY)
    assert "--micro-batch-size 32" in (words := " ".join(base.training())) and "--moe-router-pre-softmax" in words
    assert base.tokens == plan.FAMILY.base_iters * 32 * 128


def load_study(monkeypatch):
    monkeypatch.setitem(sys.modules, "forks", SimpleNamespace())
    study = importlib.import_module("study")
    del sys.modules["study"]  # another test's would have the forks of this one
    return study


def test_the_order_begins_with_the_specialists_of_the_first_seed(monkeypatch):
    study = load_study(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["study.py"])
    options = study.parse_args()
    names = [cell.name for cell in study.chosen_cells(options, options.plan)]
    assert names[:4] == ["topk-s1", "specialist-2-s1", "specialist-8-s1", "specialist-12-s1"]
    assert len(names) == 3 * len(plan.METHODS)


def test_quick_is_one_seed_in_its_own_folder(monkeypatch):
    study = load_study(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["study.py", "--quick"])
    options = study.parse_args()
    cells = study.chosen_cells(options, options.plan)
    assert {cell.seed for cell in cells} == {1} and len(cells) == len(plan.MAIN)
    assert all(REPO / "study/regret-quick" in cell.result.parents for cell in cells)


def test_quick_of_the_older_study_is_refused(monkeypatch, capsys):
    study = load_study(monkeypatch)
    monkeypatch.setattr(sys, "argv", ["study.py", "--study", "reach", "--quick"])
    with pytest.raises(SystemExit, match="2"):
        study.parse_args()
    assert "--quick needs --study regret" in capsys.readouterr().err


def test_the_kept_base_is_used_unless_a_new_one_is_asked_for(monkeypatch, tmp_path):
    study = load_study(monkeypatch)
    kept = SimpleNamespace(kept_base=tmp_path)
    assert study.kept_base(kept, new_base=False) == tmp_path
    assert study.kept_base(kept, new_base=True) is None
    assert study.kept_base(SimpleNamespace(kept_base=tmp_path / "none"), new_base=False) is None


def test_the_committed_report_is_what_the_committed_cells_give(tmp_path):
    copy = tmp_path / "study.md"
    shutil.copy(REPO / "docs/study.md", copy)
    report.write(REPO / "docs/study/regret", copy)
    assert copy.read_text() == (REPO / "docs/study.md").read_text()
