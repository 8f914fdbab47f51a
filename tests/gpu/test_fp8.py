"""Experts in FP8 on a GPU: at k below, at and above the model's, with every recipe that it has, against bf16; padding
by the dispatcher against padding by the experts; and one checkpoint that trains in bf16, in FP8 and in bf16 again."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import REPO, torchrun
from tests.gpu.layers import BF16, EXPERTS, TOKENS, engine_layer, likeness, one_pass, process_groups
from tests.tiny import COACTIVATION, PREFIX, begin, flags

pytest.importorskip("transformer_engine")
pytestmark = pytest.mark.gpu

RECIPES = {"delayed": 16, "tensorwise": 16, "blockwise": 16, "mxfp8": 32}  # and the rows of its blocks
KS = (1, 2, 3, EXPERTS)


@pytest.fixture(scope="module")
def groups() -> Iterator[None]:
    with process_groups():
        yield


def precision(recipe: str, form: str = "hybrid") -> dict[str, Any]:
    """Settings of FP8, or a skip where this GPU has no such arithmetic."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager as State

    asks = {"blockwise": State.is_fp8_block_scaling_available, "mxfp8": State.is_mxfp8_available}
    available, why = asks.get(recipe, State.is_fp8_available)()
    if not available:
        pytest.skip(f"--fp8-recipe {recipe}: {why}")
    return BF16 | {"fp8": form, "fp8_recipe": recipe}


def twin(layer: Any, **settings: Any) -> Any:
    """A layer of other settings with the same weights; strict: a bf16 layer's state is all that an FP8 one needs."""
    other = engine_layer(**settings)
    other.load_state_dict(layer.state_dict())
    return other


def settled(layer: Any) -> dict[str, Any]:
    """A pass after some that delayed scaling learns its scales from."""
    for _ in range(3):
        one_pass(layer)
    return one_pass(layer)


def check_close(ours: dict[str, Any], theirs: dict[str, Any], output: float, gradients: float) -> None:
    for name, cosine in likeness(ours, theirs).items():
        assert cosine > (output if name == "output" else gradients), (name, cosine)


@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_evaluation_and_gradients_at_every_k_are_close_to_bf16(groups, recipe, form):
    from megatron_emoe.routing.active_k import get_active_k

    plain = engine_layer(**BF16).eval()
    rounded = twin(plain, **precision(recipe, form)).eval()
    for k in KS:
        with get_active_k().evaluating(k):
            check_close(settled(rounded), one_pass(plain), output=0.99, gradients=0.95)


@pytest.mark.parametrize("elastic", [COACTIVATION, PREFIX], ids=["coactivation", "prefix"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_passes_are_close_to_bf16(groups, recipe, elastic):
    plain = engine_layer(**BF16 | elastic)
    rounded = twin(plain, **precision(recipe) | elastic)
    ks = set()
    for iteration in range(4):
        begin(iteration)
        check_close(settled(rounded), one_pass(plain), output=0.99, gradients=0.95)
        ks.add(rounded.router.topk)
    assert (len(ks) > 1) == (elastic is PREFIX)


@pytest.mark.parametrize("fused", [False, True], ids=["permuted", "permuted in one kernel"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_rows_padded_by_the_dispatcher_or_by_the_experts(groups, recipe, fused):
    from megatron_emoe.routing.active_k import get_active_k
    from megatron_emoe.training.evaluation import counting_rows

    settings = precision(recipe) | {"moe_permute_fusion": fused}
    by_experts = engine_layer(**settings).eval()
    by_dispatcher = twin(by_experts, **settings | {"moe_router_padding_for_quantization": True}).eval()
    seen: list[int] = []
    by_dispatcher.experts.register_forward_pre_hook(lambda _m, inputs: seen.extend(inputs[1].tolist()))
    for k in KS:
        seen.clear()
        with get_active_k().evaluating(k):
            # Rows that the dispatcher adds are other tokens', and may change the scale of a block or of a tensor.
            check_close(settled(by_dispatcher), settled(by_experts), output=0.995, gradients=0.97)
            with counting_rows([by_dispatcher]) as rows:
                one_pass(by_dispatcher)
                assert rows() == {1: TOKENS * k}
        assert all(count % RECIPES[recipe] == 0 for count in seen) and sum(seen) >= 5 * TOKENS * k


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recomputed_pass_is_the_same_pass(groups, recipe):
    recomputed = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    plain = engine_layer(**precision(recipe) | PREFIX)
    again = twin(plain, **precision(recipe) | PREFIX | recomputed)
    for iteration in range(4):
        begin(iteration)
        check_close(settled(again), settled(plain), output=0.999, gradients=0.99)


def train(folder: Path, *words: str, **changes: Any) -> list[float]:
    """Losses of a run of pretrain_emoe.py on one GPU."""
    sizes = {"hidden_size": 128, "ffn_hidden_size": 256, "moe_ffn_hidden_size": 128, "seq_length": 64, "bf16": True}
    sizes |= {"max_position_embeddings": 64, "vocab_size": 128, "save_interval": 2, "train_iters": 2}
    fixed = {"moe_grouped_gemm": True, "no_save_optim": True, "no_save_rng": True, "lr": 1e-4}
    fixed["no_gradient_accumulation_fusion"] = True  # it needs a kernel of Apex
    line = flags(**sizes | fixed | PREFIX | {"moe_token_dispatcher_type": "alltoall"} | changes, save=folder)
    output = torchrun(1, REPO / "pretrain_emoe.py", *line, *words, interpreter=sys.executable).stdout
    losses = [float(text) for text in re.findall(r"lm loss: (\S+)", output)]
    assert len(losses) >= 2 and all(torch.tensor(losses).isfinite()), output[-3000:]
    return losses


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "delayed"])
def test_one_checkpoint_trains_in_bf16_and_in_fp8(recipe, tmp_path):
    precision(recipe)
    train(tmp_path / "bf16")
    load = {"finetune": True, "exit_on_missing_checkpoint": True}
    plain = train(tmp_path / "on", load=tmp_path / "bf16", **load)
    fp8 = ("--fp8-format", "hybrid", "--fp8-recipe", recipe, "--moe-router-padding-for-quantization")
    rounded = train(tmp_path / "fp8", *fp8, load=tmp_path / "bf16", **load)
    assert rounded == pytest.approx(plain, rel=0.02) and rounded != plain
    back = train(tmp_path / "back", load=tmp_path / "fp8", **load)
    assert back[0] == pytest.approx(rounded[-1], rel=0.2)
