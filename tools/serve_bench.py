"""Throughput and latency of a running vLLM with the plugin, at several offered loads and k', and by its own policy.

    python tools/serve_bench.py --server http://localhost:8000 --data-path data/text_heldout --rates 1 2 4 --k 4 8 \\
      --losses sweep.json --out served.json

The server runs with VLLM_PLUGINS=emoe (docs/serving.md). At each rate the same requests are sent at each --k and once
without a k', where the server's own applies, or follows the load. They arrive at random (a Poisson process), whether
earlier ones were answered or not, by vLLM's own benchmark, which runs in vLLM's environment (--serve-python). No cell
reads what another left in the prefix cache. The server's counts tell which k' ran. served.json has it all, served.png
the curves, served.log what vLLM's benchmark said. Exit status 2 for what is refused, 1 where no request of a cell came
to its end.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import plot_sweep

from megatron_emoe.settings import paths
from megatron_emoe.settings.command_line import command_line
from megatron_emoe.settings.flag_files import own_command
from megatron_emoe.settings.flag_types import a_path, path_word, positive, whole, whole_to
from megatron_emoe.settings.refusal import fail
from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep import named_budgets, served
from megatron_emoe.sweep.served import ServedCell, ServedResult
from megatron_emoe.sweep.serving_client import Load, Server, check_ks, prompts

if TYPE_CHECKING:  # matplotlib takes a second to import: it is where a chart is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

REPO = Path(__file__).resolve().parent.parent
MOST_REQUESTS = 1_000_000
WARM_UP = 4
"""Requests at each k' before anything is measured."""
COUNTED = ("tokens", "prefill", "decode", "rows", "changes")
"""What GET /emoe counts, and is no setting."""


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    parser.add_argument("--server", default="http://localhost:8000", metavar="URL", help="(default: %(default)s)")
    parser.add_argument(
        "--data-path",
        type=path_word,
        required=True,
        metavar="PREFIX",
        help="tokens of the server's tokenizer, .bin and .idx (tools/preprocess_data.py), which prompts are cut from",
    )
    parser.add_argument("--rates", type=positive, nargs="+", required=True, metavar="X", help="offered, requests/s")
    parser.add_argument("--k", type=whole, nargs="+", default=[], help="k' beside the server's own")
    parser.add_argument(
        "--requests", type=whole_to(MOST_REQUESTS), default=100, help="of a cell (default: %(default)s)"
    )
    parser.add_argument("--prompt-tokens", type=whole, default=128, help="(default: %(default)s)")
    parser.add_argument("--output-tokens", type=whole, default=64, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and the arrivals (default: %(default)s)")
    parser.add_argument(
        "--losses",
        type=a_path,
        metavar="FILE.json",
        help="a sweep of what is served, or its table of budgets (pick_k.py --budgets): mean loss of what ran",
    )
    parser.add_argument("--out", type=a_path, required=True, metavar="SERVED.json", help="to write; and SERVED.png")
    parser.add_argument(
        "--serve-python",
        type=a_path,
        default=REPO / ".venv-serve/bin/python",
        metavar="PYTHON",
        help="of an environment with vLLM and the plugin (default: that of `make setup-serve`)",
    )
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed {args.seed}: must be in [0, {2**32 - 1}]")
    return args


def check(args: argparse.Namespace) -> tuple[list[list[int]], served.Losses]:
    """The prompts, and losses by k'. ValueError for what can be refused before the server is asked."""
    if args.out.suffix.lower() != ".json":
        raise ValueError(f"--out {args.out}: must end in .json")
    for file in (args.out, args.out.with_suffix(".png"), args.out.with_suffix(".log")):
        paths.check_out(file)
    found = prompts(args.data_path, args.requests, args.prompt_tokens, args.seed)
    losses = {} if args.losses is None else losses_in(args.losses)
    if not (args.serve_python.is_file() and os.access(args.serve_python, os.X_OK)):
        raise ValueError(f"--serve-python {args.serve_python}: no such program; make setup-serve makes an environment")
    return found, losses


def losses_in(path: Path) -> dict[int | tuple[int, ...], float]:
    """Loss by k' of a sweep, or of a table of budgets. ValueError where the file is neither."""
    try:
        return {budget.k: budget.loss for budget in named_budgets.load(path).budgets}
    except ValueError:
        return {cell.k: cell.loss for cell in sweep.load(path).cells}


def ask(args: argparse.Namespace, server: Server) -> tuple[str, dict[str, Any]]:
    """Name of the model, and GET /emoe. ValueError where the server cannot serve what is asked for."""
    model, most = server.model()
    status = server.status()
    check_ks(args.k, status)
    if args.prompt_tokens + args.output_tokens > most:
        raise ValueError(
            f"--prompt-tokens {args.prompt_tokens} --output-tokens {args.output_tokens}: "
            f"must be at most {most} together, the server's --max-model-len"
        )
    return model, status


def measure(
    args: argparse.Namespace, server: Server, result: ServedResult, pieces: list, losses: served.Losses
) -> None:
    """Every cell; --out is rewritten after each. ValueError where the benchmark or a whole cell failed."""
    asked = {"url": server.url, "model": result.model, "output_tokens": args.output_tokens, "seed": args.seed}
    ks: list[int | None] = [*dict.fromkeys(args.k), None]
    with Load(args.serve_python, args.out.with_suffix(".log")) as load:
        for k in ks:
            load.run(asked | {"prompts": pieces[:WARM_UP], "rate": None, "body": body(k, "warm-up")})
        print("\n".join(table([])), flush=True)
        for rate in args.rates:
            for k in ks:
                before = served.counted(server.status())
                found = load.run(asked | {"prompts": pieces, "rate": rate, "body": body(k, f"{rate:g}")})
                ran = served.counted(server.status()).since(before)
                result = dataclasses.replace(result, cells=(*result.cells, served.cell(rate, k, found, ran, losses)))
                served.save(result, args.out)
                print(table(result.cells[-1:])[-1], flush=True)


def body(k: int | None, cell: str) -> dict[str, Any]:
    """Of a request at k'. The salt keeps what an earlier cell left in the prefix cache out of this one."""
    salt = {"temperature": 0, "cache_salt": f"serve_bench {cell} {k}"}
    return salt if k is None else salt | {"vllm_xargs": {"emoe_k": k}}


def table(cells: Sequence[ServedCell]) -> list[str]:
    """Markdown: head, rule, and a row for each cell."""
    rows = [served.HEAD, ["---:"] * len(served.HEAD), *map(served.row, cells)]
    return ["| " + " | ".join(row) + " |" for row in rows]


def draw(result: ServedResult) -> Figure:
    """Throughput and the two times over the offered load, a curve for each k'; dotted: the 99th percentile."""
    import matplotlib
    from matplotlib.figure import Figure as Drawing

    with matplotlib.rc_context(plot_sweep.STYLE):
        figure = Drawing(figsize=(11, 4.2), layout="constrained")
        panels = figure.subplots(1, 3)
        for number, k in enumerate(dict.fromkeys(cell.k for cell in result.cells)):
            cells = sorted((cell for cell in result.cells if cell.k == k), key=lambda cell: cell.rate)
            _draw_k(panels, cells, number)
        words = ("output tokens per second", "time to the first token (ms)", "time per token after it (ms)")
        for axes, text in zip(panels, words, strict=True):
            axes.set(xlabel="offered load (requests/s)", ylabel=text, ylim=(0, None), xlim=(0, None))
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=6, frameon=False)
        figure.suptitle("p50, and dotted p99 of both times", fontsize=9)
    return figure


def _draw_k(panels: Sequence[Axes], cells: Sequence[ServedCell], number: int) -> None:
    wheels = (plot_sweep.COLOURS, plot_sweep.MARKERS)
    colour, marker = (wheel[number % len(wheel)] for wheel in wheels)
    name = served.name_of(cells[0].k)
    style = {"color": colour, "marker": marker, "label": name if cells[0].k is None else f"k\N{PRIME} = {name}"}
    rates = [cell.rate for cell in cells]
    panels[0].plot(rates, [cell.output_tokens_per_second for cell in cells], **style)
    for axes, parts in ((panels[1], [cell.ttft_ms for cell in cells]), (panels[2], [cell.tpot_ms for cell in cells])):
        if None not in parts:
            axes.plot(rates, [part.p50 for part in parts if part], **style)
            axes.plot(rates, [part.p99 for part in parts if part], **(style | {"linestyle": ":", "label": None}))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    server = Server(args.server)
    try:
        pieces, losses = check(args)
        model, status = ask(args, server)
    except ValueError as error:
        fail(error)
    result = ServedResult(
        version=1,
        model=model,
        data=args.data_path,
        prompts=args.requests,
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        seed=args.seed,
        server={key: value for key, value in status.items() if key not in COUNTED},
        cells=(),
        losses=None if args.losses is None else str(args.losses),
        vllm=server.version(),
        command=own_command(),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    try:
        measure(args, server, result, pieces, losses)
    except (ValueError, OSError) as error:
        fail(error, status=1)
    plot_sweep.save_figure(draw(served.load(args.out)), args.out.with_suffix(".png"))
    print(f"wrote {args.out}, {args.out.with_suffix('.png')}")


if __name__ == "__main__":
    main()
