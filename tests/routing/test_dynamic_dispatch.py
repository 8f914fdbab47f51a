"""The MoE layer where every token has its own number of experts: output against a loop, rows, and the added sync."""

from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.routing.test_moe_layer import TOKENS, Seen, host_traffic, naive_output, observe
from tests.tiny import begin, build_layer, hidden_states, layer_config, start

TOP_P = {"emoe_selection": "top-p", "emoe_top_p": 0.8}
NULL = {"emoe_selection": "null-experts", "emoe_null_experts": 4, "moe_router_topk": 3}
LAYERS = {
    "top-p": TOP_P,
    "top-p, allgather": TOP_P | {"moe_token_dispatcher_type": "allgather"},
    "null": NULL | {"moe_shared_expert_intermediate_size": 12},
    "null, allgather": NULL | {"moe_token_dispatcher_type": "allgather"},
}


def check_passes(results: list[Seen], settings: dict[str, Any]) -> None:
    """Every pass on every rank: the loop's output, rows as many as the map says, and permute told the truth."""
    experts = [expert for seen in results for expert in seen.experts]
    seen_counts = set()
    for passes in zip(*(seen.passes for seen in results), strict=True):
        for seen, one in zip(results, passes, strict=True):
            torch.testing.assert_close(one.output_TD, naive_output(seen, experts, one), rtol=1e-4, atol=1e-6)
            told, needed = one.handed
            assert int(told) == needed, one.name
            if settings["emoe_selection"] == "top-p" and one.name == "evaluation":
                assert (one.map_TE.sum(1) == one.k).all()
            else:
                seen_counts |= set(one.map_TE.sum(1).tolist())
        routed = sum(int(one.map_TE.sum()) for one in passes)
        assert sum(one.rows for one in passes) == routed
        assert routed != len(results) * TOKENS * 2 or passes[0].name == "evaluation"
    assert len(seen_counts) > 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_output_is_the_loop_over_tokens_and_experts(name, ranks):
    results = run_ranks(observe, ranks, LAYERS[name], (1, 2, 4), ranks)
    assert len(results[0].experts) == 8 // ranks
    check_passes(results, LAYERS[name])


def only_null() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Output and input gradient where rank 0 chooses nothing but null experts, and its null experts' gradient."""
    start(expert_model_parallel_size=2)
    layer, x = build_layer(layer_config(**NULL | {"moe_router_topk": 2})), hidden_states()
    if torch.distributed.get_rank() == 0:
        x = x.detach().abs().requires_grad_()
        layer.router.null_weight.data.fill_(5.0)  # positive input: null logits above all others
    begin()
    output = layer(x)[0]
    (output.sum() + x.square().sum()).backward()
    return output.detach(), x.grad, layer.router.null_weight.grad


@pytest.mark.slow
def test_a_rank_whose_tokens_all_choose_null_experts_sends_nothing_and_gets_nothing():
    (output, gradient, null), (other, *_) = run_ranks(only_null, 2)
    assert output.abs().max() == 0 and other.abs().max() > 0
    assert torch.equal(gradient, 2 * hidden_states().detach().abs())  # what went around the experts is untouched
    assert null is not None and null.abs().max() == 0


BALANCE = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.1}


@pytest.mark.slow
def test_the_count_is_the_only_added_wait_and_noise_adds_none():
    stock, plain = run_ranks(host_traffic, 2, BALANCE, True)[0]
    top_p, operations = run_ranks(host_traffic, 2, BALANCE | TOP_P, False)[0]
    noisy, more = run_ranks(host_traffic, 2, BALANCE | {"emoe_selection": "noisy-topk"}, False)[0]
    assert noisy == stock and len({plain, operations, more}) == 3
    added = {name: count - stock[name] for name, count in top_p.items() if count != stock[name]}
    assert added == {"_local_scalar_dense": 1}
