"""`make bench-gpu` without a GPU: its report from given numbers, its refusals, and its measurements in host mode."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_emoe.host import flags as host_flags
from megatron_emoe.host import mode as host_mode
from tests import programs
from tests.device_runs import ON_DEVICE
from tests.distributed import REPO, run_ranks
from tests.tiny import flags

sys.path.insert(0, str(REPO / "benchmarks"))
import bench_gpu
import gpu_report
import gpu_results
from gpu_cells import GB, Cell, all_cells, chosen, layers_that_fit, why_skipped

PAGE = REPO / "docs/gpu.md"
CELL = Cell("te", "bf16", "live", "coactivation", (8, 16))
MEASURED = {
    "step": {"stock": [0.5, 0.4, 0.5], "elastic": [0.51, 0.408, 0.51]},  # 1.02 in every pair
    "tokens": 1000,
    "flops": {"stock": 50e12, "elastic": 75e12},
    "mean_k": 12.0,
    "load": {"stock": 1.1, "elastic": 1.25},
    "peak_bytes": {"stock": 20_000_000_000, "elastic": 21_500_000_000},
    "router": {"stock": [0.001, 0.002, 0.003], "elastic": [0.003, 0.003, 0.003]},
    "routers_per_step": 16,
    "sweep": {
        str(k): {"seconds": [s, s, 9.0], "tokens": 1000, "flops": 1e9 * k, "rows": k} for k, s in ((8, 0.1), (16, 0.16))
    },
}
MACHINE = {
    "device": "NVIDIA H100 80GB HBM3",
    "memory": 80 << 30,
    "torch": "2.15",
    "megatron-core": "0.19.2",
    "peak_tflops": 989,
}
RUN = {"date": "2026-01-02", "command": "make bench-gpu", "driver": "1.2", "versions": {"triton": "none"}}
RUN |= {"layers": 3, "pairs": 30}
PASS = {"bytes": 4_000_000, "kernel": [4e-6, 8e-6, 3e-6], "reference": [1e-4, 1e-4, 1e-4]}
RESULTS = {
    "machine": MACHINE,
    "cells": {CELL.name: {"measured": MEASURED, "run": RUN}},
    "kernel": {"measured": {"copy": 2e12, "passes": {"forward, 8192 tokens": PASS}}, "run": RUN},
}


@pytest.fixture
def one_cell(monkeypatch):
    monkeypatch.setattr(gpu_report, "all_cells", lambda: [CELL])


def line(text: str, start: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(start))


def test_the_numbers_of_a_row_are_those_of_hand_arithmetic(one_cell):
    head, steps, throughput, sweep, kernel = gpu_report.section(RESULTS).split("\n### ")
    assert "make bench-gpu`, driver 1.2, triton none; 3 layers, 30 pairs of steps: 1 cells" in head
    # Router share: 16 x 2 ms of 500 ms, 16 x 3 ms of 510 ms.
    expected = "| 12.00 | 500.0 | 510.0 | 1.020 | 1.020 to 1.020 | 1.020 | 1.500 | 1.10 | 1.25 | 6.4% | 9.4% |"
    assert line(steps, "| te").endswith(expected)
    # 3 x 1000 tokens and 150 TFLOP in 1.4 s: 107.1 TFLOP/s, 10.8 % of 989. Elastic: 225 in 1.428 s.
    assert line(throughput, "| te").endswith("| 2,143 | 107.1 | 10.8% | 20.0 | 2,101 | 157.6 | 15.9% | 21.5 |")
    # 10,000 tokens/s of 8 GFLOP each: 80 TFLOP/s; 6,250 of 16: 100.
    assert line(sweep, "| te | bf16 | 8 ").endswith("| 10,000 | 80.0 | 1.00 |")
    assert line(sweep, "| te | bf16 | 16 ").endswith("| 6,250 | 100.0 | 0.62 |")
    # 4 MB at 2 TB/s take 2 us, the kernel's median is 4.
    assert line(kernel, "| forward, 8192").endswith("| 4.0 | 2.0 | 4.0 | 0.50 | 100.0 |")


def test_fp8_has_twice_the_peak_and_no_peak_gives_no_mfu(monkeypatch):
    cell = Cell("te", "fp8", "live", "coactivation")
    monkeypatch.setattr(gpu_report, "all_cells", lambda: [cell])
    results = RESULTS | {"cells": {cell.name: {"measured": MEASURED, "run": RUN}}}
    assert "| 5.4% |" in gpu_report.section(results)  # 107 of 2 x 989
    unknown = gpu_report.section(results | {"machine": MACHINE | {"peak_tflops": None}})
    assert "not known: no MFU is stated" in unknown and "%" not in line(unknown.split("### Throughput")[1], "| te")
    assert (gpu_report.peak_of("NVIDIA H100 PCIe"), gpu_report.peak_of("NVIDIA H100 80GB HBM3")) == (756, 989)
    assert gpu_report.peak_of("NVIDIA GeForce GTX 1080") is None


def test_the_page_is_what_was_measured_or_says_not_run_yet_in_every_row():
    kept = REPO / "docs/gpu.json"
    page = PAGE.read_text()
    section = gpu_report.section(json.loads(kept.read_text()) if kept.is_file() else None)
    assert gpu_report.with_results(page, section) == page
    empty = gpu_report.section(None)
    rows = [row for row in empty.splitlines() if row.startswith("| ") and "---" not in row]
    assert len([row for row in rows if "not run yet" in row]) == len(rows) - 4 == 2 * 18 + 3 * 5 + 2  # four heads


def test_results_replace_themselves_alone_and_a_page_without_marks_is_refused():
    page = f"before\n{gpu_report.BEGIN}\nold\n{gpu_report.END}\nafter\n"
    assert gpu_report.with_results(page, "new\n") == page.replace("old", "new")
    with pytest.raises(ValueError, match="must hold"):
        gpu_report.with_results("before\n", "new")


def test_what_a_machine_cannot_measure_says_why_in_its_row(one_cell):
    fp8, engine = Cell("te", "fp8", "live", "recipe"), Cell("te", "bf16", "live", "recipe")
    assert why_skipped(engine, False, True, False) == "Transformer Engine is not installed"
    assert "no FP8" in why_skipped(fp8, True, False, False) and why_skipped(fp8, True, True, False) is None
    local = Cell("local", "bf16", "live", "recipe")
    assert [why_skipped(local, *with_engine) is None for with_engine in ((0, 1, 0), (1, 1, 0), (1, 1, 1))] == [1, 0, 1]
    skipped = gpu_report.section(RESULTS | {"cells": {CELL.name: {"skipped": "skipped: no reason", "run": RUN}}})
    assert skipped.count("skipped: no reason") == 4  # both tables, and each k'


def test_what_was_measured_before_a_failure_stands_and_the_rest_says_why(one_cell):
    part = {name: MEASURED[name] for name in ("step", "tokens", "flops", "mean_k", "load")}
    failed = RESULTS | {"cells": {CELL.name: {"measured": part, "failed": "failed: out of memory", "run": RUN}}}
    _, steps, throughput, sweep, _ = gpu_report.section(failed).split("\n### ")
    assert line(steps, "| te").endswith("| 1.10 | 1.25 | - | - |") and "| 2,143 |" in line(throughput, "| te")
    assert sweep.count("failed: out of memory") == 2


def test_words_choose_cells():
    assert {cell.name for cell in chosen(["fp8", "recipe"], False)} == {
        "te-fp8-balanced-recipe",
        "te-fp8-live-recipe",
    }
    assert len(chosen([], False)) == len(all_cells()) == 18 and len(chosen([], True)) == 6
    assert [cell.name for cell in chosen(["mean-k", "local", "live"], False)] == ["local-bf16-live-mean-k"]
    with pytest.raises(ValueError, match="--only fp9: must be one of balanced, bf16, coactivation"):
        chosen(["fp9"], False)
    with pytest.raises(ValueError, match="nothing is all of that"):
        chosen(["local", "fp8"], False)


def test_layers_follow_memory():
    # 4 layers: 4 x (2 x 0.419 x 18 + 3) = 72.3 GB, ends and rest 15.4; one layer: 18.1 + 15.4.
    assert [layers_that_fit(gigabytes * GB) for gigabytes in (30, 40, 85, 192)] == [0, 1, 3, 4]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "no CUDA device"),
        (["--layers", "0"], "--layers 0: must be at least 1"),
        (["--repeats", "2"], "--repeats 2: must be at least 3"),
        (["--peak-tflops", "0"], "--peak-tflops 0: must be at least 1"),
        (["--only", "all"], "--only all: must be one of"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_work(words, told, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", *words])
    monkeypatch.setattr(bench_gpu.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench_gpu, "run_script", None)
    assert bench_gpu.main() == 2
    assert capsys.readouterr().err.startswith(f"bench_gpu.py: error: {told}")


def test_the_command_starts_where_nothing_of_this_is_installed_and_ends_with_status_2_without_a_gpu(tmp_path):
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    hidden.pop("PYTHONPATH", None)
    words = [programs.python(), REPO / "benchmarks/bench_gpu.py", "--quick"]
    done = subprocess.run(words, cwd=tmp_path, env=hidden, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("bench_gpu.py: error: no CUDA device"), done.stderr


@pytest.mark.parametrize("changed", gpu_results.MACHINE)
def test_results_of_another_machine_are_refused_and_stay(changed, tmp_path):
    path = tmp_path / "gpu.json"
    assert gpu_results.results_of(path, MACHINE) == {"machine": MACHINE, "cells": {}, "kernel": None}
    path.write_text(json.dumps(RESULTS))
    stated = MACHINE | {"peak_tflops": 1}
    assert gpu_results.results_of(path, stated) == RESULTS | {"machine": stated}
    with pytest.raises(
        ValueError, match=f"--results {path}: measured with {changed} {MACHINE[changed]}, here it is B2"
    ):
        gpu_results.results_of(path, MACHINE | {changed: "B2"})


def test_a_worse_result_does_not_replace_a_better_one():
    whole, part = {"measured": {"step": 1, "sweep": 2}}, {"measured": {"step": 3}, "failed": "late"}
    skipped, failed = {"skipped": "no FP8"}, {"failed": "early"}
    order = [skipped, failed, part, whole]
    for worse, old in itertools.combinations(order[1:], 2):
        assert gpu_results.better(old, worse) is old and gpu_results.better(worse, old) is old
    assert gpu_results.better(None, skipped) is skipped and gpu_results.better(skipped, failed) is failed
    assert gpu_results.better(whole, again := {"measured": {"step": 4, "sweep": 5}}) is again


def test_each_cell_is_written_before_the_next_begins(tmp_path, monkeypatch):
    """The second cell is the end of the program: what stood and what the first measured is on the page."""
    options = SimpleNamespace(results=tmp_path / "gpu.json", out=tmp_path / "gpu.md", only=[])
    options.out.write_text(PAGE.read_text())
    first, second, old = (Cell("local", "bf16", "live", name) for name in ("mean-k", "recipe", "coactivation"))
    measured = {name: value for name, value in MEASURED.items() if name != "sweep"}
    outcomes = [{"failed": "failed: no kernel"}, {"measured": measured}, KeyboardInterrupt]

    def run_script(*_):
        if (outcome := outcomes.pop(0)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return outcome

    monkeypatch.setattr(bench_gpu, "run_script", run_script)
    monkeypatch.setattr(bench_gpu, "find_spec", lambda name: None)
    monkeypatch.setattr(bench_gpu.torch.cuda, "get_device_capability", lambda: (9, 0))
    results = {"machine": MACHINE, "cells": {old.name: {"measured": measured, "run": RUN}}, "kernel": None}
    with pytest.raises(KeyboardInterrupt):
        bench_gpu.measure([first, second], options, results, RUN | {"pairs": 10})
    kept = json.loads(options.results.read_text())
    assert {name: cell["run"]["pairs"] for name, cell in kept["cells"].items()} == {old.name: 30, first.name: 10}
    page = options.out.read_text()
    assert page.count("| 157.6 |") == 2 and "failed: no kernel" in page and "10 pairs of steps: 1 cells" in page


TINY = {"train_iters": 1000, "log_interval": 1000000, "no_create_attention_mask_in_dataloader": True, "bf16": True}
MEAN = {"emoe_selection": "prefix", "emoe_k_schedule": "uniform", "emoe_k_min": 1, "emoe_k_max": 3}


@pytest.mark.slow
def test_a_cell_is_measured_by_the_same_program_in_host_mode(one_cell, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more of them wait for one another, at work, on a busy machine
    words = [*flags(**TINY, **MEAN, emoe_k_draw="layer"), "--host-mode"]
    cell = Cell("te", "bf16", "live", "coactivation", (2, 6), tuple(words))
    result = bench_gpu.run_script("measure_gpu", cell.job(0, pairs=3, rounds=2), tmp_path / "log")
    assert "measured" in result and "failed" not in result, result
    log = (tmp_path / "log").read_text()
    assert "megatron-core" in log and "still in memory" not in log
    measured = result["measured"]
    assert [len(measured["step"][name]) for name in ("stock", "elastic")] == [3, 3]
    assert all(0 < seconds < 60 for times in measured["step"].values() for seconds in times)
    assert measured["tokens"] == 8 * 16 and measured["routers_per_step"] == 2 * 4 and 1 < measured["mean_k"] < 3
    # Per token and layer at k: attention 4 x 32 x 32, router 32 x 8, k experts of 3 x 32 x 16; the head 32 x 96; and
    # attention itself 2 x 32 for each of (16 + 1) / 2 tokens. Two FLOPs each, thrice in training.
    forward = 2 * (2 * (4 * 1024 + 256 + 2 * 1536) + 3072) + 2 * 2 * 2 * 32 * 17 // 2
    assert measured["flops"]["stock"] == 3 * 128 * forward
    per_k = 3 * 128 * 2 * 2 * 1536
    assert measured["flops"]["elastic"] == pytest.approx(3 * 128 * forward + per_k * (measured["mean_k"] - 2))
    for k in (2, 6):
        assert measured["sweep"][str(k)]["rows"] == k and len(measured["sweep"][str(k)]["seconds"]) == 2
    assert all(1 <= measured["load"][name] <= 8 for name in ("stock", "elastic"))  # 8: all rows at one expert
    complete = {"measured": measured | {"sweep": MEASURED["sweep"]}, "run": RUN}
    assert "not run yet" not in gpu_report.section(RESULTS | {"cells": {CELL.name: complete}})


def test_local_layers_have_every_flag_that_the_core_needs_without_transformer_engine():
    words = Cell("local", "bf16", "live", "recipe").command(1)
    for flag, value in host_flags.LOCAL_LAYERS.items():
        assert not value or words[words.index(flag) + 1] == value
        assert flag in words and flag in ON_DEVICE["cuda"], flag
    engine = Cell("te", "bf16", "live", "recipe").command(1)
    assert engine[engine.index("--transformer-impl") + 1] == "transformer_engine"
    assert "--no-rope-fusion" not in engine and "--no-gradient-accumulation-fusion" in engine


SMALL = """--num-layers 1 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 16 --moe-ffn-hidden-size 16
    --seq-length 16 --vocab-size 96 --num-experts 32 --global-batch-size 2 --host-mode"""


@pytest.mark.slow
def test_the_flags_of_local_layers_run_in_host_mode_at_a_small_size(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_gpu, "PYTHON", programs.python())
    cell = Cell("local", "bf16", "balanced", "recipe")
    words = ["gloo" if word == "nccl" else word for word in cell.command(1)] + SMALL.split()
    result = bench_gpu.run_script(
        "measure_gpu", {"flags": words, "pairs": 3, "rounds": 1, "sweep": []}, tmp_path / "log"
    )
    assert "measured" in result, result
    assert 8 < result["measured"]["mean_k"] < 24 and result["measured"]["tokens"] == 2 * 16


def taken(words: list[str]) -> dict[str, str]:
    """What Megatron makes of a GPU's flags; it asks for GPU and Transformer Engine while it reads them."""
    from megatron.core.transformer import transformer_config
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_emoe.model.layer_spec import elastic_model_config
    from megatron_emoe.training.arguments import parse

    host_mode.skip_dataset_helper_build()
    transformer_config.is_te_min_version = lambda *args, **kwargs: True
    sys.argv = ["measure_gpu.py", *words]
    args = parse()
    stock, elastic = gpt_config_from_args(args).transformer, elastic_model_config(args).transformer
    names = ("fp8", "bf16", "moe_grouped_gemm", "transformer_impl", "moe_router_force_load_balancing", "num_layers")
    assert all(getattr(stock, name) == getattr(elastic, name) for name in names)
    return {name: str(getattr(elastic, name)) for name in (*names, "emoe_selection", "emoe_qk_norm")}


@pytest.mark.parametrize("cell", [Cell("te", "fp8", "live", "coactivation"), Cell("te", "bf16", "balanced", "mean-k")])
def test_megatron_takes_the_flags_of_transformer_engine_s_layers(cell):
    (settings,) = run_ranks(taken, 1, [*cell.command(3), "--no-rope-fusion"])  # that fusion is imported while reading
    expected = {"fp8": "hybrid" if cell.precision == "fp8" else "None", "num_layers": "3", "moe_grouped_gemm": "True"}
    expected |= {"moe_router_force_load_balancing": str(cell.routing == "balanced"), "emoe_qk_norm": "core"}
    assert settings.items() >= expected.items() and settings["transformer_impl"] == "transformer_engine"


def test_a_cell_that_fails_says_so(tmp_path):
    job = {"flags": ["--host-mode", "--fp8-format", "hybrid"], "pairs": 3, "rounds": 1, "sweep": []}
    result = bench_gpu.run_script("measure_gpu", job, tmp_path / "log")
    assert result.keys() == {"failed"}
    assert result["failed"].startswith("failed: ValueError: --fp8-format hybrid: not possible")


def test_a_measurement_that_hangs_is_ended(tmp_path):
    result = bench_gpu.run_script("measure_gpu", {"flags": []}, tmp_path / "log", limit=0.05)
    assert result == {"failed": "failed: no end within 0.05 s"}


@pytest.mark.slow
def test_the_kernel_is_measured_by_the_same_program_in_triton_s_interpreter(tmp_path):
    pytest.importorskip("triton")
    asked = {"tokens": [16], "samples": 2, "calls": 1, "copied": 4_000_000, "device": "cpu"}
    result = bench_gpu.run_script("measure_gpu_router", asked, tmp_path / "log", {"TRITON_INTERPRET": "1"})
    (forward, both) = result["measured"]["passes"].values()
    # Logits and probabilities of 4 bytes, a map of one; 25 random numbers and a pool size of 4. Back: 3 of 4, a map.
    assert forward["bytes"] == 16 * (64 * 9 + 4 * 26) and both["bytes"] - forward["bytes"] == 16 * 64 * 13
    assert result["measured"]["copy"] > 0 and all(len(both[of]) == 2 for of in ("kernel", "reference"))
