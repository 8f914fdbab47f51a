"""The fused router's kernels on a GPU, compiled, against selection.py on the same GPU; tests/routing/test_kernel.py
runs the same comparisons in Triton's interpreter.
"""

from collections.abc import Iterator
from unittest.mock import patch

import pytest
import torch

from megatron_emoe.routing import kernel as router_kernel
from megatron_emoe.routing.kernel import RoutingRule, Wanted
from tests import router_kernel_cases as cases
from tests.gpu.layers import process_groups
from tests.router_cases import LOSSES, PADDED, ROUTERS, both_ways, compare

pytestmark = pytest.mark.gpu

TOKENS = 4099  # a last block that is not full at any number of experts


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_selection_weights_losses_and_gradient(name, dtype):
    if name == "1024 experts" and dtype != "fp32":
        pytest.skip("16 bits have too few different numbers")
    cases.check(name, dtype, TOKENS, device="cuda")


@pytest.mark.parametrize("name", cases.CASES)
@pytest.mark.parametrize("part", ["p", "h", "b"])
def test_the_gradient_of_each_output_alone(name, part):
    cases.check(name, "fp32", 67, part, device="cuda")
    cases.check_bare(name, 67, device="cuda")


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_of_equal_logits_the_lower_expert_ranks_first_and_of_equal_numbers_the_better_rank(dtype):
    cases.check_equal_logits(dtype, TOKENS, device="cuda")


def test_equal_groups_and_scores_that_rounding_makes_equal():
    cases.check_equal_groups(device="cuda")
    cases.check_rounded_scores(device="cuda")


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_extreme_logits(score_function):
    cases.check_extremes(score_function, device="cuda")


@pytest.mark.parametrize("name", [name for name in cases.CASES if name.startswith("few")])
def test_the_gradient_is_that_of_finite_differences(name):
    cases.check_finite_differences(name, device="cuda")


def test_runs_of_the_same_numbers_are_bit_equal():
    rule, logits_TE, bias_E, u_TP = cases.inputs("softmax after, pool", "bf16", TOKENS, "cuda")
    first, *others = [router_kernel.route(logits_TE, rule, bias_E, u_TP, cases.ALL) for _ in range(20)]
    for other in others:
        assert all(torch.equal(ours, wanted) for ours, wanted in zip(other, first, strict=True))


def test_the_host_never_waits():
    rule, logits_TE, bias_E, u_TP = cases.inputs("groups, sigmoid bias", "fp32", TOKENS, "cuda")
    logits_TE.requires_grad_()
    router_kernel.route(logits_TE, rule, bias_E, u_TP, cases.ALL).probs_TE.sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        router_kernel.route(logits_TE, rule, bias_E, u_TP, cases.ALL).probs_TE.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_drawn_k_compiles_nothing():
    """k from 1 to 31 with pools of 32, keeps and factors: one kernel forward, one back."""
    logits_TE = cases.random_logits(64, 64, torch.float32, "cuda").requires_grad_()
    u_TP = cases.random_numbers(64, 33, "cuda")
    compiled = set()
    for k in range(1, 32):
        rule = RoutingRule("softmax", k, 32, True, pool=None, keep=k // 2, prob=1 - k / 64, scale=1.0 + k)
        router_kernel.route(logits_TE, rule, None, u_TP, Wanted(entropy=True)).probs_TE.sum().backward()
        compiled.add((variants(router_kernel.device.forward_kernel), variants(router_kernel.device.backward_kernel)))
    assert len(compiled) == 1


def variants(kernel) -> int:
    """How many binaries Triton holds of a kernel on this device."""
    device = torch.cuda.current_device()
    if hasattr(kernel, "device_caches"):
        return len(kernel.device_caches[device][0])
    return len(kernel.cache[device])  # Triton 3.2


# ElasticRouter, with and without the kernel.


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    with process_groups():
        yield


@pytest.fixture(params=["with the core's fused parts", "without"])
def fused_losses(request, groups) -> Iterator[list[int]]:
    """What Transformer Engine's fused loss was called with; without it, the core's losses are not fused."""
    from megatron.core.transformer.moe import moe_utils

    from megatron_emoe.routing import router

    calls: list[int] = []
    if request.param == "without":
        with patch.object(router, "_core_can_fuse", lambda: False):
            yield calls
        return
    pytest.importorskip("transformer_engine")
    loss = moe_utils.fused_moe_aux_loss
    assert loss is not None
    with patch.object(moe_utils, "fused_moe_aux_loss", lambda *args, **more: calls.append(1) or loss(*args, **more)):
        yield calls


@pytest.mark.parametrize(("name", "padded"), [*((name, False) for name in ROUTERS), *((name, True) for name in PADDED)])
def test_the_router_is_the_same_with_and_without_the_kernel(name, padded, fused_losses, request):
    fused, unfused, calls = both_ways(ROUTERS[name], padded, False, "cuda")
    compare(fused, unfused, rtol=1e-4, atol=1e-5)
    assert calls and calls.count("_forward") == calls.count("_backward")
    assert any(gradient.abs().max() > 1e-4 for gradient in unfused["weight"])
    engine = "without" not in request.node.callspec.params["fused_losses"]
    assert bool(fused_losses) == (engine and LOSSES.items() <= ROUTERS[name].items())


def test_a_recomputed_router_calls_the_kernel_again(groups):
    fused, unfused, calls = both_ways(ROUTERS["balance on top-k"], False, True, "cuda")
    compare(fused, unfused, rtol=1e-4, atol=1e-5)
    assert calls == ["_forward", "_forward", "_backward"] * 3
