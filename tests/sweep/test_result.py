"""The fields of schema 2 of the sweep file: optional, checked, resumed; and schema 1 beside them."""

import dataclasses
import json

import pytest

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.curve import SweepData
from tests.distributed import REPO
from tests.sweep.test_curve import document, make_result
from tests.sweep_results import make_cell
from tests.sweeps import run_tool

DIGEST, OTHER = "a" * 64, "b" * 64
LOAD = {"min": 0.0, "p5": 0.1, "p50": 1.0, "p95": 2.0, "max": 3.5, "dead": 1}
MEASURED = {
    "flops_per_token": 1e6,
    "latency_ms_batch1": 1.5,
    "latency_ms_large": 0.25,
    "router_entropy": {"2": 1.25},
    "load": {"2": LOAD},
    "coverage": {"2": 0.75},
}


def header(cells=(), **changes):
    fields = {"schema": 2, "num_moe_layers": 2, "data": SweepData(path=["held-out"], tokens=4096, digest=DIGEST)}
    return make_result(cells, **(fields | changes))


def test_all_fields_survive_the_file(tmp_path):
    cells = [make_cell(2, 1.5, **MEASURED), make_cell([1, 3], 1.25)]
    result = header(cells=cells, framework="transformers", tail_scale={"6": 0.25}, coverage_at_least=3)
    sweep.save(result, tmp_path / "a.json")
    assert sweep.load(tmp_path / "a.json") == result
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored["cells"][0]["load"] == {"2": LOAD}
    assert not set(MEASURED) & set(stored["cells"][1])  # what was not measured is absent


def test_schema_1_has_none_of_it(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(document()))
    result = sweep.load(tmp_path / "a.json")
    assert (result.framework, result.num_moe_layers, result.tail_scale, result.data.digest) == ("megatron", *[None] * 3)
    assert all(getattr(cell, name) is None for cell in result.cells for name in MEASURED)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"second_cell": {"coverage": {"2": 1.5}}},
            "cells[1].coverage.2: 1.5; Input should be less than or",
        ),
        ({"second_cell": {"coverage": {"two": 0.5}}}, "cells[1].coverage.two.[key]: 'two'; String should match"),
        (
            {"second_cell": {"latency_ms_batch1": 0.0}},
            "cells[1].latency_ms_batch1: 0.0; Input should be greater",
        ),
        (
            {"second_cell": {"router_entropy": {"1": float("nan")}}},
            "cells[1].router_entropy.1: nan; Input should",
        ),
        ({"second_cell": {"load": {"1": LOAD | {"mean": 1.0}}}}, "cells[1].load.1.mean: 1.0; Extra inputs"),
        ({"second_cell": {"k": [1, 2, 3]}}, "cells[1].k: [1, 2, 3]; must have one entry for each of the 2 MoE layers"),
        ({"framework": "jax"}, "framework: 'jax'; Input should be 'megatron' or 'transformers'"),
        ({"tail_scale": {"6": -1.0}}, "tail_scale.6: -1.0; Input should be greater than or equal to 0"),
        ({"data": {"path": [], "tokens": 9, "digest": "abc"}}, "data.digest: 'abc'; String should match pattern"),
    ],
)
def test_malformed_fields_name_key_value_and_rule(tmp_path, changes, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document(**({"schema": 2, "num_moe_layers": 2} | changes))))
    with pytest.raises(ValueError) as error:
        sweep.load(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_a_cell_without_what_is_asked_for_is_missing():
    result = header(cells=[make_cell(2, 1.5, latency_ms_large=0.5), make_cell(4, 1.4)])
    assert sweep.missing_ks(result, [1, 2, 4]) == [1]
    assert sweep.missing_ks(result, [1, 2, 4], ["latency_ms_large"]) == [1, 4]
    assert sweep.missing_ks(result, [2], ["latency_ms_large", "router_entropy"]) == [2]


def test_resume_takes_the_stored_digest_and_rule(tmp_path):
    path = tmp_path / "a.json"
    sweep.save(header(cells=[make_cell(2, 1.5)], coverage_at_least=3), path)
    started = header(data=SweepData(path=["held-out"], tokens=4096))
    resumed = sweep.resume(path, started)
    assert (resumed.data.digest, resumed.coverage_at_least, len(resumed.cells)) == (DIGEST, 3, 1)
    assert sweep.with_digest(resumed, DIGEST) == resumed
    with pytest.raises(ValueError, match=f"top-k: data.digest: {DIGEST}; the data now give {OTHER}: "):
        sweep.with_digest(resumed, OTHER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"framework": "transformers"}, "framework: 'megatron'; must equal this run's 'transformers'"),
        ({"tail_scale": {"6": 0.5}}, "tail_scale: None; must equal this run's {'6': 0.5}"),
        ({"coverage_at_least": 2}, "coverage_at_least: 3; must equal this run's 2"),
        ({"schema": 1, "num_moe_layers": None}, "schema: 2; must equal this run's 1"),
    ],
)
def test_resume_refuses_another_sweep(tmp_path, change, message):
    sweep.save(header(coverage_at_least=3), tmp_path / "a.json")
    with pytest.raises(ValueError) as error:
        sweep.resume(tmp_path / "a.json", header(**change))
    assert f"a.json: {message}" in str(error.value)


HOW = {"dtype": "bfloat16", "selection": "top-p", "combine": "renormalize"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float32"}, "dtype: 'bfloat16'; must equal this run's 'float32', or write to another file"),
        ({"selection": "topk"}, "selection: 'top-p'; must equal this run's 'topk'"),
        ({"combine": "model"}, "combine: 'renormalize'; must equal this run's 'model'"),
    ],
)
def test_cells_measured_in_another_way_are_not_mixed(tmp_path, change, message):
    path = tmp_path / "a.json"
    sweep.save(header(cells=[make_cell(2, 1.5)], **HOW), path)
    assert sweep.resume(path, header(**HOW)).dtype == "bfloat16"
    with pytest.raises(ValueError) as error:
        sweep.resume(path, header(**(HOW | change)))
    assert f"a.json: {message}" in str(error.value)


def test_an_older_file_goes_on_and_says_nothing_it_does_not_know(tmp_path):
    path = tmp_path / "a.json"
    sweep.save(header(cells=[make_cell(2, 1.5)]), path)
    resumed = sweep.resume(path, header(**HOW))
    assert len(resumed.cells) == 1 and (resumed.dtype, resumed.selection, resumed.combine) == (None, None, None)


def join(folder, *names, out="all.json"):
    return run_tool("join_sweeps", *(folder / name for name in names), "--out", folder / out)


def test_joining_does_not_depend_on_the_order_of_the_files(tmp_path):
    old = header(cells=[make_cell(4, 1.4)], data=SweepData(path=["held-out"], tokens=4096))
    new = header(cells=[make_cell(2, 1.5, coverage={"2": 0.5})], coverage_at_least=3, **HOW)
    sweep.save(old, tmp_path / "old.json")
    sweep.save(new, tmp_path / "new.json")
    for names in (("old.json", "new.json"), ("new.json", "old.json")):
        assert join(tmp_path, *names).status == 0
        joined = sweep.load(tmp_path / "all.json")
        assert [cell.k for cell in joined.cells] == [2, 4]
        assert (joined.dtype, joined.coverage_at_least, joined.data.digest) == (None, 3, DIGEST)  # old says no dtype


def test_what_cannot_be_joined_is_named_by_its_file(tmp_path):
    sweep.save(header(**HOW), tmp_path / "a.json")
    sweep.save(header(**HOW | {"dtype": "float32"}), tmp_path / "b.json")
    sweep.save(header(data=SweepData(path=["held-out"], tokens=4096, digest=OTHER)), tmp_path / "c.json")
    for name, told in {
        "b.json": "dtype: 'float32'; must equal 'bfloat16'",
        "c.json": f"data.digest: '{OTHER}'",
    }.items():
        answer = join(tmp_path, "a.json", name)
        assert answer.status == 2 and answer.err.startswith(f"join_sweeps.py: error: {tmp_path / name}: {told}")
        assert f" in {tmp_path / 'a.json'}: not one sweep" in answer.err
    for out, why in {"missing/all.json": f"the folder {tmp_path}/missing does not exist", ".": "is a folder"}.items():
        answer = join(tmp_path, "a.json", out=out)
        assert answer.status == 2 and f"--out {tmp_path / out}: {why}" in answer.err


def test_the_sweeps_of_the_study_can_be_read(tmp_path):
    files = sorted((REPO / "docs" / "study").glob("*.json"))
    for file in files:
        (tmp_path / "a.json").write_text(json.dumps(json.loads(file.read_text())["sweep"]))
        assert sweep.load(tmp_path / "a.json").cells
    assert len(files) > 30


def test_comparison_goes_by_digest_where_both_are_known():
    baseline, method = header(cells=[make_cell(2, 1.5)]), header(cells=[make_cell(2, 1.25)], label="EMoE")
    moved = dataclasses.replace(method, data=SweepData(path=["elsewhere"], tokens=4096, digest=DIGEST))
    assert sweep.peak_gain(moved, baseline) == 0.25
    other = dataclasses.replace(method, data=SweepData(path=["held-out"], tokens=4096, digest=OTHER))
    with pytest.raises(ValueError, match="^data.digest: b{12}... in EMoE, a{12}... in top-k; must be equal"):
        sweep.peak_gain(other, baseline)
    unknown = dataclasses.replace(method, data=SweepData(path=["elsewhere"], tokens=4096))
    with pytest.raises(ValueError, match="^data.path: "):
        sweep.peak_gain(unknown, baseline)


def test_sensitivity_changes_one_layer_at_a_time():
    assert sweep.sensitivity_budgets([1, 2, 4, 1], 2, 2) == [(1, 2), (4, 2), (2, 1), (2, 4)]
    assert sweep.sensitivity_budgets([2], 2, 3) == []


def test_table_of_an_optional_number():
    result = header(cells=[make_cell(2, 1.5, latency_ms_large=0.5), make_cell(4, 1.4)])
    assert sweep.markdown_table([result], "latency_ms_large").splitlines()[2:] == ["| 2 | 0.5 |", "| 4 |  |"]
