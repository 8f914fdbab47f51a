"""A Megatron sweep in other parallel layouts: the same data, losses, rows, costs and evidence as on one rank."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.curve import SweepCell
from tests import hf_models, sweeps
from tests.distributed import run_ranks
from tests.sweeps import Answer

pytestmark = pytest.mark.slow

LAYOUTS = {
    "one": (1, {}),
    "expert": (2, {"expert_model_parallel_size": 2}),
    "pipeline": (2, {"pipeline_model_parallel_size": 2}),
}
TRAINED = torch.ones(8, 8).long().triu(-2).tril(2) * 3  # neighbours, three tokens each


def prepare(folder: Path) -> None:
    from megatron_emoe.hf.import_model import import_model

    import_model(hf_models.save("olmoe", folder / "hf"), folder / "megatron", report=lambda _line: None)
    save_file({"layer.1": TRAINED, "layer.2": TRAINED // 3}, folder / "megatron/coactivation.safetensors")
    sweeps.write_tokens(folder / "data")


def run_sweep(folder: Path, name: str) -> Answer:
    layout = LAYOUTS[name][1] | {"load": str(folder / "megatron"), "k": [3], "layer_sensitivity": True}
    extra = {"evidence": True, "latency": True, "coverage_at_least": 2}
    return sweeps.run_tool("sweep_k", *sweeps.flags(folder / "data", folder / f"{name}.json", **layout, **extra))


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, dict[str, list[Answer]]]:
    folder = tmp_path_factory.mktemp("layouts")
    run_ranks(prepare, 1, folder)
    return folder, {name: run_ranks(run_sweep, ranks, folder, name) for name, (ranks, _) in LAYOUTS.items()}


def cells(folder: Path, name: str) -> tuple[SweepCell, ...]:
    return sweep.load(folder / f"{name}.json").cells


def test_every_rank_ends_well(swept):
    for answers in swept[1].values():
        assert [answer.status for answer in answers] == [None] * len(answers), answers


@pytest.mark.parametrize("name", ["expert", "pipeline"])
def test_layouts_agree(swept, name):
    folder, _ = swept
    one, other = (sweep.load(folder / f"{each}.json") for each in ("one", name))
    assert one.data == other.data and one.data.digest is not None
    assert [cell.k for cell in one.cells] == [2, 3, (2, 3), (3, 2)] == [cell.k for cell in other.cells]
    for mine, theirs in zip(one.cells, other.cells, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, abs=2e-6)
        assert mine.block_losses == pytest.approx(theirs.block_losses, abs=1e-5)  # sequence by sequence, on any rank
        assert (mine.ranks, theirs.ranks) == (1, 2)
        assert mine.router_entropy == pytest.approx(theirs.router_entropy, abs=1e-6)
        for field in ("tokens", "rows_per_layer", "active_params", "flops_per_token", "load", "coverage"):
            assert getattr(mine, field) == getattr(theirs, field), field


@pytest.mark.parametrize("name", ["expert", "pipeline"])
def test_matrices_agree(swept, name):
    folder, _ = swept
    one, other = (load_file(folder / f"{each}.coactivation.safetensors") for each in ("one", name))
    assert one.keys() == other.keys() and len(one) == 8
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_coverage_follows_from_the_matrices(swept):
    folder, _ = swept
    matrices = load_file(folder / "one.coactivation.safetensors")
    for cell in cells(folder, "one"):
        k = "-".join(map(str, cell.k)) if isinstance(cell.k, tuple) else str(cell.k)
        used = matrices[f"k{k}.layer.1"].triu(1) > 0
        assert cell.coverage == {"1": (used & (TRAINED >= 2)).sum().item() / used.sum().item(), "2": 0.0}
        assert 0 < cell.coverage["1"] < 1  # layer 2: one token each, two are asked for


@pytest.mark.parametrize("name", LAYOUTS)
def test_latency_is_measured_in_every_layout(swept, name):
    for cell in cells(swept[0], name):
        assert 0 < cell.latency_ms_large < cell.latency_ms_batch1 < 1e4
