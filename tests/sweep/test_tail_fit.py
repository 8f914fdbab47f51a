"""The search for a(k') and the two halves of its data, without a model."""

from argparse import Namespace

import pytest

from megatron_emoe.sweep.tail_fit import TailFit, _halves, minimise


def test_the_minimum_may_lie_inside_or_at_either_end():
    inside = minimise(lambda a: 2 + (a - 0.3) ** 2, 1.0)  # minimum 2 at 0.3
    assert inside == (pytest.approx(0.3, abs=0.05), pytest.approx(2, abs=0.0025))
    assert minimise(lambda a: 1 + a, 1.0) == (0.0, 1.0)
    assert minimise(lambda a: 3 - a, 1.0) == (1.0, 2.0)


class Pretended(TailFit):
    """a = 0 at k' is not plain top-k, as with group-limited routing: 2 - a / 2 at k', 1 at k."""

    def __init__(self) -> None:
        self.judging = self.fitting = {}
        self.at_k = self.loss({}, 2, 1.0)

    def loss(self, batches, k, scale):
        return 1.0 if k == 2 else 2 - scale / 2


def test_the_loss_at_zero_is_measured():
    found = Pretended().fit(6, 1.0)
    assert (found.scale, found.fit, found.at_k) == (1.0, 1.5, 1.0)


@pytest.mark.parametrize(
    ("steps", "judged", "fitted"),
    [(2, [0, 1], [2, 3]), (3, [0, 1], [4, 5]), (5, [0, 1, 2, 3], [6, 7, 8, 9])],
)
def test_halves_leave_the_middle_batch_out(steps, judged, fitted):
    # Two micro-batches each. A sweep of half of five batches, with another batch size, reads a part of the third.
    batches = {0: list(range(2 * steps)), 1: []}
    assert _halves(batches, steps) == ({0: judged, 1: []}, {0: fitted, 1: []})


@pytest.mark.parametrize(("tokens", "cause"), [(4096, "--data-path"), (1008, "--max-eval-tokens 1008")])
def test_too_few_for_two_batches(monkeypatch, tokens, cause):
    import megatron_emoe.sweep.tail_fit as module

    args = Namespace(max_eval_tokens=tokens, seq_length=16, eval_global_batch_size=32)
    for name in ("initialize_megatron", "elastic_model_config", "load_model", "ElasticLoop", "Evaluator"):
        monkeypatch.setattr(module, name, lambda *_: Namespace(transformer=None, forward=None))
    monkeypatch.setattr(module, "read_batches", lambda _: ({}, 1, "digest"))
    with pytest.raises(ValueError, match=f"^{cause}: too few for two batches, one for each half$"):
        TailFit(args)
