"""The chart of k' sweeps: what is drawn, where, and that an error leaves no file."""

import dataclasses
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from matplotlib.artist import Artist
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.curve import SweepData, SweepResult
from tests import sweep_results
from tools import plot_sweep

SCRIPT = Path(plot_sweep.__file__)
# Limit at k = 2: 1.756 * 1.001 = 1.757756. Plain top-k passes it at 4; EMoE never does: R = 3 / 2 and 6 / 2.
PLAIN = {6: 1.813, 1: 1.830, 2: 1.756, 3: 1.757, 4: 1.780}
EMOE = {1: 1.820, 2: 1.762, 4: 1.741, 6: 1.737}

make_result = partial(sweep_results.make_result, schema=1, k_train=2)


@pytest.fixture
def files(tmp_path) -> list[Path]:
    paths = [tmp_path / "plain.json", tmp_path / "emoe.json"]
    sweep.save(make_result("top-k", PLAIN), paths[0])
    sweep.save(make_result("EMoE", EMOE), paths[1])
    return paths


def lines(figure: Figure, gid: str) -> list[Artist]:
    return [line for line in figure.axes[0].get_lines() if line.get_gid() == gid]


def data(line) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in line.get_xydata()]


def legend_texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def names_above(figure: Figure) -> list[tuple[float, str]]:
    return [(text.get_position()[0], text.get_text()) for text in figure.axes[0].texts if text.get_gid() == "k"]


def test_one_curve_per_result_in_order_of_k():
    figure = plot_sweep.draw([make_result("top-k", PLAIN), make_result("EMoE", EMOE)])
    plain, emoe = lines(figure, "curve")
    assert data(plain) == [(1, 1.830), (2, 1.756), (3, 1.757), (4, 1.780), (6, 1.813)]
    assert data(emoe) == [(1, 1.820), (2, 1.762), (4, 1.741), (6, 1.737)]
    assert list(figure.axes[0].get_xticks()) == [1, 2, 3, 4, 6]


def test_band_and_markers_show_the_effective_range():
    figure = plot_sweep.draw([make_result("top-k", PLAIN), make_result("EMoE", EMOE)])
    plain, emoe = lines(figure, "range")
    assert data(plain) == [(2, 1.756), (3, 1.757)]
    assert data(emoe) == [(2, 1.762), (4, 1.741), (6, 1.737)]
    plain, emoe = lines(figure, "outside")
    assert data(plain) == [(1, 1.830), (4, 1.780), (6, 1.813)]
    assert data(emoe) == [(1, 1.820)]
    assert to_hex(plain.get_markerfacecolor()) == "#ffffff"


def test_a_range_of_one_budget_is_a_visible_disc():
    figure = plot_sweep.draw([make_result("wall at once", {2: 1.756, 4: 1.780})])
    (band,) = lines(figure, "range")
    assert data(band) == [(2, 1.756)]
    assert band.get_marker() == "o"
    assert band.get_markersize() > lines(figure, "curve")[0].get_markersize()


def test_legend_gives_range_and_wall():
    figure = plot_sweep.draw([make_result("top-k", PLAIN), make_result("EMoE", EMOE)])
    assert legend_texts(figure) == ["top-k: R = 1.5, wall at k′ = 4", "EMoE: R = 3, no wall up to k′ = 6"]
    assert "more than 0.1% above the loss at k" in figure.legends[0].get_title().get_text()


def test_a_dashed_line_at_each_k_of_training():
    results = [make_result("a", EMOE), make_result("b", PLAIN), make_result("c", EMOE, k_train=4)]
    figure = plot_sweep.draw(results)
    drawn = lines(figure, "k_train")
    assert [line.get_xdata()[0] for line in drawn] == [2, 4]
    assert {line.get_linestyle() for line in drawn} == {"--"}
    assert names_above(figure) == [(2, "k = 2"), (4, "k = 4")]


def test_axis_of_active_parameters():
    # 1.0e9 + k * 0.1e9 parameters, in billions: 1.1 at 1, 1.2 at 2, 1.4 at 4, 1.6 at 6.
    figure = plot_sweep.draw([make_result("EMoE", EMOE)], x="active_params")
    assert [x for x, _ in data(lines(figure, "curve")[0])] == pytest.approx([1.1, 1.2, 1.4, 1.6])
    assert figure.axes[0].get_xlabel() == "active parameters (billions)"
    assert lines(figure, "k_train")[0].get_xdata()[0] == pytest.approx(1.2)
    assert [text for _, text in names_above(figure)] == ["k = 2", "1", "4", "6"]


def test_axis_of_flops():
    # 2 layers of 1e6 FLOPs per expert: 4 million at k' = 2.
    figure = plot_sweep.draw([make_result("EMoE", EMOE)], x="flops")
    assert [x for x, _ in data(lines(figure, "curve")[0])] == pytest.approx([2, 4, 8, 12])
    assert figure.axes[0].get_xlabel() == "forward FLOPs of the routed experts per token (millions)"


def test_names_above_the_axis_do_not_touch():
    # 64 budgets on 6.5 inches: those within 5 % of the axis of a written one are left out, never the k of training.
    losses = dict.fromkeys(range(1, 65), 1.7)
    figure = plot_sweep.draw([make_result("EMoE", losses, num_experts=64)], x="flops")
    places = sorted(x for x, _ in names_above(figure))
    left, right = figure.axes[0].get_xlim()
    assert (4.0, "k = 2") in names_above(figure)
    assert min(b - a for a, b in zip(places, places[1:], strict=False)) > 0.05 * (right - left)
    assert len(places) >= 10


def test_a_wide_range_of_budgets_is_on_a_log_axis():
    losses = dict.fromkeys((1, 2, 4, 8, 16, 32), 1.7)
    axes = plot_sweep.draw([make_result("EMoE", losses, num_experts=64)]).axes[0]
    assert axes.get_xscale() == "log"
    assert axes.xaxis.get_major_formatter().format_ticks(axes.get_xticks()) == ["1", "2", "4", "8", "16", "32"]
    assert plot_sweep.draw([make_result("EMoE", EMOE)]).axes[0].get_xscale() == "linear"


def test_more_budgets_than_ticks_fit():
    losses = dict.fromkeys(range(1, 41), 1.7)
    log = plot_sweep.draw([make_result("EMoE", losses, num_experts=64)]).axes[0]
    low, high = log.get_xlim()
    assert [tick for tick in log.get_xticks() if low <= tick <= high] == [1, 2, 4, 8, 16, 32]
    # From 3 to 40 the axis is linear.
    del losses[1], losses[2]
    ticks = plot_sweep.draw([make_result("EMoE", losses, k_train=10, num_experts=64)]).axes[0].get_xticks()
    assert len(ticks) <= 14
    assert all(tick == int(tick) for tick in ticks)


def test_curves_differ_in_colour_marker_or_dashes():
    figure = plot_sweep.draw([make_result(f"run {index}", EMOE) for index in range(12)])
    curves = lines(figure, "curve")
    assert len({line.get_color() for line in curves[:7]}) == 7
    assert len({(line.get_color(), line.get_marker()) for line in curves}) == 12
    # In grey, neighbours differ in their marker, and the first is the only solid line among them.
    assert len({line.get_marker() for line in curves[:6]}) == 6
    assert [line.get_linestyle() for line in curves[:5]] == ["-", "--", "--", "--", "--"]
    assert len(legend_texts(figure)) == 12


def test_labels_and_title_are_taken_literally(tmp_path):
    # Matplotlib reads $...$ as a formula, and leaves labels that start with an underscore out of a legend.
    label = "_hidden $\\undefined$ 100%"
    figure = plot_sweep.draw([make_result(label, EMOE)], title="cost $x$")
    plot_sweep.save_figure(figure, tmp_path / "a.svg")
    assert legend_texts(figure) == [f"{label}: R = 3, no wall up to k′ = 6"]
    assert not figure.legends[0].get_texts()[0].get_parse_math()
    assert not figure._suptitle.get_parse_math()


def test_per_layer_cells_are_not_drawn_but_counted(tmp_path, capsys):
    path = tmp_path / "a.json"
    sweep.save(make_result("EMoE", EMOE | {(2, 4): 1.5}), path)
    plot_sweep.main([str(path), "--out", str(tmp_path / "a.png")])
    assert "EMoE: 1 of 5 cells have one k per layer and are not drawn" in capsys.readouterr().out
    assert len(data(lines(plot_sweep.draw([sweep.load(path)]), "curve")[0])) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "start"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml"), ("pdf", b"%PDF-"), ("PNG", b"\x89PNG")]
)
def test_writes_the_kind_that_the_suffix_names(files, tmp_path, suffix, start):
    out = tmp_path / f"wall.{suffix}"
    plot_sweep.main([*map(str, files), "--out", str(out), "--title", "Wall"])
    first = out.read_bytes()
    assert first.startswith(start)
    plot_sweep.main([*map(str, files), "--out", str(out), "--title", "Wall"])
    assert out.read_bytes() == first
    assert sorted(tmp_path.iterdir()) == sorted([*files, out])


def test_labels_from_the_command_line(files, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot_sweep, "save_figure", lambda figure, path: figures.append(figure))
    plot_sweep.main([*map(str, files), "--out", str(tmp_path / "a.png"), "--labels", "plain", "elastic"])
    assert [text.split(":")[0] for text in legend_texts(figures[0])] == ["plain", "elastic"]


@pytest.fixture
def fails(capsys):
    """A function that expects a call to be refused by one line with `message`."""

    def refused(arguments: list, message: str) -> None:
        with pytest.raises(SystemExit) as left:
            plot_sweep.main([str(argument) for argument in arguments])
        (line,) = capsys.readouterr().err.splitlines()
        assert left.value.code == 2 and ": error: " in line and message in line

    return refused


def test_errors_name_the_rule_and_leave_nothing(files, tmp_path, fails):
    out = tmp_path / "wall.png"
    other = tmp_path / "other.json"
    sweep.save(make_result("32 experts", EMOE, num_experts=32), other)
    no_k = tmp_path / "no_k.json"
    sweep.save(make_result("no k", {4: 1.5}), no_k)
    no_curve = tmp_path / "no_curve.json"
    sweep.save(make_result("no curve", {(2, 4): 1.5}), no_curve)
    broken = tmp_path / "broken.json"
    broken.write_text('{"schema": 1, "label"')
    before = sorted(tmp_path.iterdir())

    fails([tmp_path / "none.json", "--out", out], "none.json: cannot be read: No such file or directory")
    fails([broken, "--out", out], "broken.json: Invalid JSON")
    fails([*files, other, "--out", out], "num_experts: 16 in top-k, 32 in 32 experts; must be equal")
    fails([no_k, "--out", out], "no k: no cell at k' = 2")
    fails([no_curve, "--out", out], "no curve: no cell at k' = 2")
    fails([files[0], files[0], "--out", out], "label: 'top-k' is given 2 times; must be unique")
    fails([*files, "--out", out, "--labels", "one"], "--labels: 1 given; must be one for each of the 2 results")
    fails([*files, "--out", tmp_path / "wall.jpg"], "wall.jpg; must end in one of .png, .svg, .pdf")
    fails([*files, "--out", tmp_path / "nowhere" / "a.png"], "nowhere does not exist")
    fails([*files, "--out", tmp_path / "a.png", "--labels", "one\nline", "b"], "must be printable text on one line")
    (tmp_path / "folder.png").mkdir()
    fails([*files, "--out", tmp_path / "folder.png"], "folder.png: is a folder; must be a file")
    (tmp_path / "folder.png").rmdir()
    fails([*files, "--out", "/proc/a.png"], "--out /proc/a.png: cannot be written (No such file or directory)")
    assert sorted(tmp_path.iterdir()) == before


def test_a_chart_that_fails_to_draw_keeps_the_old_file(files, tmp_path, monkeypatch, fails):
    out = tmp_path / "wall.png"
    out.write_bytes(b"old")

    def half(self, file, **options):
        file.write(b"half a picture")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", half)
    fails([*files, "--out", out], "no space left")
    assert out.read_bytes() == b"old"
    assert sorted(tmp_path.iterdir()) == sorted([*files, out])


@pytest.mark.slow
def test_as_a_command(files, tmp_path):
    command = [sys.executable, str(SCRIPT), *map(str, files), "--out", "wall.png"]
    environment = os.environ | {"PYTHONPATH": str(SCRIPT.parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "wrote wall.png\n"), done.stderr
    assert (tmp_path / "wall.png").read_bytes().startswith(b"\x89PNG")
    failed = subprocess.run([*command[:-1], "wall.gif"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert failed.returncode == 2
    assert failed.stderr == "plot_sweep.py: error: --out: wall.gif; must end in one of .png, .svg, .pdf\n"


def test_sweeps_over_different_data_are_refused(tmp_path):
    def on(data: str, digest: str | None) -> SweepResult:
        return dataclasses.replace(make_result(data, PLAIN), data=SweepData(path=[data], tokens=4096, digest=digest))

    plot_sweep.check_results([on("a", "a" * 64), on("b", "a" * 64)])  # another path to the same tokens
    plot_sweep.check_results([on("a", "a" * 64), on("b", None)])  # schema 1: not known
    with pytest.raises(ValueError, match=r"^data.digest: a{12}... in a, b{12}... in b; must be equal"):
        plot_sweep.check_results([on("a", "a" * 64), on("old", None), on("b", "b" * 64)])


def test_an_axis_that_was_not_measured_is_refused():
    result = make_result("a", PLAIN)
    cells = [dataclasses.replace(cell, latency_ms_large=0.5 * cell.k if cell.k != 3 else None) for cell in result.cells]
    measured = dataclasses.replace(result, cells=[cell for cell in cells if cell.k != 3])
    (curve,) = lines(plot_sweep.draw([measured], x="latency"), "curve")
    assert list(curve.get_xdata()) == [0.5, 1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="^--x latency: a has no latency_ms_large at k' = 3$"):
        plot_sweep.draw([dataclasses.replace(result, cells=cells)], x="latency")
