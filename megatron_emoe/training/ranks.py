"""Ranks of a program that may be started without torchrun: one is enough where the layout needs no more."""

from __future__ import annotations

import math
import os
from argparse import Namespace

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What torchrun would set; port 0 is any that is free."""


def settle_ranks(args: Namespace) -> None:
    """Let a process without torchrun be the only rank. args: validated.

    Raises:
        ValueError: a parallel layout that needs another number of ranks than there are.
    """
    check_ranks(args)
    if not {"RANK", "WORLD_SIZE"} & set(os.environ):
        os.environ.update({name: value for name, value in ALONE.items() if name not in os.environ})


def check_ranks(args: Namespace) -> None:
    """ValueError where the ranks are no multiple of what tensor, pipeline, context and expert parallelism need."""
    tensor, stages = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    experts = args.expert_model_parallel_size * (args.expert_tensor_parallel_size or tensor)
    needed = math.lcm(tensor * args.context_parallel_size, experts) * stages
    if args.world_size % needed:
        here = "is 1 process" if args.world_size == 1 else f"are {args.world_size}"
        sizes = (
            *(("tensor-model", tensor), ("pipeline-model", stages), ("context", args.context_parallel_size)),
            *(("expert-model", args.expert_model_parallel_size), ("expert-tensor", args.expert_tensor_parallel_size)),
        )
        flags = " ".join(f"--{name}-parallel-size {size}" for name, size in sizes if (size or 1) > 1)
        raise ValueError(
            f"{flags}: needs a multiple of {needed} ranks, here {here}: torchrun --nproc-per-node {needed}"
        )
