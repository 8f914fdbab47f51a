"""FP8 without a GPU: elastic layers are built with every recipe and dispatcher, checkpoints pass between FP8 and bf16
with and without scales, and Transformer Engine's recomputation repeats a draw. Nothing is computed in FP8."""

import io
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import REPO, run_ranks
from tests.te.test_transformer_engine import (
    ENGINE,
    GROUPED,
    MODELS,
    assert_loaded,
    cuda_said_to_be_there,
    describe,
    expected_name,
    load_words,
    make,
    refused,
    save,
    weights_of,
    words_of,
)
from tests.tiny import COACTIVATION, PREFIX, begin, build_layer, hidden_states, layer_config, start, stored_tensors

pytestmark = [
    pytest.mark.te,
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine: make test-te"),
]

RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]
ALLOW = "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE"
FLEX = {"moe_token_dispatcher_type": "flex", "moe_router_dtype": "fp32"}
LAYER = {
    "hidden_size": 32,
    "moe_ffn_hidden_size": 32,
    "moe_grouped_gemm": True,
    "expert_model_parallel_size": 2,
    "bf16": True,
    "params_dtype": torch.bfloat16,
}
DISPATCHERS: dict[str, dict[str, Any]] = {
    "alltoall": {},
    "alltoall, padded": {"moe_router_padding_for_quantization": True},
    "alltoall, fused": {"moe_permute_fusion": True, "moe_router_padding_for_quantization": True},
    "allgather": {"moe_token_dispatcher_type": "allgather"},
    "deepep": FLEX | {"moe_flex_dispatcher_backend": "deepep", "moe_permute_fusion": True},
    "hybridep": FLEX | {"moe_flex_dispatcher_backend": "hybridep"},
    "hybridep, padded": FLEX | {"moe_flex_dispatcher_backend": "hybridep", "moe_router_padding_for_quantization": True},
}


def construct(precision: dict[str, Any]) -> dict[str, list[str]]:
    """Class names in an elastic layer of Transformer Engine's spec with each dispatcher, on one of two expert ranks."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection

    from megatron_emoe.model.layer_spec import elastic_layer
    from tests.dispatch_stand_ins import install_deep_ep

    install_deep_ep()
    start(expert_model_parallel_size=2)
    built = {}
    for (name, dispatcher), elastic in product(DISPATCHERS.items(), (COACTIVATION, PREFIX)):
        config = layer_config(**LAYER | precision | dispatcher | elastic)
        spec = elastic_layer(get_gpt_layer_with_transformer_engine_spec(num_experts=8, moe_grouped_gemm=True))
        with cuda_said_to_be_there():
            layer = spec.submodules.mlp(config, layer_number=1, pg_collection=get_default_pg_collection())
        parts = (layer, layer.router, layer.experts, layer.token_dispatcher)
        built[name] = [type(part).__name__ for part in parts]
        assert layer.token_dispatcher.config.fp8 == precision["fp8"] and hasattr(layer.experts, "quantization_padding")
    return built


@pytest.mark.parametrize("form", ["hybrid", "e4m3"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_with_every_dispatcher(recipe, form):
    ends = {"first_last_layers_bf16": True, "num_layers": 2} if recipe != "delayed" else {}
    built = run_ranks(construct, 2, {"fp8": form, "fp8_recipe": recipe} | ends)[1]
    kinds = {"alltoall": "MoEAlltoAllTokenDispatcher", "allgather": "MoEAllGatherTokenDispatcher"}
    common = ["ElasticMoELayer", "ElasticRouter", "TEGroupedMLP"]
    expected = {name: [*common, kinds.get(name.split(",")[0], "MoEFlexTokenDispatcher")] for name in DISPATCHERS}
    assert built == expected


def fp8_words(recipe: str = "delayed") -> list[str]:
    return [*GROUPED, "--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe]


def scale(model: Any) -> None:
    """Give every linear layer the scales of delayed scaling that a first pass would: different ones for each."""
    from transformer_engine.common.recipe import DelayedScaling

    recipe = DelayedScaling()
    scaled = [
        module
        for name, module in model.named_modules()
        if hasattr(module, "fp8_meta") and not name.endswith("core_attention")  # FP8 attention is a flag of its own
    ]
    for number, module in enumerate(scaled):
        module.fp8_meta |= {"recipe": recipe, "fp8_checkpoint": True, "num_gemms": getattr(module, "num_gemms", 1)}
        module.init_fp8_meta_tensors(recipe)
        for place in ("scaling_fwd", "scaling_bwd"):
            values = module.fp8_meta[place].scale
            values.copy_(torch.arange(values.numel()) + 100.0 * (number + 1))


def scales_of(model: Any) -> dict[str, Tensor]:
    return {
        f"{name} {place}": module.fp8_meta[place].scale.clone()
        for name, module in model.named_modules()
        for place in ("scaling_fwd", "scaling_bwd")
        if place in getattr(module, "fp8_meta", {})
    }


def save_scaled(words: list[str], forced: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Write a checkpoint of an FP8 model with scales, and return its weights and scales."""
    from megatron.training.checkpointing import save_checkpoint

    os.environ[ALLOW] = "1"
    model = make(words, forced, seed=2)
    scale(model)
    with cuda_said_to_be_there():
        save_checkpoint(1, [model], None, None, 0)
    return describe(model).weights, scales_of(model)


def load_scaled(words: list[str], forced: list[str], allow: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read a checkpoint where Transformer Engine may load pickles (allow "1") or not, and return weights and scales."""
    from megatron.training.checkpointing import load_checkpoint

    os.environ[ALLOW] = allow
    model = make(words, forced, seed=3)
    load_checkpoint([model], None, None)
    return {name: tensor.detach().clone() for name, tensor in weights_of(model).items()}, scales_of(model)


@pytest.fixture(scope="module")
def scaled(tmp_path_factory) -> tuple[Path, dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint of a model trained in FP8 with delayed scaling, its weights and its scales."""
    folder = tmp_path_factory.mktemp("scaled")
    words = words_of(MODELS["Qwen1.5-MoE"] | COACTIVATION, save=folder)
    weights, scales = run_ranks(save_scaled, 1, words, fp8_words())[0]
    assert len(scales) > 10 and len({float(values[0]) for values in scales.values()}) > 5
    return folder, weights, scales


def test_an_fp8_checkpoint_goes_on_in_fp8_with_its_scales(scaled):
    folder, weights, scales = scaled
    words = load_words(MODELS["Qwen1.5-MoE"] | PREFIX, folder)
    loaded, again = run_ranks(load_scaled, 1, words, fp8_words(), "1")[0]
    assert_loaded(loaded, weights)
    assert again.keys() == scales.keys()
    assert [name for name in scales if not torch.equal(scales[name], again[name])] == []
    with pytest.raises(RuntimeError, match=f"set {ALLOW}=1"):
        run_ranks(load_scaled, 1, words, fp8_words(), "0")


@pytest.mark.parametrize("backend", [ENGINE, GROUPED, []], ids=["experts one by one", "grouped experts", "local"])
def test_an_fp8_checkpoint_goes_on_in_bf16_and_leaves_its_scales(scaled, backend):
    folder, weights, _ = scaled
    model = MODELS["Qwen1.5-MoE"]
    words = load_words(model | PREFIX, folder)
    local, _ = run_ranks(load_scaled, 1, words, ["--bf16"], "0")[0]
    loaded, scales = run_ranks(load_scaled, 1, words, [*backend, "--bf16"], "0")[0]
    named = {name: expected_name(name, model, backend) if backend else name for name in local}
    assert_loaded(loaded, {named[name]: weights[expected_name(name, model, GROUPED)] for name in local})
    assert scales == {}


@pytest.mark.parametrize("recipe", RECIPES)
def test_keys_of_weights_are_the_same_in_bf16_and_fp8(recipe, tmp_path):
    """bf16 into FP8 and back again: what was saved first is what is saved last, to the bit."""
    model = MODELS["ERNIE-4.5"] | COACTIVATION
    first, second, third = (tmp_path / name for name in ("bf16", "fp8", "again"))
    os.environ[ALLOW] = "1"  # of this process: what its ranks inherit
    try:
        run_ranks(save, 1, words_of(model, save=first), [*GROUPED, "--bf16"])
        run_ranks(pass_on, 1, load_words(model, first, save=second), [*fp8_words(recipe)])
        run_ranks(pass_on, 1, load_words(model, second, save=third), ["--bf16"])
    finally:
        del os.environ[ALLOW]
    before, between, after = (stored_tensors(folder, 1) for folder in (first, second, third))
    assert before.keys() == between.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def pass_on(words: list[str], forced: list[str]) -> None:
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint

    model = make(words, forced, seed=5)
    load_checkpoint([model], None, None)
    save_checkpoint(1, [model], None, None, 0)


def test_a_run_whose_scales_could_not_be_loaded_again_is_refused(tmp_path):
    words = words_of(MODELS["OLMoE"], save=tmp_path / "out")
    status, text = run_ranks(refused, 1, words, fp8_words())[0]
    assert status == 2 and f"--save {tmp_path}/out with --fp8-recipe delayed: its scales are saved as pickles" in text
    assert not (tmp_path / "out").exists()


Routes = list[tuple[bool, Tensor]]


def recomputed(recompute: bool) -> tuple[Routes, dict[str, Tensor]]:
    """Gradient mode and experts of every routing, and gradients, where other micro-batches run before the backward
    pass. With an FP8 configuration the core recomputes through Transformer Engine; the experts compute in fp32."""
    from megatron.core.transformer.moe import moe_utils
    from transformer_engine.pytorch import distributed

    # Reading and setting a GPU's random state is all of its recomputation that needs one; and the router's product.
    distributed._get_cuda_rng_state = lambda **_: torch.get_rng_state()
    distributed._set_cuda_rng_state = lambda state, **_: torch.set_rng_state(state)
    moe_utils.te_general_gemm = None
    start()
    layer, routes = build_layer(layer_config(**PREFIX | COACTIVATION)), []
    layer.config.fp8 = "hybrid"
    layer.moe_layer_recompute = recompute
    layer.router.register_forward_hook(lambda _m, _i, out: routes.append((torch.is_grad_enabled(), out[1].clone())))
    x, outputs = hidden_states(), []
    for iteration in range(3):
        begin(iteration)
        outputs.append(layer(x)[0])
    for output in outputs:
        output.square().sum().backward()
    gradients = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return routes, gradients | {"input": x.grad}


def test_transformer_engine_s_recomputation_repeats_the_draw():
    plain, expected = run_ranks(recomputed, 1, False)[0]
    routes, gradients = run_ranks(recomputed, 1, True)[0]
    assert [grad for grad, _ in routes] == [False] * 3 + [True] * 3
    assert len({int(experts.sum()) for _, experts in plain}) > 1  # k differed
    for (_, once), (_, first), (_, again) in zip(plain, routes[:3], routes[3:], strict=True):
        assert torch.equal(once, first) and torch.equal(first, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name])


OPTIMIZER = """
    import sys
    from megatron.core import optimizer
    from megatron_emoe.host import mode as host_mode
    from megatron_emoe.model import layer_spec
    from megatron_emoe.training import loop as training
    host_mode._cuda_is_present = lambda: True
    words = ["--num-experts", "8"]
    assert host_mode.setup(words) == words and not host_mode.is_on()
    print(optimizer.Adam.__module__, optimizer.USING_PYTORCH_OPTIMIZER)
    host_mode.enable(force=True)
    print(optimizer.Adam.__module__, optimizer.USING_PYTORCH_OPTIMIZER)
"""


def test_outside_host_mode_the_fused_optimizer_is_megatron_s_choice():
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(OPTIMIZER)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    chosen = [line for line in io.StringIO(done.stdout).read().splitlines() if line.endswith(("True", "False"))]
    assert chosen[0].startswith("transformer_engine.pytorch.optimizers") and chosen[0].endswith("False")
    assert chosen[1].startswith("megatron_emoe.host.mode")
