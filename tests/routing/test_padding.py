"""--moe-router-padding-for-quantization at every k: rows that the dispatcher adds for FP8 kernels change no output, no
gradient, no loss and no statistic. The experts compute in fp32 here; it is the dispatcher that pads."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.tiny import COACTIVATION, PREFIX, begin, build_layer, hidden_states, layer_config, start

EXPERTS, SEQUENCE, BATCH = 8, 32, 2
TOKENS = SEQUENCE * BATCH
BALANCED = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1, "emoe_hr_loss_coeff": 0.05}
SELECTIONS: dict[str, dict[str, Any]] = {
    "topk": {},
    "coactivation": COACTIVATION,
    "prefix": PREFIX,
    "both": PREFIX | COACTIVATION,
    "top-p": {"emoe_selection": "top-p", "emoe_top_p": 0.7},
    "null experts": {"emoe_selection": "null-experts", "emoe_null_experts": 4, "moe_router_topk": 3},
    "capacity": PREFIX | {"moe_expert_capacity_factor": 1.0},
    "expert bias": PREFIX | {"moe_router_enable_expert_bias": True},
}

Pass = dict[str, Any]


def pad(layer: Any, recipe: str) -> None:
    """What the dispatcher reads of an FP8 configuration; local experts cannot compute in FP8."""
    for name, value in {"fp8": "hybrid", "fp8_recipe": recipe, "moe_router_padding_for_quantization": True}.items():
        assert hasattr(layer.token_dispatcher.config, name)
        setattr(layer.token_dispatcher.config, name, value)


def passes_of(settings: dict[str, Any], recipe: str | None, ranks: int) -> list[Pass]:
    """Evaluation at k' below, at and above k, then training passes on measured steps, on one rank."""
    from megatron_emoe.routing.active_k import get_active_k

    start(expert_model_parallel_size=ranks)
    layer = build_layer(layer_config(**settings | {"expert_model_parallel_size": ranks}))
    for weight in layer.experts.parameters():
        weight.data *= 20  # outputs of about 1
    if recipe is not None:
        pad(layer, recipe)
    seen: list[Pass] = []
    layer.experts.register_forward_pre_hook(lambda _m, inputs: seen.append({"rows": torch.as_tensor(inputs[1])}))
    layer.eval()
    for k in (1, 2, 3, EXPERTS):
        with get_active_k().evaluating(k):
            run(layer, seen)
    layer.train()
    for iteration in range(4):
        begin(iteration)
        run(layer, seen)
    return seen


def run(layer: Any, seen: list[Pass]) -> None:
    """One measured pass, forward and backward: everything that it computed or recorded is added to `seen`."""
    from megatron_emoe.routing.metrics import get_elastic_tracker

    tracker = get_elastic_tracker()
    tracker.clear()
    tracker.begin_step(0, log_interval=1, coactivation_interval=1)
    layer.zero_grad()
    x = hidden_states(sequence=SEQUENCE, batch=BATCH, seed=11 + torch.distributed.get_rank())
    routed = {}
    handle = layer.router.register_forward_hook(lambda _m, _i, out: routed.update(map=out[1]))
    before = None if layer.router.local_tokens_per_expert is None else layer.router.local_tokens_per_expert.clone()
    output = layer(x)[0]
    handle.remove()
    loss = output.square().sum()
    loss.backward()
    one = seen[-1]
    one |= {"output": output.detach(), "loss": loss.detach(), "input gradient": x.grad, "map": routed["map"]}
    one |= {f"gradient of {name}": p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    one |= {f"load {number}": load for number, load in tracker._loads.items()}
    one |= {f"pairs {number}": pairs for number, pairs in tracker._pairs.items()}
    one |= {name: value for sums in tracker._sums.values() for name, value in sums.items()}
    one |= {f"core's {name}": entry.values.clone() for name, entry in tracker._metrics.items()}
    if before is not None:
        one["tokens for the bias"] = layer.router.local_tokens_per_expert - before


def equal(ours: Pass, theirs: Pass) -> list[str]:
    """Names of what differs. Counts, maps and losses to the bit, sums over rows in another order to rounding."""
    assert ours.keys() == theirs.keys()
    wrong = []
    for name in ours.keys() - {"rows"}:
        mine, other = torch.as_tensor(ours[name]), torch.as_tensor(theirs[name])
        close = torch.equal if mine.dtype in (torch.bool, torch.int64) else torch.allclose
        if not close(mine, other, **({} if close is torch.equal else {"rtol": 1e-5, "atol": 1e-6})):
            wrong.append(name)
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_padded_rows_are_seen_by_nobody(selection, ranks):
    settings = BALANCED | SELECTIONS[selection]
    plain = run_ranks(passes_of, ranks, settings, None, ranks)
    padded = run_ranks(passes_of, ranks, settings, "delayed", ranks)
    for theirs, ours in zip(plain, padded, strict=True):
        assert [equal(*both) for both in zip(ours, theirs, strict=True)] == [[]] * 8
        assert all((one["rows"] % 16 == 0).all() for one in ours)
        assert any((one["rows"] % 16).any() for one in theirs)
        assert all(one["rows"].sum() >= other["rows"].sum() for one, other in zip(ours, theirs, strict=True))
        for one in ours[4:]:
            assert one["load 1"].sum() == one["map"].sum() == one["pairs 1"].trace() > 0
            assert {"active k", "router entropy", "core's load_balancing_loss"} <= one.keys()


COUNTED: dict[str, dict[str, Any]] = {
    "alltoall": {},
    "tail 0": {"emoe_tail_scale": ["0.0"]},
    "allgather, which adds no rows": {"moe_token_dispatcher_type": "allgather"},
    "hybridep, which adds its own": {
        "moe_token_dispatcher_type": "flex",
        "moe_flex_dispatcher_backend": "hybridep",
        "moe_router_dtype": "fp32",
        "emoe_tail_scale": ["0.0"],
    },
}


def counted(settings: dict[str, Any], parallel: dict[str, int], ks: list[int], padded: bool = True) -> list[int]:
    """Rows that an evaluation counts at each k' over two ranks."""
    from megatron_emoe.routing.active_k import get_active_k
    from megatron_emoe.training.evaluation import counting_rows
    from tests.dispatch_stand_ins import install_deep_ep

    install_deep_ep()
    start(**parallel)
    layer = build_layer(layer_config(**settings | parallel)).eval()
    if padded:
        pad(layer, "mxfp8")
    seen = []
    for k in ks:
        with torch.no_grad(), get_active_k().evaluating(k), counting_rows([layer]) as count:
            layer(hidden_states(sequence=SEQUENCE, batch=BATCH))
            seen += count().values()
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_rows_that_prove_the_k_of_an_evaluation_are_those_of_tokens(name):
    ks = [1, 2, 5, EXPERTS]
    counts = run_ranks(counted, 2, PREFIX | COUNTED[name], {"expert_model_parallel_size": 2}, ks)
    assert counts == [[2 * TOKENS * k for k in ks]] * 2


def test_rows_count_once_where_two_ranks_share_an_expert():
    sharded = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    counts = run_ranks(counted, 2, PREFIX | {"sequence_parallel": True}, sharded, [1, EXPERTS])
    assert counts[0] == [2 * TOKENS, 2 * TOKENS * EXPERTS]  # each rank has its half of the sequence


def test_rows_of_tokens_that_have_each_their_own_count_are_those_of_the_map():
    ours = run_ranks(counted, 2, SELECTIONS["top-p"], {"expert_model_parallel_size": 2}, [2], True)
    assert 0 < ours[0][0] < 2 * TOKENS * EXPERTS
    assert ours == run_ranks(counted, 2, SELECTIONS["top-p"], {"expert_model_parallel_size": 2}, [2], False)


def test_blocks_are_those_of_the_recipe():
    for recipe, block in (("mxfp8", 32), ("blockwise", 16), ("tensorwise", 16)):
        seen = run_ranks(passes_of, 1, PREFIX, recipe, 1)[0]
        assert all((one["rows"] % block == 0).all() for one in seen)
    assert any((one["rows"] % 32).any() for one in seen)


def message(settings: dict[str, Any], tokens: int) -> str:
    """What a pass over so many tokens says, or nothing."""
    start()
    layer = build_layer(layer_config(**settings))
    pad(layer, "delayed")
    begin()
    try:
        layer(hidden_states(sequence=tokens, batch=1))
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PREFIX, {"emoe_eval_k": [8]}, SELECTIONS["top-p"]], ids=str)
def test_tokens_that_cannot_fill_the_blocks_of_every_k_are_refused(settings):
    expected = (
        "--moe-router-padding-for-quantization: with a varying k the 24 tokens of a rank's micro-batch must be a "
        "multiple of 16; without this flag the experts pad their rows themselves"
    )
    assert run_ranks(message, 1, settings, 24)[0] == expected
    assert run_ranks(message, 1, settings, 32)[0] == ""


def test_one_k_is_the_core_s_own_business():
    assert run_ranks(message, 1, {}, 24)[0] == run_ranks(message, 1, COACTIVATION, 24)[0] == ""


def replayed(stock: bool) -> list[Tensor]:
    """A layer's output where routing and preprocessing come from a CUDA graph, and where they run."""
    from megatron.core.transformer.enums import CudaGraphModule

    start()
    layer = build_layer(layer_config(stock))
    pad(layer, "delayed")
    x = hidden_states(sequence=SEQUENCE, batch=BATCH)
    eager = layer(x)[0]
    hidden, probs = layer.preprocess(x, *layer.route(x))
    layer.config.cuda_graph_impl = "transformer_engine"
    layer.config.cuda_graph_modules = [CudaGraphModule.moe_router, CudaGraphModule.moe_preprocess]
    layer.cudagraph_tensor_store.set(hidden_states=hidden, probs=probs)
    return [layer(x)[0].detach(), eager.detach()]


def test_the_replay_of_a_captured_router_is_the_core_s():
    ours, stock = (run_ranks(replayed, 1, stock)[0] for stock in (False, True))
    assert torch.equal(stock[0], stock[1]) and torch.equal(ours[0], stock[0]) and torch.equal(ours[1], stock[1])


def displaced() -> bool:
    """Whether adding rows to a map that is padded to capacity takes tokens out, which is why both are refused."""
    from megatron.core.transformer.moe.moe_utils import pad_routing_map, permute

    map_TE = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool)
    map_TE[-8:] = True  # 8 tokens for every expert, its capacity
    tokens = torch.arange(TOKENS, dtype=torch.float32).unsqueeze(1)
    kept = permute(tokens, pad_routing_map(map_TE.clone(), 16), num_out_tokens=8 * EXPERTS, drop_and_pad=True)[0]
    return not torch.equal(kept[:8], tokens[-8:])


def test_padding_to_capacity_would_lose_tokens():
    assert run_ranks(displaced, 1) == [True]


def test_the_core_pads_in_place_so_the_router_s_map_needs_a_copy():
    from megatron.core.transformer.moe.moe_utils import pad_routing_map

    map_TE = torch.ones(TOKENS, EXPERTS, dtype=torch.bool)
    map_TE[1::2] = False
    before: Tensor = map_TE.clone()
    pad_routing_map(map_TE, 64)
    assert not torch.equal(map_TE, before)  # once this fails, the layer's copy can go
