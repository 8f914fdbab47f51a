"""From the command line to built layers: every elastic setting arrives, in every kind of layer, no MoE layer stays
stock, and every tensor is saved under its one key."""

import contextlib
import io
from dataclasses import fields, replace
from typing import Any, NamedTuple

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter

from megatron_emoe.model.layer_spec import elastic_layer, our_layer
from megatron_emoe.routing.dynamic_router import build_router
from megatron_emoe.routing.moe_layer import ElasticMoELayer
from megatron_emoe.settings.elastic_config import ElasticConfig
from tests.distributed import run_ranks
from tests.tiny import COACTIVATION, PREFIX, arguments, flags, layer_config, start

# Together these give every elastic field a value other than its default.
LINES: list[dict[str, Any]] = [
    {
        "emoe_selection": "coactivation",
        "emoe_pool_k": 6,
        "emoe_pool_draw": "microbatch",
        "emoe_k_schedule": "weighted",
        "emoe_k_min": 1,
        "emoe_k_max": 3,
        "emoe_k_weights": [0.5, 0.25, 0.25],
        "emoe_k_draw": "layer",
        "emoe_seed": 99,
        "emoe_hr_loss_coeff": 0.125,
        "emoe_balance_on": "topk",
        "emoe_combine": "renormalize",
        "emoe_eval_k": [1, 4],
        "emoe_coactivation_interval": 7,
        "emoe_router_watch": "stop",
        "emoe_gradient_check": "off",
    },
    {
        "emoe_selection": "coactivation",
        "emoe_pool_k": 5,
        "emoe_pool_fixed": True,
        "emoe_k_schedule": "default-or-smaller",
        "emoe_k_min": 1,
        "emoe_k_default_prob": 0.7,
        "emoe_qk_norm": "full",
        "emoe_clip_qkv": 4.0,
    },
    {
        "emoe_selection": "prefix",
        "emoe_k_schedule": "ramp",
        "emoe_k_min": 1,
        "emoe_k_max": 4,
        "emoe_k_ramp_iters": 50,
        "emoe_distill_coeff": 0.5,
    },
    {
        "emoe_selection": "prefix",
        "emoe_k_schedule": "stratified",
        "emoe_k_grid": [1, 4],
        "emoe_other_weight": 0.5,
        "emoe_budget_scales": True,
    },
    {
        "emoe_selection": "prefix",
        "emoe_k_schedule": "stratified",
        "emoe_k_grid": [4],
        "emoe_second_pass": 0.5,
    },
    {
        **COACTIVATION,
        "emoe_pool_keep": 1,
        "emoe_pool_prob": 0.5,
        "emoe_pool_anneal_iters": 10,
        "emoe_tail_scale": ["4:0.5"],
        "emoe_train": "router",
    },
    {"emoe_selection": "top-p", "emoe_top_p": 0.7, "emoe_top_p_max": 4, "emoe_entropy_loss_coeff": 0.5},
    {"emoe_selection": "null-experts", "emoe_null_experts": 4},
    {"emoe_selection": "noisy-topk", "emoe_importance_loss_coeff": 0.5, "emoe_load_loss_coeff": 0.25},
]
LORA = {
    **dict.fromkeys(("num_experts", "moe_ffn_hidden_size", "moe_token_dispatcher_type")),
    **COACTIVATION,
    "emoe_lora_experts": 8,
    "emoe_lora_rank": 4,
    "emoe_lora_alpha": 2.5,
    "emoe_hr_loss_coeff": 0.5,
}
ROUTERS = {"top-p": "TopPRouter", "null-experts": "NullExpertRouter", "noisy-topk": "NoisyTopKRouter"}
DEFAULTS = {field.name: field.default for field in fields(ElasticConfig)}


class Layer(NamedTuple):
    """A built MoE layer: its name in the model, the classes, and the elastic settings in each place that reads them."""

    name: str
    classes: tuple[str, str, str]
    settings: list[dict[str, Any]]
    is_mtp: bool
    number: int


def model_of(changes: dict[str, Any]) -> Any:
    """Parse a command line and build the model it asks for."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_emoe.model.layer_spec import elastic_model_config

    args = arguments(flags(**changes))
    start()
    config = elastic_model_config(args)
    return config.get_builder_cls()(config).build_model(ProcessGroupCollection.use_mpu_process_groups())


def build(changes: dict[str, Any]) -> list[Layer]:
    """Every MoE layer of that model, described."""
    return [describe(name, layer) for name, layer in model_of(changes).named_modules() if isinstance(layer, MoELayer)]


def keys(changes: dict[str, Any]) -> set[str]:
    """The keys under which that model's tensors are saved."""
    entries = model_of(changes).sharded_state_dict().values()
    return {entry.key for entry in entries if not entry.key.endswith("_extra_state")}


def describe(name: str, layer: Any) -> Layer:
    configs = [layer.config, layer.router.config, layer.token_dispatcher.config]
    return Layer(
        name,
        (type(layer).__name__, type(layer.router).__name__, type(layer.config).__name__),
        [{field: getattr(config, field) for field in DEFAULTS} for config in configs],
        layer.router.is_mtp_layer,
        layer.router.global_layer_number,
    )


OF_A_CHECKPOINT = {"emoe_teacher", "emoe_teacher_weight"}
"""What names one: tests/training/test_teacher.py."""


def test_the_lines_cover_every_elastic_field():
    changed = {name for line in (*LINES, ours(LORA)) for name, value in line.items() if value != DEFAULTS[name]}
    assert changed == set(DEFAULTS) - OF_A_CHECKPOINT


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "line"),
    [*(("attention", line) for line in LINES), ("multi-latent", LINES[0]), ("multi-token", LINES[0])],
    ids=lambda value: value if isinstance(value, str) else value.get("emoe_k_schedule", value["emoe_selection"]),
)
def test_every_flag_reaches_every_built_layer(kind, line):
    more = {
        "attention": {"qk_layernorm": "emoe_qk_norm" in line},
        "multi-latent": {"multi_latent_attention": True},
        "multi-token": {"mtp_num_layers": 1},
    }[kind] | {"eval_iters": 1, "moe_aux_loss_coeff": 1e-2}  # what some of the settings are about
    layers = run_ranks(build, 1, line | more)[0]
    assert len(layers) == (3 if kind == "multi-token" else 2)
    config = "ElasticMLATransformerConfig" if kind == "multi-latent" else "ElasticTransformerConfig"
    for layer in layers:
        assert layer.classes == ("ElasticMoELayer", ROUTERS.get(line["emoe_selection"], "ElasticRouter"), config)
        assert layer.settings == [DEFAULTS | line] * 3
    assert [layer.number for layer in layers] == list(range(1, len(layers) + 1))
    assert [layer.is_mtp for layer in layers] == [False, False, True][: len(layers)]


def ours(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name in DEFAULTS}


def build_lora(changes: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]], float, int | None]]:
    """Every MLP with low-rank experts: its name, the settings in it and its router, the scale, what is MoE in it."""
    from megatron_emoe.routing.lora_mlp import LoraMLP

    return [
        (name, [ours(vars(part.config)) for part in (mlp, mlp.router)], mlp.lora.linear_fc2.scale, mlp.router.topk)
        for name, mlp in model_of(changes).named_modules()
        if isinstance(mlp, LoraMLP)
    ]


def test_every_flag_reaches_every_dense_layer_with_low_rank_experts():
    layers = run_ranks(build_lora, 1, LORA)[0]
    assert [layer[0] for layer in layers] == ["decoder.layers.0.mlp", "decoder.layers.1.mlp"]
    assert all(layer[1:] == ([DEFAULTS | ours(LORA)] * 2, 2.5 / 4, 2) for layer in layers)


REFUSED_LORA = [
    ({"num_experts": 4}, "--emoe-lora-experts 8 cannot be combined with --num-experts 4"),
    ({"moe_expert_capacity_factor": 1.0}, "--moe-expert-capacity-factor 1.0: low-rank experts have room"),
    ({"moe_shared_expert_intermediate_size": 8}, "--moe-shared-expert-intermediate-size 8: low-rank experts are for"),
    ({"mtp_num_layers": 1}, "--mtp-num-layers 1: the layers of multi-token prediction would have none"),
    ({"emoe_lora_rank": 32}, "--emoe-lora-rank 32: must be below --hidden-size 32, or it is no low rank"),
    (
        {"recompute_granularity": "selective", "recompute_modules": "moe"},
        "--recompute-modules moe: its layers are recomputed as mlp",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED_LORA, ids=[row[1] for row in REFUSED_LORA])
def test_what_low_rank_experts_cannot_be_combined_with(changes, message):
    status, line = run_ranks(refused, 1, LORA | changes, [])[0]
    assert status == 2 and message in line


def test_dense_layers_stay_and_moe_layers_between_them_are_elastic():
    layers = run_ranks(build, 1, COACTIVATION | {"num_layers": 4, "moe_layer_freq": "[0,1,0,1]"})[0]
    assert [layer.name for layer in layers] == ["decoder.layers.1.mlp", "decoder.layers.3.mlp"]
    assert {layer.classes[:2] for layer in layers} == {("ElasticMoELayer", "ElasticRouter")}


def test_settings_that_are_off_build_elastic_layers_with_the_defaults():
    assert all(layer.settings == [DEFAULTS] * 3 for layer in run_ranks(build, 1, {})[0])


class OtherRouter(TopKRouter):
    """Somebody else's router."""


class OtherLayer(MoELayer):
    """Somebody else's MoE layer."""


def test_a_spec_with_somebody_else_s_layer_or_router_is_refused():
    spec = get_gpt_layer_local_spec(8, moe_grouped_gemm=False)
    mlp = spec.submodules.mlp
    other_router = replace(mlp.keywords["submodules"], router=OtherRouter)
    for changed, name in (
        (type(mlp)(OtherLayer, **mlp.keywords), "OtherLayer"),
        (type(mlp)(MoELayer, submodules=other_router), "OtherRouter"),
    ):
        with pytest.raises(TypeError, match=name):
            elastic_layer(replace(spec, submodules=replace(spec.submodules, mlp=changed)))


def test_only_the_moe_layer_and_its_router_are_replaced_and_the_core_s_spec_is_left_alone():
    spec = get_gpt_layer_local_spec(8, moe_grouped_gemm=False)
    ours = elastic_layer(spec)
    assert (spec.submodules.mlp.func, ours.submodules.mlp.func) == (MoELayer, ElasticMoELayer)
    before, after = spec.submodules.mlp.keywords["submodules"], ours.submodules.mlp.keywords["submodules"]
    assert (before.router, after.router) == (TopKRouter, build_router)
    assert replace(after, router=TopKRouter) == before
    assert replace(ours.submodules, mlp=None) == replace(spec.submodules, mlp=None)
    assert elastic_layer(ours) is ours


def refused(changes: dict[str, Any], forced: list[str]) -> tuple[int, str]:
    """Exit status and message of a command line; forced: words that host mode itself would not let through."""
    from megatron_emoe.host import mode as host_mode

    text, setup = io.StringIO(), host_mode.setup
    host_mode.setup = lambda words: setup(words) + forced
    with contextlib.redirect_stderr(text), pytest.raises(SystemExit) as leave:
        arguments(flags(**changes))
    return leave.value.code, text.getvalue()


@pytest.mark.parametrize(
    ("changes", "forced", "named"),
    [
        (
            PREFIX | {"moe_router_dtype": "fp32"},
            ["--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "ncclep"],
            ["--emoe-k-schedule uniform", "--moe-flex-dispatcher-backend ncclep"],
        ),
        (
            {"emoe_selection": "noisy-topk"},
            ["--moe-router-fusion"],
            ["--emoe-selection noisy-topk", "--moe-router-fusion"],
        ),
        (
            COACTIVATION | {"moe_router_load_balancing_type": "sinkhorn"},
            [],
            ["--emoe-selection coactivation", "--moe-router-load-balancing-type sinkhorn"],
        ),
    ],
    ids=["flex", "fusion", "sinkhorn"],
)
def test_a_combination_that_cannot_work_ends_with_one_message_naming_both_flags(changes, forced, named):
    status, message = run_ranks(refused, 1, changes, forced)[0]
    errors = [line for line in message.splitlines() if "error:" in line]
    assert status == 2 and len(errors) == 1
    assert all(word in errors[0] for word in named)


# Where Transformer Engine's layers keep what a layer holds, whichever spec built it.
ATTENTION = {
    "self_attention.linear_qkv.layer_norm_weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
}
LATENT_ATTENTION = {
    "input_layernorm.weight",
    "self_attention.linear_q_proj.weight",
    "self_attention.linear_kv_down_proj.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight",
    "self_attention.linear_kv_up_proj.weight",
    "self_attention.linear_proj.weight",
}
COMPRESSED_QUERIES = LATENT_ATTENTION - {"self_attention.linear_q_proj.weight"} | {
    "self_attention.linear_q_down_proj.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight",
    "self_attention.linear_q_up_proj.weight",
}
NORMS = {"self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"}
DENSE = {"mlp.linear_fc1.layer_norm_weight", "mlp.linear_fc1.weight", "mlp.linear_fc2.weight"}
MOE = {
    "pre_mlp_layernorm.weight",
    "mlp.router.weight",
    "mlp.experts.experts.linear_fc1.weight",
    "mlp.experts.experts.linear_fc2.weight",
}
SHARED = {"mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight"}
ENDS = {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight", "output_layer.weight"}
MTP = {f"mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "final_layernorm")}
STACKED, FIRST, SECOND, PREDICTED = "decoder.layers.", "decoder.layers.0.", "decoder.layers.1.", "mtp.layers.0."
LATENT = {"multi_latent_attention": True, "qk_layernorm": True, "emoe_qk_norm": "latent"}
DENSE_FIRST = {"moe_layer_freq": "[0,1]"}
SAVED: dict[str, tuple[dict[str, Any], dict[str, set[str]]]] = {
    "plain": ({}, {STACKED: ATTENTION | MOE}),
    "OLMoE": ({"qk_layernorm": True, "emoe_qk_norm": "full"}, {STACKED: ATTENTION | NORMS | MOE}),
    "Qwen": (
        {"add_qkv_bias": True, "moe_shared_expert_intermediate_size": 32, "moe_shared_expert_gate": True},
        {STACKED: ATTENTION | {"self_attention.linear_qkv.bias"} | MOE | SHARED | {"mlp.shared_experts.gate_weight"}},
    ),
    "DeepSeek-V2-Lite": (
        LATENT | DENSE_FIRST | {"moe_shared_expert_intermediate_size": 32},
        {FIRST: LATENT_ATTENTION | DENSE, SECOND: LATENT_ATTENTION | MOE | SHARED},
    ),
    "compressed queries": (
        LATENT | DENSE_FIRST | {"emoe_qk_norm": "core", "q_lora_rank": 16},
        {FIRST: COMPRESSED_QUERIES | DENSE, SECOND: COMPRESSED_QUERIES | MOE},
    ),
    "ERNIE": (
        DENSE_FIRST | {"moe_router_enable_expert_bias": True, "moe_router_pre_softmax": None},
        {FIRST: ATTENTION | DENSE, SECOND: ATTENTION | MOE | {"mlp.router.expert_bias"}},
    ),
    "multi-token": (
        DENSE_FIRST | {"mtp_num_layers": 1},
        {FIRST: ATTENTION | DENSE, SECOND: ATTENTION | MOE, f"{PREDICTED}transformer_layer.": ATTENTION | MOE},
    ),
    "multi-token, latent": (
        LATENT | {"mtp_num_layers": 1},
        {STACKED: LATENT_ATTENTION | MOE, f"{PREDICTED}transformer_layer.": LATENT_ATTENTION | MOE},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("changes", "layers"), SAVED.values(), ids=SAVED)
def test_tensors_are_saved_under_the_keys_of_transformer_engine(changes, layers):
    expected = {prefix + name for prefix, names in layers.items() for name in names}
    assert run_ranks(keys, 1, changes)[0] == expected | ENDS | (MTP if "mtp_num_layers" in changes else set())


class OtherAttention(SelfAttention):
    """Somebody else's attention."""


@pytest.mark.parametrize("changes", [{"emoe_qk_norm": "full", "qk_layernorm": True}, {"emoe_clip_qkv": 1.0}])
def test_a_feature_on_somebody_else_s_attention_is_refused(changes):
    spec = get_gpt_layer_local_spec(8, moe_grouped_gemm=False)
    other = replace(spec.submodules.self_attention, module=OtherAttention)
    config = layer_config(normalization="RMSNorm", **changes)
    with pytest.raises(TypeError, match="OtherAttention in the layer spec is not the core's SelfAttention"):
        our_layer(replace(spec, submodules=replace(spec.submodules, self_attention=other)), config)
    assert our_layer(spec, config).submodules.self_attention != spec.submodules.self_attention
