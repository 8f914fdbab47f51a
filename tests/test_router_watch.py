"""The router watch: what counts as trouble, when it ends a run, and a real run that it ends."""

import pytest
import torch

from megatron_emoe import router_watch
from megatron_emoe.router_watch import MARKER, RouterWatch, RoutingFailure, check_marker, troubles
from tests.distributed import run_ranks
from tests.tiny import flags, train

NAN = float("nan")


def values(entropy: list[float], dead: list[float], loss: list[float] | None = None) -> dict[str, torch.Tensor]:
    losses = [-1.0] * len(entropy) if loss is None else loss
    named = {"router entropy": entropy, "dead experts": dead, "hierarchical router loss": losses}
    return {name: torch.tensor(numbers) for name, numbers in named.items()}


def test_what_counts_as_trouble():
    # 5 % of ln 8 = 2.0794 are 0.10397; half of 8 experts are 4.
    assert troubles(values([0.104, 2.0], [4, 0]), [1, 3], 8) == []
    assert troubles(values([0.103, 2.0], [0, 5]), [1, 3], 8) == [
        "layer 1: router entropy 0.103 nats, below 0.104: routing has collapsed to one expert",
        "layer 3: 5 of 8 experts got no token",
    ]
    assert troubles(values([NAN], [8]), [2], 8) == [
        "layer 2: router entropy nan: no finite number",
        "layer 2: 8 of 8 experts got no token",
    ]
    assert troubles(values([1.0], [0], [NAN]), [2], 8) == ["layer 2: router entropy 1: no finite number"]


GOOD, BAD = values([1.0], [0]), values([0.01], [6])


def test_warn_never_ends_a_run_and_off_says_nothing():
    watch = RouterWatch("warn", None)
    lines = [watch.look(BAD, [1], 8, iteration) for iteration in range(10)]
    assert all(line.startswith(" WARNING: layer 1: router entropy 0.01") and "(and 1 more)" in line for line in lines)
    assert watch.look(GOOD, [1], 8, 11) == ""
    assert RouterWatch("off", None).look(BAD, [1], 8, 1) == ""


def test_stop_ends_a_run_after_three_bad_steps_in_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    watch = RouterWatch("stop", str(tmp_path / "save"))
    for found in (BAD, BAD, GOOD, BAD, BAD):
        watch.look(found, [1], 8, 5)
    check_marker(str(tmp_path / "save"))  # nothing is said so far
    with pytest.raises(RoutingFailure, match="watch stop: routing has broken down by iteration 6: layer 1"):
        watch.look(BAD, [1], 8, 6)
    with pytest.raises(ValueError, match=f"the run stopped itself .*iteration 6.*delete .*{MARKER} to go on"):
        check_marker(str(tmp_path / "save"))


def spoil_router() -> None:
    """The routers of this run prefer one expert by far."""
    from megatron_emoe.router import ElasticRouter

    gating = ElasticRouter.gating
    ElasticRouter.gating = lambda self, hidden: gating(self, hidden) + 1e3 * (torch.arange(8) == 2)


RUN = {"expert_model_parallel_size": 2, "train_iters": 8, "global_batch_size": 4, "save_interval": 2, "log_interval": 1}


@pytest.mark.slow
def test_a_collapsed_run_ends_on_every_rank_and_does_not_start_again(tmp_path):
    words = flags(**RUN | {"save": tmp_path, "load": tmp_path, "emoe_router_watch": "stop"})
    with pytest.raises(RuntimeError, match="RoutingFailure: --emoe-router-watch stop"):
        run_ranks(train, 2, words, False, spoil_router, timeout=120)
    reason = (tmp_path / MARKER).read_text()
    assert "routing has broken down by iteration 3: layer 1: router entropy" in reason
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "2"
    with pytest.raises(RuntimeError, match="SystemExit: 2"):
        run_ranks(train, 2, words)
    (tmp_path / MARKER).unlink()
    assert len(run_ranks(train, 2, words)[0].losses) == 6


@pytest.mark.slow
def test_a_collapse_is_warned_of_and_no_more_by_default():
    run = run_ranks(train, 2, flags(**RUN), False, spoil_router)[1]
    assert run.log.count("WARNING: layer 1: router entropy") == 8
    assert router_watch.PATIENCE < 8
