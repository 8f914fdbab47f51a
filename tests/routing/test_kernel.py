"""The fused router on the CPU: its kernels in Triton's interpreter against selection.py, and ElasticRouter with and
without it. Triton reads TRITON_INTERPRET when it is first imported, so all of this runs in a process of its own.
"""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests import router_kernel_cases as cases
from tests.distributed import ALONE, REPO
from tests.router_cases import LARGER, LOSSES, PADDED, ROUTERS, both_ways, compare, train, watch_kernel
from tests.tiny import COACTIVATION, build_layer, hidden_states, layer_config, start

pytestmark = pytest.mark.slow

ENV = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Callable[..., Any]]:
    """Calls a function of a module in the process with the interpreter; what it raises is raised here."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with patch.dict(os.environ, ENV):  # no longer than it takes to start: other processes must not inherit it
            pool.submit(os.getpid).result(timeout=300)
        yield lambda function, *args: pool.submit(function, *args).result(timeout=300)


@pytest.mark.parametrize("name", [name for name in cases.CASES if name != "1024 experts"])
def test_selection_weights_losses_and_gradient(name, interpreted):
    interpreted(cases.check, name, "fp32", 21)  # a last block that is not full


FEW = ["softmax after, pool", "sigmoid bias", "groups before", "tail, sigmoid"]
SOME = [*FEW, "softmax before, pool", "softmax bias, pool", "sqrtsoftplus", "groups", "fixed pool", "tail", "tail, raw"]


@pytest.mark.parametrize("name", SOME)
def test_bf16(name, interpreted):
    interpreted(cases.check, name, "bf16", 21)


@pytest.mark.parametrize("name", FEW)
def test_half_precision_and_the_gradient_of_each_output_alone(name, interpreted):
    interpreted(cases.check, name, "fp16", 21)
    for part in "phb":
        interpreted(cases.check, name, "fp32", 5, part)
    interpreted(cases.check_bare, name, 5)


def test_the_largest_number_of_experts(interpreted):
    interpreted(cases.check, "1024 experts", "fp32", 3)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_of_equal_logits_the_lower_expert_ranks_first_and_of_equal_numbers_the_better_rank(dtype, interpreted):
    interpreted(cases.check_equal_logits, dtype, 21)


def test_equal_groups_and_scores_that_rounding_makes_equal(interpreted):
    interpreted(cases.check_equal_groups)
    interpreted(cases.check_rounded_scores)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_extreme_logits(score_function, interpreted):
    interpreted(cases.check_extremes, score_function)


@pytest.mark.parametrize("name", [name for name in cases.CASES if name.startswith("few")])
def test_the_gradient_is_that_of_finite_differences(name, interpreted):
    interpreted(cases.check_finite_differences, name)


def test_bytes_by_hand():
    from megatron_emoe.routing.kernel import Wanted, bytes_moved

    # 10 tokens, 64 experts, bf16: logits and probabilities 2 x 1280, map 640; numbers 10 x 17 x 4, pool sizes 40.
    # Back: logits, gradient of probabilities and of logits 3 x 1280, map 640.
    assert bytes_moved(10, 64, 16, torch.bfloat16) == (2560 + 640 + 680 + 40, 3840 + 640)
    # fp32, plain top-k with a tail, entropy (40 bytes), balance scores (2560), the plain map (640):
    assert bytes_moved(10, 64, 8, torch.float32, sampled=False, tail=True, wanted=Wanted(True, True, True)) == (
        2 * 2560 + 640 + 640 + 640 + 40 + 2560,
        3 * 2560 + 640 + 640 + 40 + 2560,
    )


COMPILE = """
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from megatron_emoe.routing.kernel_device import backward_kernel, forward_kernel

NUMBERS = dict.fromkeys(["tokens", "k", "pool_max", "pool", "keep", "first", "group_best"], "i32")
FACTORS = dict.fromkeys(["prob", "inverse_prob", "scale", "tail", "log_tail"], "fp32")
SWITCHES = dict(NORMALIZE=True, ENTROPY=True, BALANCE=True, PROBS=True)
READ = dict(logits="*bf16", bias="*fp32", u="*fp32")
WRITTEN = dict(probs="*bf16", routed="*u8", head="*u8", plain="*u8", pools="*i32", entropy="*fp32", balance="*fp32")
ALL = dict(SAMPLE=True, POOLS=True, PLAIN=True, HEAD=True)
PLAIN = dict(GROUPS=1, CHOSEN=0, LOG_G=0, RANK=0, SCORE=0)  # softmax, no groups, no bias
MODELS = (  # experts in groups, with a bias; 64 with a pool of 24; the most, with a pool of 16; all 8 of 8
    ALL | dict(E=24, B=32, LOG=5, GROUPS=3, CHOSEN=2, LOG_G=2, LOG_P=3, RANK=2, SCORE=1),
    ALL | PLAIN | dict(E=64, B=16, LOG=6, LOG_P=5, HEAD=False),
    ALL | PLAIN | dict(E=1024, B=1, LOG=10, LOG_P=4, SCORE=2, RANK=1),
    PLAIN | dict(E=8, B=128, LOG=3, LOG_P=3, SAMPLE=False, POOLS=False, PLAIN=False, HEAD=False),
)
GRADS = dict(grad_probs="*bf16", grad_entropy="*fp32", grad_balance="*fp32", grad_logits="*bf16")
BACK = dict(logits="*bf16", routed="*u8", head="*u8") | GRADS | FACTORS | dict(tokens="i32")

for model in MODELS:
    switches = dict(u="SAMPLE", pools="POOLS", plain="PLAIN", head="HEAD")
    absent = {name for name, switch in switches.items() if not model[switch]}
    absent |= {"bias"} if model["RANK"] < 2 else set()
    for kernel, types in ((forward_kernel, READ | WRITTEN | NUMBERS | FACTORS), (backward_kernel, BACK)):
        given = SWITCHES | model | dict.fromkeys(absent)
        signature = {name: "constexpr" if name in absent else types.get(name, "constexpr") for name in kernel.arg_names}
        constants = {name: given[name] for name, kind in signature.items() if kind == "constexpr"}
        binary = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32)).asm
        print(kernel.__name__, model["E"], len(binary["cubin"]) > 0)
"""


def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
    # The interpreter runs Python that the compiler refuses. Compute capability 9.0; nothing is launched.
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(REPO)}
    env.pop("TRITON_INTERPRET", None)
    run = subprocess.run([sys.executable, "-c", COMPILE], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = ("forward_kernel", "backward_kernel")
    assert run.stdout.splitlines() == [
        f"{kernel} {experts} True" for experts in (24, 64, 1024, 8) for kernel in kernels
    ]


# ElasticRouter, with and without the kernel.


def on_one_rank(function: Callable[..., Any], *args: Any) -> Any:
    """Run in host mode on a process group of one rank, which the process makes at the first call."""
    import torch.distributed as dist

    from megatron_emoe.host import mode as host_mode

    if not dist.is_initialized():
        host_mode.enable(force=True)
        os.environ |= ALONE
        dist.init_process_group("gloo")
        start()
    return function(*args)


@pytest.mark.parametrize(("name", "padded"), [*((name, False) for name in ROUTERS), *((name, True) for name in PADDED)])
def test_the_router_is_the_same_with_and_without_the_kernel(name, padded, interpreted):
    fused, unfused, calls = interpreted(on_one_rank, both_ways, ROUTERS[name], padded, False)
    compare(fused, unfused, rtol=2e-5, atol=2e-6)
    assert calls and calls.count("_forward") == calls.count("_backward")
    assert any(gradient.abs().max() > 1e-4 for gradient in unfused["weight"])


def test_a_first_pass_under_recomputation_keeps_nothing(interpreted):
    fused, unfused, calls = interpreted(on_one_rank, both_ways, ROUTERS["coactivation"], False, True)
    compare(fused, unfused, rtol=2e-5, atol=2e-6)
    assert calls == ["_forward", "_forward", "_backward"] * 3


def nothing_is_saved() -> list[int]:
    """How many tensors routing saves for a backward pass: without gradients, for logits without, and with."""
    from megatron_emoe.routing import kernel as router_kernel

    saved: list[list[Any]] = []
    rule, logits_TE, bias_E, u_TP = cases.inputs("few, softmax", "fp32", 5, "cpu")
    for needs, context in ((True, torch.no_grad()), (False, torch.enable_grad()), (True, torch.enable_grad())):
        saved.append([])
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t, kept=saved[-1]: kept.append(t) or t, lambda t: t)
        with context, hooks:
            router_kernel.route(logits_TE.clone().requires_grad_(needs), rule, bias_E, u_TP, cases.ALL)
    return [len(kept) for kept in saved]


def test_only_logits_and_map_are_kept_and_only_for_a_backward_pass(interpreted):
    assert interpreted(nothing_is_saved) == [0, 0, 2]


def evaluate(ks: list[int]) -> list[Any]:
    """Evaluation at k' with a tail, in which nothing is drawn, and plain top-k', which is the core's own."""
    from megatron_emoe.routing.active_k import get_active_k

    results, calls = [], []
    for fusion in (False, True):
        router = build_layer(layer_config(**LARGER | {"moe_router_fusion": fusion})).router.eval()
        for k in ks:
            with torch.no_grad(), get_active_k().evaluating(k), watch_kernel(calls):
                results.append(router(hidden_states()))
    return [results, calls]


def test_evaluation_past_k_uses_the_kernel_and_plain_top_k_the_core(interpreted):
    (results, calls) = interpreted(on_one_rank, evaluate, [2, 3, 6])
    assert calls == ["_forward"] * 2  # k' = 3 and 6
    for (wanted, wanted_map), (probs, routed) in zip(results[:3], results[3:], strict=True):
        assert torch.equal(routed, wanted_map)
        torch.testing.assert_close(probs, wanted, rtol=2e-6, atol=1e-7)


def without_the_kernel() -> list[Any]:
    """Fusion where the kernel cannot run: results with and without the flag, and what is logged."""
    from megatron_emoe.routing import kernel as router_kernel

    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("megatron_emoe.routing.kernel").addHandler(handler)
    router_kernel.say_once.cache_clear()
    with patch.object(router_kernel.device, "INTERPRETED", False):
        fused = train(COACTIVATION | LOSSES | {"moe_router_fusion": True}, False, False)
    return [fused, train(COACTIVATION | LOSSES, False, False), messages]


def test_without_a_gpu_the_router_says_once_why_it_is_not_fused(interpreted):
    fused, unfused, messages = interpreted(on_one_rank, without_the_kernel)
    for name, tensors in unfused.items():
        for ours, wanted in zip(fused[name], tensors, strict=True):
            assert torch.equal(ours, wanted), name
    assert messages == [
        "--moe-router-fusion: Transformer Engine is not installed, so only elastic routing is fused",
        "--moe-router-fusion: elastic routing is not fused, because the logits are not on a GPU",
    ]
