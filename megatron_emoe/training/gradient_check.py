"""What is to be trained gets a gradient: looked at in the first steps of a run, never again.

A run whose weights get none looks like any other: its loss is logged, and nothing learns. It happens where frozen
layers cut the way back (recomputation passes no gradient to inputs that ask for none), or where nothing uses a weight.
"""

from __future__ import annotations

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import finalize_model_grads
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_emoe.routing.transformer_config import ElasticTransformerConfig
from megatron_emoe.routing.watch import RunStopped, stop

STEPS = 10
"""Steps in which every weight must have had a gradient. Most have one in the first."""

_ONE_OF_MANY = re.compile(r"(?<=local_experts\.)\d+|(?<=weight)\d+$|(?<=bias)\d+$")


def check_gradients(args: Namespace, config: ElasticTransformerConfig) -> None:
    """Have Megatron look, behind its own work on the gradients of a step, whether every weight has one.

    Not where --emoe-gradient-check is off; where a graph is captured, which must not wait; and not with sharded weights
    (FSDP), whose gradients are elsewhere.
    """
    unseen = config.cuda_graph_impl != "none" or args.use_megatron_fsdp or args.use_torch_fsdp2
    if config.emoe_gradient_check == "stop" and not unseen:
        folder = Path(args.save) if args.save else None
        config.finalize_model_grads_func = GradientCheck(folder)


class GradientCheck:
    """Megatron's `finalize_model_grads`, and behind it the check until it has passed. Collective, as that is.

    folder: --save, where the reason of a stop is left. Experts of a layer count as one: in a small batch some get no
    token.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.missing: set[str] | None = None
        self.steps = 0

    def __call__(self, model: list[nn.Module], *args: Any, **kwargs: Any) -> None:
        """Finish the gradients of a step.

        Raises:
            RunStopped: on every rank, where weights had no gradient in the first STEPS.
        """
        finalize_model_grads(model, *args, **kwargs)
        if self.missing is None or self.missing:
            self._look(model)

    def _look(self, model: list[nn.Module]) -> None:
        found = over_all_ranks(gradients(model))
        before = found.keys() if self.missing is None else self.missing
        self.missing = {name for name in before if not found[name]}
        self.steps += 1
        if self.missing and self.steps >= STEPS:
            why = reason(sorted(self.missing))
            stop(self.folder, why, RunStopped(why))


def gradients(model: list[nn.Module]) -> dict[str, bool]:
    """Whether any number of a weight's gradient is other than 0, by name, for the weights of this rank that train."""
    names: list[str] = []
    any_other: list[Tensor] = []
    for chunk, part in enumerate(model):
        for name, weight in unwrap_model(part).named_parameters():
            if weight.requires_grad:
                gradient = getattr(weight, "main_grad", weight.grad)
                names.append(_stage(chunk) + _ONE_OF_MANY.sub("*", name))
                any_other.append(weight.new_zeros((), dtype=torch.bool) if gradient is None else gradient.any())
    found: dict[str, bool] = {}
    for name, value in zip(names, torch.stack(any_other).tolist() if names else [], strict=True):  # sync: first steps
        found[name] = found.get(name, False) or value
    return found


def _stage(chunk: int) -> str:
    """Layers are numbered from 0 in every stage and chunk of a pipeline: what goes before a weight's name."""
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    return f"stage {parallel_state.get_pipeline_model_parallel_rank()}, chunk {chunk}: " if stages > 1 else ""


def over_all_ranks(found: dict[str, bool]) -> dict[str, bool]:
    """A weight has a gradient if a rank that holds a part of it has. Collective."""
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, found)
    merged: dict[str, bool] = {}
    for rank in ranks:
        for name, has_one in rank.items():
            merged[name] = merged.get(name, False) or has_one
    return merged


def reason(missing: list[str]) -> str:
    """What to say of weights without a gradient."""
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return (
        f"no gradient reached {', '.join(missing[:3])}{more} in the first {STEPS} steps: this run would not train what "
        "it is to train. Where they are not meant to be trained: --emoe-gradient-check off"
    )
