"""How much of the data is evaluated, the digest that identifies it, and how times are taken."""

import hashlib
import time

import numpy as np
import pytest
import torch

from megatron_emoe.sweep import latency
from megatron_emoe.training.evaluation import OneMask, data_digest, sequences_to_evaluate


@pytest.mark.parametrize(
    ("available", "batch", "sequences"),
    [
        (200, 8, 192),  # three times 64
        (200, 24, 192),  # of 64 and 24 the least common multiple is 192
        (190, 24, 168),  # too few for it: seven batches
        (63, 8, 56),
        (7, 8, 0),
    ],
)
def test_layouts_with_other_batches_evaluate_the_same(available, batch, sequences):
    assert sequences_to_evaluate(available, batch) == sequences


def causal(sequences: int, length: int = 4) -> dict[str, torch.Tensor]:
    """A micro-batch as Megatron's datasets make it, with a mask of its own."""
    mask = torch.ones(sequences, 1, length, length).tril() < 0.5
    return {"tokens": torch.arange(sequences * length).view(sequences, length), "attention_mask": mask}


def test_batches_that_are_kept_share_one_mask_where_masks_are_equal():
    read = [causal(2), causal(2), causal(1), causal(1)]
    one_mask = OneMask(differ=False)
    kept = [one_mask(batch) for batch in read]
    assert [len({id(batch["attention_mask"]) for batch in some}) for some in (kept, read)] == [2, 4]
    for batch, original in zip(kept, read, strict=True):
        assert torch.equal(batch["attention_mask"], original["attention_mask"])
        assert batch["tokens"] is original["tokens"]
    own = OneMask(differ=True)
    assert all(own(batch) is batch for batch in read)
    assert one_mask({"tokens": read[0]["tokens"]}).keys() == {"tokens"}  # a run without masks


def sample(tokens: list[int], labels: list[int], mask: list[float]) -> dict[str, torch.Tensor]:
    return {"tokens": torch.tensor(tokens), "labels": torch.tensor(labels), "loss_mask": torch.tensor(mask)}


DATA = [sample([1, 2], [2, 3], [1.0, 1.0]), sample([4, 5], [5, 6], [1.0, 0.0])]


def test_digest_by_hand():
    expected = hashlib.sha256(np.array([1, 2, 2, 3, 4, 5, 5, -100], dtype="<i8").tobytes()).hexdigest()
    assert data_digest(DATA, 2).whole == expected
    assert (
        data_digest([DATA[0], sample([4, 5], [5, 9], [1.0, 0.0])], 2).whole == expected
    )  # a label that does not count
    narrow = [{name: tensor.to(torch.int32) for name, tensor in each.items()} for each in DATA]
    assert data_digest(narrow, 2).whole == expected


def test_each_sequence_has_a_digest_of_its_own():
    second = hashlib.sha256(np.array([4, 5, 5, -100], dtype="<i8").tobytes()).hexdigest()
    assert data_digest(DATA, 2).sequences[1] == second[:12]
    assert data_digest(DATA[::-1], 2).sequences == data_digest(DATA, 2).sequences[::-1]


def test_digest_tells_data_apart():
    others = [DATA[::-1], [DATA[0], sample([4, 5], [5, 6], [1.0, 1.0])], [DATA[0], sample([4, 6], [5, 6], [1.0, 0.0])]]
    assert len({data_digest(each, 2) for each in (DATA, *others)} | {data_digest(DATA, 1)}) == 5


def test_warm_up_does_not_count_and_one_slow_run_changes_nothing(monkeypatch):
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor)
    clock = iter([0.0, 9.0, 0.0, 8.0, 0.0, 1.0, 0.0, 2.0, 0.0, 7.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert latency.median_seconds(lambda: None, 3) == 2.0


def test_the_slowest_rank_counts(monkeypatch):
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.copy_(torch.tensor([5.0, 3.0, 4.0])))
    assert latency.median_seconds(lambda: None, 3) == 4.0
