"""What low-rank experts on a dense model cannot be combined with: every rule with both flags and the reason."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_emoe.settings.elastic_config import flag

_NO_DISPATCH = "every rank computes all low-rank experts of its tokens: nothing is dispatched"
_NO_LIMIT = "low-rank experts have room for every token"
_DENSE = "low-rank experts are for a model whose layers are dense"
_OWN_PRODUCTS = "the frozen linear layers and their low-rank experts are products of this package's, in bf16 or fp32"

_REFUSED: dict[str, str] = {
    "expert_model_parallel_size": _NO_DISPATCH,
    "moe_token_dispatcher_type": _NO_DISPATCH,
    "moe_permute_fusion": _NO_DISPATCH,
    "moe_apply_probs_on_input": _NO_DISPATCH,
    "moe_expert_capacity_factor": _NO_LIMIT,
    "moe_pad_expert_input_to_capacity": _NO_LIMIT,
    "moe_token_dropping": _NO_LIMIT,
    "moe_expert_rank_capacity_factor": _NO_LIMIT,
    "moe_paged_stash": _NO_LIMIT,
    "moe_shared_expert_intermediate_size": _DENSE,
    "moe_layer_freq": _DENSE,
    "moe_latent_size": _DENSE,
    "moe_layer_recompute": _DENSE,
    "mtp_num_layers": "the layers of multi-token prediction would have none",
    "moe_router_padding_for_quantization": _OWN_PRODUCTS,
    "fp8": _OWN_PRODUCTS,
    "fp4": _OWN_PRODUCTS,
    "tp_comm_overlap": _OWN_PRODUCTS,
    "use_kitchen": _OWN_PRODUCTS,
    "cuda_graph_impl": "not tried, and a captured router records nothing",
}
_FLAGS = {"fp8": "--fp8-format", "fp4": "--fp4-format"}


def check_lora(config: Any) -> None:
    """Refuse (ValueError) what contradicts --emoe-lora-experts. config: Megatron-Core's with the elastic fields."""
    experts = config.emoe_lora_experts
    if experts is None:
        return
    cause = f"{flag('emoe_lora_experts')} {experts}"
    if config.num_moe_experts != experts:
        raise ValueError(f"{cause} cannot be combined with --num-experts {config.num_moe_experts}: {_DENSE}")
    if config.lora_rank >= config.hidden_size:
        rule = f"must be below --hidden-size {config.hidden_size}, or it is no low rank"
        raise ValueError(f"{flag('emoe_lora_rank')} {config.lora_rank}: {rule}")
    for name, why in _REFUSED.items():
        value = getattr(config, name)
        if value and value != getattr(TransformerConfig, name):
            shown = "" if value is True else f" {value}"
            raise ValueError(f"{cause} cannot be combined with {_FLAGS.get(name, flag(name))}{shown}: {why}")
    if "moe" in (config.recompute_modules or []):
        raise ValueError(f"{cause} cannot be combined with --recompute-modules moe: its layers are recomputed as mlp")
    if config.transformer_impl == "inference_optimized":
        raise ValueError(f"{cause} cannot be combined with --transformer-impl inference_optimized: {_OWN_PRODUCTS}")
