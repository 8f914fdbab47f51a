"""Regret to specialists: worked out by hand, on a card, on a chart, and what cannot be compared."""

import dataclasses
import json

import pytest

from megatron_emoe.sweep import result as sweep_result
from megatron_emoe.sweep.card import make_card
from megatron_emoe.sweep.curve import SweepData
from megatron_emoe.sweep.regret import regret_line, regrets, specialists
from tests.sweep.test_card import ELASTIC, column, make_result, table
from tests.sweep_results import make_cell
from tests.tools.test_plot_sweep import plot_sweep
from tests.tools.test_report import report

# ELASTIC: 1.820 at 1, 1.762 at 2, 1.741 at 4, 1.737 at 6.
AT_1 = make_result("alone 1", {1: 1.800, 2: 1.9}, k_train=1)
AT_2 = make_result("alone 2", {2: 1.760, 4: 1.8})
AT_6 = make_result("alone 6", {2: 1.8, 6: 1.740}, k_train=6)
ALONE = [AT_6, AT_1, AT_2]


def test_by_hand():
    envelope = specialists(ALONE)
    assert [(k, cell.loss) for k, cell in envelope.items()] == [(1, 1.8), (2, 1.76), (6, 1.74)]
    found = regrets(ELASTIC, envelope)
    assert {k: round(one.value, 6) for k, one in found.items()} == {1: 0.02, 2: 0.002, 6: -0.003}
    # 0.02 / 1.8 = 1.11 %, 0.002 / 1.76 = 0.11 %, -0.003 / 1.74 = -0.17 %; their mean 0.35 %
    each = "k' = 1: +1.11 %, k' = 2: +0.11 %, k' = 6: -0.17 %"
    assert regret_line(ELASTIC, envelope) == (
        f"elastic: regret to specialists {each}; mean +0.35 %, worst +1.11 % at k' = 1"
    )


def test_errors_are_paired():
    def blocks(label: str, k: int, *losses: float):
        cells = [make_cell(k, sum(losses) / len(losses), rows_per_layer={"2": 64, "3": 64}, block_losses=losses)]
        result = make_result(label, {k: 1.0}, k_train=k)
        return dataclasses.replace(result, cells=tuple(cells))

    ours, theirs = blocks("ours", 2, 1.0, 1.2, 1.5), blocks("theirs", 2, 1.0, 1.1, 1.3)
    (found,) = regrets(ours, specialists([theirs])).values()
    # Differences 0, 0.1, 0.2: mean 0.1, deviation 0.1, error 0.1 / sqrt(3)
    assert (found.value, found.error) == pytest.approx((0.1, 0.057735), abs=1e-6)


def test_a_card_has_them():
    card = make_card([ELASTIC], experts=ALONE)
    found = table(card, "Regret")
    assert found.head == ("k'", "specialist", "elastic")
    assert column(found, "specialist") == {"1": "1.8000", "2": "1.7600", "6": "1.7400"}
    assert column(found, "elastic") == {"1": "+1.11", "2": "+0.11", "6": "-0.17"}
    assert card.sections[0].lines[-1] == regret_line(ELASTIC, specialists(ALONE))
    assert not [one for one in make_card([ELASTIC]).sections[0].tables if one.title == "Regret"]


def test_a_chart_has_the_envelope():
    (axes,) = plot_sweep.draw([ELASTIC], experts=ALONE).axes
    (line,) = [line for line in axes.get_lines() if line.get_gid() == "envelope"]
    assert list(zip(*line.get_data(), strict=True)) == [(1, 1.8), (2, 1.76), (6, 1.74)]
    (band,) = [one for one in axes.collections if one.get_gid() == "envelope band"]
    heights = {round(y, 6) for _, y in band.get_paths()[0].vertices}
    assert heights == {1.8, 1.76, 1.74, 1.8018, 1.76176, 1.74174}


@pytest.mark.parametrize(
    ("alone", "rule"),
    [
        ([AT_2, dataclasses.replace(AT_2, label="again")], "again was trained with k = 2, and so was alone 2"),
        (
            [dataclasses.replace(AT_2, training={"--emoe-k-schedule": "stratified"})],
            "alone 2 was trained at several k (--emoe-k-schedule stratified)",
        ),
        ([make_result("lost", {2: 1.8}, k_train=6)], "lost has no cell at k' = 6, the k of its training"),
        ([make_result("far", {8: 1.8}, k_train=8)], "none of their k (8) is a measured k' of elastic"),
    ],
)
def test_what_is_no_specialist(alone, rule, tmp_path, capsys):
    paths = []
    for number, result in enumerate([ELASTIC, *alone]):
        paths.append(str(tmp_path / f"{number}.json"))
        sweep_result.save(result, paths[-1])
    for tool, out in ((plot_sweep, tmp_path / "out.png"), (report, tmp_path / "out.html")):
        with pytest.raises(SystemExit) as left:
            tool.main([paths[0], "--specialists", *paths[1:], "--out", str(out)])
        assert left.value.code == 2 and f"error: --specialists: {rule}" in capsys.readouterr().err
        assert not out.exists()


def test_other_tokens_are_refused():
    other = dataclasses.replace(AT_2, data=SweepData(path=["held-out"], tokens=80, digest="1f" * 32))
    with pytest.raises(ValueError, match="digest"):
        make_card([ELASTIC], experts=[other])


def test_the_tools_print_and_write_them(tmp_path, capsys):
    paths = []
    for number, result in enumerate([ELASTIC, *ALONE]):
        paths.append(str(tmp_path / f"{number}.json"))
        sweep_result.save(result, paths[-1])
    plot_sweep.main([paths[0], "--specialists", *paths[1:], "--out", str(tmp_path / "out.svg")])
    said = capsys.readouterr().out
    assert (
        said.startswith("elastic: regret to specialists k' = 1: +1.11 %")
        and "specialists" in (tmp_path / "out.svg").read_text()
    )
    report.main([paths[0], "--specialists", *paths[1:], "--out", str(tmp_path / "out.html")])
    assert "| 6 | 1.7400 | -0.17 |" in (tmp_path / "out.md").read_text()
    assert json.loads((tmp_path / "0.json").read_text())["label"] == "elastic"
