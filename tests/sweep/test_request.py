"""What a sweep refuses before anything is built, the budgets that it lists, and how its cells are filled."""

import re
import sys
from argparse import ArgumentTypeError, Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.training.arguments import parse_args, validate_args

from megatron_emoe.settings.flag_types import per_layer
from megatron_emoe.settings.refusal import NoNumber
from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.curve import SweepData
from megatron_emoe.sweep.evidence import matrices_path
from megatron_emoe.sweep.fill import fill
from megatron_emoe.sweep.request import _check_ks, _training, budgets, by_layer
from megatron_emoe.training.arguments import add_arguments
from megatron_emoe.training.evaluation import Digest
from tests import hf_models, sweeps
from tests.distributed import run_ranks
from tests.sweep.test_curve import make_result
from tests.sweep_results import make_cell
from tests.sweeps import Answer
from tests.tiny import flags

TWO = "torchrun --nproc-per-node 2"
HOST = "--transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion".split()
GROUPS = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}  # 4 groups of 2 experts, 2 are used


def asked(monkeypatch, ks: list[int], lists: list[tuple[int, ...]] = (), **changes) -> Namespace:
    monkeypatch.setattr(sys, "argv", ["sweep_k.py", *flags(**changes), *HOST])
    args = parse_args(add_arguments)
    validate_args(args)
    args.k, args.k_per_layer, args.layer_sensitivity = ks, list(lists), False
    return args


@pytest.mark.parametrize(
    ("ks", "lists", "changes", "message"),
    [
        ([2, 9], [], {}, "--k 9: must lie in [1, 8], the number of experts"),
        ([0], [], {}, "--k 0: must lie in [1, 8], the number of experts"),
        ([2, 5], [], GROUPS, "--k 5: 2 groups of 2 experts hold only 4"),
        ([1, 2], [], GROUPS, "--k 1: must be at least --moe-router-group-topk 2, or a group has no score"),
        (
            [2, 4],
            [],
            {"moe_router_load_balancing_type": "sinkhorn"},
            "--k cannot be combined with --moe-router-load-balancing-type sinkhorn: it chooses the experts itself",
        ),
        ([2], [(2, 9)], {}, "--k-per-layer 9: must lie in [1, 8], the number of experts"),
        ([], [(2, 5)], GROUPS, "--k-per-layer 5: 2 groups of 2 experts hold only 4"),
        ([2], [(2, 4), (2, 4, 4)], {}, "--k-per-layer 2,4,4: 3 numbers; the model has 2 MoE layers"),
        ([], [], {}, "--k is not given, nor --k-per-layer: which numbers of active experts?"),
    ],
)
def test_what_cannot_run_at_another_k_is_refused(monkeypatch, ks, lists, changes, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _check_ks(asked(monkeypatch, ks, lists, **changes), 2)


def test_a_k_asked_for_twice_is_fine(monkeypatch):
    _check_ks(asked(monkeypatch, [4, 2, 4], [(1, 8), (1, 8)]), 2)


def test_a_list_of_a_k_per_layer():
    assert per_layer("2,4,4") == (2, 4, 4)
    with pytest.raises(ArgumentTypeError, match="'2,x': must be whole numbers with commas"):
        per_layer("2,x")
    assert by_layer(3, [2, 5]) == 3 and by_layer((1, 4), [2, 5]) == {2: 1, 5: 4}


def ask(**changes) -> Namespace:
    extras = dict.fromkeys(("layer_sensitivity", "evidence", "agreement", "latency"), False)
    return Namespace(**{"k": [2, 4], "k_per_layer": []} | extras | changes)


def test_budgets_are_listed_once():
    result = make_result({}, num_moe_layers=2, schema=2)
    assert budgets(ask(k=[4, 1, 4], k_per_layer=[(1, 2), (4, 4)]), result) == [4, 1, (1, 2), (4, 4)]
    # Sensitivity: against k = 2 everywhere, which is measured too.
    listed = budgets(ask(k=[4, 1], layer_sensitivity=True, k_per_layer=[(1, 2)]), result)
    assert listed == [4, 1, (1, 2), 2, (4, 2), (2, 4), (2, 1)]


@pytest.mark.parametrize(
    ("stored", "training"),
    [
        ({}, {}),  # stock Megatron
        ({"emoe_selection": "topk", "emoe_eval_k": [2, 4], "emoe_qk_norm": "full"}, {}),
        ({"emoe_selection": "prefix", "emoe_k_max": 8}, {"--emoe-selection": "prefix", "--emoe-k-max": "8"}),
        ({"emoe_selection": "topk", "emoe_tail_scale": ["4:0.5", "8:0.1"]}, {"--emoe-tail-scale": "4:0.5 8:0.1"}),
    ],
)
def test_elastic_settings(stored, training):
    assert _training(Namespace(**stored)) == training


class Pretended:
    """A model whose measurements are marked and counted."""

    digest = Digest("a" * 64, ("aa", "bb"))

    def __init__(self) -> None:
        self.asked: list[tuple] = []

    def cell(self, k):
        self.asked.append(("cell", k))
        return make_cell(k, 1.5)

    def evidence(self, k):
        self.asked.append(("evidence", k))
        return {"router_entropy": {"1": 0.5}, "coverage": None}, {1: torch.eye(2)}

    def agreement(self, k):
        self.asked.append(("agreement", k))
        return {"agreement": 0.5, "kl_to_k": 0.25}

    def latency(self, k):
        self.asked.append(("latency", k))
        return {"latency_ms_batch1": None, "latency_ms_large": 2.0}


def test_a_sweep_measures_what_is_missing_and_no_more(tmp_path):
    out, start = tmp_path / "a.json", make_result({}, schema=2)
    model = Pretended()
    result = fill(ask(out=out), start, model, writes=True)
    assert model.asked == [("cell", 2), ("cell", 4)] and sweep.load(out) == result
    assert not matrices_path(out).exists()
    model = Pretended()
    result = fill(ask(out=out, k=[4, 1], evidence=True), sweep.resume(out, start), model, writes=True)
    assert model.asked == [("evidence", 4), ("cell", 1), ("evidence", 1)]
    model = Pretended()
    result = fill(ask(out=out, k=[4, 2], latency=True), result, model, writes=True)
    assert model.asked == [("latency", 4), ("latency", 2)]
    model = Pretended()
    result = fill(ask(out=out, k=[2], agreement=True), result, model, writes=True)
    assert model.asked == [("agreement", 2)] and sweep.curve(result)[2].kl_to_k == 0.25
    cells = sweep.curve(sweep.load(out))
    assert [cell.router_entropy for cell in cells.values()] == [{"1": 0.5}, None, {"1": 0.5}]
    assert [cell.latency_ms_large for cell in cells.values()] == [None, 2.0, 2.0]
    assert fill(ask(out=out, k=[4], latency=True, evidence=True), result, Pretended(), writes=True) == result


class Spoilt(Pretended):
    """Nothing is measured: the loss is no number, or the disk is full."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def cell(self, k):
        if k == 4:
            raise self.error
        return super().cell(k)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (NoNumber("the loss is nan"), "--k 4: the loss is nan"),
        (OSError(28, "No space left on device"), "--out OUT: cannot be written (No space left on device)"),
    ],
)
def test_what_goes_wrong_ends_with_status_1_and_keeps_the_finished_cells(tmp_path, capsys, error, told):
    out = tmp_path / "a.json"
    with pytest.raises(SystemExit) as left:
        fill(ask(out=out), make_result({}, schema=2), Spoilt(error), writes=True)
    assert left.value.code == 1 and capsys.readouterr().err.splitlines()[-1].endswith(told.replace("OUT", str(out)))
    assert list(sweep.curve(sweep.load(out))) == [2]


def test_a_rank_that_does_not_write_writes_nothing(tmp_path):
    result = fill(ask(out=tmp_path / "a.json", evidence=True), make_result({}, schema=2), Pretended(), writes=False)
    assert len(result.cells) == 2 and not list(tmp_path.iterdir())


def test_other_data_under_the_same_name_end_the_sweep(tmp_path, capsys):
    data = SweepData(path=["held-out"], tokens=4096, digest="b" * 64)
    with pytest.raises(SystemExit) as left:
        fill(ask(out=tmp_path / "a.json"), make_result({2: 1.5}, schema=2, data=data), Pretended(), writes=True)
    assert left.value.code == 2
    assert f"--out {tmp_path}/a.json: top-k: data.digest: {'b' * 64}; the data now give" in capsys.readouterr().err


def refuse(folder: Path) -> dict[str, Answer]:
    """Wrong calls of the tool, on one rank."""
    hf = hf_models.save("ernie4_5_moe", folder / "hf")
    data = sweeps.write_tokens(folder / "data")
    hf_flags = {"hf": str(hf), "k": [2]}

    def call(**changes) -> Answer:
        out = changes.pop("out", folder / "a.json")
        return sweeps.run_tool("sweep_k", *sweeps.flags(data, out, **hf_flags | changes))

    return {
        "both": call(load=str(folder)),
        "neither": call(hf=None),
        "no model": call(hf=str(folder)),
        "list": call(k_per_layer=["2,2,2"]),
        "coverage": call(coverage_at_least=0),
        "out": call(out=folder / "none/a.json"),
        "batch": call(micro_batch_size=128),
        "data": call(micro_batch_size=128, max_eval_tokens=128 * 16),
        "combine": call(emoe_combine="raw"),
        "tail": call(emoe_tail_scale=["9:0.5"]),
        "ranks": call(expert_model_parallel_size=2),
        "label": call(label="two\nlines"),
        "folder": call(out=folder),
    }


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> tuple[Path, dict[str, Answer]]:
    folder = tmp_path_factory.mktemp("refused")
    return folder, run_ranks(refuse, 1, folder)[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("both", "--hf FOLDER/hf excludes --load FOLDER: one model at a time"),
        ("neither", "--load is not given: which checkpoint?"),
        ("no model", "FOLDER/config.json: no such file; FOLDER is no Hugging Face model"),
        ("list", "--k-per-layer 2,2,2: 3 numbers; the model has 2 MoE layers"),  # of three layers, the first is dense
        ("coverage", "--coverage-at-least 0: must be at least 1"),
        ("out", "--out FOLDER/none/a.json: the folder FOLDER/none does not exist"),
        ("batch", "--max-eval-tokens 1024: 64 sequences of 16 tokens, fewer than one batch of 128"),
        ("data", "--data-path: 109 sequences of 16 tokens, fewer than one batch of 128"),
        ("combine", "--emoe-combine has no meaning with --hf: transformers runs the model by its own code"),
        ("ranks", f"--expert-model-parallel-size 2: needs a multiple of 2 ranks, here is 1 process: {TWO}"),
        ("label", "--label 'two\\nlines': must be printable text on one line"),
        ("folder", "--out FOLDER: is a folder; must be a file"),
        ("tail", "--emoe-tail-scale 9:0.5: k' must lie in [3, 8], above k"),
    ],
)
def test_one_message_and_status_2(refused, name, message):
    folder, answers = refused
    answer = answers[name]
    assert answer.status == 2, answer
    assert answer.err.replace(str(folder), "FOLDER").splitlines()[-1] == f"sweep_k.py: error: {message}"
    assert not (folder / "a.json").exists()


def test_transformers_run_in_one_process(monkeypatch):
    from megatron_emoe.sweep.request import _hugging_face

    args = SimpleNamespace(world_size=2, hf="FOLDER")
    with pytest.raises(ValueError, match="^--hf FOLDER: transformers runs in one process, here are 2: no torchrun$"):
        _hugging_face(args)
