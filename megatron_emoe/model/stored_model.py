"""Which model a checkpoint holds, by the arguments it was saved with, and whether a command line asks for the same."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig

from megatron_emoe.settings.elastic_config import MODEL_FEATURES, ElasticConfig, flag

SHAPE_FLAGS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "num_experts",
    "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size",
    "moe_layer_freq",
    "multi_latent_attention",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_layernorm",
    "add_qkv_bias",
    "position_embedding_type",
    "swiglu",
    "normalization",
    "untie_embeddings_and_output_weights",
    "moe_router_enable_expert_bias",
    "emoe_lora_experts",
    "emoe_lora_rank",
)
"""What makes a model another one: compared when a checkpoint is loaded."""

# What a configuration field says about how a model runs, not which model it is: taken from the command line.
_RUNTIME = (
    *("recompute", "cuda_graph", "offload", "overlap", "fusion", "fp8", "fp4"),
    *("dispatcher", "moe_pad_expert", "init"),
)
_RUNTIME_FIELDS = {
    "attention_backend",
    "transformer_impl",
    "persist_layer_norm",
    "distribute_saved_activations",
    "deterministic_mode",
    "pipeline_model_parallel_layout",
    "moe_grouped_gemm",
    "moe_per_layer_logging",
    "attention_dropout",
    "hidden_dropout",
}
_MODEL_FLAGS = [
    "num_experts",
    "swiglu",
    "squared_relu",
    "quick_geglu",
    "position_embedding_type",
    "rotary_base",
    "rotary_percent",
    "rotary_interleaved",
    "use_rope_scaling",
    "rope_scaling_factor",
    "rotary_seq_len_interpolation_factor",
    "add_position_embedding",
    "group_query_attention",
    "seq_length",
    "max_position_embeddings",
    "untie_embeddings_and_output_weights",
    "vocab_size",
    "make_vocab_size_divisible_by",
    "tokenizer_type",
    "tokenizer_model",
    "vocab_file",
    "merge_file",
    "rope_type",
    "bf16",
    "fp16",
    "micro_batch_size",
    "multi_latent_attention",
    "mtp_num_layers",
]


def check_shape(args: Namespace, stored: Namespace, source: str) -> None:
    """ValueError for the first flag in which the checkpoint in `source` holds another model.

    A part of the stored model that this run leaves out counts too: the core would drop its weights without a word.
    """
    for name in (*SHAPE_FLAGS, *MODEL_FEATURES):
        old, new = shape_value(stored, name), shape_value(args, name)
        if old != new and (old is not None or name in MODEL_FEATURES):
            given = f"{flag(name)} is not given" if new is None else f"{flag(name)} {new}"
            saved = "without it" if old is None else f"with {old}"
            raise ValueError(f"{given}: the checkpoint in {source} was saved {saved}")


def check_given(given: Mapping[str, Any], stored: Namespace, source: str) -> None:
    """ValueError for the first flag on an evaluation's command line in which the model in `source` is another.

    given: values by name. k counts too: past it the tail begins, and a result names it as the k of training.
    """
    for name in (*SHAPE_FLAGS, *MODEL_FEATURES, "moe_router_topk"):
        if name in given and given[name] != shape_value(stored, name):
            rule = f"the model in {source} has {shape_value(stored, name)}; leave the flag out"
            asks = " (--k asks for other numbers of active experts)" if name == "moe_router_topk" else ""
            raise ValueError(f"{flag(name)} {given[name]}: {rule}{asks}")


def shape_value(args: Namespace, name: str) -> Any:
    """Without --group-query-attention the number of query groups is the number of heads: the core writes that into its
    namespace, and so into checkpoints, when it first logs. A checkpoint without our flags has no feature of ours."""
    if name == "num_query_groups" and not getattr(args, "group_query_attention", True):
        return args.num_attention_heads
    return getattr(args, name, getattr(ElasticConfig, name, None))


def model_flags(stored: Namespace) -> dict[str, Any]:
    """What the checkpoint says about which model it holds, elastic settings included: name and stored value.

    The core's --use-checkpoint-args takes a fixed list that misses, among others, --qk-layernorm and --norm-epsilon;
    this is every field of the configuration except those about how to run it.
    """
    shape = {f.name for f in fields(MLATransformerConfig)} - {f.name for f in fields(ModelParallelConfig)}
    shape = {name for name in shape - _RUNTIME_FIELDS if not any(word in name for word in _RUNTIME)}
    names = [*sorted(shape), *_MODEL_FLAGS, *(f.name for f in fields(ElasticConfig))]
    return {name: getattr(stored, name) for name in names if hasattr(stored, name)}
