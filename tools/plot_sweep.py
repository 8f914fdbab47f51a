"""Draw the held-out loss over the number of active experts k', one curve per sweep result.

    python tools/plot_sweep.py top-k.json emoe.json --out wall.png --x active_params

Each curve is one checkpoint. The dashed line is the k it was trained with; the thick part of a curve is its effective
range (see `megatron_emoe.sweep.curve.range_end`), and R in the legend is that range divided by k.
+ a(k') in the legend: with a tail scale.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_emoe.settings import paths
from megatron_emoe.settings.atomic_file import written_whole
from megatron_emoe.settings.command_line import command_line
from megatron_emoe.settings.flag_types import a_path
from megatron_emoe.settings.refusal import fail
from megatron_emoe.settings.result_file import check_label
from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.curve import SweepCell, SweepResult
from megatron_emoe.sweep.regret import regret_line, specialists
from megatron_emoe.sweep.summary import shown_label

if TYPE_CHECKING:  # matplotlib takes a second to import: it is where a chart is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which stay apart for colour-blind eyes, without their yellow, too faint on white.
# Markers and dashes repeat with other periods: curves also stay apart in grey, and beyond seven of them.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (5, 1.5, 1.5, 1.5)), (0, (8, 2)))

# What --x offers: the field of a cell and the words on the axis.
X_AXES = {
    "k": ("k", "active experts per token k′"),
    "active_params": ("active_params", "active parameters"),
    "flops": ("expert_flops_per_token", "forward FLOPs of the routed experts per token"),
    "all_flops": ("flops_per_token", "forward FLOPs of the whole model per token"),
    "latency": ("latency_ms_large", "milliseconds per token in a full micro-batch"),
    "latency1": ("latency_ms_batch1", "milliseconds per token, one token alone"),
}
UNITS = ((1e12, "trillions"), (1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
SPECIALISTS = "results of models that were each continued at one k' alone: their envelope, and the regret to it"
SUFFIXES = (".png", ".svg", ".pdf")
MAX_TICKS = 14
LINEAR_UP_TO = 16
EXPLANATION = (
    "Band and filled markers: effective range, from k (dashed line, the k of training) to the largest measured k′\n"
    "that comes before every loss more than {:.1%} above the loss at k. R is that k′ over k; the wall is the next one."
)
STYLE: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "0.92",
    "svg.hashsalt": "plot_sweep",  # element ids of an SVG do not change from run to run
    "pdf.fonttype": 42,
}


def draw(
    results: Sequence[SweepResult], *, x: str = "k", title: str = "", experts: Sequence[SweepResult] = ()
) -> Figure:
    """The chart of one or more sweeps; `x` is a key of `X_AXES`. experts: specialists, drawn as their envelope.

    Raises `ValueError` where labels repeat, the models differ in their number of experts, the sweeps were measured on
    different tokens, or a result has no cell at its own k (its range is then undefined).
    """
    check_results(results)
    check_axis([*results, *experts], x)
    envelope = specialists(experts) if experts else {}
    sweep.check_same_data([*results, *experts])
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 4.6 + 0.2 * len(results)), layout="constrained")
        axes = figure.add_subplot()
        scale = _set_x_axis(axes, results, x)
        for index, result in enumerate(results):
            _draw_curve(axes, result, index, x, scale)
        if envelope:
            _draw_envelope(axes, envelope, x, scale)
        _draw_ks(axes, results, x, scale)
        axes.ticklabel_format(useOffset=False)
        axes.set_ylabel("held-out loss (nats per token)")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontweight="bold", parse_math=False)
        _draw_legend(figure, axes)
    return figure


def check_results(results: Sequence[SweepResult]) -> None:
    """Raises `ValueError` where the results do not belong in one chart."""
    sweep.check_labels([result.label for result in results])
    sweep.check_same_data(results)
    first = results[0]
    for other in results[1:]:
        if other.num_experts != first.num_experts:
            left, right = (f"{result.num_experts} in {result.label}" for result in (first, other))
            raise ValueError(f"num_experts: {left}, {right}; must be equal")
    for result in results:
        sweep.range_end(result)


def check_axis(results: Sequence[SweepResult], x: str) -> None:
    """Raises `ValueError` where a cell on a curve was not measured on the axis asked for."""
    field = X_AXES[x][0]
    for result in results:
        lacking = [k for k, cell in sweep.curve(result).items() if getattr(cell, field) is None]
        if lacking:
            raise ValueError(f"--x {x}: {result.label} has no {field} at k' = {', '.join(map(str, lacking))}")


def _x_of(cell: SweepCell, x: str, scale: float) -> float:
    return getattr(cell, X_AXES[x][0]) / scale


def _set_x_axis(axes: Axes, results: Sequence[SweepResult], x: str) -> float:
    """Label and scale the axis; return the unit that its values are to be divided by."""
    label = X_AXES[x][1]
    if x == "k":
        axes.set_xlabel(label)
        _set_k_ticks(axes, sorted(set().union(*map(sweep.curve, results))))
        return 1
    largest = max(_x_of(cell, x, 1) for result in results for cell in sweep.curve(result).values())
    scale, unit = next((entry for entry in UNITS if largest >= entry[0]), (1, ""))
    axes.set_xlabel(f"{label} ({unit})" if unit else label)
    return scale


def _set_k_ticks(axes: Axes, ks: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator, ScalarFormatter

    # From 1 to 64 on a linear axis, all budgets near a small k would lie on top of each other.
    log = ks[-1] > LINEAR_UP_TO * ks[0]
    if log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
    if len(ks) <= MAX_TICKS:
        axes.xaxis.set_major_locator(FixedLocator(ks))
    elif not log:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_curve(axes: Axes, result: SweepResult, index: int, x: str, scale: float) -> None:
    """The curve itself, a band over its effective range, and open markers outside of that range."""
    end = sweep.range_end(result)
    points = [(k, _x_of(cell, x, scale), cell.loss) for k, cell in sweep.curve(result).items()]
    inside = [point for point in points if result.k_train <= point[0] <= end]
    outside = [point for point in points if point not in inside]
    style: dict[str, Any] = {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": DASHES[index % len(DASHES)],
        "clip_on": False,  # a marker at the edge of the axes is drawn whole
    }
    # A line through one point draws nothing, so there the band is a disc.
    band: dict[str, Any] = {"marker": "o"} if len(inside) == 1 else {"solid_capstyle": "round"}
    band |= {"color": style["color"], "linewidth": 10, "markersize": 14, "alpha": 0.25, "zorder": 1.5, "clip_on": False}
    axes.plot(*_columns(inside), **band, gid="range")
    axes.plot(*_columns(points), **style, label=_legend_text(result), gid="curve")
    axes.plot(*_columns(outside), **style | {"linestyle": ""}, markerfacecolor="white", gid="outside")


def _draw_envelope(axes: Axes, envelope: Mapping[int, SweepCell], x: str, scale: float) -> None:
    """What a model of its own would have at each k', and a band of as much as the range tolerates above it."""
    at = [_x_of(cell, x, scale) for cell in envelope.values()]
    losses = [cell.loss for cell in envelope.values()]
    above = [loss * (1 + sweep.TOLERANCE) for loss in losses]
    axes.fill_between(at, losses, above, color="0.5", alpha=0.3, linewidth=0, zorder=1, gid="envelope band")
    style: dict[str, Any] = {"color": "0.35", "marker": "x", "linestyle": ":", "clip_on": False}
    label = f"specialists: a model for each k′ (band: up to {sweep.TOLERANCE:.1%} worse)"
    axes.plot(at, losses, **style, label=label, gid="envelope")


def _columns(points: Sequence[tuple[int, float, float]]) -> tuple[list[float], list[float]]:
    return [at for _, at, _ in points], [loss for _, _, loss in points]


def _legend_text(result: SweepResult) -> str:
    wall = sweep.wall(result)
    past = f"no wall up to k′ = {max(sweep.curve(result))}" if wall is None else f"wall at k′ = {wall}"
    return f"{shown_label(result)}: R = {sweep.effective_range(result):.3g}, {past}"


def _draw_ks(axes: Axes, results: Sequence[SweepResult], x: str, scale: float) -> None:
    """A dashed line at each k of training; above an axis of costs, also the k' that the places stand for."""
    trained = sorted({(_x_of(sweep.curve(result)[result.k_train], x, scale), result.k_train) for result in results})
    for at, _ in trained:
        axes.axvline(at, color="0.35", linestyle="--", linewidth=1, zorder=1, gid="k_train")
    names = [(at, f"k = {k}") for at, k in trained]
    if x != "k":
        places = {(_x_of(cell, x, scale), k) for result in results for k, cell in sweep.curve(result).items()}
        names += [(at, f"{k}") for at, k in sorted(places - set(trained))]
        axes.text(0, 1.01, "k′", transform=axes.transAxes, ha="right", va="bottom", fontsize=9)
    _write_above(axes, names)


def _write_above(axes: Axes, names: Sequence[tuple[float, str]]) -> None:
    """Write each text over its place on the axis, leaving out those that would touch an earlier one."""
    to_axes = axes.transData + axes.transAxes.inverted()
    above: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom", "fontsize": 9}
    written: list[float] = []
    for at, text in names:
        place = to_axes.transform((at, axes.get_ylim()[0]))[0]
        if all(abs(place - other) > 0.05 for other in written):
            written.append(place)
            axes.text(at, 1.01, text, **above, gid="k")


def _draw_legend(figure: Figure, axes: Axes) -> None:
    handles = [line for line in axes.get_lines() if line.get_gid() in ("curve", "envelope")]
    legend = figure.legend(
        handles=handles,
        loc="outside lower left",
        title=EXPLANATION.format(sweep.TOLERANCE),
        title_fontsize=8.5,
        alignment="left",
        frameon=False,
        handlelength=3,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the chart as PNG, SVG or PDF, by suffix; an older file is replaced only once the new one is complete."""
    import matplotlib

    kind = path.suffix.lower().removeprefix(".")
    # Without a date, one result gives one and the same file.
    metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}.get(kind)
    with matplotlib.rc_context(STYLE), written_whole(path) as file:
        figure.savefig(file, format=kind, dpi=200, metadata=metadata)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("results", nargs="+", type=a_path, metavar="RESULT.json", help="a result of tools/sweep_k.py")
    parser.add_argument("--out", required=True, type=a_path, help=f"file to write, one of {', '.join(SUFFIXES)}")
    parser.add_argument("--title", default="", help="title above the chart (default: none)")
    parser.add_argument("--labels", nargs="+", help="names of the curves, one per result (default: those in the files)")
    parser.add_argument("--specialists", nargs="+", type=a_path, default=[], metavar="RESULT.json", help=SPECIALISTS)
    parser.add_argument("--x", choices=X_AXES, default="k", help="horizontal axis (default: %(default)s)")
    return parser.parse_args(argv)


def load_results(paths: Sequence[Path], labels: Sequence[str] | None) -> list[SweepResult]:
    """The results, under other labels where given. Raises `ValueError` for a bad file or another number of labels."""
    results = [sweep.load(path) for path in paths]
    if labels is None:
        return results
    if len(labels) != len(results):
        raise ValueError(f"--labels: {len(labels)} given; must be one for each of the {len(results)} results")
    for label in labels:
        check_label("--labels", label)
    return [dataclasses.replace(result, label=label) for result, label in zip(results, labels, strict=True)]


def check_out(path: Path) -> None:
    """Raises `ValueError` for a suffix that is not drawn or a file that cannot be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--out: {path}; must end in one of {', '.join(SUFFIXES)}")
    paths.check_out(path)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        check_out(args.out)
        results = load_results(args.results, args.labels)
        experts = [sweep.load(path) for path in args.specialists]
        envelope = specialists(experts) if experts else {}
        lines = [regret_line(result, envelope) for result in results] if envelope else []
        save_figure(draw(results, x=args.x, title=args.title, experts=experts), args.out)
    except (ValueError, OSError) as error:
        fail(error)
    for result in results:
        left_out = len(result.cells) - len(sweep.curve(result))
        if left_out:
            print(f"{result.label}: {left_out} of {len(result.cells)} cells have one k per layer and are not drawn")
    print("\n".join([*lines, f"wrote {args.out}"]))


if __name__ == "__main__":
    main()
