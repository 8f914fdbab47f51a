"""The ranges of --profile, as Megatron's trace file shows them; without the flag no class is touched."""

import gzip
import json
from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_emoe.training import profiling
from tests.distributed import run_ranks, torchrun
from tests.tiny import COACTIVATION, flags, train

LAYER = ["emoe.route", "emoe.dispatch", "emoe.dispatch", "emoe.experts", "emoe.combine", "emoe.combine"]
PROFILED = {"profile": True, "use_pytorch_profiler": True, "profile_step_start": 1, "profile_step_end": 3}
LOSSES = {"moe_aux_loss_coeff": 1e-2, "moe_z_loss_coeff": 1e-3}
LAYERS, MICRO_BATCHES, STEPS = 2, 4, 2


def profiled(folder: Path, changes: dict[str, Any]) -> None:
    train(flags(**COACTIVATION, **LOSSES, **PROFILED, tensorboard_dir=folder / "log", **changes))


def ranges(folder: Path) -> list[dict]:
    """Our ranges of the trace, in order of time."""
    with gzip.open(folder / "torch_profile" / "rank-0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    found = [event for event in events if event.get("cat") == "user_annotation" and event["name"].startswith("emoe.")]
    return sorted(found, key=lambda event: event["ts"])


def inside(inner: dict, outer: dict) -> bool:
    return outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]


@pytest.mark.slow
def test_every_range_of_a_layer_is_there_in_order_and_router_losses_lie_within_the_route(tmp_path):
    run_ranks(profiled, 1, tmp_path, {})
    events = ranges(tmp_path)
    losses = [event for event in events if event["name"] == "emoe.router losses"]
    routes = [event for event in events if event["name"] == "emoe.route"]
    assert len(routes) == LAYERS * MICRO_BATCHES * STEPS
    # z-loss, hierarchical, and the core's three kinds of balance, of which two are off but asked.
    assert len(losses) == 5 * len(routes)
    assert all(any(inside(loss, route) for route in routes) for loss in losses)
    named = [event for event in events if event["name"] in LAYER]
    assert [event["name"] for event in named] == LAYER * len(routes)
    assert all(a["ts"] + a["dur"] <= b["ts"] for a, b in zip(named, named[1:], strict=False)), "ranges overlap"
    rest = Counter(event["name"] for event in events if event["name"] not in [*LAYER, "emoe.router losses"])
    assert rest == {"emoe.shared experts": len(routes), "emoe.loss": MICRO_BATCHES * STEPS}


@pytest.mark.slow
def test_a_recomputed_layer_has_its_ranges_twice(tmp_path):
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    run_ranks(profiled, 1, tmp_path, full)
    experts = [event for event in ranges(tmp_path) if event["name"] == "emoe.experts"]
    assert len(experts) == 2 * LAYERS * MICRO_BATCHES * STEPS


def names_without_the_flag() -> tuple[set[str], list[str]]:
    from megatron_emoe.training.profiling import RANGES

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        train(flags(**COACTIVATION, **LOSSES, train_iters=1))
    methods = [getattr(owner, name) for owner in RANGES for name in RANGES[owner]]
    ours = [method.__name__ for method in methods if method.__code__.co_filename.endswith("profiling.py")]
    return {event.key for event in seen.key_averages()}, ours


@pytest.mark.slow
def test_without_the_flag_there_is_no_range():
    ((names, ours),) = run_ranks(names_without_the_flag, 1)
    assert "aten::mm" in names and not [name for name in names if name.startswith("emoe.")]
    assert ours == []


@pytest.mark.slow
def test_a_profile_without_a_folder_is_refused():
    words = flags(profile=True, use_pytorch_profiler=True)
    done = torchrun(1, "pretrain_emoe.py", "--host-mode", *words, check=False)
    told = "pretrain_emoe.py: error: --use-pytorch-profiler: needs --tensorboard-dir"
    assert done.returncode != 0 and told in done.stdout and "Traceback" not in done.stdout.partition(told)[0]


def test_a_profile_for_nsys_is_refused_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="--profile: without --use-pytorch-profiler .* needs a CUDA device"):
        profiling.start(Namespace(profile=True, use_pytorch_profiler=False, tensorboard_dir=None))
