"""The demo: its commands are commands of these tools, in an order that works, and what it prints at the end is so (the
whole runs in `make demo`)."""

import argparse
import dataclasses
import os
import shlex
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

FITTED = {1: 4.14, 2: 4.00, 3: 3.97, 4: 3.9582, 6: 3.9570, 8: 3.9575, 12: 3.9580, 16: 3.9590}
LOSSES = {1: 4.19, 2: 4.02, 3: 3.98, 4: 3.9644, 6: 3.9522, 8: 3.9524, 12: 3.9664, 16: 3.9867}
PLAIN = {1: 4.14, 2: 4.00, 3: 3.97, 4: 3.9582, 6: 3.9641, 8: 3.9781, 12: 4.0162, 16: 4.0514}

make_result = partial(sweep_results.make_result, k_train=demo.TRAINED_K, num_experts=32, num_moe_layers=demo.LAYERS)


def make_cell(k: int | tuple[int, ...], loss: float) -> SweepCell:
    return sweep_results.make_cell(k, loss, layers=demo.LAYERS)


def layer_cells() -> list[SweepCell]:
    """The deeper a layer, the more its k' matters: 0.1, 0.4 and 0.7 of what it matters everywhere."""
    cells = []
    for ks in sweep.sensitivity_budgets(demo.LAYER_KS, demo.TRAINED_K, demo.LAYERS):
        ((layer, k),) = ((layer, k) for layer, k in enumerate(ks) if k != demo.TRAINED_K)
        cells.append(make_cell(ks, LOSSES[4] + (0.1 + 0.3 * layer) * (LOSSES[k] - LOSSES[4])))
    return cells


@pytest.fixture
def out(tmp_path, monkeypatch) -> Path:
    """The demo's folder after the sweeps of the three curves and the one of the layers."""
    monkeypatch.setattr(demo, "OUT", tmp_path)
    for curve, losses in (("topk", PLAIN), ("topk_fitted", FITTED)):
        cells = [make_cell(k, loss) for k, loss in losses.items()]
        sweep.save(make_result(demo.TITLES[curve], cells), tmp_path / f"sweep_{curve}.json")
    uniform = [make_cell(k, loss) for k, loss in LOSSES.items()]
    sweep.save(make_result(demo.TITLES["elastic"], uniform + layer_cells()), tmp_path / "sweep_elastic.json")
    return tmp_path


def lanes() -> list[list[demo.Step]]:
    return [list(lane) for lanes in demo.stages() for lane in lanes]


def step(name: str) -> demo.Step:
    (found,) = (step for lane in lanes() for step in lane if step.name == name)
    return found


def value(flag: str, step: demo.Step) -> str:
    return step.words[step.words.index(flag) + 1]


def test_the_steps_in_order(out):
    assert [len(lanes) for lanes in demo.stages()] == [1, 2, 1]
    assert [[step.name for step in lane] for lane in lanes()] == [
        ["corpus", "base"],
        ["topk", "sweep topk", "fit topk", "sweep topk fitted"],
        ["elastic", "fit elastic", "sweep elastic", "sweep layers", "sweep k' per layer"],
        ["plot", "card"],
    ]


def test_what_is_done_is_what_is_complete(out):
    done = {step.name for lane in lanes() for step in lane if step.done()}
    assert done == {"sweep topk", "sweep topk fitted", "sweep elastic", "sweep layers"}

    # A sweep that was interrupted is not done.
    elastic = sweep.load(out / "sweep_elastic.json")
    sweep.save(make_result(demo.TITLES["elastic"], list(elastic.cells[1:])), out / "sweep_elastic.json")
    assert not step_of(demo.elastic(), "sweep elastic").done()


def step_of(lane: demo.Lane, name: str) -> demo.Step:
    return next(step for step in lane if step.name == name)


def test_a_run_that_was_cut_short_is_not_done(out):
    folder = out / "checkpoints/base"
    folder.mkdir(parents=True)
    newest = folder / "latest_checkpointed_iteration.txt"
    for iteration, done in ((demo.BASE_ITERS - 1, False), (demo.BASE_ITERS, True)):
        newest.write_text(f"{iteration}\n")
        assert step("base").done() is done


def test_a_run_that_is_started_again_finds_an_empty_folder(out):
    """Its own: a whole checkpoint in --save is refused, and a run can be ended before the tracker names it."""
    for name in ("base", "topk"):
        for kind in ("checkpoints", "tensorboard"):
            (out / kind / name / "iter_0000400").mkdir(parents=True)
            (out / kind / name / "iter_0000400/.metadata").write_text("")
    base = step("base")
    base.prepare()
    assert not Path(value("--save", base)).exists() and not Path(value("--tensorboard-dir", base)).exists()
    assert (out / "checkpoints/topk/iter_0000400/.metadata").exists()


def test_a_sweep_of_an_older_demo_is_not_this_one_s(out):
    file = out / "sweep_elastic.json"
    sweeps = [step(name) for name in ("sweep elastic", "sweep layers")]
    for each in sweeps:
        each.prepare()
    assert all(each.done() for each in sweeps)
    sweep.save(dataclasses.replace(sweep.load(file), label="elastic"), file)
    assert not any(each.done() for each in sweeps)
    sweeps[0].prepare()
    assert not file.exists()


def test_the_seconds_of_an_older_demo_are_left_out(tmp_path):
    file = tmp_path / "seconds.json"
    assert demo.read_spent(file) == {}
    file.write_text('{"corpus": 31.4}')
    assert demo.read_spent(file) == {}
    file.write_text('[{"step": "corpus", "wall": 31.4, "processor": 40.2}]')
    assert demo.read_spent(file) == {"corpus": demo.Spent("corpus", 31.4, 40.2)}


@pytest.mark.parametrize("run", ["topk", "elastic"])
def test_the_tail_scale_is_fitted_once_and_on_what_is_not_swept(run, out):
    fit = step(f"fit {run}")
    assert not fit.done()
    folder = out / f"checkpoints/{run}/iter_0000120"
    folder.mkdir(parents=True)
    (folder / "emoe_tail_scale.json").write_text("{}")
    assert fit.done()
    sweeps = [one for lane in lanes() for one in lane if one.script == "tools/sweep_k.py"]
    swept = {int(value("--max-eval-tokens", one)) for one in sweeps}
    assert 2 * max(swept) == int(
        value("--max-eval-tokens", fit)
    )  # its second half, which it is fitted on, is not swept


def test_plain_top_k_is_swept_without_the_scale_that_lies_beside_its_weights(out):
    plain, fitted = step("sweep topk"), step("sweep topk fitted")
    assert value("--emoe-tail-scale", plain) == "1" and "--emoe-tail-scale" not in fitted.words
    assert value("--load", plain) == value("--load", fitted) and value("--out", plain) != value("--out", fitted)


def test_lanes_that_run_side_by_side_write_nothing_of_each_other_s(out):
    first, second = ([step for step in lane if step.ranks] for lane in next(s for s in demo.stages() if len(s) == 2))
    for flag in ("--out", "--save", "--data-cache-path"):
        of_one, of_other = ({value(flag, step) for step in lane if flag in step.words} for lane in (first, second))
        assert of_one and of_other and not of_one & of_other


def test_the_command_in_a_log_is_one_that_can_be_typed(out, monkeypatch):
    monkeypatch.setattr(demo, "OUT", REPO / "demo")
    command = shlex.split(step_of(demo.topk(), "fit topk").command)
    assert command[:4] == ["torchrun", "--standalone", "--nproc-per-node", "1"]
    assert command[4:7] == ["tools/fit_tail_scale.py", "--load", "demo/checkpoints/topk"]


def test_what_runs_on_the_cpu_is_so_where_it_is_typed_too():
    by_script = {one.script: one for lane in (demo.base(), demo.topk(), demo.drawings()) for one in lane}
    assert [script for script, one in by_script.items() if "--host-mode" in shlex.split(one.command)] == [
        "pretrain_emoe.py",
        "tools/sweep_k.py",
        "tools/fit_tail_scale.py",
    ]
    assert step_of(demo.topk(), "topk").flags[-1] == "--host-mode"  # and given to what runs here


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
    swept = step("sweep k' per layer")
    assert ",".join(map(str, allocations[0])) in swept.words and not swept.done()

    elastic = sweep.load(out / "sweep_elastic.json")
    better = [make_cell(ks, 4.0 - 0.001 * sum(ks)) for ks in allocations]
    sweep.save(make_result(elastic.label, [*elastic.cells, *better]), out / "sweep_elastic.json")
    assert swept.done()
    pick_k.main([str(out / "sweep_elastic.json"), "--max-flops", str(demo.BUDGET)])
    text = capsys.readouterr().out
    assert f"best: k' = {','.join(map(str, allocations[1]))}, loss 3.9930 (measured)" in text
    assert "is better than 2 everywhere, measured" in text and "predicted" not in text


def test_the_tools_take_their_commands(out):
    corpus = preprocess_data.parse_args(step("corpus").words)
    assert corpus.train_tokenizer == demo.VOCAB and all(Path(path).exists() for path in corpus.input)
    plot = plot_sweep.parse_args(step("plot").words)
    card = report.parse_args(step("card").words)
    assert plot.results == card.sweeps and len(card.sweeps) == 3
    assert (card.baseline, card.out) == (out / "sweep_topk.json", out / "card.html")


def test_the_card_can_be_written_from_the_sweeps(out):
    (_, card) = demo.drawings()
    report.main(card.words)
    assert card.done()
    text = (out / "card.md").read_text()
    assert demo.ELASTIC in text and "| elastic + a(k') | 4 | 3.9644 | 6 | 3.9522 |" in text


def test_the_runs_are_megatron_s(out, monkeypatch):
    monkeypatch.chdir(REPO)  # where the demo's commands run
    from megatron.training.arguments import add_megatron_arguments

    from megatron_emoe.training.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    steps = [one for lane in lanes() for one in lane if one.script == "pretrain_emoe.py"]
    runs = [parser.parse_args(expand(one.flags)) for one in steps]
    assert [(run.train_iters, run.num_layers, run.moe_router_topk) for run in runs] == [
        (demo.BASE_ITERS, demo.LAYERS, demo.TRAINED_K),
        (demo.CONTINUED_ITERS, demo.LAYERS, demo.TRAINED_K),
        (demo.CONTINUED_ITERS, demo.LAYERS, demo.TRAINED_K),
    ]
    assert [run.emoe_selection for run in runs] == ["topk", "topk", "prefix"]
    assert runs[2].emoe_tail_scale == ["0.25"]
    # All ranks together do one global batch in one micro-batch each.
    assert all(run.micro_batch_size * one.ranks == run.global_batch_size for run, one in zip(runs, steps, strict=True))
    assert steps[0].ranks == runs[0].expert_model_parallel_size == 2


def test_the_summary(out):
    text = demo.summary([demo.Spent("corpus", 31.4, 40.2)])
    assert (
        "elastic + a(k'): effective range 3.00, wall at k' = 16" in text
    )  # 3.9664 <= 3.9644 * 1.001 = 3.9684 < 3.9867
    assert "topk: effective range 1.00, wall at k' = 6" in text  # 3.9641 > 3.9582 * 1.001 = 3.9622
    assert "topk + a(k'): effective range 4.00, no wall up to k' = 16" in text  # 3.9590 <= 3.9622
    assert "at k against topk: +0.0062 nats, +0.16%" in text  # 3.9644 - 3.9582
    assert "at its best k' = 6 against topk at k: -0.0060" in text  # 3.9522 - 3.9582
    assert "at its best k' = 6 against topk + a(k') at its best k': -0.0048" in text  # 3.9522 - 3.9570
    assert "\nelastic + a(k'): use k' = 6: loss -0.0122 (error unknown) to k = 4, at 1.5 times" in text
    assert ": corpus 31 (40)\n" in text
    assert "| 16 | 4.0514 | 3.9590 | 3.9867 |" in text
