"""The command that picks a k': its answer, what it prints to run and measure, and how it fails."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep import named_budgets
from megatron_emoe.sweep.curve import SweepResult
from tests import sweep_results

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tools"))
import pick_k  # noqa: E402

# k = 4; two MoE layers, of which the first hardly needs its experts.
CURVE = {1: 2.4, 2: 2.2, 3: 2.1, 4: 2.0, 6: 1.95, 8: 1.97}
LAYERS = {(1, 4): 2.03, (2, 4): 2.01, (3, 4): 2.004, (4, 1): 2.32, (4, 2): 2.12, (4, 3): 2.05}

make_result = partial(
    sweep_results.make_result,
    "elastic",
    num_moe_layers=2,
    command="python tools/sweep_k.py --load runs/elastic --k 1 2 3 4 6 8 --data-path held-out --out first.json",
)


@pytest.fixture
def answer(tmp_path, capsys):
    """What the command prints for a result and flags."""

    def run(result: SweepResult, *flags: str) -> str:
        path = tmp_path / "sweep.json"
        sweep.save(result, path)
        pick_k.main([str(path), *flags])
        return capsys.readouterr().out.replace(str(path), "SWEEP")

    return run


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_flops_answer_with_a_predicted_allocation_and_its_command(answer):
    text = answer(make_result(CURVE | LAYERS), "--max-flops", "0.6")
    # Uniform 2: 4 of 8 experts. (1, 3) is predicted at 2.2 + (0.03 + 0.05) - (0.01 + 0.12) = 2.15.
    assert rows(text) == [
        ["2", "4", "0.500", "2.2000", "+0.2000", "measured"],
        ["1,3", "4", "0.500", "2.1500", "+0.1500", "predicted, per layer"],
    ]
    assert "best: k' = 2, loss 2.2000 (measured)\n" in text
    assert "per layer: not all of it is measured, and nothing measured is better than 2 everywhere\n" in text
    assert (
        "  torchrun --nproc-per-node 1 tools/sweep_k.py --load runs/elastic --k 1 2 3 4 6 8 --data-path held-out "
        "--k-per-layer 1,3 --out SWEEP\n"
    ) in text
    assert "tools/sweep_k.py --load runs/elastic --data-path held-out --k 2 --out k2.json\n" in text
    assert "vllm serve EXPORTED --hf-overrides '{\"num_experts_per_tok\": 2}'" in text


def test_a_measured_allocation_that_is_better_is_the_answer(answer):
    text = answer(make_result(CURVE | LAYERS | {(1, 3): 2.16}), "--max-flops", "0.6")
    assert rows(text)[1] == ["1,3", "4", "0.500", "2.1600", "+0.1600", "measured, per layer"]
    assert "best: k' = 1,3, loss 2.1600 (measured)" in text
    assert "per layer: 1,3 is better than 2 everywhere, measured: loss -0.0400 at 1 times its expert FLOPs" in text
    assert "predicted" not in text
    assert "--k-per-layer 1,3" in text and "--hf-overrides" not in text


def test_a_measured_allocation_that_is_worse_is_shown_and_not_the_answer(answer):
    text = answer(make_result(CURVE | LAYERS | {(1, 3): 2.21}), "--max-flops", "0.6")
    assert rows(text)[1] == ["1,3", "4", "0.500", "2.2100", "+0.2100", "measured, per layer"]
    assert "best: k' = 2," in text
    assert "per layer: measured, and not better than 2 everywhere\n" in text


def test_without_measured_layers_it_says_how_to_measure_them(answer):
    text = answer(make_result(CURVE), "--max-flops", "0.6")
    assert len(rows(text)) == 1
    assert "per layer: no layer was measured alone; to measure:" in text
    assert re.search(r"sweep_k.py .* --layer-sensitivity --out SWEEP", text)


def test_latency(answer):
    result = make_result(CURVE, latency={2: 1.0, 4: 1.5})
    text = answer(result, "--max-latency-ms", "1.2")
    assert rows(text) == [["2", "4", "0.500", "2.2000", "+0.2000", "measured", "1"]]
    assert "--max-latency-ms: at most 1.2 ms per token, one token alone" in text


def test_quality(answer):
    text = answer(make_result(CURVE), "--min-quality", "0.9")  # a loss of at most 2.0 - ln 0.9 = 2.1054
    assert "best: k' = 3, loss 2.1000" in text


def test_the_tail_scale_in_force_is_said(answer):
    text = answer(make_result(CURVE, tail_scale={"6": 0.25, "8": 0.1}), "--max-flops", "2")
    assert "best: k' = 6, loss 1.9500 (measured), with tail scale 0.25\n" in text
    assert "--k 6 --emoe-tail-scale 6:0.25 8:0.1 --out k6.json" in text
    assert "do not serve a tail scale (here 0.25)" in text


def test_nothing_fits_is_one_line_and_a_bad_status(tmp_path):
    path = tmp_path / "sweep.json"
    sweep.save(make_result(CURVE), path)
    run = subprocess.run(
        [sys.executable, pick_k.__file__, str(path), "--max-flops", "0.2"],
        capture_output=True,
        text=True,
        cwd=REPO,
        env={"PYTHONPATH": str(REPO)},
    )
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == (
        "pick_k.py: --max-flops 0.2: no measured k' of elastic has at most 0.2 times the expert FLOPs at k = 4; "
        "the nearest is k' = 1 with 0.25\n"
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "one of --max-flops, --max-latency-ms, --min-quality, --budgets is required"),
        (["--budgets", "b.json", "--max-flops", "2"], "--max-flops 2: not with --budgets, which lists every budget"),
        (["--budgets", "b.json", "--max-latency-ms", "2"], "--max-latency-ms 2: not with --budgets"),
        (["--budgets", "b.json", "--min-quality", "1", "--at", "large"], "--at: only with --max-latency-ms"),
        (["--max-flops", "1", "--min-quality", "1"], "not allowed with argument --max-flops"),
        (["--max-flops", "1", "--at", "large"], "--at: only with --max-latency-ms"),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as error:
        pick_k.main([str(tmp_path / "sweep.json"), *flags])
    assert error.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-flops", "0"], "--max-flops 0: must be a finite number above 0"),
        (["--max-latency-ms", "1", "--at", "large"], "has no latency_ms_large; must be measured"),
    ],
)
def test_bad_values(tmp_path, capsys, flags, message):
    path = tmp_path / "sweep.json"
    sweep.save(make_result(CURVE), path)
    refuses(capsys, [str(path), *flags], message)


def test_an_unreadable_sweep(tmp_path, capsys):
    refuses(capsys, [str(tmp_path / "nowhere.json"), "--max-flops", "1"], "nowhere.json: cannot be read")


def refuses(capsys, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as left:
        pick_k.main(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and ": error: " in line and message in line


def test_errors_and_a_cpu_are_named(answer):
    # Differences of the blocks to k: -0.1 and -0.3.
    blocks = {4: (2.0, 2.2), 6: (1.9, 1.9)}
    cells = [
        sweep_results.make_cell(k, sum(of) / 2, block_losses=of, latency_ms_batch1=k / 4, device="cpu")
        for k, of in blocks.items()
    ]
    text = answer(make_result(cells), "--max-latency-ms", "2")
    assert "--max-latency-ms: at most 2 ms per token, one token alone (measured on a CPU)\n" in text
    assert rows(text)[0][4] == "-0.2000 ± 0.1000"


@pytest.fixture
def budgets(answer, tmp_path):
    """The file that --budgets writes, and what is printed."""

    def run(result: SweepResult, *flags: str) -> tuple[dict, str]:
        text = answer(result, "--budgets", str(tmp_path / "budgets.json"), *flags)
        return json.loads((tmp_path / "budgets.json").read_text()), text.replace(str(tmp_path), "AT")

    return run


def test_budgets_are_the_frontier_with_names(budgets):
    curve = {1: 2.5, 2: 2.045, 3: 2.03, 4: 2.0, 6: 1.99, 8: 1.995, 12: 1.98}
    latency = {2: 1.0, 4: 1.5}
    table, text = budgets(make_result(curve, latency=latency, command="", checkpoint="runs/a b"))
    # Quality: exp(2 - loss). k' = 1 is below the floor of 0.95, k' = 8 no better than 6.
    assert table == {
        "version": 1,
        "checkpoint": "runs/a b",
        "k_train": 4,
        "num_experts": 16,
        "budgets": [
            {"name": "fast", "k": 2, "loss": 2.045, "quality": 0.955997, "expert_flops": 0.5, "latency_ms_batch1": 1.0},
            {"name": "k3", "k": 3, "loss": 2.03, "quality": 0.970446, "expert_flops": 0.75},
            {"name": "default", "k": 4, "loss": 2.0, "quality": 1.0, "expert_flops": 1.0, "latency_ms_batch1": 1.5},
            {"name": "k6", "k": 6, "loss": 1.99, "quality": 1.01005, "expert_flops": 1.5},
            {"name": "best", "k": 12, "loss": 1.98, "quality": 1.020201, "expert_flops": 3.0},
        ],
    }
    assert rows(text)[0] == ["fast", "2", "0.5", "2.0450", "+0.0450", "0.9560", "1"]
    assert "fast: the cheapest k' with a quality of at least 0.95 (--min-quality sets another floor)\n" in text
    assert "below that quality: k' = 1\nno better than a cheaper k': k' = 8\n" in text
    assert "tools/convert_checkpoint.py export --megatron 'runs/a b' --out EXPORTED" in text
    asked = '\'{"emoe": {"budgets": "AT/budgets.json"}}\''
    assert f"  VLLM_PLUGINS=emoe vllm serve EXPORTED --additional-config {asked}\n" in text


def test_a_floor_of_ones_own_and_a_budget_per_layer(budgets):
    # (2, 5) costs less than 4 everywhere and is better than 3; (6, 6) is 6 and no other budget.
    cells = {2: 2.2, 3: 2.1, 4: 2.0, 6: 1.95, (2, 5): 2.05, (6, 6): 1.94}
    table, text = budgets(make_result(cells), "--min-quality", "0.9")
    found = [(each["name"], each["k"], each["expert_flops"]) for each in table["budgets"]]
    assert found == [("fast", 3, 0.75), ("k2-5", [2, 5], 0.875), ("default", 4, 1.0), ("best", 6, 1.5)]
    assert "a quality of at least 0.9 (" in text and "below that quality: k' = 2\n" in text


@pytest.mark.parametrize(
    ("cells", "names", "said"),
    [
        ({2: 2.2, 4: 2.0, 6: 1.9}, ["default", "best"], "no budget fast: nothing cheaper than default has a quality"),
        ({3: 2.01, 4: 2.0, 6: 2.1}, ["fast", "default"], "no budget best: default has the lowest loss"),
        ({2: 2.01, 3: 1.99, 4: 2.0}, ["fast", "best", "default"], "default is listed although a cheaper k' is as good"),
        ({3: 1.99, 4: 2.0}, ["fast", "default"], "no budget best: fast has the lowest loss"),
        ({4: 2.0}, ["default"], "no budget best: default has the lowest loss"),
    ],
)
def test_names_that_have_no_budget_of_their_own_are_left_out(budgets, cells, names, said):
    table, text = budgets(make_result(cells))
    assert [each["name"] for each in table["budgets"]] == names and said in text


def test_a_table_is_read_as_it_was_written_and_checked(tmp_path):
    table = named_budgets.budget_table(make_result(CURVE | {(1, 6): 2.02}))
    path = tmp_path / "budgets.json"
    named_budgets.save(table, path)
    assert named_budgets.load(path) == table
    found = json.loads(path.read_text())
    wrong = {
        "names fast; must be unique, and one of them default": found["budgets"][:1],
        "must be ascending in expert_flops": found["budgets"][::-1],
    }
    for message, budgets in wrong.items():
        path.write_text(json.dumps(found | {"budgets": budgets}))
        with pytest.raises(ValueError, match=message):
            named_budgets.load(path)


def test_a_table_is_whole_or_not_there(tmp_path, capsys, monkeypatch):
    path, out = tmp_path / "sweep.json", tmp_path / "budgets.json"
    sweep.save(make_result({2: 2.2}), path)
    out.write_text("before")
    refuses(capsys, [str(path), "--budgets", str(out)], "no cell at k' = 4")
    sweep.save(make_result(CURVE), path)
    refuses(capsys, [str(path), "--budgets", str(path)], f"--budgets {path}: is the sweep itself; must be another")
    refuses(capsys, [str(path), "--budgets", str(tmp_path)], f"--budgets {tmp_path}: is a folder; must be a file")
    refuses(capsys, [str(path), "--budgets", str(out), "--min-quality", "1.1"], "--min-quality 1.1: must be at most 1")
    refuses(capsys, [str(path), "--budgets", str(out), "--min-quality", "0"], "--min-quality 0: must be a finite")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    refuses(capsys, [str(path), "--budgets", str(out)], f"--budgets {out}: cannot be written (No space left on device)")
    assert out.read_text() == "before" and sorted(os.listdir(tmp_path)) == ["budgets.json", "sweep.json"]
