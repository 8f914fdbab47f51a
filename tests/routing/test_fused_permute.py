"""Fused permutation at every k, around stand-ins that allocate exactly the rows that they are told: output and
gradients are those of the unfused path. And shared experts that overlap with the dispatch, which no k may disturb."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import run_ranks
from tests.tiny import COACTIVATION, PREFIX, begin, build_layer, hidden_states, layer_config, start

TOKENS = 16  # of each rank: hidden_states() is 8 x 2
TOP_P = {"emoe_selection": "top-p", "emoe_top_p": 0.8}
ELASTIC = {"coactivation": COACTIVATION, "prefix": PREFIX, "top-p": TOP_P}

Seen = list[tuple[int, dict[str, Tensor], list[dict[str, Any]]]]


def passes_of(settings: dict[str, Any], parallel: dict[str, int]) -> Seen:
    """k, output with all gradients, and the fused kernel's calls, of evaluation at several k' and of training."""
    from megatron_emoe.routing.active_k import Place, get_active_k, scheduled_k
    from tests import dispatch_stand_ins as library

    library.install_fused_permutation()
    start(**parallel)
    layer = build_layer(layer_config(**settings | parallel))
    x = hidden_states(seed=11 + torch.distributed.get_rank())
    for weight in layer.experts.parameters():
        weight.data *= 20  # outputs of about 1
    seen: Seen = []

    def forward(k: int) -> None:
        output, gradients, calls = library.one_pass(layer, x)
        seen.append((k, gradients | {"output": output}, calls))

    layer.eval()
    for k in (1, 2, 3, 8):
        with get_active_k().evaluating(k):
            forward(k)
    layer.train()
    for iteration in range(4):
        begin(iteration)
        forward(scheduled_k(layer.config, 2, Place(iteration, 0, layer=1)))
    return seen


def compare(ours: Seen, theirs: Seen) -> None:
    assert [k for k, *_ in ours] == [k for k, *_ in theirs]
    for (_, mine, _), (_, other, _) in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys() and other["output"].abs().max() > 0.1
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("elastic", ELASTIC)
def test_the_fused_kernel_is_told_the_rows_that_there_are(elastic, dispatcher):
    settings, parallel = ELASTIC[elastic] | {"moe_token_dispatcher_type": dispatcher}, {"expert_model_parallel_size": 2}
    plain = run_ranks(passes_of, 2, settings, parallel)
    fused = run_ranks(passes_of, 2, settings | {"moe_permute_fusion": True}, parallel)
    for ours, theirs in zip(fused, plain, strict=True):
        compare(ours, theirs)
        assert all(calls == [] for *_, calls in theirs)
        for number, (k, _, calls) in enumerate(ours):
            (call,) = calls
            assert call["num_out_tokens"] == call["rows"] > 0
            if dispatcher == "alltoall" and not (elastic == "top-p" and number >= 4):
                assert call["rows"] == TOKENS * k


def test_one_rank_is_told_the_rows_of_every_k():
    settings = PREFIX | {"moe_permute_fusion": True, "num_moe_experts": 4, "emoe_k_max": 3}
    seen = run_ranks(first_call, 1, settings)[0]
    assert [call["num_out_tokens"] for call in seen] == [TOKENS * k for k in (1, 2, 3, 4)]


def first_call(settings: dict[str, Any]) -> list[dict[str, Any]]:
    from megatron_emoe.routing.active_k import get_active_k
    from tests import dispatch_stand_ins as library

    library.install_fused_permutation()
    start()
    layer = build_layer(layer_config(**settings)).eval()
    for k in (1, 2, 3, 4):
        with torch.no_grad(), get_active_k().evaluating(k):
            assert layer(hidden_states())[0].isfinite().all()
    return library.CALLS


@pytest.mark.slow
@pytest.mark.parametrize("elastic", ["coactivation", "prefix"])
def test_shared_experts_that_overlap_with_the_dispatch(elastic):
    settings = ELASTIC[elastic] | {"moe_shared_expert_intermediate_size": 12}
    parallel = {"expert_model_parallel_size": 2}
    plain = run_ranks(passes_of, 2, settings, parallel)
    overlapped = run_ranks(passes_of, 2, settings | {"moe_shared_expert_overlap": True}, parallel)
    for ours, theirs in zip(overlapped, plain, strict=True):
        assert any(name.startswith("shared_experts") for name in ours[0][1])
        compare(ours, theirs)
