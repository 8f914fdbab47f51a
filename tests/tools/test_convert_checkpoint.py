"""tools/convert_checkpoint.py as a user calls it: each verb, its exit status, its one message."""

import importlib
import json
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import hf_models
from tests.distributed import REPO, run_ranks
from tests.sweeps import Answer, run_tool

pytestmark = pytest.mark.slow

call = partial(run_tool, "convert_checkpoint")


def session(folder: Path) -> dict[str, Answer]:
    """What a user does with a checkpoint, right and wrong, on one rank."""
    hf = hf_models.save("olmoe", folder / "hf", tokenizer=True)
    other = hf_models.save("olmoe", folder / "other", seed=1)
    answers = {
        "import": call("import", "--hf", str(hf), "--out", str(folder / "megatron")),
        "again": call("import", "--hf", str(hf), "--out", str(folder / "megatron")),
        "quick": call("import", "--hf", str(other), "--out", str(folder / "quick"), "--no-verify", "--workers", "1"),
        "no hf": call("import", "--hf", str(folder), "--out", str(folder / "never")),
        "workers": call("import", "--hf", str(hf), "--out", str(folder / "never"), "--workers", "0"),
        "verify": call(*_verify(hf, folder / "megatron"), "--k", "1", "4", "--json", str(folder / "verify.json")),
        "text": call(*_verify(hf, folder / "megatron"), "--text", _text(folder), "--bf16"),
        "wrong": call(*_verify(hf, folder / "quick")),
        "k": call(*_verify(hf, folder / "megatron"), "--k", "9"),
        "json out": call(*_verify(hf, folder / "megatron"), "--json", str(folder / "no/a.json")),
        "inspect": call("inspect", str(folder / "megatron")),
        "json": call("inspect", str(hf), "--json"),
        "export": call("export", "--megatron", str(folder / "megatron"), "--out", str(folder / "back"), "--k", "3"),
        "nothing": call("export", "--megatron", str(folder / "empty"), "--out", str(folder / "never")),
    }
    return answers


def _verify(hf: Path, megatron: Path) -> list[str]:
    return ["verify", "--hf", str(hf), "--megatron", str(megatron)]


def _text(folder: Path) -> str:
    (folder / "text.txt").write_text(" ".join(f"w{n % 120}" for n in range(4, 700)))
    return str(folder / "text.txt")


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> tuple[Path, dict[str, Answer]]:
    folder = tmp_path_factory.mktemp("session")
    return folder, run_ranks(session, 1, folder)[0]


def test_the_right_calls_succeed(answers):
    folder, given = answers
    failed = {name: given[name] for name in ("import", "quick", "verify", "text", "inspect", "json", "export")}
    assert not {name: answer for name, answer in failed.items() if answer.status != 0}
    assert not (folder / "never").exists()


def test_an_import_checks_every_layer_and_prints_the_flags(answers):
    folder, given = answers
    text = given["import"].out
    assert "layer 1 at k = 8: largest relative difference" in text
    assert (folder / "megatron/model.args").read_text().rstrip() in text
    assert "largest relative difference" not in given["quick"].out


def test_a_comparison_is_printed_and_written(answers):
    folder, given = answers
    assert "fp32: the same model" in given["verify"].out
    assert [row["k"] for row in json.loads((folder / "verify.json").read_text())["rows"]] == [1, 4]
    assert "bf16: the same model" in given["text"].out


def test_models_that_differ_end_with_status_1(answers):
    assert answers[1]["wrong"].status == 1
    assert "fp32: NOT the same model" in answers[1]["wrong"].out


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("again", "convert_checkpoint.py import: error: FOLDER/megatron: is not empty; nothing is overwritten"),
        (
            "no hf",
            "convert_checkpoint.py import: error: FOLDER/config.json: no such file; FOLDER is no Hugging Face model",
        ),
        ("k", "convert_checkpoint.py verify: error: --k 9: must lie in [1, 8], the number of experts"),
        (
            "json out",
            "convert_checkpoint.py verify: error: --json FOLDER/no/a.json: the folder FOLDER/no does not exist",
        ),
        ("nothing", "convert_checkpoint.py export: error: --megatron FOLDER/empty: no such folder"),
    ],
)
def test_one_message_and_status_2(answers, name, message):
    folder, given = answers
    assert given[name].status == 2
    assert given[name].err.replace(str(folder), "FOLDER").splitlines()[-1] == message


def test_workers_are_checked(answers):
    assert answers[1]["workers"].status == 2
    assert "--workers 0: must be a whole number of at least 1" in answers[1]["workers"].err


def test_inspection_is_text_or_json(answers):
    folder, given = answers
    assert f"{folder}/megatron: Megatron checkpoint (torch_dist)" in given["inspect"].out
    assert json.loads(given["json"].out)["architecture"] == "olmoe"


@pytest.mark.parametrize("verb", ["import", "export", "verify", "inspect"])
def test_only_what_goes_on_says_so_when_it_is_interrupted(verb, monkeypatch, capsys):
    def interrupt(chosen: Namespace) -> None:
        raise KeyboardInterrupt

    words = {"import": "--hf A --out B", "export": "--megatron A --out B", "verify": "--hf A --megatron B"}
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    convert_checkpoint = importlib.import_module("convert_checkpoint")
    monkeypatch.setattr(convert_checkpoint, "_check", interrupt)
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", verb, *words.get(verb, "A").split()])
    assert convert_checkpoint.main() == 130
    again = ": the same command goes on where it stopped" if verb in ("import", "export") else ""
    assert capsys.readouterr().err == f"interrupted{again}\n"


def test_the_exported_model_has_the_k_asked_for_and_the_same_weights(answers):
    folder, _ = answers
    assert json.loads((folder / "back/config.json").read_text())["num_experts_per_tok"] == 3
    before = load_file(folder / "hf/model.safetensors")
    after = {}
    for file in (folder / "back").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def swap_halves(folder: Path) -> Answer:
    """A name table with gate and up swapped: the import's own check must find it."""
    from megatron_emoe.hf import architecture

    right = architecture.gated
    architecture.gated = lambda *words, **named: _swapped(right(*words, **named))
    hf = hf_models.save("olmoe", folder / "hf")
    return call("import", "--hf", str(hf), "--out", str(folder / "megatron"))


def _swapped(pieces: list) -> list:
    from dataclasses import replace

    gate, up, down = pieces
    return [replace(gate, hf=up.hf), replace(up, hf=gate.hf), down]


def test_a_wrong_table_is_found_by_the_import_itself(tmp_path):
    (answer,) = run_ranks(swap_halves, 1, tmp_path)
    assert answer.status == 2
    assert "import: error: layer 0 at k = 2" in answer.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
