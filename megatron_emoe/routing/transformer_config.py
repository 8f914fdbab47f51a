"""Megatron-Core's transformer configuration with the elastic fields."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass, fields

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.training.argument_utils import core_transformer_config_from_args

from megatron_emoe.routing.combinations import BothConfigs, check_elastic, refuse_state_that_would_not_load
from megatron_emoe.settings.elastic_config import ElasticConfig, flag


@dataclass
class ElasticTransformerConfig(BothConfigs):
    """TransformerConfig plus ElasticConfig: what elastic layers read.

    Raises:
        ValueError: elastic settings that contradict each other, the model, or another flag.
    """

    def __post_init__(self) -> None:
        # The core refuses a selection bias with softmax scores; ElasticRouter computes it, so the core must not see it.
        asked = self.moe_router_enable_expert_bias  # type: ignore[has-type]
        if self.moe_router_score_function == "softmax":
            self.moe_router_enable_expert_bias = False
        super().__post_init__()
        self.moe_router_enable_expert_bias = asked
        check_elastic(self)


@dataclass
class ElasticMLATransformerConfig(MLATransformerConfig, ElasticTransformerConfig):
    """The same for multi-latent attention (DeepSeek-V2)."""


_ELASTIC_CLASS: dict[type, type[ElasticTransformerConfig]] = {
    TransformerConfig: ElasticTransformerConfig,
    MLATransformerConfig: ElasticMLATransformerConfig,
}


_OWN_LAYERS = ("spec", "yaml_cfg", "heterogeneous_layers_config_path", "hybrid_layer_pattern")


def elastic_config_from_args(args: Namespace) -> ElasticTransformerConfig:
    """The elastic configuration for Megatron's arguments and ours.

    The core chooses the class by flags (--multi-latent-attention swaps it without a word), so its result is promoted to
    the elastic class of the same kind rather than asked for.

    Raises:
        TypeError: the flags lead to a configuration class that has no elastic counterpart.
        AttributeError: `args` lacks an elastic flag; a default would hide it.
        ValueError: flags that bring their own layers, FP8 scales that could not be loaded again; else see
            ElasticTransformerConfig.
    """
    for name in _OWN_LAYERS:
        if getattr(args, name) is not None:
            raise ValueError(f"{flag(name)} {getattr(args, name)}: it brings its own layers, which are not elastic")
    refuse_state_that_would_not_load(args)
    plain = copy(args)
    if args.moe_router_score_function == "softmax":
        plain.moe_router_enable_expert_bias = False
    config = core_transformer_config_from_args(plain)
    if type(config) not in _ELASTIC_CLASS:
        raise TypeError(f"{type(config).__name__} has no elastic counterpart")
    config.__class__ = _ELASTIC_CLASS[type(config)]
    for field in fields(ElasticConfig):
        setattr(config, field.name, getattr(args, field.name))
    config.moe_router_enable_expert_bias = args.moe_router_enable_expert_bias
    config.use_te_rng_tracker = args.te_rng_tracker  # the core leaves its own field at the default
    check_elastic(config)
    return config


def check_ks(args: Namespace, name: str, ks: Iterable[int]) -> None:
    """ValueError unless the model of `args` can run at every k' in `ks`, given with the flag `name`.

    The rules are those of --emoe-eval-k: range, groups, what in the core cannot follow another k, none given twice.
    """
    asked = copy(args)
    asked.emoe_eval_k = list(ks)
    try:
        elastic_config_from_args(asked)
    except ValueError as error:
        raise ValueError(str(error).replace(flag("emoe_eval_k"), name)) from error
