"""Puts the elastic classes into Megatron-Core's own specs, local or Transformer Engine. The only file that knows
specs."""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.training.argument_utils import gpt_config_from_args
from megatron.training.models import gpt
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from megatron_emoe.moe_layer import ElasticMoELayer
from megatron_emoe.router import ElasticRouter
from megatron_emoe.transformer_config import elastic_config_from_args


def elastic_layer(spec: ModuleSpec) -> ModuleSpec:
    """A copy of a transformer layer's spec with elastic router and MoE layer; a dense layer comes back as it was.

    Raises:
        TypeError: the spec holds a MoE layer or router other than the core's.
    """
    mlp = spec.submodules.mlp
    target = mlp.func if isinstance(mlp, functools.partial) else getattr(mlp, "module", None)
    if not (isinstance(target, type) and issubclass(target, MoELayer)) or target is ElasticMoELayer:
        return spec
    if target is not MoELayer or not isinstance(mlp, functools.partial):
        raise TypeError(f"{target.__name__} in the layer spec is not the core's MoELayer: it would stay inelastic")
    moe = mlp.keywords["submodules"]
    if moe.router is not TopKRouter:
        raise TypeError(f"{moe.router} in the layer spec is not the core's TopKRouter: it would stay inelastic")
    elastic = functools.partial(
        ElasticMoELayer, *mlp.args, **{**mlp.keywords, "submodules": replace(moe, router=ElasticRouter)}
    )
    return replace(spec, submodules=replace(spec.submodules, mlp=elastic))


def elastic_layers(block: Any) -> Any:
    """The same for a block of layers (`layer_specs`), or a single layer's spec."""
    if not hasattr(block, "layer_specs"):
        return elastic_layer(block)
    return replace(block, layer_specs=[elastic_layer(spec) for spec in block.layer_specs])


def elastic_layer_spec(config: GPTModelConfig, vp_stage: int | None = None) -> Any:
    """`transformer_layer_spec` of the model: the core's default spec for these flags, with elastic MoE layers."""
    return elastic_layers(gpt.default_layer_spec(config, vp_stage))


def _elastic_mtp_block(config: GPTModelConfig, *args: Any, **kwargs: Any) -> Any:
    """The core's multi-token-prediction block; its inner layers come from the stock spec and are made elastic here."""
    block = _core_mtp_block(config, *args, **kwargs)
    if block is None:
        return None
    layers = []
    for spec in block.layer_specs:
        inner = replace(spec.submodules, mtp_model_layer=elastic_layer(spec.submodules.mtp_model_layer))
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
        """Build one stage (AssertionError if a MoE layer or router in it is not elastic)."""
        with _elastic_mtp():
            model = super().build_model(*args, **kwargs)
        for name, module in model.named_modules():
            assert not isinstance(module, MoELayer) or isinstance(module, ElasticMoELayer), f"{name} stayed stock"
            assert not isinstance(module, TopKRouter) or isinstance(module, ElasticRouter), f"{name} stayed stock"
        return model


@dataclass(kw_only=True)
class ElasticGPTModelConfig(GPTModelConfig):
    """GPTModelConfig built by ElasticGPTModelBuilder."""

    builder: ClassVar[str] = "megatron_emoe.layer_spec.ElasticGPTModelBuilder"


def elastic_model_config(args: Namespace) -> ElasticGPTModelConfig:
    """The model configuration for `megatron.training.pretrain`, from Megatron's arguments and ours.

    Raises:
        ValueError: see elastic_config_from_args.
    """
    transformer = elastic_config_from_args(args)
    config = gpt_config_from_args(copy(args), config=transformer, model_config_cls=ElasticGPTModelConfig)
    config.transformer_layer_spec = elastic_layer_spec
    return config
