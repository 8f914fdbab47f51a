"""Named ranges in Megatron's --profile: where the time of an elastic layer goes.

A range is torch's record_function: the PyTorch profiler shows it as it is, and under nsys the core runs the profiled
steps inside emit_nvtx, which makes an NVTX range of it. Forward passes have ranges, those of a recomputed layer too.
"""

from __future__ import annotations

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import record_function

from megatron_emoe.routing.dynamic_router import DynamicRouter, NoisyTopKRouter
from megatron_emoe.routing.moe_layer import ElasticMoELayer
from megatron_emoe.routing.router import ElasticRouter
from megatron_emoe.training.loop import ElasticLoop

ROUTE, DISPATCH, EXPERTS, COMBINE = "emoe.route", "emoe.dispatch", "emoe.experts", "emoe.combine"
SHARED, ROUTER_LOSSES, LOSS = "emoe.shared experts", "emoe.router losses", "emoe.loss"

RANGES: dict[type, dict[str, str]] = {
    ElasticMoELayer: {
        "route": ROUTE,
        "preprocess": DISPATCH,
        "dispatch": DISPATCH,
        "routed_experts_compute": EXPERTS,
        "shared_experts_compute": SHARED,
        "combine": COMBINE,
        "postprocess": COMBINE,
    },
    ElasticRouter: {
        "apply_z_loss": ROUTER_LOSSES,
        "_apply_aux_loss": ROUTER_LOSSES,
        "_apply_seq_aux_loss": ROUTER_LOSSES,
        "_apply_global_aux_loss": ROUTER_LOSSES,
        "_attach_hierarchical_loss": ROUTER_LOSSES,
    },
    DynamicRouter: {"_attach_balance_loss": ROUTER_LOSSES},
    NoisyTopKRouter: {"_attach_noise_losses": ROUTER_LOSSES},
    ElasticLoop: {"_checked_loss": LOSS},
}
"""Class -> method, its own or the core's -> name of its range. Router losses lie inside of route."""


def start(args: Namespace) -> None:
    """Put the ranges in place if --profile is given; without it no class is touched, and nothing is paid.

    Raises:
        ValueError: --profile asks for what this machine or this command line cannot give.
    """
    if not args.profile:
        return
    _check(args)
    for owner, names in RANGES.items():
        for method, name in names.items():
            setattr(owner, method, _in_range(getattr(owner, method), name))


def _check(args: Namespace) -> None:
    if not args.use_pytorch_profiler and not torch.cuda.is_available():
        raise ValueError("--profile: without --use-pytorch-profiler it is for nsys, which needs a CUDA device")
    if args.use_pytorch_profiler and args.tensorboard_dir is None:
        rule = "Megatron writes the trace to torch_profile beside that folder"
        raise ValueError(f"--use-pytorch-profiler: needs --tensorboard-dir; {rule}")


def _in_range(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def ranged(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return method(*args, **kwargs)

    return ranged
