"""The elastic configuration: what it accepts, what it becomes, and every feature of the core that it refuses."""

import re
import sys
from argparse import Namespace

import pytest
from megatron.core.transformer.enums import CudaGraphModule
from megatron.core.transformer.moe.moe_utils import get_capacity
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args
from megatron.training.arguments import parse_args, validate_args

from megatron_emoe.routing import combinations
from megatron_emoe.routing.transformer_config import (
    ElasticMLATransformerConfig,
    ElasticTransformerConfig,
    check_elastic,
    elastic_config_from_args,
)
from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.training.arguments import add_arguments

MODEL = {
    "num_layers": 2,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_moe_experts": 8,
    "moe_ffn_hidden_size": 8,
    "moe_router_topk": 2,
    "moe_router_pre_softmax": True,
    "add_bias_linear": False,
}
BIAS = {"moe_router_enable_expert_bias": True, "moe_router_score_function": "softmax"}
COACTIVATION = {"emoe_selection": "coactivation", "emoe_pool_k": 6}
UNIFORM = {"emoe_selection": "prefix", "emoe_k_schedule": "uniform", "emoe_k_min": 1, "emoe_k_max": 4}

FLAGS = (
    "--num-layers 2 --hidden-size 16 --ffn-hidden-size 32 --moe-ffn-hidden-size 8 --num-attention-heads 2 "
    "--seq-length 16 --max-position-embeddings 16 --num-experts 8 --moe-router-topk 2 --moe-router-pre-softmax "
    "--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 64 --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope "
    "--transformer-impl local --no-rope-fusion --no-persist-layer-norm --no-gradient-accumulation-fusion"
)


def elastic(**settings) -> ElasticTransformerConfig:
    return ElasticTransformerConfig(**MODEL | settings)


def parsed(monkeypatch, flags: str = "") -> Namespace:
    """Megatron's checked namespace for the tiny model, with our flags."""
    monkeypatch.setattr(sys, "argv", ["pretrain_emoe.py", *FLAGS.split(), *flags.split()])
    args = parse_args(add_arguments)
    validate_args(args)
    return args


# What it accepts and what it becomes.


def test_settings_off_leave_the_core_s_configuration():
    core = TransformerConfig(**MODEL)
    ours = elastic()
    assert isinstance(ours, TransformerConfig)
    unequal = [
        name
        for name, value in vars(core).items()
        if getattr(ours, name) != value and not callable(value)  # initialisers are new functions each time
    ]
    assert unequal == []


@pytest.mark.parametrize("score_function", ["sigmoid", "sqrtsoftplus"])
def test_selection_bias_of_the_core_is_kept(score_function):
    config = elastic(moe_router_enable_expert_bias=True, moe_router_score_function=score_function)
    assert config.moe_router_enable_expert_bias is True


def test_selection_bias_with_softmax_is_ours_alone():
    with pytest.raises(ValueError, match="Expert bias for aux-loss-free routing only supports 'sigmoid'"):
        TransformerConfig(**MODEL | BIAS)
    config = elastic(**BIAS)
    assert (config.moe_router_enable_expert_bias, config.moe_router_score_function) == (True, "softmax")
    assert elastic(**BIAS | {"moe_router_enable_expert_bias": False}).moe_router_enable_expert_bias is False


def test_flags_become_the_elastic_configuration(monkeypatch):
    args = parsed(monkeypatch, "--emoe-selection coactivation --emoe-pool-k 6 --emoe-seed 7 --emoe-eval-k 1 4")
    core = core_transformer_config_from_args(args)
    config = elastic_config_from_args(args)
    assert type(config) is ElasticTransformerConfig
    assert config.settings() == ElasticConfig(**COACTIVATION, emoe_seed=7, emoe_eval_k=[1, 4]).settings()
    for name in ("num_moe_experts", "moe_router_topk", "hidden_size", "normalization", "gated_linear_unit"):
        assert getattr(config, name) == getattr(core, name), name


def test_softmax_with_bias_from_flags(monkeypatch):
    args = parsed(monkeypatch, "--moe-router-enable-expert-bias")
    config = elastic_config_from_args(args)
    assert (config.moe_router_enable_expert_bias, config.moe_router_score_function) == (True, "softmax")
    assert args.moe_router_enable_expert_bias is True  # the namespace goes into checkpoints: it is as it was


def test_multi_latent_attention_is_promoted_too(monkeypatch):
    args = parsed(monkeypatch, "--multi-latent-attention --emoe-selection coactivation --emoe-pool-k 6 --q-lora-rank 8")
    assert type(core_transformer_config_from_args(args)) is MLATransformerConfig  # what the core would build silently
    config = elastic_config_from_args(args)
    assert type(config) is ElasticMLATransformerConfig
    assert isinstance(config, ElasticTransformerConfig)
    assert config.samples and config.emoe_pool_k == 6
    assert config.q_lora_rank == 8


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("spec", ["some.module", "some_spec"]),
        ("heterogeneous_layers_config_path", "layers.json"),
        ("hybrid_layer_pattern", "M*E"),
        ("yaml_cfg", "model.yaml"),
    ],
)
def test_flags_that_bring_their_own_layers(monkeypatch, name, value):
    args = parsed(monkeypatch)
    setattr(args, name, value)
    message = f"--{name.replace('_', '-')} {value}: it brings its own layers, which are not elastic"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        elastic_config_from_args(args)


def test_another_configuration_class_is_refused(monkeypatch):
    args = parsed(monkeypatch)

    class Other(TransformerConfig):
        pass

    def other_config(namespace: Namespace) -> Other:
        return Other(**MODEL)

    monkeypatch.setattr("megatron_emoe.routing.transformer_config.core_transformer_config_from_args", other_config)
    with pytest.raises(TypeError, match=r"^Other has no elastic counterpart"):
        elastic_config_from_args(args)


@pytest.mark.parametrize("name", ["emoe_selection", "emoe_pool_k", "emoe_hr_loss_coeff"])
def test_a_namespace_without_a_flag_is_an_error_not_a_default(monkeypatch, name):
    args = parsed(monkeypatch)
    delattr(args, name)
    with pytest.raises(AttributeError, match=name):
        elastic_config_from_args(args)


def test_settings_are_checked_on_every_way_in(monkeypatch):
    message = re.escape("--emoe-pool-k 9: must not exceed --num-experts 8")
    with pytest.raises(ValueError, match=message):
        elastic(**COACTIVATION | {"emoe_pool_k": 9})
    with pytest.raises(ValueError, match=message):
        ElasticMLATransformerConfig(
            **MODEL | COACTIVATION | {"emoe_pool_k": 9, "multi_latent_attention": True, "qk_layernorm": False}
        )
    args = parsed(monkeypatch, "--emoe-selection coactivation --emoe-pool-k 9")
    with pytest.raises(ValueError, match=message):
        elastic_config_from_args(args)


def test_group_limits_reach_the_check():
    groups = {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
    with pytest.raises(ValueError, match="^--emoe-pool-k 6: 2 groups of 2 experts hold only 4$"):
        elastic(**COACTIVATION | groups)


def test_of_a_model_without_experts_nothing_elastic_can_be_asked():
    dense = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 2}
    assert ElasticTransformerConfig(**dense).num_moe_experts is None
    for settings, given in (({"emoe_eval_k": [2, 4]}, "--emoe-eval-k 2 4"), (COACTIVATION, "--emoe-selection coactiv")):
        with pytest.raises(ValueError, match=f"^{given}.*: needs experts, and --num-experts is not given$"):
            ElasticTransformerConfig(**dense, **settings)


# What the core and elastic settings cannot do together. Each cause: settings, and how the message names them.

CHOOSES = {  # the stock selection is not used
    "coactivation": (COACTIVATION, "--emoe-selection coactivation"),
    "combine": ({"emoe_combine": "raw"}, "--emoe-combine raw"),
    "softmax bias": (BIAS, "--moe-router-enable-expert-bias with --moe-router-score-function softmax"),
}
VARIES = {  # k varies
    "schedule": (UNIFORM, "--emoe-k-schedule uniform"),
    "evaluation": ({"emoe_eval_k": [1, 4]}, "--emoe-eval-k"),
}

REPLAYED = "a replayed selection is not a drawn one"
ITSELF = "it chooses the experts itself"
REPLACING = {
    "replay": ({"moe_enable_routing_replay": True}, f"--moe-enable-routing-replay: {REPLAYED}"),
    "graphs": ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local: a captured graph repeats one k and one draw"),
    "inference": (
        {"transformer_impl": "inference_optimized"},
        "--transformer-impl inference_optimized: its router and dispatchers fix k when they are built",
    ),
    "sinkhorn": (
        {"moe_router_load_balancing_type": "sinkhorn"},
        f"--moe-router-load-balancing-type sinkhorn: {ITSELF}",
    ),
    "sinkhorn in a list": (
        {"moe_router_load_balancing_type": ["seq_aux_loss", "sinkhorn"]},
        f"--moe-router-load-balancing-type sinkhorn: {ITSELF}",
    ),
    "quantile": (
        {"moe_router_load_balancing_type": "quantile_balancing"},
        f"--moe-router-load-balancing-type quantile_balancing: {ITSELF}",
    ),
}
FUSION = {"moe_router_fusion": True}
FLEX = {"moe_token_dispatcher_type": "flex", "moe_router_dtype": "fp32"}
DEEPEP, HYBRIDEP, NCCLEP = (FLEX | {"moe_flex_dispatcher_backend": name} for name in ("deepep", "hybridep", "ncclep"))
FLEX_FLAGS = "--moe-token-dispatcher-type flex (--moe-flex-dispatcher-backend {})"
FROZEN = {
    "NCCL-EP": (
        NCCLEP,
        f"{FLEX_FLAGS.format('ncclep')}: Transformer Engine holds one number of experts per token for the whole "
        "process; use deepep, hybridep, alltoall or allgather",
    ),
    "DeepEP that pads": (
        DEEPEP | {"moe_router_padding_for_quantization": True},
        f"--moe-router-padding-for-quantization and {FLEX_FLAGS.format('deepep')}: an expert that nearly every row of "
        "a rank reaches has none left to be padded with; without it the experts pad",
    ),
    "stash": ({"moe_paged_stash": True}, "--moe-paged-stash: it sizes its buffers by the k of the first iteration"),
    "probs on input": (
        {"moe_apply_probs_on_input": True},
        "--moe-apply-probs-on-input: it works with one active expert only",
    ),
}


def with_feature(settings: dict, feature: dict) -> ElasticTransformerConfig:
    """A valid elastic configuration in which a feature of the core is then switched on.

    The core's own rules about these features (Transformer Engine is installed, ...) run when a configuration is built.
    """
    config = elastic(**settings)
    for name, value in feature.items():
        assert hasattr(config, name)  # the core still has this setting
        setattr(config, name, value)
    return config


def refused(settings: dict, feature: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check_elastic(with_feature(settings, feature))


@pytest.mark.parametrize(("settings", "cause"), (CHOOSES | VARIES).values(), ids=CHOOSES | VARIES)
@pytest.mark.parametrize(("feature", "why"), REPLACING.values(), ids=REPLACING)
def test_features_that_replace_the_selection(settings, cause, feature, why):
    refused(settings, feature, f"{cause} cannot be combined with {why}")


@pytest.mark.parametrize(("settings", "_"), (CHOOSES | VARIES).values(), ids=CHOOSES | VARIES)
def test_a_fused_router_computes_every_selection_but_the_baselines(settings, _):
    check_elastic(with_feature(settings, FUSION))


@pytest.mark.parametrize(
    "settings",
    [
        {"emoe_selection": "top-p"},
        {"emoe_selection": "null-experts", "emoe_null_experts": 4},
        {"emoe_selection": "noisy-topk"},
    ],
    ids=str,
)
def test_no_fused_router_for_a_baseline(settings):
    cause = f"--emoe-selection {settings['emoe_selection']}"
    why = "no fused kernel selects by its rule"
    refused(settings, FUSION, f"{cause} cannot be combined with --moe-router-fusion: {why}")


@pytest.mark.parametrize(("settings", "cause"), VARIES.values(), ids=VARIES)
@pytest.mark.parametrize(("feature", "why"), FROZEN.values(), ids=FROZEN)
def test_features_that_fix_k(settings, cause, feature, why):
    refused(settings, feature, f"{cause} cannot be combined with {why}")


@pytest.mark.parametrize("backend", [DEEPEP, HYBRIDEP], ids=["deepep", "hybridep"])
@pytest.mark.parametrize(("settings", "_"), VARIES.values(), ids=VARIES)
def test_flex_dispatchers_that_follow_k(settings, _, backend):
    check_elastic(with_feature(settings, backend))
    check_elastic(with_feature(settings, HYBRIDEP | {"moe_expert_rank_capacity_factor": 1.5}))


@pytest.mark.parametrize("backend", [DEEPEP, HYBRIDEP, NCCLEP], ids=["deepep", "hybridep", "ncclep"])
def test_flex_dispatchers_where_every_token_has_its_own_count(backend):
    name = FLEX_FLAGS.format(backend["moe_flex_dispatcher_backend"])
    why = "it is served with one number of experts for all tokens only; use alltoall or allgather"
    for settings in ({"emoe_selection": "top-p"}, {"emoe_selection": "null-experts", "emoe_null_experts": 4}):
        refused(
            settings, backend, f"--emoe-selection {settings['emoe_selection']} cannot be combined with {name}: {why}"
        )


@pytest.mark.parametrize(
    ("settings", "cause"),
    [
        (UNIFORM | {"emoe_k_max": 17}, "--emoe-k-schedule uniform"),
        ({"emoe_eval_k": [4, 17]}, "--emoe-eval-k"),
        (UNIFORM | {"emoe_eval_k": [17]}, "--emoe-k-schedule uniform"),
    ],
)
def test_deepep_s_limit_of_experts_per_token_counts_every_shard_of_them(settings, cause):
    settings = {"num_moe_experts": 32} | settings
    sharded = DEEPEP | {"expert_tensor_parallel_size": 2}
    check_elastic(with_feature(settings, DEEPEP))
    check_elastic(with_feature(settings, sharded | HYBRIDEP))
    why = "it takes at most 32 experts per token, and k' = 17 times --expert-tensor-parallel-size 2 is more"
    refused(settings, sharded, f"{cause} cannot be combined with {FLEX_FLAGS.format('deepep')}: {why}")


PLACES = {"moe_expert_capacity_factor": 2.0, "moe_pad_expert_input_to_capacity": True}


@pytest.mark.parametrize(
    ("settings", "largest", "most"),
    [
        (UNIFORM, 4, None),
        (UNIFORM | {"emoe_k_max": 5}, 5, "1.6"),
        ({"emoe_eval_k": [1, 6]}, 6, "1.33333"),
        ({"moe_router_topk": 8}, 8, "1"),
    ],
    ids=str,
)
def test_no_expert_has_more_places_than_there_are_tokens(settings, largest, most):
    message = (
        f"--moe-expert-capacity-factor 2.0 with --moe-pad-expert-input-to-capacity: must be at most {most}, the 8 "
        f"experts over the largest k of this run, {largest}"
    )
    check_elastic(with_feature(settings, PLACES | {"moe_pad_expert_input_to_capacity": False}))
    refused(settings, PLACES, message) if most else check_elastic(with_feature(settings, PLACES))


def test_at_exactly_all_experts_the_core_s_rounding_decides():
    decided = set()
    for k, experts in ((3, 10), (7, 10), (4, 60), (8, 64), (6, 8)):
        exact, less = experts / k, experts / k * (1 - 1e-8)
        too_many = any(get_capacity(tokens * k, experts, exact) > tokens for tokens in range(1, 20_000))
        assert combinations._has_more_places_than_tokens(k, experts, exact) is too_many
        assert not combinations._has_more_places_than_tokens(k, experts, less)
        assert all(get_capacity(tokens * k, experts, less) <= tokens for tokens in range(1, 20_000))
        decided.add(too_many)
    assert decided == {True, False}


def test_padding_for_quantization_and_padding_to_capacity_take_each_other_s_rows():
    both = {
        "moe_router_padding_for_quantization": True,
        "moe_pad_expert_input_to_capacity": True,
        "moe_expert_capacity_factor": 1.0,
    }
    refused(
        {},
        both,
        "--moe-router-padding-for-quantization cannot be combined with --moe-pad-expert-input-to-capacity: "
        "the rows it adds would take the places of tokens",
    )
    check_elastic(with_feature({}, both | {"moe_pad_expert_input_to_capacity": False}))


RECIPES = ["delayed", "tensorwise", "blockwise", "mxfp8"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("settings", [{}, COACTIVATION, UNIFORM, {"emoe_eval_k": [1, 8]}], ids=str)
def test_every_fp8_recipe_and_bf16_layers_at_the_ends(recipe, settings):
    fp8 = {"fp8": "hybrid", "fp8_recipe": recipe, "moe_router_padding_for_quantization": True}
    for more in ({}, {"first_last_layers_bf16": True}, {"moe_token_dispatcher_type": "alltoall"}):
        check_elastic(with_feature(settings, fp8 | {"transformer_impl": "transformer_engine"} | more))


@pytest.mark.parametrize("feature", [f for f, _ in FROZEN.values()], ids=FROZEN)
def test_features_that_fix_k_work_with_a_constant_k(feature):
    check_elastic(with_feature(COACTIVATION, feature))


@pytest.mark.parametrize("feature", [FUSION, *(f for f, _ in (REPLACING | FROZEN).values())])
def test_every_feature_works_with_elastic_settings_off(feature):
    check_elastic(with_feature({"emoe_router_watch": "off"}, feature))


MOE_ROUTER = CudaGraphModule.moe_router
GRAPHS = {  # of the router; and how the message names them
    "whole layers": ({"cuda_graph_impl": "local"}, "--cuda-graph-impl local"),
    "the whole iteration": ({"cuda_graph_impl": "full_iteration"}, "--cuda-graph-impl full_iteration"),
    "routers": (
        {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": [CudaGraphModule.attn, MOE_ROUTER]},
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router",
    ),
}
RECORDED = [
    ({}, "--emoe-router-watch warn"),
    ({"emoe_hr_loss_coeff": 0.001}, "--emoe-hr-loss-coeff 0.001"),
    ({"emoe_router_watch": "off", "emoe_coactivation_interval": 5}, "--emoe-coactivation-interval 5"),
]


@pytest.mark.parametrize(("graphs", "name"), GRAPHS.values(), ids=GRAPHS)
@pytest.mark.parametrize(("settings", "cause"), RECORDED, ids=str)
def test_nothing_is_recorded_of_a_captured_router(settings, cause, graphs, name):
    why = "a captured router records nothing; leave it out of the graph, or this off"
    refused(settings, graphs, f"{cause} cannot be combined with {name}: {why}")
    check_elastic(with_feature({"emoe_router_watch": "off"}, graphs))
    check_elastic(with_feature(settings, graphs | {"cuda_graph_impl": "none"}))
    if not name.endswith("full_iteration"):
        check_elastic(with_feature(settings, graphs | {"cuda_graph_modules": [CudaGraphModule.attn]}))


def test_another_schedule_of_the_loop_is_refused_whatever_the_elastic_settings():
    for settings in ({}, COACTIVATION):
        refused(
            settings,
            {"overlap_moe_expert_parallel_comm": True},
            "--overlap-moe-expert-parallel-comm: not supported, its schedule takes a plan from the forward step",
        )


@pytest.mark.parametrize(
    ("flag", "name", "value"), [("fp8", "--fp8-format", "hybrid"), ("fp4", "--fp4-format", "e2m1")]
)
def test_low_precision_that_local_layers_would_ignore(flag, name, value):
    message = f"{name} {value}: needs --transformer-impl transformer_engine, local layers ignore it"
    refused({}, {flag: value, "transformer_impl": "local"}, message)
    check_elastic(with_feature({}, {flag: value, "transformer_impl": "transformer_engine"}))


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ("--emoe-selection coactivation --emoe-pool-k 6", "--emoe-selection coactivation"),
        (
            "--emoe-selection prefix --emoe-k-schedule uniform --emoe-k-min 1 --emoe-k-max 4",
            "--emoe-k-schedule uniform",
        ),
    ],
)
def test_draws_and_the_engine_s_random_states(monkeypatch, line, cause):
    message = f"{cause} cannot be combined with --te-rng-tracker: recomputation finds its draws through Megatron's own"
    args = parsed(monkeypatch, line)
    args.te_rng_tracker = True
    with pytest.raises(ValueError, match=f"^{re.escape(message)} tracker$"):
        elastic_config_from_args(args)
    plain = parsed(monkeypatch, "--emoe-eval-k 1 4")
    plain.te_rng_tracker = True
    elastic_config_from_args(plain)


@pytest.mark.parametrize("kinds", ["global_aux_loss", ["seq_aux_loss", "global_aux_loss"]])
def test_global_balancing_needs_one_k_per_step(kinds):
    feature = {"moe_router_load_balancing_type": kinds}
    refused(
        UNIFORM | {"emoe_k_draw": "microbatch"},
        feature,
        "--emoe-k-draw microbatch cannot be combined with --moe-router-load-balancing-type global_aux_loss: "
        "it averages counts over micro-batches, which then hold different numbers of experts",
    )
    check_elastic(with_feature(UNIFORM | {"emoe_k_draw": "step"}, feature))
    check_elastic(with_feature(UNIFORM | {"emoe_k_draw": "layer"}, feature))
