"""The regret study for one GPU: its flags work, and the program runs, stops and goes on at toy size."""

import json
import sys

import pytest

from megatron_emoe.settings.baseline_rules import check_baseline_settings
from megatron_emoe.settings.elastic_rules import validate_elastic
from tests import programs
from tests.distributed import REPO

sys.path.insert(0, str(REPO / "benchmarks"))
import study_cell
import study_gpu
from study_family import elastic_config


@pytest.mark.parametrize("method", study_gpu.methods(study_gpu.GPU), ids=lambda method: method.name)
def test_a_method_is_a_valid_setting(method):
    settings = elastic_config(method, seed=1)
    validate_elastic(settings, model_k=method.k, num_experts=32)
    check_baseline_settings(settings, model_k=method.k, num_experts=32)


def test_specialists_are_there_for_every_k_of_the_grid():
    ks = {method.k for method in study_gpu.methods(study_gpu.GPU) if not method.flags}
    assert ks == set(study_gpu.regret.GRID)


@pytest.mark.slow
def test_it_runs_stops_and_goes_on_at_toy_size(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_gpu, "PYTHON", programs.python())
    monkeypatch.setattr(study_gpu, "NAMES", ("stratified-teacher",))
    monkeypatch.setattr(study_gpu.study_corpus, "text", lambda: ([str(REPO / "megatron_emoe")], (".py",), []))
    results = tmp_path / "results"
    words = ["study_gpu.py", "--toy", "--work", str(tmp_path), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as left:
        study_gpu.main()
    assert left.value.code == 2 and "run with --prepare first" in capsys.readouterr().err
    study_gpu.prepare(tmp_path, vocabulary=512)

    monkeypatch.setattr(sys, "argv", [*words, "--minutes", "1e-9"])
    study_gpu.main()
    assert "goes on at base-s1" in capsys.readouterr().out and not list(results.iterdir())
    monkeypatch.setattr(sys, "argv", words)
    study_gpu.main()
    assert sorted(path.name for path in results.iterdir()) == ["stratified-teacher-s1.json"]
    record = json.loads((results / "stratified-teacher-s1.json").read_text())
    assert record["teacher"] and [cell["k"] for cell in record["sweep"]["cells"]] == [2, 4, 8, 12]
    started: list[study_cell.Step] = []
    monkeypatch.setattr(study_gpu, "run", lambda step, *_: started.append(step))
    study_gpu.main()
    assert started == []  # nothing is done twice
