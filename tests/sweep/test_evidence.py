"""Co-activation, coverage, entropy and load of a k' by hand, and the file of the matrices."""

import math
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_emoe.sweep.evidence import (
    Evidence,
    covered,
    matrices_path,
    name_of,
    save_matrices,
    training_pairs,
)

CPU = torch.device("cpu")
# Three tokens on four experts: {0, 1}, {0, 1}, {0, 2}.
MAP_TE = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0]]).bool()
PAIRS_EE = torch.tensor([[3, 2, 1, 0], [2, 2, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])


def evidence() -> Evidence:
    found = Evidence([2, 3], 4, CPU)
    found.add(2, torch.zeros(3, 4), MAP_TE)
    found.add(3, torch.tensor([[100.0, 0, 0, 0]]), torch.tensor([[True, False, False, False]]))
    found.add(2, torch.tensor([[100.0, 0, 0, 0]]), torch.tensor([[False, False, True, True]]))
    return found


def test_pairs_entropy_and_load():
    found = evidence()
    pairs = found.matrices()
    extra = torch.zeros(4, 4).long()
    extra[2:, 2:] = 1
    assert torch.equal(pairs[2], PAIRS_EE + extra) and pairs[3].sum() == 1
    fields = found.fields(None)
    # Layer 2: three indifferent tokens (log 4) and a certain one.
    assert fields["router_entropy"] == pytest.approx({"2": 0.75 * math.log(4), "3": 0.0}, abs=1e-6)
    # Layer 2: experts have 3, 2, 2 and 1 of 8 tokens, the even share is 2. Layer 3: one has all of four shares.
    assert fields["load"]["2"]["min"] == 0.5 and fields["load"]["2"]["max"] == 1.5 and fields["load"]["2"]["p50"] == 1.0
    assert fields["load"]["3"] == {"min": 0.0, "p5": 0.0, "p50": 0.0, "p95": pytest.approx(3.4), "max": 4.0, "dead": 3}
    assert fields["coverage"] is None


def test_coverage_is_the_share_of_the_pairs_used():
    trained = torch.zeros(4, 4).long()
    trained[0, 1] = trained[1, 0] = 5
    trained[2, 3] = trained[3, 2] = 9  # together in training, not here
    # Used here: (0, 1) and (0, 2).
    assert covered({1: PAIRS_EE}, {1: trained}) == {1: 0.5}
    assert covered({1: PAIRS_EE}, {1: trained}, at_least=5) == {1: 0.5}
    assert covered({1: PAIRS_EE}, {1: trained}, at_least=6) == {1: 0.0}
    assert covered({1: PAIRS_EE}, {1: PAIRS_EE}) == {1: 1.0}
    assert covered({1: PAIRS_EE}, {7: trained}) == {1: 0.0}  # nothing was counted in this layer
    assert covered({1: torch.eye(4).long(), 2: PAIRS_EE}, {2: trained}) == {2: 0.5}  # k' = 1 has no pairs
    assert evidence().fields({2: PAIRS_EE})["coverage"] == {"2": 2 / 3}


def test_training_s_file(tmp_path):
    assert training_pairs(tmp_path, 4, 7) is None
    save_file({"layer.2": PAIRS_EE}, tmp_path / "coactivation.safetensors", metadata={"iteration": "7"})
    stored = training_pairs(tmp_path, 4, 7)
    assert stored is not None and stored.keys() == {2} and torch.equal(stored[2], PAIRS_EE)
    with pytest.raises(ValueError, match=r"coactivation.safetensors: layer.2 is \[4, 4\]; the model has 8 experts"):
        training_pairs(tmp_path, 8, 7)
    (tmp_path / "coactivation.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"coactivation.safetensors: cannot be read"):
        training_pairs(tmp_path, 4, 7)


def test_pairs_of_later_training_are_not_the_checkpoint_s(tmp_path):
    """One file lies beside all checkpoints: at --ckpt-step 6 it may hold what only the training after it used."""
    path, said = tmp_path / "coactivation.safetensors", []
    save_file({"layer.2": PAIRS_EE}, path, metadata={"iteration": "7"})
    assert training_pairs(tmp_path, 4, 6, said.append) is None
    assert said == [f"{path}: pairs up to iteration 7, the checkpoint is of 6: coverage stays empty"]
    for iteration in (7, 8, None):
        assert training_pairs(tmp_path, 4, iteration, said.append) is not None
    save_file({"layer.2": PAIRS_EE}, path)  # of a file that says nothing, nothing is known
    assert training_pairs(tmp_path, 4, 6, said.append) is not None and len(said) == 1


def test_matrices_are_added_replaced_and_dropped(tmp_path):
    out = tmp_path / "sweep.json"
    ones = {1: torch.ones(2, 2).long()}
    save_matrices(out, 4, ones, [])
    save_matrices(out, (2, 4), {1: 2 * ones[1]}, [4])
    path = matrices_path(out)
    assert path.name == "sweep.coactivation.safetensors"
    assert load_file(path).keys() == {"k4.layer.1", "k2-4.layer.1"}
    save_matrices(out, 4, {1: 3 * ones[1]}, [4, (2, 4)])
    assert int(load_file(path)["k4.layer.1"][0, 0]) == 3 and len(load_file(path)) == 2
    save_matrices(out, 8, ones, [])  # a sweep that starts anew
    assert load_file(path).keys() == {"k8.layer.1"}
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_names():
    assert (name_of(4), name_of((2, 4, 4))) == ("k4", "k2-4-4")


def test_evidence_adds_up_over_ranks(monkeypatch):
    found = evidence()
    before = found.matrices()[2].clone()
    monkeypatch.setattr(torch, "distributed", SimpleNamespace(all_reduce=lambda tensor: tensor.mul_(2)))
    found.reduce()
    assert torch.equal(found.matrices()[2], 2 * before)
    assert found.fields(None)["router_entropy"]["2"] == pytest.approx(0.75 * math.log(4))
