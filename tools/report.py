"""An elasticity card of one or more sweeps: charts, tables per k', and how they were produced.

    python tools/report.py topk.json elastic.json --baseline topk.json --out card.html

writes card.html, one file that needs no other, and card.md, its tables in Markdown. The sweeps must be over the same
data, of models trained at the same k. What was not measured is an empty cell.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import plot_sweep
import serve_bench

from megatron_emoe.settings import paths
from megatron_emoe.settings.atomic_file import write_atomically
from megatron_emoe.settings.command_line import command_line
from megatron_emoe.settings.flag_types import a_path
from megatron_emoe.settings.refusal import fail
from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep import served
from megatron_emoe.sweep.card import Card, make_card, name_seeds
from megatron_emoe.sweep.card_page import Figure, inline_svg, to_html, to_markdown
from megatron_emoe.sweep.curve import SweepResult
from megatron_emoe.sweep.served import ServedResult
from megatron_emoe.sweep.summary import shown_label, speeds_count

if TYPE_CHECKING:  # matplotlib takes a second to import: it is where a chart is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

LATENCIES = {"latency_ms_batch1": "one token alone", "latency_ms_large": "a full micro-batch"}


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("sweeps", nargs="+", type=a_path, metavar="SWEEP.json", help="results of tools/sweep_k.py")
    parser.add_argument("--out", required=True, type=a_path, metavar="CARD.html", help="page to write; and CARD.md")
    parser.add_argument(
        "--baseline",
        type=a_path,
        metavar="SWEEP.json",
        help="plain top-k, for peak gain and cost at k; one of the sweeps, or one more",
    )
    parser.add_argument(
        "--specialists", nargs="+", type=a_path, default=[], metavar="SWEEP.json", help=plot_sweep.SPECIALISTS
    )
    parser.add_argument(
        "--served", nargs="+", type=a_path, default=[], metavar="SERVED.json", help="results of tools/serve_bench.py"
    )
    parser.add_argument("--title", default="", help="heading of the card (default: from the labels)")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="N",
        help="seed of the training run of each sweep, in order: sweeps of one label are then seeds of one method, and "
        "mean and deviation are shown (a sweep itself does not know the seed)",
    )
    return parser.parse_args(argv)


def check_out(path: Path) -> None:
    """Raises `ValueError` for another suffix than .html or a file that cannot be written."""
    if path.suffix.lower() != ".html":
        raise ValueError(f"--out: {path}; must end in .html")
    for file in (path, path.with_suffix(".md")):
        paths.check_out(file)


def load(args: argparse.Namespace) -> tuple[list[SweepResult], SweepResult | None]:
    """The sweeps, and the baseline: the sweep itself where it is one of them."""
    results = [sweep.load(path) for path in args.sweeps]
    if args.baseline is None:
        return results, None
    paths = [path.resolve() for path in args.sweeps]
    same = args.baseline.resolve()
    return results, results[paths.index(same)] if same in paths else sweep.load(args.baseline)


def charts(
    results: Sequence[SweepResult], experts: Sequence[SweepResult] = (), loads: Sequence[ServedResult] = ()
) -> list[Figure]:
    """Loss over k'; over FLOPs where that is another picture; latency over k' where any was measured on a GPU; what a
    server gave under load, where that was measured."""
    drawn = {"Held-out loss over k'": plot_sweep.draw(results, x="k", experts=experts)}
    if len({cell.expert_flops_per_token / k for result in results for k, cell in sweep.curve(result).items()}) > 1:
        drawn["Held-out loss over the FLOPs of the routed experts"] = plot_sweep.draw(
            results, x="flops", experts=experts
        )
    timed = [result for result in results if speeds_count(result)]
    if any(points(result, field) for result in timed for field in LATENCIES):
        drawn["Latency over k'"] = draw_latency(timed)
    for number, load in enumerate(loads, start=1):
        drawn["Served under load" + (f" ({number})" if len(loads) > 1 else "")] = serve_bench.draw(load)
    return [Figure(caption, svg(figure, f"chart{n}")) for n, (caption, figure) in enumerate(drawn.items())]


def points(result: SweepResult, field: str) -> list[tuple[int, float]]:
    """(k', value) of the cells where that field was measured."""
    values = [(k, getattr(cell, field)) for k, cell in sweep.curve(result).items()]
    return [(k, value) for k, value in values if value is not None]


def draw_latency(results: Sequence[SweepResult]) -> Drawing:
    """Milliseconds per token over k', a panel for one token alone and one for a full batch, if measured."""
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    measured = [field for field in LATENCIES if any(points(result, field) for result in results)]
    with matplotlib.rc_context(plot_sweep.STYLE):
        figure = Drawing(figsize=(7.2, 3.4 + 0.2 * len(results)), layout="constrained")
        for field, axes in zip(measured, figure.subplots(1, len(measured), squeeze=False)[0], strict=True):
            _draw_panel(axes, results, field)
        lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        legend = figure.legend(handles=list(lines.values()), loc="outside lower left", frameon=False)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def _draw_panel(axes: Axes, results: Sequence[SweepResult], field: str) -> None:
    from matplotlib.ticker import MaxNLocator

    for index, result in enumerate(results):
        wheels = (plot_sweep.COLOURS, plot_sweep.MARKERS, plot_sweep.DASHES)
        colour, marker, dash = (wheel[index % len(wheel)] for wheel in wheels)
        if measured := points(result, field):
            style = {"color": colour, "marker": marker, "linestyle": dash, "clip_on": False}
            axes.plot(*zip(*measured, strict=True), **style, label=shown_label(result))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(LATENCIES[field], fontsize=10)
    axes.set_xlabel("active experts per token k′")
    axes.set_ylabel("milliseconds per token")
    axes.set_ylim(bottom=0)


def svg(figure: Drawing, prefix: str) -> str:
    """The chart for a page; its text stays text."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({**plot_sweep.STYLE, "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return inline_svg(text.getvalue(), prefix)


def write(card: Card, figures: Sequence[Figure], out: Path) -> list[Path]:
    """Both files, complete or not at all; returns their paths."""
    texts = {out: to_html(card, figures), out.with_suffix(".md"): to_markdown(card)}
    for path, text in texts.items():
        write_atomically(path, text)
    return list(texts)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        check_out(args.out)
        results, baseline = load(args)
        experts = [sweep.load(path) for path in args.specialists]
        loads = [served.load(path) for path in args.served]
        more = {"experts": experts, "served": loads}
        card = make_card(results, baseline=baseline, seeds=args.seeds, title=args.title, **more)
        named = name_seeds(results, args.seeds)
        extra = [baseline] if baseline is not None and baseline not in results else []
        written = write(card, charts([*named, *extra], experts, loads), args.out)
    except (ValueError, OSError) as error:
        fail(error)
    print("\n".join(f"wrote {path}" for path in written))


if __name__ == "__main__":
    main()
