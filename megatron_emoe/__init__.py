"""Elastic Mixture-of-Experts training on Megatron-Core.

These are the names for one's own script or notebook; docs/python.md says what each does. No other name or module is
promised to stay where it is. Importing this package loads nothing: torch, Megatron-Core and transformers come with the
first use of a name that needs them, and those that read sweep files need none of the three.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"  # setup.py reads it here

if TYPE_CHECKING:
    from megatron_emoe.hf.active_experts import set_active_experts
    from megatron_emoe.hf.low_rank_model import add_low_rank_experts
    from megatron_emoe.host.mode import enable as enable_host_mode
    from megatron_emoe.model.layer_spec import elastic_spec
    from megatron_emoe.routing.active_experts import active_experts, begin_microbatch
    from megatron_emoe.routing.transformer_config import (
        ElasticMLATransformerConfig,
        ElasticTransformerConfig,
        elastic_config_from_args,
    )
    from megatron_emoe.settings.elastic_config import ElasticConfig
    from megatron_emoe.sweep.budget import flops_limit, latency_limit, quality_limit
    from megatron_emoe.sweep.budget import pick as pick_cell
    from megatron_emoe.sweep.curve import SweepCell, SweepResult, best_k, effective_range, loss_at, wall
    from megatron_emoe.sweep.curve import load as load_sweep
    from megatron_emoe.training.arguments import add_arguments as add_elastic_arguments
    from megatron_emoe.training.evaluation import counting_rows

__all__ = [
    "ElasticConfig",
    "ElasticMLATransformerConfig",
    "ElasticTransformerConfig",
    "SweepCell",
    "SweepResult",
    "__version__",
    "active_experts",
    "add_elastic_arguments",
    "add_low_rank_experts",
    "begin_microbatch",
    "best_k",
    "counting_rows",
    "effective_range",
    "elastic_config_from_args",
    "elastic_spec",
    "enable_host_mode",
    "flops_limit",
    "latency_limit",
    "load_sweep",
    "loss_at",
    "pick_cell",
    "quality_limit",
    "set_active_experts",
    "wall",
]

_HOMES = {
    "hf.active_experts": "set_active_experts",
    "hf.low_rank_model": "add_low_rank_experts",
    "host.mode": "enable_host_mode=enable",
    "model.layer_spec": "elastic_spec",
    "routing.active_experts": "active_experts begin_microbatch",
    "routing.transformer_config": "ElasticMLATransformerConfig ElasticTransformerConfig elastic_config_from_args",
    "settings.elastic_config": "ElasticConfig",
    "sweep.budget": "flops_limit latency_limit pick_cell=pick quality_limit",
    "sweep.curve": "SweepCell SweepResult best_k effective_range load_sweep=load loss_at wall",
    "training.arguments": "add_elastic_arguments=add_arguments",
    "training.evaluation": "counting_rows",
}
"""Module: the public names that it holds, as name=its name there where the two differ."""


if not TYPE_CHECKING:  # a checker would take any name for one of ours

    def __getattr__(name: str) -> Any:
        """The public `name`, imported at its first use (PEP 562) and kept. AttributeError for any other."""
        for module, names in _HOMES.items():
            for public, _, there in (word.partition("=") for word in names.split()):
                if public == name:
                    value = getattr(import_module(f"megatron_emoe.{module}"), there or public)
                    globals()[name] = value
                    return value
        raise AttributeError(f"module 'megatron_emoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(globals().keys() | set(__all__))
