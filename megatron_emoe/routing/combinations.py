"""What elastic settings and Megatron-Core's cannot do together: every rule with both flags and the reason."""

from __future__ import annotations

import math
from argparse import Namespace
from dataclasses import fields

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_emoe.routing.lora_combinations import check_lora
from megatron_emoe.settings.baseline_rules import BASELINES, check_baseline_settings
from megatron_emoe.settings.elastic_config import MODEL_FEATURES, ElasticConfig, flag
from megatron_emoe.settings.elastic_rules import validate_elastic


class BothConfigs(TransformerConfig, ElasticConfig):
    """What the rules read: the fields of both. transformer_config.py builds it."""


def check_elastic(config: BothConfigs) -> None:
    """Refuse what cannot work, by flag, value and rule, before anything is built (ValueError)."""
    if not config.num_moe_experts:
        _check_dense(config)
        return
    check_lora(config)
    validate_elastic(
        config,
        model_k=config.moe_router_topk,
        num_experts=config.num_moe_experts,
        num_groups=config.moe_router_num_groups,
        group_topk=config.moe_router_group_topk,
    )
    check_baseline_settings(config, model_k=config.moe_router_topk, num_experts=config.num_moe_experts)
    check_baseline_combinations(config)
    _refuse_balancing(config)
    _refuse_router_features(config)
    _refuse_captured_router(config)
    _refuse_frozen_k(config)
    _refuse_machinery(config)
    _refuse_more_places_than_tokens(config)
    _refuse_two_passes(config)
    _check_qk_norm(config)
    _refuse_attention_features(config)


def _check_dense(config: BothConfigs) -> None:
    """A model without experts can be converted and compared; nothing elastic can be asked of it."""
    for field in fields(ElasticConfig):
        value = getattr(config, field.name)
        if value != field.default and field.name not in (*MODEL_FEATURES, "emoe_seed"):
            words = " ".join(map(str, value)) if isinstance(value, list) else value
            given = flag(field.name) if value is True else f"{flag(field.name)} {words}"
            raise ValueError(f"{given}: needs experts, and --num-experts is not given")
    _check_qk_norm(config)
    _refuse_attention_features(config)


def _conflict(elastic: str, other: str, why: str) -> None:
    raise ValueError(f"{elastic} cannot be combined with {other}: {why}")


def _cause(config: BothConfigs) -> str | None:
    """The flag because of which the stock router's own selection is not used, or None."""
    if config.samples or config.emoe_selection in BASELINES:
        return f"--emoe-selection {config.emoe_selection}"
    if config.emoe_combine != "model":
        return f"--emoe-combine {config.emoe_combine}"
    if config.emoe_tail_scale is not None:
        return f"--emoe-tail-scale {' '.join(config.emoe_tail_scale)}"
    if config.moe_router_enable_expert_bias and config.moe_router_score_function == "softmax":
        return "--moe-router-enable-expert-bias with --moe-router-score-function softmax"
    return None


def _varying(config: BothConfigs) -> str | None:
    """The flag because of which k varies, or None."""
    if config.counts_vary:
        return f"--emoe-selection {config.emoe_selection}"
    if config.draws_k:
        return f"--emoe-k-schedule {config.emoe_k_schedule}"
    return flag("emoe_eval_k") if config.emoe_eval_k else None


def _refuse_balancing(config: BothConfigs) -> None:
    kinds = config.moe_router_load_balancing_type
    kinds = [kinds] if isinstance(kinds, str) else kinds
    cause = _cause(config) or _varying(config)
    for kind in ("sinkhorn", "quantile_balancing"):
        if cause and kind in kinds:
            _conflict(cause, f"--moe-router-load-balancing-type {kind}", "it chooses the experts itself")
    if config.emoe_k_draw == "microbatch" and config.draws_k and "global_aux_loss" in kinds:
        _conflict(
            "--emoe-k-draw microbatch",
            "--moe-router-load-balancing-type global_aux_loss",
            "it averages counts over micro-batches, which then hold different numbers of experts",
        )


def _refuse_router_features(config: BothConfigs) -> None:
    """Features that replace or replay the router's own selection."""
    cause = _cause(config) or _varying(config)
    if cause is None:
        return
    if config.moe_router_fusion and config.emoe_selection in BASELINES:
        _conflict(cause, "--moe-router-fusion", "no fused kernel selects by its rule")
    if config.moe_enable_routing_replay:
        _conflict(cause, "--moe-enable-routing-replay", "a replayed selection is not a drawn one")
    if config.cuda_graph_impl != "none":
        _conflict(cause, f"--cuda-graph-impl {config.cuda_graph_impl}", "a captured graph repeats one k and one draw")
    if config.transformer_impl == "inference_optimized":
        _conflict(
            cause, "--transformer-impl inference_optimized", "its router and dispatchers fix k when they are built"
        )


_CAPTURES_ROUTER = {"moe", "moe_router", "moe_preprocess"}


def _refuse_captured_router(config: BothConfigs) -> None:
    """A replayed graph runs no Python: what is recorded of routing would be missing without a word."""
    modules = {module.name for module in config.cuda_graph_modules}  # none: whole layers, or the whole iteration
    if config.cuda_graph_impl == "none" or (modules and not modules & _CAPTURES_ROUTER):
        return
    words = f" --cuda-graph-modules {' '.join(sorted(modules))}" if modules else ""
    causes = {
        f"--emoe-hr-loss-coeff {config.hr_loss_coeff}": config.hr_loss_coeff > 0,
        f"--emoe-router-watch {config.emoe_router_watch}": config.emoe_router_watch != "off",
        f"--emoe-coactivation-interval {config.emoe_coactivation_interval}": config.emoe_coactivation_interval > 0,
    }
    for cause in (cause for cause, asked in causes.items() if asked):
        why = "a captured router records nothing; leave it out of the graph, or this off"
        _conflict(cause, f"--cuda-graph-impl {config.cuda_graph_impl}{words}", why)


def _refuse_frozen_k(config: BothConfigs) -> None:
    """Features whose buffers or formulas fix k when they are built."""
    cause = _varying(config)
    if cause is None:
        return
    if config.moe_token_dispatcher_type == "flex":
        _refuse_flex(config, cause)
    if config.moe_paged_stash:
        _conflict(cause, "--moe-paged-stash", "it sizes its buffers by the k of the first iteration")
    if config.moe_apply_probs_on_input:
        _conflict(cause, "--moe-apply-probs-on-input", "it works with one active expert only")


_DEEPEP_LIMIT = 32  # experts of a token: each is a lane of a warp in its kernels


def _refuse_flex(config: BothConfigs, cause: str) -> None:
    """What the flex dispatcher's libraries cannot do at every k. DeepEP and HybridEP follow k from call to call."""
    backend = config.moe_flex_dispatcher_backend
    name = f"--moe-token-dispatcher-type flex (--moe-flex-dispatcher-backend {backend})"
    if config.counts_vary:
        _conflict(cause, name, "it is served with one number of experts for all tokens only; use alltoall or allgather")
    if backend == "ncclep":
        why = "Transformer Engine holds one number of experts per token for the whole process"
        _conflict(cause, name, f"{why}; use deepep, hybridep, alltoall or allgather")
    if backend != "deepep":
        return
    largest, shards = config.largest_k(config.moe_router_topk), config.expert_tensor_parallel_size
    if largest * shards > _DEEPEP_LIMIT:
        sum_up = f"k' = {largest} times --expert-tensor-parallel-size {shards}"
        _conflict(cause, name, f"it takes at most {_DEEPEP_LIMIT} experts per token, and {sum_up} is more")
    if config.moe_router_padding_for_quantization:
        why = "an expert that nearly every row of a rank reaches has none left to be padded with"
        _conflict(cause, f"--moe-router-padding-for-quantization and {name}", f"{why}; without it the experts pad")


def _refuse_machinery(config: BothConfigs) -> None:
    """Parts of the training loop that this package does not serve."""
    if config.overlap_moe_expert_parallel_comm:
        raise ValueError(
            "--overlap-moe-expert-parallel-comm: not supported, its schedule takes a plan from the forward step"
        )
    if config.moe_router_padding_for_quantization and config.moe_pad_expert_input_to_capacity:
        raise ValueError(
            "--moe-router-padding-for-quantization cannot be combined with --moe-pad-expert-input-to-capacity: "
            "the rows it adds would take the places of tokens"
        )
    for name, value in (("--fp8-format", config.fp8), ("--fp4-format", config.fp4)):
        if value and config.transformer_impl == "local":
            raise ValueError(f"{name} {value}: needs --transformer-impl transformer_engine, local layers ignore it")
    if config.draws and config.use_te_rng_tracker:
        cause = f"--emoe-k-schedule {config.emoe_k_schedule}"
        if config.samples or config.adds_noise:
            cause = f"--emoe-selection {config.emoe_selection}"
        _conflict(cause, "--te-rng-tracker", "recomputation finds its draws through Megatron's own tracker")


def _refuse_more_places_than_tokens(config: BothConfigs) -> None:
    """The core pads an expert to tokens x k x factor / E rows, and has no more than the tokens to pad with."""
    factor, experts = config.moe_expert_capacity_factor, config.num_moe_experts or 0
    largest = config.largest_k(config.moe_router_topk)
    if not config.moe_pad_expert_input_to_capacity or factor is None:
        return
    if _has_more_places_than_tokens(largest, experts, factor):
        most = experts / largest
        bound = f"at most {most:g}" if largest * factor > experts else f"below {most:g}, as it is rounded up there"
        rule = f"must be {bound}, the {experts} experts over the largest k of this run, {largest}"
        raise ValueError(f"--moe-expert-capacity-factor {factor} with --moe-pad-expert-input-to-capacity: {rule}")


def _has_more_places_than_tokens(k: int, experts: int, factor: float) -> bool:
    """At k x factor = E the core's own arithmetic is a place above the tokens for some numbers of tokens: twice as many
    tokens round alike, so odd numbers tell."""
    if abs(k * factor - experts) > 1e-9 * experts:
        return k * factor > experts
    return any(math.ceil(tokens * k / experts * factor) > tokens for tokens in range(1, 1 << 14, 2))


def _refuse_two_passes(config: BothConfigs) -> None:
    """The teacher, and a second pass, go through the whole model inside one micro-batch."""
    for name in ("emoe_distill_coeff", "emoe_teacher", "emoe_second_pass"):
        if value := getattr(config, name):
            _refuse_stages(config, f"{flag(name)} {value}")


def _refuse_stages(config: BothConfigs, cause: str) -> None:
    stages = config.pipeline_model_parallel_size
    if stages > 1:
        _conflict(cause, f"--pipeline-model-parallel-size {stages}", "both passes go through the whole model")
    if config.mtp_num_layers:
        _conflict(cause, f"--mtp-num-layers {config.mtp_num_layers}", "its losses are computed inside the model")


def _check_qk_norm(config: BothConfigs) -> None:
    """What --emoe-qk-norm needs. Without it the core builds multi-latent attention in two ways that it cannot."""
    kind, latent = config.emoe_qk_norm, config.multi_latent_attention
    needs = f"{flag('emoe_qk_norm')} {kind}: needs"
    if kind != "core" and not config.qk_layernorm:
        raise ValueError(f"{needs} --qk-layernorm, which is not given")
    if kind == "full" and latent:
        _conflict("--emoe-qk-norm full", "--multi-latent-attention", "it has no queries and keys of the model's width")
    if kind == "full" and config.normalization != "RMSNorm":
        raise ValueError(f"{needs} --normalization RMSNorm, not {config.normalization}")
    if kind == "full" and config.layernorm_zero_centered_gamma:
        _conflict("--emoe-qk-norm full", "--apply-layernorm-1p", "its weight is the factor itself, not factor - 1")
    if kind == "latent" and not latent:
        raise ValueError(f"{needs} --multi-latent-attention, which is not given")
    q_rank = config.q_lora_rank if latent else None
    if kind == "latent" and q_rank is not None:
        _conflict("--emoe-qk-norm latent", f"--q-lora-rank {q_rank}", "compressed queries have a norm; use core")
    if kind == "core" and latent and config.qk_layernorm and q_rank is None and config.transformer_impl == "local":
        raise ValueError(
            "--qk-layernorm with --multi-latent-attention and no --q-lora-rank: the local implementation has no norm "
            "before the queries' projection; for DeepSeek-V2-Lite's model give --emoe-qk-norm latent"
        )


def _refuse_attention_features(config: BothConfigs) -> None:
    """Kinds of attention that would go around the clamp or the norm of queries and keys."""
    limit, cause = config.emoe_clip_qkv, None
    if config.emoe_qk_norm != "core":
        cause = f"--emoe-qk-norm {config.emoe_qk_norm}"
    if limit is not None:
        cause = f"--emoe-clip-qkv {limit}"
        if not 0 < limit < float("inf"):
            raise ValueError(f"{cause}: must be a finite number above 0")
        if config.multi_latent_attention:
            _conflict(cause, "--multi-latent-attention", "its keys and values are expanded after the clamp's place")
    if cause is None:
        return
    if config.transformer_impl == "inference_optimized":
        _conflict(cause, "--transformer-impl inference_optimized", "its layers are fused for the core's own attention")
    if config.experimental_attention_variant is not None:
        variant = f"--experimental-attention-variant {config.experimental_attention_variant}"
        _conflict(cause, variant, "it is another attention")
    if config.qk_l2_norm:
        _conflict(cause, "--qk-l2-norm", "it is another norm of queries and keys")
    if config.fused_single_qkv_rope:
        _conflict(cause, "fused_single_qkv_rope", "rotary embedding comes before queries and keys are split")
    if getattr(config, "mla_down_proj_fusion", False):
        _conflict(cause, "--mla-down-proj-fusion", "it is another attention class of the core")


def check_baseline_combinations(config: BothConfigs) -> None:
    """Refuse what a baseline is not defined for, by both flags and the reason (ValueError)."""
    if config.emoe_selection not in BASELINES:
        return
    cause = f"--emoe-selection {config.emoe_selection}"
    scores, groups = config.moe_router_score_function, config.moe_router_group_topk
    if scores != "softmax":
        _conflict(cause, f"--moe-router-score-function {scores}", "it is defined by a softmax over the experts")
    if config.moe_router_enable_expert_bias:
        _conflict(cause, "--moe-router-enable-expert-bias", "its rule knows no selection bias")
    if groups:
        _conflict(cause, f"--moe-router-group-topk {groups}", "its rule knows no groups of experts")
    if config.counts_vary:
        _refuse_fixed_counts(config, cause)


def _refuse_fixed_counts(config: BothConfigs, cause: str) -> None:
    """What counts on every token having k experts."""
    kinds = config.moe_router_load_balancing_type
    for kind in [kinds] if isinstance(kinds, str) else kinds:
        if kind not in ("none", "aux_loss"):
            flagged = f"--moe-router-load-balancing-type {kind}"
            _conflict(cause, flagged, "it counts k experts for every token; use aux_loss or none")
    if config.moe_expert_capacity_factor is not None:
        factor = f"--moe-expert-capacity-factor {config.moe_expert_capacity_factor}"
        _conflict(cause, factor, "it is a share of tokens times k, and tokens have no common k")
    if config.emoe_tail_scale is not None:
        tail = f"--emoe-tail-scale {' '.join(config.emoe_tail_scale)}"
        _conflict(cause, tail, "it is about ranks above k, and tokens have no common k")


def refuse_state_that_would_not_load(args: Namespace) -> None:
    """ValueError where a run would save FP8 scales that Transformer Engine then refuses to load: it could not go on.

    Delayed scaling alone has scales to save, as a pickle. Other recipes compute theirs anew from every tensor.
    """
    if args.fp8 is None or args.fp8_recipe != "delayed" or args.save is None or _pickles_are_loaded():
        return
    raise ValueError(
        f"--save {args.save} with --fp8-recipe delayed: its scales are saved as pickles, which this Transformer Engine "
        "does not load: give another --fp8-recipe (tensorwise, blockwise, mxfp8), or set "
        "NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE=1 where the checkpoints can be trusted"
    )


def _pickles_are_loaded() -> bool:
    try:
        from transformer_engine.pytorch._extra_state import unsafe_pickle_extra_state_enabled
    except ImportError:  # none, or one that loads them unasked
        return True
    return unsafe_pickle_extra_state_enabled()
