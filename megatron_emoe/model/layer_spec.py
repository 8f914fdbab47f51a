"""Puts the elastic classes and the model features into Megatron-Core's own specs, local or Transformer Engine. The
only file that knows specs.

Checkpoint keys are those of the Transformer Engine spec, whichever spec a model is built with: where that one fuses a
norm into the linear layer behind it, the local spec's norm is saved under the fused name. A checkpoint written on the
CPU so loads on a GPU, and back.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models import gpt
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig
from torch import Tensor, nn

from megatron_emoe.model.attention import (
    ClippedSelfAttention,
    FullWidthKeyNorm,
    FullWidthQueryNorm,
    LatentDotProductAttention,
    LatentSelfAttention,
    PackedDotProductAttention,
)
from megatron_emoe.model.checkpoint import checkpoint_to_load, recovery_of, starts_anew
from megatron_emoe.model.quantization_state import take_what_is_there
from megatron_emoe.model.recovery import Recovery, carry_out_together
from megatron_emoe.routing.dynamic_router import NEW_WEIGHTS, build_router
from megatron_emoe.routing.lora_mlp import LORA_WEIGHTS, LoraExperts, LoraMLP
from megatron_emoe.routing.moe_layer import ElasticMoELayer
from megatron_emoe.routing.router import ElasticRouter
from megatron_emoe.routing.transformer_config import ElasticTransformerConfig, elastic_config_from_args


def elastic_layer(spec: ModuleSpec) -> ModuleSpec:
    """A copy of a transformer layer's spec with elastic router and MoE layer; a dense layer comes back as it was.

    Raises:
        TypeError: the spec holds a MoE layer or router other than the core's.
    """
    mlp = spec.submodules.mlp
    target = _class_of(mlp)
    if not _is_moe(mlp) or target is ElasticMoELayer:
        return spec
    if target is not MoELayer or not isinstance(mlp, functools.partial):
        raise TypeError(f"{target.__name__} in the layer spec is not the core's MoELayer: it would stay inelastic")
    moe = mlp.keywords["submodules"]
    if moe.router is not TopKRouter:
        raise TypeError(f"{moe.router} in the layer spec is not the core's TopKRouter: it would stay inelastic")
    elastic = functools.partial(
        ElasticMoELayer, *mlp.args, **{**mlp.keywords, "submodules": replace(moe, router=build_router)}
    )
    return replace(spec, submodules=replace(spec.submodules, mlp=elastic))


def _class_of(mlp: Any) -> Any:
    return mlp.func if isinstance(mlp, functools.partial) else getattr(mlp, "module", None)


def _is_moe(mlp: Any) -> bool:
    target = _class_of(mlp)
    return isinstance(target, type) and issubclass(target, MoELayer)


def lora_layer(spec: ModuleSpec) -> ModuleSpec:
    """A copy of a dense transformer layer's spec whose MLP has low-rank experts.

    Transformer Engine's spec fuses the norm before the MLP into its first linear layer. Router and experts need what it
    gives: it becomes a layer of its own, as before experts, and its checkpoint keys stay (canonical_keys).

    Raises:
        TypeError: the layer's MLP is not the core's.
    """
    mlp, layer = spec.submodules.mlp, spec.submodules
    if not isinstance(mlp, functools.partial) or mlp.func != MLP.as_mlp_submodule:
        raise TypeError(f"{mlp} in the layer spec is not the core's MLP: it would get no low-rank experts")
    parts = mlp.keywords["submodules"]
    if getattr(parts.linear_fc1, "__name__", "") == "TELayerNormColumnParallelLinear":
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        parts = replace(parts, linear_fc1=TESpecProvider().column_parallel_linear())
        layer = replace(layer, pre_mlp_layernorm=TESpecProvider().layer_norm())
    return replace(spec, submodules=replace(layer, mlp=functools.partial(LoraMLP, submodules=parts)))


def attention_layer(spec: ModuleSpec, config: ElasticTransformerConfig) -> ModuleSpec:
    """A copy of a transformer layer's spec with the attention that --emoe-qk-norm and --emoe-clip-qkv ask for.

    Raises:
        TypeError: the spec's attention is not the core's class that the feature extends.
    """
    attention = spec.submodules.self_attention
    module, parts = attention.module, attention.submodules
    extended = MLASelfAttention if config.emoe_qk_norm == "latent" else SelfAttention
    if (config.emoe_qk_norm != "core" or config.emoe_clip_qkv is not None) and module is not extended:
        raise TypeError(f"{module.__name__} in the layer spec is not the core's {extended.__name__}")
    if parts.core_attention is DotProductAttention:
        packed = LatentDotProductAttention if module is MLASelfAttention else PackedDotProductAttention
        parts = replace(parts, core_attention=packed)
    if module is MLASelfAttention:
        module = LatentSelfAttention
    if config.emoe_qk_norm == "full":
        parts = replace(parts, q_layernorm=FullWidthQueryNorm, k_layernorm=FullWidthKeyNorm)
    if config.emoe_clip_qkv is not None:
        module = ClippedSelfAttention
    attention = replace(attention, module=module, submodules=parts)
    return replace(spec, submodules=replace(spec.submodules, self_attention=attention))


def canonical_keys(spec: ModuleSpec) -> ModuleSpec:
    """A copy of a transformer layer's spec that saves every norm of its own where Transformer Engine would fuse it."""
    layer = spec.submodules
    attention = layer.self_attention.submodules
    fused = {"input_layernorm": "self_attention.linear_qkv"}
    if hasattr(attention, "kv_layernorm"):
        fused = {
            "self_attention.q_layernorm": "self_attention.linear_q_up_proj",
            "self_attention.kv_layernorm": "self_attention.linear_kv_up_proj",
        }
    if not _is_moe(layer.mlp):
        fused["pre_mlp_layernorm"] = "mlp.linear_fc1"
    keys = {key: name for key, name in layer.sharded_state_dict_keys_map.items() if not key.endswith("layernorm.")}
    for norm, linear in fused.items():
        owner = attention if norm.startswith("self_attention.") else layer
        if getattr(owner, norm.rpartition(".")[2]) is not IdentityOp:
            keys[f"{norm}."] = f"{linear}.layer_norm_"
    return replace(spec, submodules=replace(layer, sharded_state_dict_keys_map=keys))


def our_layer(spec: ModuleSpec, config: ElasticTransformerConfig) -> ModuleSpec:
    """A copy of a transformer layer's spec with everything that this package adds to it (TypeError as above)."""
    layer = elastic_layer(spec) if config.emoe_lora_experts is None else lora_layer(spec)
    return canonical_keys(attention_layer(layer, config))


def elastic_spec(spec: Any, config: ElasticTransformerConfig) -> Any:
    """A copy of one of Megatron-Core's GPT specs whose MoE layers and routers are elastic.

    spec: that of one transformer layer (as get_gpt_layer_local_spec returns it), or of a block of several
    (get_gpt_decoder_block_spec); it stays as it is. config: the model's, which names the features of attention. Dense
    layers stay dense. Checkpoint keys become those that every model here has.

    Raises:
        TypeError: a MoE layer, router or attention in it is not the core's own, and would stay as it is.
    """
    if not hasattr(spec, "layer_specs"):
        return our_layer(spec, config)
    return replace(spec, layer_specs=[our_layer(layer, config) for layer in spec.layer_specs])


def elastic_layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """`transformer_layer_spec` of the model: the core's default spec for these flags, with what this package adds."""
    core = config
    if config.transformer.emoe_lora_experts is not None:  # the core's spec of a model without experts
        core = copy(config)
        core.transformer = copy(config.transformer)
        core.transformer.num_moe_experts = None
    return elastic_spec(gpt.default_layer_spec(core, vp_stage), config.transformer)


def _elastic_mtp_block(config: GPTModelConfig, *args: Any, **kwargs: Any) -> Any:
    """The core's multi-token-prediction block; its inner layers come from the stock spec and become ours here."""
    block = _core_mtp_block(config, *args, **kwargs)
    if block is None:
        return None
    layers = []
    for spec in block.layer_specs:
        inner = replace(spec.submodules, mtp_model_layer=our_layer(spec.submodules.mtp_model_layer, config.transformer))
        layers.append(replace(spec, submodules=inner))
    return replace(block, layer_specs=layers)


_core_mtp_block = gpt.mtp_block_spec


@contextmanager
def _elastic_mtp() -> Iterator[None]:
    """The builder takes its MTP spec from a module function with no seam; replace it while a model is built."""
    gpt.mtp_block_spec = _elastic_mtp_block
    try:
        yield
    finally:
        gpt.mtp_block_spec = _core_mtp_block


class ElasticGPTModelBuilder(GPTModelBuilder):
    """The core's builder, with elastic layers in the MTP block too, and a proof that no MoE layer stayed stock."""

    def build_model(self, *args: Any, **kwargs: Any) -> GPTModel:
        """Build one stage (AssertionError if a MoE layer or router in it is not elastic).

        What an earlier run left damaged is dealt with before: every rank has read by now what there is, and none has
        loaded yet.
        """
        recovery, self._model_config.recovery = self._model_config.recovery, None
        if recovery is not None:
            self._model_config.checkpoint = carry_out_together(recovery, self._model_config.checkpoint)
        with _elastic_mtp():
            model = super().build_model(*args, **kwargs)
        if self._model_config.checkpoint is not None:
            new_weights = self._new_weights() if self._model_config.starts_anew else ()
            take_what_is_there(model, self._model_config.checkpoint, new_weights)
        for name, module in model.named_modules():
            assert not isinstance(module, MoELayer) or isinstance(module, ElasticMoELayer), f"{name} stayed stock"
            assert not isinstance(module, TopKRouter) or isinstance(module, ElasticRouter), f"{name} stayed stock"
        if self._model_config.transformer.emoe_train == "router":
            train_only(model, ElasticRouter)
        elif self._model_config.transformer.emoe_lora_experts is not None:
            train_only(model, ElasticRouter, LoraExperts)
        return model

    def _new_weights(self) -> tuple[str, ...]:
        return NEW_WEIGHTS if self._model_config.transformer.emoe_lora_experts is None else NEW_WEIGHTS + LORA_WEIGHTS


def train_only(model: nn.Module, *kinds: type[nn.Module]) -> None:
    """Freeze every weight of the model but those of modules of these kinds.

    Hidden states then ask for a gradient where they enter: recomputation and pipeline stages pass none to others.
    """
    model.requires_grad_(False)
    for module in model.modules():
        if isinstance(module, kinds):
            module.requires_grad_(True)
    cut = model.config.recompute_granularity is not None or model.config.pipeline_model_parallel_size > 1
    if cut and getattr(model, "embedding", None) is not None:  # the first stage's
        model.embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(_module: nn.Module, _inputs: Any, hidden: Tensor) -> None:
    if torch.is_grad_enabled():
        hidden.requires_grad_(True)


@dataclass(kw_only=True)
class ElasticGPTModelConfig(GPTModelConfig):
    """GPTModelConfig built by ElasticGPTModelBuilder. checkpoint: what the model will be loaded from, if anything.
    starts_anew: only its weights are taken, and those that another selection lacks are as they are built. recovery:
    what has to be done about the folder before anything is loaded from it."""

    builder: ClassVar[str] = "megatron_emoe.model.layer_spec.ElasticGPTModelBuilder"
    checkpoint: Path | None = None
    starts_anew: bool = False
    recovery: Recovery | None = None


def elastic_model_config(args: Namespace) -> ElasticGPTModelConfig:
    """The model configuration for `megatron.training.pretrain`, from Megatron's arguments and ours.

    Raises:
        ValueError: see elastic_config_from_args and checkpoint_to_load.
    """
    transformer = elastic_config_from_args(args)
    config = gpt_config_from_args(copy(args), config=transformer, model_config_cls=ElasticGPTModelConfig)
    config.transformer_layer_spec = elastic_layer_spec
    config.rope_scaling_factor = args.rope_scaling_factor  # the core reads the flag, and leaves its own default of 8
    config.checkpoint = checkpoint_to_load(args)
    config.starts_anew = starts_anew(args)
    config.recovery = recovery_of(args)
    return config
