"""Proof of a plan's parameter counts: every distinct rank of the layout is built at full size and counted.

The tensors have no memory (torch's meta device) and the ranks no partners (torch's fake process group), so the largest
model is built on any machine, by the code that a training run builds it with.
"""

from __future__ import annotations

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_emoe.model.layer_spec import elastic_model_config
from megatron_emoe.plan.layout import Layout, layout_flags
from megatron_emoe.plan.model import PlannedModel
from megatron_emoe.plan.parameters import Parameters, stage_parameters
from megatron_emoe.settings import flag_files
from megatron_emoe.training.arguments import completed, parsed, refusing


@dataclass(frozen=True)
class CheckedRank:
    """One rank's parameters as planned and as built. `whole` of what was built is not told apart and stays 0."""

    rank: int
    pp: int
    ep: int
    tp: int
    planned: Parameters
    built: Parameters

    @property
    def agrees(self) -> bool:
        """Whether plan and model are equal."""
        return (self.planned.dense, self.planned.expert) == (self.built.dense, self.built.expert)


def check_parameters(model: PlannedModel, layout: Layout) -> Iterator[CheckedRank]:
    """Build and count each distinct (pipeline, expert, tensor) rank of the layout, in host mode's form of the layers.

    Raises:
        ValueError: Megatron itself refuses the layout.
        RuntimeError: a process group exists already in this process.
    """
    if torch.distributed.is_initialized():
        raise RuntimeError("a process group exists already: the check needs a fake one, in a process of its own")
    args = _arguments(model, layout)
    seen = set()
    for rank in range(layout.gpus):
        with _as_rank(args, rank):
            place = _place()
            if place not in seen:
                seen.add(place)
                planned = stage_parameters(model.args, layout, place[0], local=True)
                yield CheckedRank(rank, *place[:3], planned, _count(_build(args)))


def _arguments(model: PlannedModel, layout: Layout) -> Namespace:
    """Megatron's arguments of a training run on this layout, as its first rank completes them."""
    built = replace(layout, fp8=False, state="fp32")  # changes no parameter, needs no GPU
    words = flag_files.expand([*model.words])
    args = completed(parsed(words, layout_flags(model.args, built)), layout.gpus)
    args.use_cpu_initialization, args.perform_initialization = False, False
    args.init_model_with_meta_device = True
    return args


@contextlib.contextmanager
def _as_rank(args: Namespace, rank: int) -> Iterator[None]:
    """Inside, this process is the rank `rank` of a fake world."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=rank, world_size=args.world_size, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=args.tensor_model_parallel_size,
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            expert_model_parallel_size=args.expert_model_parallel_size,
            expert_tensor_parallel_size=args.expert_tensor_parallel_size,
            create_gloo_process_groups=False,  # the fake world has no partners to meet over gloo
        )
        args.rank = rank
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _place() -> tuple[int, int, int, int]:
    """Pipeline, expert, tensor and expert-tensor rank."""
    return (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_expert_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_expert_tensor_parallel_rank(),
    )


def _build(args: Namespace) -> torch.nn.Module:
    """This rank's part of the model, on the meta device whatever device its layers ask for."""
    config = elastic_model_config(copy(args))
    config.transformer.perform_initialization = False
    config.transformer.use_cpu_initialization = False
    builder = config.get_builder_cls()(config)
    device = torch.cuda.current_device
    torch.cuda.current_device = lambda: torch.device("meta")
    try:
        with refusing(), torch.device("meta"):
            model_parallel_cuda_manual_seed(1)
            return builder.build_model(ProcessGroupCollection.use_mpu_process_groups(), *_ends())
    finally:
        torch.cuda.current_device = device


def _ends() -> tuple[bool, bool]:
    return parallel_state.is_pipeline_first_stage(), parallel_state.is_pipeline_last_stage()


def _count(model: torch.nn.Module) -> Parameters:
    dense = expert = 0
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            expert += parameter.numel()
        else:
            dense += parameter.numel()
    return Parameters(dense, expert)
