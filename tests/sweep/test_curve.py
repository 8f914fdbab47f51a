"""The sweep file and the numbers read off its curve, against values worked out by hand in the comments."""

import dataclasses
import json
import stat
from collections.abc import Iterable, Mapping

import pytest

from megatron_emoe.settings.atomic_file import written_whole
from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.curve import SweepCell, SweepData, SweepResult
from tests import sweep_results
from tests.sweep_results import make_cell


def make_result(cells: Mapping | Iterable[SweepCell], *, label: str = "top-k", **fields) -> SweepResult:
    values = {"schema": 1, "checkpoint": "runs/a", "k_train": 2}
    return sweep_results.make_result(label, cells, **(values | fields))


# The plain top-2 model of 16 experts that shows the wall: 1.756 at 2, 1.780 at 4, 1.813 at 6.
WALL_AT_ONCE = {1: 1.83, 2: 1.756, 4: 1.780, 6: 1.813}
# Limit at k = 2: 1.5 * 1.001 = 1.5015. 3, 4 and 6 stay below it, 8 does not; 16 is good again, but past the wall.
WALL_AT_8 = {1: 1.7, 2: 1.5, 3: 1.45, 4: 1.4, 6: 1.501, 8: 1.502, 16: 1.3}


def test_range_and_wall():
    result = make_result(WALL_AT_8)
    assert sweep.range_end(result) == 6
    assert sweep.effective_range(result) == 3.0  # 6 / 2
    assert sweep.wall(result) == 8


def test_wall_at_once():
    # Limit 1.756 * 1.001 = 1.757756 < 1.780 at k' = 4, the first budget past k.
    result = make_result(WALL_AT_ONCE)
    assert sweep.effective_range(result) == 1.0
    assert sweep.wall(result) == 4


def test_no_wall():
    result = make_result({2: 1.5, 4: 1.4, 5: 1.4})
    assert sweep.effective_range(result) == 2.5  # 5 / 2
    assert sweep.wall(result) is None


def test_only_the_k_cell():
    result = make_result({2: 1.5})
    assert sweep.effective_range(result) == 1.0
    assert sweep.wall(result) is None


@pytest.mark.parametrize(
    ("at_k", "boundary"),
    # loss at k * 1.001, exact in decimal. As binary floats 2.002 > 2.0 * 1.001, 3.003 > 3.0 * 1.001 and
    # 1.757756 - 1.756 > 0.001 * 1.756, which would put the wall at the boundary itself.
    [(2.0, 2.002), (3.0, 3.003), (1.756, 1.757756), (1.0, 1.001), (1.1, 1.1011)],
)
def test_exactly_the_tolerance_is_not_worse(at_k, boundary):
    assert sweep.wall(make_result({2: at_k, 4: boundary})) is None
    assert sweep.wall(make_result({2: at_k, 4: boundary + 1e-9})) == 4


def test_range_compares_with_k_not_with_the_previous_budget():
    # Each step is 0.09 % of 1.0 worse than the one before; from k it is 0.09 % at 3, 0.18 % at 4.
    result = make_result({2: 1.0, 3: 1.0009, 4: 1.0018})
    assert sweep.range_end(result) == 3


def test_tolerance_is_a_share_of_the_loss_at_k():
    # From 4.0 to 4.02 is 0.5 %, in absolute terms 0.02.
    result = make_result({2: 4.0, 4: 4.02})
    assert sweep.wall(result, tolerance=0.005) is None
    assert sweep.effective_range(result, tolerance=0.005) == 2.0
    assert sweep.wall(result, tolerance=0.0049) == 4
    assert sweep.wall(make_result({2: 4.0, 4: 4.0}), tolerance=0) is None


@pytest.mark.parametrize("tolerance", [-0.001, float("nan"), float("inf")])
def test_tolerance_that_is_no_share(tolerance):
    with pytest.raises(ValueError, match=r"tolerance: .*; must be a finite number >= 0"):
        sweep.range_end(make_result(WALL_AT_8), tolerance)


def test_budgets_below_k_are_not_in_the_range():
    # Much worse at 1 and 2 than at k = 4: neither ends the range; 2 and 1 are still on the curve.
    result = make_result({1: 9.0, 2: 5.0, 4: 1.5, 8: 1.5}, k_train=4)
    assert sweep.effective_range(result) == 2.0  # 8 / 4
    assert sweep.wall(result) is None
    assert list(sweep.curve(result)) == [1, 2, 4, 8]


def test_unmeasured_budgets_neither_extend_nor_end_the_range():
    # 3 and 5 to 7 have no cell. The last good one is 4, the next measured one is 8: R = 4 / 2.
    result = make_result({2: 1.5, 4: 1.4, 8: 1.6})
    assert sweep.effective_range(result) == 2.0
    assert sweep.wall(result) == 8


def test_order_of_the_cells_does_not_matter():
    shuffled = make_result(dict(sorted(WALL_AT_8.items(), key=lambda item: item[1])))
    assert list(sweep.curve(shuffled)) == [1, 2, 3, 4, 6, 8, 16]
    assert sweep.range_end(shuffled) == 6


def test_per_layer_cells_are_not_on_the_curve():
    # Were [2, 4] read as 4 or as its mean 3, it would be the wall, and the best loss at [4, 2].
    cells = [make_cell([2, 4], 9.0), make_cell(2, 1.5), make_cell(4, 1.4), make_cell([4, 2], 0.1)]
    result = make_result(cells)
    assert list(sweep.curve(result)) == [2, 4]
    assert sweep.effective_range(result) == 2.0
    assert sweep.best_k(result) == 4


def test_no_cell_at_k():
    result = make_result({1: 1.5, 4: 1.4}, label="EMoE")
    for function in (sweep.range_end, sweep.effective_range, sweep.wall):
        with pytest.raises(ValueError, match=r"EMoE: no cell at k' = 2 \(k_train = 2\); measured: \[1, 4\]"):
            function(result)


def test_best_k_takes_the_cheapest_of_equals():
    assert sweep.best_k(make_result({8: 1.4, 4: 1.4, 2: 1.5})) == 4
    with pytest.raises(ValueError, match="top-k: no cell with a single k"):
        sweep.best_k(make_result([make_cell([2, 4], 1.0)]))


def test_peak_gain_and_cost_at_k():
    baseline = make_result({1: 1.9, 2: 1.756, 4: 1.700})
    method = make_result({1: 1.8, 2: 1.760, 4: 1.720, 8: 1.730}, label="EMoE")
    # Best of the method is 1.720 at 4; plain top-k counts at k = 2 only, not at its own best: 1.756 - 1.720.
    assert sweep.peak_gain(method, baseline) == pytest.approx(0.036, abs=1e-12)
    # The method is worse at k by 1.760 - 1.756.
    assert sweep.cost_at_k(method, baseline) == pytest.approx(0.004, abs=1e-12)


def test_peak_gain_is_negative_where_the_method_never_reaches_the_baseline():
    baseline, method = make_result({2: 1.5, 4: 9.0}), make_result({2: 1.75, 4: 1.625}, label="EMoE")
    assert sweep.peak_gain(method, baseline) == -0.125  # 1.5 - 1.625, exact in binary
    assert sweep.cost_at_k(method, baseline) == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k_train": 4}, "k_train: 4 in EMoE, 2 in top-k; must be equal"),
        ({"num_experts": 32}, "num_experts: 32 in EMoE, 16 in top-k; must be equal"),
        ({"data": SweepData(path=["other"], tokens=64)}, r"data.path: \['other'\] in EMoE, \['held-out'\] in top-k"),
        ({"data": SweepData(path=["held-out"], tokens=9)}, "data.tokens: 9 in EMoE, 64 in top-k; must be equal"),
        ({"cells": [make_cell(2, 1.5, tokens=9)]}, r"cells.tokens: \[9\] in EMoE, \[64\] in top-k; must be equal"),
    ],
)
def test_results_that_cannot_be_compared(change, message):
    baseline = make_result({2: 1.5, 4: 1.4})
    method = dataclasses.replace(baseline, label="EMoE", **change)
    for function in (sweep.peak_gain, sweep.cost_at_k):
        with pytest.raises(ValueError, match=message):
            function(method, baseline)


def test_gain_without_the_baseline_at_k():
    with pytest.raises(ValueError, match=r"top-k: no cell at k' = 2"):
        sweep.peak_gain(make_result({2: 1.5}, label="EMoE"), make_result({4: 1.5}))


def test_save_and_load_give_the_same_result(tmp_path):
    cells = [make_cell(2, 1.5), make_cell([1, 3], 1.25, rows_per_layer={"1": 64, "2": 192})]
    result = make_result(cells)
    sweep.save(result, tmp_path / "a.json")
    assert sweep.load(tmp_path / "a.json") == result
    stored = json.loads((tmp_path / "a.json").read_text())
    assert [cell["k"] for cell in stored["cells"]] == [2, [1, 3]]
    assert stored["schema"] == 1
    assert stored["cells"][1]["rows_per_layer"] == {"1": 64, "2": 192}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    sweep.save(make_result({2: 1.5}), path)
    before = path.read_bytes()

    with pytest.raises(RuntimeError, match="disk gone"), written_whole(path) as file:
        file.write(b"half")
        raise RuntimeError("disk gone")
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) & stat.S_IRUSR


def document(**changes) -> dict:
    """A valid sweep file as plain JSON data, with some keys changed."""
    cell = {
        "k": 2,
        "loss": 1.5,
        "tokens": 4096,
        "seconds": 2.0,
        "tokens_per_second": 2048.0,
        "rows_per_layer": {"1": 8192},
        "expert_flops_per_token": 1536.0,
        "active_params": 1000,
    }
    top = {
        "schema": 1,
        "label": "EMoE",
        "checkpoint": "runs/b",
        "iteration": 1000,
        "k_train": 2,
        "num_experts": 16,
        "data": {"path": ["held-out"], "tokens": 4096},
        "cells": [cell, cell | {"k": 4}],
        "command": "sweep_k.py",
        "date": "2026-01-31T12:00:00Z",
    }
    cell_changes = changes.pop("second_cell", {})
    top["cells"][1] |= cell_changes
    return top | changes


def test_the_unchanged_document_is_valid(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(document()))
    assert list(sweep.curve(sweep.load(tmp_path / "a.json"))) == [2, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"second_cell": {"loss": float("nan")}}, "cells[1].loss: nan; Input should be a finite number"),
        ({"second_cell": {"loss": float("inf")}}, "cells[1].loss: inf; Input should be a finite number"),
        ({"second_cell": {"loss": -1.5}}, "cells[1].loss: -1.5; Input should be greater than 0"),
        ({"second_cell": {"loss": 0.0}}, "cells[1].loss: 0.0; Input should be greater than 0"),
        ({"second_cell": {"loss": None}}, "cells[1].loss: None; Input should be a valid number"),
        ({"second_cell": {"loss": "1.5"}}, "cells[1].loss: '1.5'; Input should be a valid number"),
        ({"second_cell": {"k": 2}}, "cells[1].k: 2; is already in cells[0], each k once"),
        ({"second_cell": {"k": 17}}, "cells[1].k: 17; must be at most num_experts (16)"),
        ({"second_cell": {"k": [1, 17]}}, "cells[1].k: (1, 17); must be at most num_experts (16)"),
        ({"second_cell": {"k": 0}}, "cells[1].k: 0; must be an integer >= 1, or a list with one"),
        ({"second_cell": {"k": [4, 0]}}, "cells[1].k: [4, 0]; must be an integer >= 1, or a list with one"),
        ({"second_cell": {"k": []}}, "cells[1].k: []; must be an integer >= 1, or a list with one"),
        ({"second_cell": {"k": True}}, "cells[1].k: True; must be an integer >= 1, or a list with one"),
        ({"second_cell": {"k": 2.5}}, "cells[1].k: 2.5; must be an integer >= 1, or a list with one"),
        ({"second_cell": {"tokens": 64}}, "cells[1].tokens: 64; must equal cells[0].tokens (4096)"),
        ({"second_cell": {"rows_per_layer": {"1": -1}}}, "cells[1].rows_per_layer.1: -1; Input should be greater"),
        ({"second_cell": {"perplexity": 4.5}}, "cells[1].perplexity: 4.5; Unexpected keyword argument"),
        ({"schema": 4}, "schema: 4; Input should be 1, 2 or 3"),
        ({"label": ""}, "label: ''; must be printable text on one line"),
        ({"k_train": 17}, "k_train: 17; must be at most num_experts (16)"),
        ({"iteration": -1}, "iteration: -1; Input should be greater than or equal to 0"),
        ({"date": "yesterday"}, "date: 'yesterday'; must be an ISO 8601 date"),
        ({"cells": {}}, "cells: {}; Input should be a valid array"),
    ],
)
def test_malformed_files_name_path_key_value_and_rule(tmp_path, changes, message):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(document(**changes)))
    with pytest.raises(ValueError) as error:
        sweep.load(path)
    assert str(error.value).startswith(f"{path}: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", list(document()))
def test_a_missing_key(tmp_path, key):
    incomplete = document()
    del incomplete[key]
    (tmp_path / "a.json").write_text(json.dumps(incomplete))
    with pytest.raises(ValueError, match=rf"a\.json: {key}: Field required"):
        sweep.load(tmp_path / "a.json")


def test_files_that_are_no_json(tmp_path):
    (tmp_path / "half.json").write_text(json.dumps(document())[:100])
    with pytest.raises(ValueError, match=r"half\.json: Invalid JSON"):
        sweep.load(tmp_path / "half.json")
    with pytest.raises(ValueError, match=r"none\.json: cannot be read: No such file"):
        sweep.load(tmp_path / "none.json")


def test_upsert_adds_replaces_and_orders():
    result = make_result({4: 1.4, 2: 1.5})
    result = sweep.upsert_cell(result, make_cell([2, 4], 1.45))
    result = sweep.upsert_cell(result, make_cell(1, 1.9))
    result = sweep.upsert_cell(result, make_cell(4, 1.35))
    assert [(cell.k, cell.loss) for cell in result.cells] == [(1, 1.9), (2, 1.5), (4, 1.35), ((2, 4), 1.45)]


def test_upsert_checks_the_new_cell():
    with pytest.raises(ValueError, match=r"cells\[1\].k: 32; must be at most num_experts \(16\)"):
        sweep.upsert_cell(make_result({2: 1.5}), make_cell(32, 1.5))


def test_missing_ks():
    result = make_result([make_cell(2, 1.5), make_cell([2, 4], 1.4)])
    assert sweep.missing_ks(result, [8, 2, 4, 8, [2, 4], [4, 2]]) == [8, 4, (4, 2)]
    assert sweep.missing_ks(result, [2]) == []
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        sweep.missing_ks(result, [0])


def test_resume_keeps_the_cells_and_takes_the_new_header(tmp_path):
    path = tmp_path / "a.json"
    header = make_result({}, label="second run")
    assert sweep.resume(path, header) == header
    sweep.save(make_result({2: 1.5}, label="first run"), path)
    resumed = sweep.resume(path, header)
    assert (resumed.label, list(sweep.curve(resumed))) == ("second run", [2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"checkpoint": "runs/z"}, "checkpoint: 'runs/a'; must equal this run's 'runs/z'"),
        ({"iteration": 2000}, "iteration: 1; must equal this run's 2000"),
        ({"k_train": 4}, "k_train: 2; must equal this run's 4"),
        ({"num_experts": 32}, "num_experts: 16; must equal this run's 32"),
        ({"data": SweepData(path=["held-out"], tokens=8192)}, r"data: .*64.*; must equal this run's .*8192"),
    ],
)
def test_resume_refuses_the_file_of_another_sweep(tmp_path, change, message):
    sweep.save(make_result({2: 1.5}), tmp_path / "a.json")
    with pytest.raises(ValueError, match=rf"a\.json: {message}"):
        sweep.resume(tmp_path / "a.json", make_result({}, **change))


def test_expert_flops_by_hand():
    # One expert, not gated: 4 x 8 and 8 x 4, 64 multiply-adds = 128 FLOPs; gated 3 matrices: 192.
    one = {"hidden_size": 4, "moe_ffn_hidden_size": 8, "num_moe_layers": 1, "k": 1}
    assert sweep.expert_flops_per_token(**one, gated=False) == 128
    assert sweep.expert_flops_per_token(**one, gated=True) == 192
    # 3 layers of 2 experts: 6 experts. Layers with 1, 2 and 4: 7 experts.
    assert sweep.expert_flops_per_token(**(one | {"num_moe_layers": 3, "k": 2}), gated=True) == 6 * 192
    assert sweep.expert_flops_per_token(**(one | {"num_moe_layers": 3, "k": [1, 2, 4]}), gated=True) == 7 * 192


OLMOE = {
    "total_parameters": 6_919_161_856,
    "num_experts": 64,
    "hidden_size": 2048,
    "moe_ffn_hidden_size": 1024,
    "num_moe_layers": 16,
    "gated": True,
}
MIXTRAL_8X7B = {
    "total_parameters": 46_702_792_704,
    "num_experts": 8,
    "hidden_size": 4096,
    "moe_ffn_hidden_size": 14336,
    "num_moe_layers": 32,
    "gated": True,
}


@pytest.mark.parametrize(
    ("model", "k", "active"),
    [
        # The models' known counts: OLMoE-1B-7B has 1.28 B active at its 8 of 64, Mixtral 12.88 B at its 2 of 8.
        (OLMOE, 8, 1_282_017_280),
        # 8 more experts of 3 * 2048 * 1024 = 6,291,456 in 16 layers: + 805,306,368.
        (OLMOE, 16, 2_087_323_648),
        (MIXTRAL_8X7B, 2, 12_879_925_248),
        (MIXTRAL_8X7B, 8, 46_702_792_704),
        (OLMOE, [8] * 15 + [16], 1_282_017_280 + 8 * 6_291_456),
    ],
)
def test_active_parameters_of_known_models(model, k, active):
    assert sweep.active_parameters(**model, k=k) == active


def test_active_parameters_with_biases_and_without_gate():
    tiny = {"total_parameters": 1000, "num_experts": 4, "hidden_size": 4, "moe_ffn_hidden_size": 8}
    tiny |= {"num_moe_layers": 2, "k": 3}
    # One of four experts skipped in two layers. Not gated: 2 * 32 = 64, with biases + 8 + 4 = 76.
    assert sweep.active_parameters(**tiny, gated=False) == 1000 - 2 * 64
    assert sweep.active_parameters(**tiny, gated=False, bias=True) == 1000 - 2 * 76
    # Gated: 3 * 32 = 96, with biases + 2 * 8 + 4 = 116.
    assert sweep.active_parameters(**tiny, gated=True, bias=True) == 1000 - 2 * 116


def test_costs_refuse_a_k_that_the_model_does_not_have():
    with pytest.raises(ValueError, match=r"k: 65; must be at most num_experts \(64\)"):
        sweep.active_parameters(**OLMOE, k=65)
    with pytest.raises(ValueError, match="k: .*; must have one entry for each of the 16 MoE layers"):
        sweep.active_parameters(**OLMOE, k=[8, 8])
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        sweep.active_parameters(**OLMOE, k=0)


def test_markdown_table_leaves_missing_cells_empty():
    plain = make_result({1: 1.83, 2: 1.756, 4: 1.78}, label="top-k")
    elastic = make_result({2: 1.76, 8: 1.70}, label="EMoE | k=2")
    assert sweep.markdown_table([plain, elastic]) == (
        "| k' | top-k | EMoE \\| k=2 |\n"
        "| ---: | ---: | ---: |\n"
        "| 1 | 1.8300 |  |\n"
        "| 2 | 1.7560 | 1.7600 |\n"
        "| 4 | 1.7800 |  |\n"
        "| 8 |  | 1.7000 |\n"
    )


def test_markdown_table_of_the_costs():
    cells = [make_cell(2, 1.5, active_params=1_282_017_280, expert_flops_per_token=1610612736.0)]
    result = make_result(cells)
    assert sweep.markdown_table([result], "active_params").splitlines()[-1] == "| 2 | 1,282,017,280 |"
    assert sweep.markdown_table([result], "expert_flops_per_token").splitlines()[-1] == "| 2 | 1,610,612,736 |"
    assert sweep.markdown_table([result], "tokens_per_second").splitlines()[-1] == "| 2 | 64 |"


def test_markdown_table_needs_results_that_can_be_told_apart():
    with pytest.raises(ValueError, match="results: none given"):
        sweep.markdown_table([])
    with pytest.raises(ValueError, match="label: 'top-k' is given 2 times; must be unique"):
        sweep.markdown_table([make_result({2: 1.5}), make_result({4: 1.5})])
