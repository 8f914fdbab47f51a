"""The flex dispatcher at every k, around naive stand-ins for DeepEP and HybridEP: what they are given, and that outputs
and gradients are those of the all-to-all dispatcher."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.tiny import COACTIVATION, PREFIX, begin, build_layer, hidden_states, layer_config, start

TOKENS = 16  # of each rank: hidden_states() is 8 x 2
EXPERTS = 8
FLEX = {"moe_token_dispatcher_type": "flex", "moe_router_dtype": "fp32"}
BACKENDS = {name: FLEX | {"moe_flex_dispatcher_backend": name} for name in ("deepep", "hybridep")}
ELASTIC = {"coactivation": COACTIVATION, "prefix": PREFIX}


class Pass(NamedTuple):
    """One forward and backward pass. calls: what the library was given; with recomputation it is called twice."""

    name: str
    k: int
    output: Tensor
    gradients: dict[str, Tensor]
    calls: list[dict[str, Any]]


def passes_of(settings: dict[str, Any], dispatcher: dict[str, Any], parallel: dict[str, int]) -> list[Pass]:
    """Evaluation at k' below, at and above k, then training passes, on one rank."""
    from megatron_emoe.routing.active_k import Place, get_active_k, scheduled_k
    from tests import dispatch_stand_ins as library

    library.install_deep_ep()
    start(**parallel)
    config = layer_config(**settings | parallel | dispatcher)
    layer, x = build_layer(config), hidden_states(seed=11 + torch.distributed.get_rank())
    for weight in layer.experts.parameters():
        weight.data *= 20  # outputs of about 1
    passes = []

    def forward(name: str, k: int) -> None:
        passes.append(Pass(name, k, *library.one_pass(layer, x)))

    layer.eval()
    for k in (1, 2, 3, EXPERTS):
        with get_active_k().evaluating(k):
            forward("evaluation", k)
    layer.train()
    for iteration in range(4):
        begin(iteration)
        forward("training", scheduled_k(layer.config, 2, Place(iteration, 0, layer=1)))
    layer.eval()
    forward("evaluation after training", 2)
    return passes


def compare(flex: list[Pass], plain: list[Pass]) -> None:
    """Outputs and all gradients are those of the other dispatcher."""
    assert [(one.name, one.k) for one in flex] == [(one.name, one.k) for one in plain]
    for ours, theirs in zip(flex, plain, strict=True):
        torch.testing.assert_close(ours.output, theirs.output)
        assert ours.gradients.keys() == theirs.gradients.keys() > {"input", "router.weight"}
        for name, gradient in ours.gradients.items():
            torch.testing.assert_close(gradient, theirs.gradients[name], rtol=1e-4, atol=1e-5)
        assert ours.output.abs().max() > 0.1 and not theirs.calls


def check_given(backend: str, one: Pass, calls: int = 1, shards: int = 1) -> None:
    """The library got k experts of every token (each once per shard), and nothing that is sized by another k."""
    assert len(one.calls) == calls
    for call in one.calls:
        if backend == "deepep":
            assert call["topk_idx"].shape == call["topk_weights"].shape == (TOKENS, shards * one.k)
            assert (call["topk_weights"] > 0).all() and call["num_experts"] == shards * EXPERTS
            assert call["bytes"] == 16 * 4  # of a token's hidden state, at any k
            ordered = call["topk_idx"].sort(dim=1).values
            assert (ordered[:, 1:] > ordered[:, :-1]).all()  # none twice
        else:
            assert call["routing_map"].shape == (TOKENS, shards * EXPERTS) and call["num_permuted_tokens"] is None
            assert (call["routing_map"].sum(dim=1) == shards * one.k).all()
            assert ((call["probs"] > 0) == call["routing_map"]).all()


def both(settings: dict[str, Any], dispatcher: dict[str, Any], ranks: int, **parallel: int) -> Any:
    flex = run_ranks(passes_of, ranks, settings, dispatcher, parallel)
    plain = run_ranks(passes_of, ranks, settings, {"moe_router_dtype": "fp32"}, parallel)
    return zip(flex, plain, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize("elastic", ELASTIC)
@pytest.mark.parametrize("backend", BACKENDS)
def test_two_expert_ranks_at_every_k(backend, elastic):
    for flex, plain in both(ELASTIC[elastic], BACKENDS[backend], 2, expert_model_parallel_size=2):
        compare(flex, plain)
        for one in flex:
            check_given(backend, one)
        trained = {one.k for one in flex if one.name == "training"}
        assert (len(trained) > 1) == (elastic == "prefix")


def test_one_rank_at_every_k():
    for flex, plain in both(PREFIX, BACKENDS["hybridep"], 1):
        compare(flex, plain)
        for one in flex:
            check_given("hybridep", one)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_experts_sharded_over_two_tensor_ranks_get_every_token_once_per_shard(backend):
    parallel = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    for flex, plain in both(PREFIX | {"sequence_parallel": True}, BACKENDS[backend], 2, **parallel):
        compare(flex, plain)
        for one in flex:
            check_given(backend, one, shards=2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_recomputed_pass_gives_the_library_the_same_experts_again(backend):
    recomputed = PREFIX | {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    for flex, plain in both(recomputed, BACKENDS[backend], 2, expert_model_parallel_size=2):
        compare(flex, plain)
        for one in flex:
            again = one.name == "training"
            check_given(backend, one, calls=1 + again)
            for name, given in one.calls[0].items():
                for repeated in one.calls[1:]:
                    assert given is None or torch.equal(torch.as_tensor(given), torch.as_tensor(repeated[name]))
        assert len({one.k for one in flex if one.name == "training"}) > 1


def two_layers(dispatcher: dict[str, Any]) -> list[list[int]]:
    """k of each call when two layers take turns, each with its own k'."""
    from megatron_emoe.routing.active_k import get_active_k
    from tests import dispatch_stand_ins as library

    library.install_deep_ep()
    start(expert_model_parallel_size=2)
    layers = [build_layer(layer_config(num_layers=2, **dispatcher), layer_number=n).eval() for n in (1, 2)]
    seen = []
    for ks in ([3, 5], {2: 7}, None, 4):
        library.CALLS.clear()
        with torch.no_grad(), get_active_k().evaluating(ks):
            for layer in layers:
                layer(hidden_states())
        seen.append([given_k(call) for call in library.CALLS])
    return seen


def given_k(call: dict[str, Any]) -> int:
    if "topk_idx" in call:
        return call["topk_idx"].shape[1]
    return int(call["routing_map"].sum(dim=1).unique())


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_layer_has_its_own_k(backend):
    assert run_ranks(two_layers, 2, BACKENDS[backend]) == [[[3, 5], [2, 7], [2, 2], [4, 4]]] * 2


CAPACITY = {"moe_expert_capacity_factor": 1.0}


@pytest.mark.slow
def test_deepep_s_dropped_tokens_go_nowhere():
    for flex, plain in both(PREFIX | CAPACITY, BACKENDS["deepep"], 2, expert_model_parallel_size=2):
        compare(flex, plain)
        for one in flex:
            (call,) = one.calls
            assert call["topk_idx"].shape == (TOKENS, one.k)
            dropped = call["topk_idx"] < 0
            assert (call["topk_weights"][dropped] == 0).all() and (dropped.any() or one.k == EXPERTS)


@pytest.mark.slow
def test_hybridep_s_capacity_follows_k():
    padded = PREFIX | CAPACITY | {"moe_pad_expert_input_to_capacity": True}
    for flex, plain in both(padded, BACKENDS["hybridep"], 2, expert_model_parallel_size=2):
        compare(flex, plain)
        for one in flex:
            of_each = TOKENS * one.k // EXPERTS
            assert [call["num_permuted_tokens"] for call in one.calls] == [of_each * EXPERTS]  # of two ranks, 4 experts


def budgets() -> list[tuple[int, int]]:
    """(k, rows that HybridEP may fill) of training passes with a budget of 20 times the mean."""
    from megatron_emoe.routing.active_k import Place, scheduled_k
    from tests import dispatch_stand_ins as library

    library.install_deep_ep()
    start()
    layer = build_layer(layer_config(**PREFIX | BACKENDS["hybridep"]))
    # A budget goes with Transformer Engine's operation fuser, whose experts cannot be built here: up to them.
    dispatcher = layer.token_dispatcher
    dispatcher._comm_manager.moe_expert_rank_capacity_factor = 20.0
    dispatcher.config.use_transformer_engine_op_fuser = True
    for iteration in range(6):
        begin(iteration)
        x = hidden_states()
        layer.dispatch(*layer.preprocess(x, *layer.route(x)))
    drawn = [scheduled_k(layer.config, 2, Place(iteration, 0, layer=1)) for iteration in range(6)]
    return list(zip(drawn, [call["num_permuted_tokens"] for call in library.CALLS], strict=True))


def test_hybridep_s_budget_follows_k():
    seen = run_ranks(budgets, 1)[0]
    assert len({k for k, _ in seen}) > 2
    assert [rows for _, rows in seen] == [-(-TOKENS * k * 20 // 256) * 256 for k, _ in seen]  # rounded up to 256
