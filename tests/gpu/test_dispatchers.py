"""Dispatchers of real libraries at every k: outputs and gradients are those of the unfused all-to-all dispatcher.

One GPU runs fused permutation and, where deep_ep has it, HybridEP. DeepEP needs two.
"""

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.distributed import REPO, torchrun
from tests.gpu.layers import BF16, EXPERTS, likeness, local_layer, one_pass, process_groups
from tests.tiny import COACTIVATION, PREFIX, begin

pytestmark = pytest.mark.gpu
KS = (1, 2, 3, EXPERTS)
TOP_P = {"emoe_selection": "top-p", "emoe_top_p": 0.8}
FLEX = {"moe_token_dispatcher_type": "flex"}
HYBRIDEP, DEEPEP = (FLEX | {"moe_flex_dispatcher_backend": name} for name in ("hybridep", "deepep"))


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    with process_groups():
        yield


def compare(settings: dict[str, Any], dispatcher: dict[str, Any]) -> None:
    """Evaluation at each k', then training passes, of one layer with both dispatchers."""
    from megatron_emoe.routing.active_k import get_active_k

    plain = local_layer(**BF16 | settings)
    other = local_layer(**BF16 | settings | dispatcher)
    other.load_state_dict(plain.state_dict())
    for layer in (plain, other):
        layer.eval()
    for k in KS:
        with get_active_k().evaluating(k):
            check_equal(plain, other)
    for layer in (plain, other):
        layer.train()
    for iteration in range(4):
        begin(iteration)
        check_equal(plain, other)


def check_equal(plain: Any, other: Any) -> None:
    """Equal but for the order of sums, in bf16."""
    for name, cosine in likeness(one_pass(other), one_pass(plain)).items():
        assert cosine > 0.999, (name, cosine, other.router.topk)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("elastic", [COACTIVATION, PREFIX, TOP_P], ids=["coactivation", "prefix", "top-p"])
def test_fused_permutation(groups, elastic, dispatcher):
    pytest.importorskip("transformer_engine")
    compare(elastic, {"moe_permute_fusion": True, "moe_token_dispatcher_type": dispatcher})


@pytest.mark.parametrize("elastic", [COACTIVATION, PREFIX], ids=["coactivation", "prefix"])
def test_shared_experts_that_overlap_with_the_dispatch(groups, elastic):
    shared = {"moe_shared_expert_intermediate_size": 128}
    compare(elastic | shared, {"moe_shared_expert_overlap": True})


@pytest.mark.parametrize("elastic", [COACTIVATION, PREFIX], ids=["coactivation", "prefix"])
def test_hybridep_on_one_rank(groups, elastic):
    if not hasattr(pytest.importorskip("deep_ep"), "HybridEPBuffer"):
        pytest.skip("needs deep_ep with HybridEP")
    compare(elastic, HYBRIDEP)


@pytest.mark.parametrize("backend", ["deepep", "hybridep"])
def test_two_expert_ranks(backend):
    installed = pytest.importorskip("deep_ep")
    if not hasattr(installed, {"deepep": "Buffer", "hybridep": "HybridEPBuffer"}[backend]):
        pytest.skip(f"needs deep_ep with {backend}")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    done = torchrun(2, REPO / "tests" / "gpu" / "two_ranks.py", backend, interpreter=sys.executable)
    assert done.stdout.count(f"{backend}: equal at every k") == 2
