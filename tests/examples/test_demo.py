"""The demo: its commands are commands of these tools, in an order that works, and what it prints at the end is so (the
whole runs in `make demo`)."""

import argparse
import os
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_emoe.settings.flag_files import expand
from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.curve import SweepCell
from tests import sweep_results

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "examples"), str(REPO / "tools")]
import demo  # noqa: E402
import pick_k  # noqa: E402
import plot_sweep  # noqa: E402
import preprocess_data  # noqa: E402
import report  # noqa: E402

LOSSES = {1: 4.19, 2: 4.02, 3: 3.98, 4: 3.9644, 6: 3.9522, 8: 3.9524, 12: 3.9664, 16: 3.9867}
PLAIN = {1: 4.14, 2: 4.00, 3: 3.97, 4: 3.9582, 6: 3.9641, 8: 3.9781, 12: 4.0162, 16: 4.0514}

make_result = partial(sweep_results.make_result, k_train=demo.TRAINED_K, num_experts=32, num_moe_layers=demo.LAYERS)


def make_cell(k: int | tuple[int, ...], loss: float, latency: float | None = 1.0) -> SweepCell:
    measured = {"latency_ms_batch1": latency, "latency_ms_large": latency}
    return sweep_results.make_cell(k, loss, layers=demo.LAYERS, **measured)


def layer_cells() -> list[SweepCell]:
    """The deeper a layer, the more its k' matters: 0.1, 0.4 and 0.7 of what it matters everywhere."""
    cells = []
    for ks in sweep.sensitivity_budgets(demo.LAYER_KS, demo.TRAINED_K, demo.LAYERS):
        ((layer, k),) = ((layer, k) for layer, k in enumerate(ks) if k != demo.TRAINED_K)
        cells.append(make_cell(ks, LOSSES[4] + (0.1 + 0.3 * layer) * (LOSSES[k] - LOSSES[4]), None))
    return cells


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    """The demo's folder after both sweeps and the one of the layers."""
    monkeypatch.setattr(demo, "OUT", tmp_path)
    sweep.save(make_result("topk", [make_cell(k, loss) for k, loss in PLAIN.items()]), tmp_path / "sweep_topk.json")
    uniform = [make_cell(k, loss) for k, loss in LOSSES.items()]
    sweep.save(make_result("elastic", uniform + layer_cells()), tmp_path / "sweep_elastic.json")
    return tmp_path


def words(step: demo.Step, script: str) -> list[str]:
    names = [Path(word).name for word in step.command]
    return step.command[names.index(script) + 1 :]


def test_the_steps_in_order(out):
    assert [step.name for step in demo.steps()] == [
        *("corpus", "base", "topk", "elastic", "fit tail scale", "sweep topk", "sweep elastic", "sweep layers"),
        *("sweep k' per layer", "plot", "card"),
    ]


def test_what_is_done_is_what_is_complete(out):
    done = {step.name: step.done() for step in demo.steps()}
    assert [name for name, is_done in done.items() if is_done] == ["sweep topk", "sweep elastic", "sweep layers"]

    # A sweep that was interrupted, or is without latencies, is not done.
    elastic = sweep.load(out / "sweep_elastic.json")
    for cells in (elastic.cells[1:], [make_cell(k, loss, None) for k, loss in LOSSES.items()]):
        sweep.save(make_result("elastic", list(cells)), out / "sweep_elastic.json")
        assert not next(step for step in demo.steps() if step.name == "sweep elastic").done()


def test_the_tail_scale_is_fitted_once(out):
    (step,) = (step for step in demo.steps() if step.name == "fit tail scale")
    assert not step.done()
    folder = out / "checkpoints/elastic/iter_0000120"
    folder.mkdir(parents=True)
    (folder / "emoe_tail_scale.json").write_text("{}")
    assert step.done()
    tokens = words(step, "fit_tail_scale.py")
    assert (
        int(tokens[tokens.index("--max-eval-tokens") + 1]) == 2 * demo.HELD_OUT_TOKENS
    )  # its second half is not swept


def test_drawings_are_made_anew_where_a_sweep_is_newer(out):
    for name in ("wall.png", "card.html"):
        (out / name).write_text("")
        os.utime(out / name, ns=(0, (out / "sweep_elastic.json").stat().st_mtime_ns + 10**9))
    assert [step.done() for step in demo.drawings()] == [True, True]
    os.utime(out / "card.html", ns=(0, 0))
    assert [step.done() for step in demo.drawings()] == [True, False]


def test_the_layers_suggest_what_is_swept_and_then_answered(out, capsys):
    """The k' per layer that the demo measures is the one that pick_k asks for, and then its answer if it is better."""
    allocations = demo.suggested()
    # At most 0.6 * 12 = 7.2 experts: the uniform k' = 2 has 6 of them, and the first layer can give some away.
    assert [sum(ks) for ks in allocations] == [6, 7] and all(ks[0] < ks[2] for ks in allocations)
    (step,) = (step for step in demo.steps() if step.name == "sweep k' per layer")
    assert ",".join(map(str, allocations[0])) in step.command and not step.done()

    elastic = sweep.load(out / "sweep_elastic.json")
    better = [make_cell(ks, 4.0 - 0.001 * sum(ks), None) for ks in allocations]
    sweep.save(make_result("elastic", [*elastic.cells, *better]), out / "sweep_elastic.json")
    assert step.done()
    pick_k.main([str(out / "sweep_elastic.json"), "--max-flops", str(demo.BUDGET)])
    text = capsys.readouterr().out
    assert f"best: k' = {','.join(map(str, allocations[1]))}, loss 3.9930 (measured)" in text
    assert "is better than 2 everywhere, measured" in text and "predicted" not in text


def test_the_tools_take_their_commands(out):
    steps = {step.name: step for step in demo.steps()}
    corpus = preprocess_data.parse_args(words(steps["corpus"], "preprocess_data.py"))
    assert corpus.train_tokenizer == demo.VOCAB and all(Path(path).exists() for path in corpus.input)
    plot_sweep.parse_args(words(steps["plot"], "plot_sweep.py"))
    card = report.parse_args(words(steps["card"], "report.py"))
    assert (card.baseline, card.out) == (out / "sweep_topk.json", out / "card.html")


def test_the_card_can_be_written_from_the_sweeps(out):
    (_, card) = demo.drawings()
    report.main(words(card, "report.py"))
    assert card.done()
    text = (out / "card.md").read_text()
    assert demo.ELASTIC in text and "| elastic | 4 | 3.9644 | 6 | 3.9522 |" in text


def test_the_runs_are_megatron_s(out, monkeypatch):
    monkeypatch.chdir(REPO)  # where the demo's commands run
    from megatron.training.arguments import add_megatron_arguments

    from megatron_emoe.training.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    runs = [
        parser.parse_args(expand(words(s, "pretrain_emoe.py")))
        for s in demo.steps()
        if "pretrain_emoe.py" in str(s.command)
    ]
    assert [(run.train_iters, run.num_layers, run.moe_router_topk) for run in runs] == [
        (demo.BASE_ITERS, demo.LAYERS, demo.TRAINED_K),
        (demo.CONTINUED_ITERS, demo.LAYERS, demo.TRAINED_K),
        (demo.CONTINUED_ITERS, demo.LAYERS, demo.TRAINED_K),
    ]
    assert [run.emoe_selection for run in runs] == ["topk", "topk", "prefix"]
    assert runs[2].emoe_tail_scale == ["0.25"]


def test_the_summary(out):
    text = demo.summary({"corpus": 31.4})
    assert "elastic: effective range 3.00, wall at k' = 16" in text  # 3.9664 <= 3.9644 * 1.001 = 3.9684 < 3.9867
    assert "topk: effective range 1.00, wall at k' = 6" in text  # 3.9641 > 3.9582 * 1.001 = 3.9622
    assert "at k +0.0062 nats" in text and "at its best k' -0.0060 against" in text  # 3.9522 - 3.9582
    assert "seconds: corpus 31\n" in text
