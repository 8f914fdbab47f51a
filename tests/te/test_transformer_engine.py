"""The Transformer Engine spec without a GPU: modules are built, weights saved and loaded, and nothing is computed.

Every model is built twice from one command line, with the local and with the Transformer Engine spec. Both must save
the same tensors under the same keys, and each must load what the other saved. `make test-te` builds Transformer Engine
and runs this; everywhere else these tests skip themselves.
"""

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from tests import hf_models
from tests.distributed import run_ranks
from tests.hf_models import MODEL_TYPES
from tests.tiny import COACTIVATION, flags, start, stored_tensors

pytestmark = [
    pytest.mark.te,
    pytest.mark.skipif(find_spec("transformer_engine") is None, reason="needs Transformer Engine: make test-te"),
]

SHARED = {"moe_shared_expert_intermediate_size": 32}
FIRST_DENSE = {"num_layers": 3, "moe_layer_freq": "[0,1,1]"}
LATENT = {
    "multi_latent_attention": True,
    "qk_layernorm": True,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 12,
}
MODELS: dict[str, dict[str, Any]] = {
    "OLMoE": {"qk_layernorm": True, "emoe_qk_norm": "full", "emoe_clip_qkv": 8.0},
    "Qwen1.5-MoE": {"add_qkv_bias": True, "moe_shared_expert_gate": True} | SHARED,
    "DeepSeek-V2-Lite": LATENT | FIRST_DENSE | SHARED | {"emoe_qk_norm": "latent"},
    "ERNIE-4.5": FIRST_DENSE
    | SHARED
    | {
        "group_query_attention": True,
        "num_query_groups": 2,
        "moe_router_enable_expert_bias": True,
        "moe_router_pre_softmax": None,
        "untie_embeddings_and_output_weights": None,
        "rotary_interleaved": True,
    },
    "compressed queries": LATENT | {"q_lora_rank": 8},
    "multi-token prediction": FIRST_DENSE | {"mtp_num_layers": 1},
    "elastic": COACTIVATION,
}
# What the command line of a GPU has; host mode itself would refuse it.
ENGINE = ["--transformer-impl", "transformer_engine"]
GROUPED = [*ENGINE, "--moe-grouped-gemm"]
BACKENDS = {"experts one by one": ENGINE, "grouped experts": GROUPED}

# Module names of the local spec, and of Transformer Engine's where one module does the work of two.
FUSED = [
    (r"input_layernorm\.", "self_attention.linear_qkv.layer_norm_"),
    (r"pre_mlp_layernorm\.", "mlp.linear_fc1.layer_norm_"),
    (r"self_attention\.q_layernorm\.", "self_attention.linear_q_up_proj.layer_norm_"),
    (r"self_attention\.kv_layernorm\.", "self_attention.linear_kv_up_proj.layer_norm_"),
]
EXPERT = re.compile(r"local_experts\.(\d+)\.(linear_fc[12]\.weight)")


def expected_name(name: str, model: dict[str, Any], backend: list[str]) -> str:
    """The name in the Transformer Engine model of what the local model calls `name`."""
    layer = re.search(r"layers\.(\d+)\.", name)
    latent = "multi_latent_attention" in model
    dense = layer is not None and name.startswith("decoder") and "moe_layer_freq" in model and layer[1] == "0"
    apply = [not latent, dense, latent, latent]
    for (pattern, fused), applies in zip(FUSED, apply, strict=True):
        if applies:
            name = re.sub(rf"(layers\.\d+\.(?:mtp_model_layer\.)?){pattern}", rf"\1{fused}", name)
    return EXPERT.sub(r"\2\1", name) if backend is GROUPED else name


class Built(NamedTuple):
    """A model: class names and parameters by name; keys and whole shapes of the tensors, keys of the other objects."""

    modules: dict[str, str]
    weights: dict[str, Tensor]
    tensors: dict[str, tuple[int, ...]]
    objects: set[str]


@contextlib.contextmanager
def cuda_said_to_be_there() -> Iterator[None]:
    """Transformer Engine's modules refuse to be built without CUDA; where they are put is host mode's business."""
    said, torch.cuda.is_available = torch.cuda.is_available, lambda: True
    try:
        yield
    finally:
        torch.cuda.is_available = said


def make(words: list[str], forced: list[str], *, seed: int) -> Any:
    """The model of this command line, with random weights and norms."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_emoe.host import mode as host_mode
    from megatron_emoe.model.layer_spec import elastic_model_config
    from megatron_emoe.settings.flag_files import expand
    from megatron_emoe.training.arguments import parse

    sys.argv = ["pretrain_emoe.py", *host_mode.setup(expand(words)), *forced]
    with contextlib.redirect_stdout(io.StringIO()), cuda_said_to_be_there():
        args = parse()
        start(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        )
        config = elastic_model_config(args)
        model = config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def describe(model: nn.Module) -> Built:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
    from megatron.core.dist_checkpointing.utils import ShardedTensor

    state = model.sharded_state_dict()
    apply_factories(state)
    entries = list(nested_values(state))
    return Built(
        {name: type(module).__name__ for name, module in model.named_modules()},
        {name: tensor.detach().clone() for name, tensor in weights_of(model).items()},
        {entry.key: entry.global_shape for entry in entries if isinstance(entry, ShardedTensor)},
        {entry.unique_key for entry in entries if isinstance(entry, ShardedObject)},
    )


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    buffers = {name: buffer for name, buffer in model.named_buffers() if name.endswith("expert_bias")}
    return dict(model.named_parameters()) | buffers


def build(words: list[str], forced: list[str]) -> Built:
    return describe(make(words, forced, seed=1))


def save(words: list[str], forced: list[str]) -> Built:
    """Build and write a checkpoint to --save, as training does."""
    from megatron.training.checkpointing import save_checkpoint

    model = make(words, forced, seed=2)
    with contextlib.redirect_stdout(io.StringIO()):
        save_checkpoint(1, [model], None, None, 0)
    return describe(model)


def load(words: list[str], forced: list[str]) -> Built:
    """Build and read --load, as training does with --finetune."""
    from megatron.training.checkpointing import load_checkpoint

    model = make(words, forced, seed=3)
    with contextlib.redirect_stdout(io.StringIO()):
        load_checkpoint([model], None, None)
    return describe(model)


def words_of(model: dict[str, Any], **more: Any) -> list[str]:
    fixed = dict.fromkeys(["no_save_optim", "no_save_rng", "no_load_optim", "no_load_rng"], True)
    return flags(**{"save_interval": 1} | fixed | model | more)


def load_words(model: dict[str, Any], folder: Path, **more: Any) -> list[str]:
    return words_of(model, load=folder, finetune=True, exit_on_missing_checkpoint=True, **more)


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_names_keys_and_weights_go_both_ways(model, backend, tmp_path):
    local = run_ranks(save, 1, words_of(model, save=tmp_path / "local"), [])[0]
    engine = run_ranks(load, 1, load_words(model, tmp_path / "local"), backend)[0]
    assert any(kind.startswith("TE") for kind in engine.modules.values())
    assert ("TEGroupedMLP" in engine.modules.values()) == (backend is GROUPED)
    assert_loaded(engine.weights, {expected_name(name, model, backend): local.weights[name] for name in local.weights})
    assert engine.tensors == local.tensors

    engine = run_ranks(save, 1, words_of(model, save=tmp_path / "engine"), backend)[0]
    local = run_ranks(load, 1, load_words(model, tmp_path / "engine"), [])[0]
    names = {expected_name(name, model, backend): name for name in local.weights}
    assert_loaded(local.weights, {names[name]: weight for name, weight in engine.weights.items()})
    assert {key: tensor.shape for key, tensor in stored_tensors(tmp_path / "engine", 1).items()} == local.tensors


def assert_loaded(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    wrong = [name for name, weight in weights.items() if not torch.equal(weight, expected[name])]
    assert wrong == []


def only_here(engine: Built, local: Built) -> set[str]:
    """Layers whose state Transformer Engine's model saves and the local one has none of."""
    assert local.objects <= engine.objects
    return {key.partition("._extra_state")[0] for key in engine.objects - local.objects}


@pytest.mark.parametrize(
    ("model", "layers"),
    [
        ("Qwen1.5-MoE", {"decoder.layers.pre_mlp_layernorm", "decoder.final_layernorm"}),
        (
            "DeepSeek-V2-Lite",
            {f"decoder.layers.{n}.input_layernorm" for n in range(3)}
            | {f"decoder.layers.{n}.pre_mlp_layernorm" for n in (1, 2)}
            | {"decoder.final_layernorm"},
        ),
    ],
)
def test_the_state_of_norms_is_all_that_only_one_of_them_saves(model, layers):
    engine, local = (run_ranks(build, 1, words_of(MODELS[model]), forced)[0] for forced in (GROUPED, []))
    assert only_here(engine, local) == layers


TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
EP2 = {"expert_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("model", "layout"),
    [("OLMoE", TP2), ("DeepSeek-V2-Lite", TP2 | EP2 | {"expert_tensor_parallel_size": 1}), ("ERNIE-4.5", EP2)],
    ids=lambda value: value if isinstance(value, str) else "x".join(str(size) for size in value.values()),
)
def test_two_ranks_save_what_one_local_rank_saved(model, layout, tmp_path):
    settings = MODELS[model]
    local = run_ranks(save, 1, words_of(settings, save=tmp_path / "local"), [])[0]
    words = load_words(settings | layout, tmp_path / "local", save=tmp_path / "engine")
    run_ranks(load_and_save, 2, words, GROUPED)
    before, after = (stored_tensors(tmp_path / name, 1) for name in ("local", "engine"))
    assert before.keys() == after.keys() == local.tensors.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def load_and_save(words: list[str], forced: list[str]) -> None:
    from megatron.training.checkpointing import load_checkpoint, save_checkpoint

    model = make(words, forced, seed=4 + int(os.environ["RANK"]))
    with contextlib.redirect_stdout(io.StringIO()):
        load_checkpoint([model], None, None)
        save_checkpoint(1, [model], None, None, 0)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_an_imported_hugging_face_model_loads(model_type, tmp_path):
    from megatron_emoe.hf.import_model import import_model

    imported = tmp_path / "megatron"
    import_model(hf_models.save(model_type, tmp_path / "hf"), imported, report=str)
    run = "--finetune --lr 1e-3 --train-iters 1 --micro-batch-size 1 --global-batch-size 1 --seq-length 16 --mock-data"
    saving = (
        f"--load {imported} --exit-on-missing-checkpoint --save {tmp_path}/engine --save-interval 1 --no-save-optim"
    )
    words = [f"@{imported}/model.args", *run.split(), *saving.split()]
    if "--tokenizer-type" not in (imported / "model.args").read_text():
        words += ["--tokenizer-type", "NullTokenizer"]
    run_ranks(load_and_save, 1, words, GROUPED)
    before, after = stored_tensors(imported, None), stored_tensors(tmp_path / "engine", 1)
    assert before.keys() == {key for key in after if not key.startswith("rng_state")}
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


FP8 = ["--bf16", "--fp8-format", "hybrid", "--moe-router-padding-for-quantization"]


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_fp8_training_starts_from_a_checkpoint_without_scales(recipe, tmp_path):
    settings = MODELS["DeepSeek-V2-Lite"] | COACTIVATION
    local = run_ranks(save, 1, words_of(settings, save=tmp_path), [])[0]
    engine = run_ranks(load, 1, load_words(settings, tmp_path), [*GROUPED, *FP8, "--fp8-recipe", recipe])[0]
    assert "TEGroupedMLP" in engine.modules.values() and "ElasticRouter" in engine.modules.values()
    for name, weight in local.weights.items():
        assert torch.equal(engine.weights[expected_name(name, settings, GROUPED)], weight.bfloat16()), name


def refused(words: list[str], forced: list[str]) -> tuple[int, str]:
    text = io.StringIO()
    with contextlib.redirect_stderr(text), pytest.raises(SystemExit) as leave:
        make(words, forced, seed=1)
    return leave.value.code, text.getvalue()


@pytest.mark.parametrize(
    ("forced", "message"),
    [
        ([*GROUPED, "--fp8-param-gather"], "fp8"),
        ([*GROUPED, "--moe-router-padding-for-quantization"], "fp8/fp4 must be specified"),
        (["--fp8-format", "hybrid"], "needs --transformer-impl transformer_engine, local layers ignore it"),
        ([*GROUPED, "--bf16", "--fp8-format", "hybrid", "--fp4-format", "e2m1"], "fp8"),
    ],
    ids=["parameters", "padding", "local layers", "FP4 too"],
)
def test_settings_of_fp8_that_cannot_work_end_before_anything_is_built(forced, message):
    status, text = run_ranks(refused, 1, words_of(MODELS["OLMoE"]), forced)[0]
    errors = [line for line in text.splitlines() if "error:" in line]
    assert (status, len(errors)) == (2, 1) and message in errors[0], text
