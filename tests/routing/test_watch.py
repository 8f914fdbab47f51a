"""The router watch: what counts as trouble, when it ends a run, and a real run that it ends."""

import math

import pytest
import torch

from megatron_emoe.routing import watch as router_watch
from megatron_emoe.routing.metrics import load_entropy, load_statistics
from megatron_emoe.routing.watch import MARKER, RouterWatch, RoutingFailure, check_marker, troubles
from tests.distributed import run_ranks
from tests.tiny import flags, train

NAN = float("nan")


def layer(**changes: float) -> dict[str, torch.Tensor]:
    """A layer with 8 experts, 2 active, in good order: a load of entropy ln 8, each expert with its share."""
    named = {"entropy": 1.0, "load": math.log(8), "dead": 0.0, "loss": -1.0, "largest": 1.0, "k": 2.0} | changes
    full = {
        "entropy": "router entropy",
        "load": "load entropy",
        "dead": "dead experts",
        "loss": "hierarchical router loss",
        "largest": "load max",
        "k": "active k",
    }
    return {full[name]: torch.tensor([value]) for name, value in named.items()}


def both(first: dict, second: dict) -> dict[str, torch.Tensor]:
    return {name: torch.cat([first[name], second[name]]) for name in first}


def test_what_counts_as_trouble():
    # The least entropy of a load with k = 2 of 8 is ln 2; 5 % of the way to ln 8 it is .69315 + .05 * 1.38629 = .76246.
    assert troubles(both(layer(load=0.763), layer(dead=3)), [1, 3], 8) == []
    assert troubles(both(layer(load=0.762), layer(dead=4)), [1, 3], 8) == [
        "layer 1: load entropy 0.762 nats, below 0.762: routing has collapsed to the same experts for all tokens",
        "layer 3: 4 of 8 experts got no token",
    ]
    # 5 % of ln 8 = 2.0794 are .10397. An expert that every token uses has 8 / 2 = 4 times the even share; 95 % is 3.8.
    assert troubles(both(layer(entropy=0.103, largest=3.79), layer(entropy=0.104, largest=4)), [1, 3], 8) == []
    assert troubles(layer(entropy=0.103, largest=3.81), [1], 8) == [
        "layer 1: router entropy 0.103 nats, below 0.104, with one expert in every token's choice: "
        "routing has collapsed to one expert"
    ]
    assert troubles(layer(entropy=NAN, dead=8), [2], 8) == [
        "layer 2: router entropy nan: no finite number",
        "layer 2: 8 of 8 experts got no token",
    ]
    assert troubles(layer(loss=NAN), [2], 8) == ["layer 2: router entropy 1: no finite number"]


def measured(map_TE: torch.Tensor, entropy: float) -> dict[str, torch.Tensor]:
    """What the metrics tracker would find for a layer with this routing map."""
    counts = map_TE.sum(dim=0, keepdim=True).float()
    found = {"router entropy": entropy, "hierarchical router loss": -1.0, "active k": map_TE.sum() / len(map_TE)}
    found = {name: torch.tensor([float(value)]) for name, value in found.items()}
    return found | {"load entropy": load_entropy(counts)} | load_statistics(counts)


def used(tokens: list[list[int]], experts: int) -> torch.Tensor:
    map_TE = torch.zeros(len(tokens), experts, dtype=torch.bool)
    for token, chosen in enumerate(tokens):
        map_TE[token, chosen] = True
    return map_TE


def test_tokens_that_are_each_sure_of_another_expert_are_in_order():
    balanced = used([[token % 64, (token + 7) % 64] for token in range(640)], 64)
    assert troubles(measured(balanced, 0.0), [1], 64) == []


@pytest.mark.parametrize(("k", "experts"), [(1, 8), (2, 8), (4, 8), (6, 8), (7, 8), (8, 64)])
def test_the_same_experts_for_every_token_are_a_collapse_at_any_k(k, experts):
    found = troubles(measured(used([list(range(k))] * 100, experts), 1.0), [1], experts)
    assert len(found) == 2 and "same experts for all tokens" in found[0]
    assert found[1] == f"layer 1: {experts - k} of {experts} experts got no token"


@pytest.mark.parametrize("entropy", [0.0, 1.0])
def test_all_experts_for_every_token_are_in_order(entropy):
    assert troubles(measured(used([list(range(8))] * 100, 8), entropy), [1], 8) == []


GOOD, BAD = layer(), layer(load=0.01, dead=6)


def test_warn_never_ends_a_run_and_off_says_nothing():
    watch = RouterWatch("warn", None)
    lines = [watch.look(BAD, [1], 8, iteration) for iteration in range(10)]
    assert all(line.startswith(" WARNING: layer 1: load entropy 0.01") and "(and 1 more)" in line for line in lines)
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
    with pytest.raises(ValueError, match=f"the run stopped itself .*iteration 6.*delete .*{MARKER}") as refused:
        check_marker(str(tmp_path / "save"))
    # What a job on Slurm may do: --ckpt-step is refused there.
    assert "write its iteration into " in str(refused.value) and "--ckpt-step" not in str(refused.value)


def spoil_router() -> None:
    """The routers of this run prefer one expert by far."""
    from megatron_emoe.routing.router import ElasticRouter

    gating = ElasticRouter.gating
    ElasticRouter.gating = lambda self, hidden: gating(self, hidden) + 1e3 * (torch.arange(8) == 2)


RUN = {"expert_model_parallel_size": 2, "train_iters": 8, "global_batch_size": 4, "save_interval": 2, "log_interval": 1}


@pytest.mark.slow
def test_a_collapsed_run_ends_on_every_rank_and_does_not_start_again(tmp_path):
    words = flags(**RUN | {"save": tmp_path, "load": tmp_path, "emoe_router_watch": "stop"})
    with pytest.raises(RuntimeError, match="RoutingFailure: --emoe-router-watch stop"):
        run_ranks(train, 2, words, False, spoil_router, timeout=120)
    reason = (tmp_path / MARKER).read_text()
    assert "routing has broken down by iteration 3: layer 1: load entropy" in reason
    tracker = tmp_path / "latest_checkpointed_iteration.txt"
    assert tracker.read_text() == "2"
    with pytest.raises(RuntimeError, match="SystemExit: 2"):
        run_ranks(train, 2, words)
    (tmp_path / MARKER).unlink()
    assert len(run_ranks(train, 2, words)[0].losses) == 6


@pytest.mark.slow
def test_a_collapse_is_warned_of_and_no_more_by_default():
    run = run_ranks(train, 2, flags(**RUN), False, spoil_router)[1]
    assert run.log.count("WARNING: layer 1: load entropy") == 8
    assert router_watch.PATIENCE < 8
