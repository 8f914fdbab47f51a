"""Models with their optimizers, and batches for all of them. Import it after host_mode.setup()."""

import itertools
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.training import setup_model_and_optimizer, train_step
from paired import Step


def build(args: Namespace, config: object, forward_step: Callable, batches: Iterator) -> tuple[list[Any], Step]:
    """A model in training mode, and a function that does one optimizer step of it at an iteration."""
    model, optimizer, scheduler = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model:
        chunk.train()
    run_config = get_model_config(model[0])
    if run_config.finalize_model_grads_func is None:  # the training loop would set it
        run_config.finalize_model_grads_func = finalize_model_grads

    def step(iteration: int) -> None:
        args.curr_iteration = iteration
        rest = (run_config, get_forward_backward_func(), iteration)
        train_step(forward_step, batches, model, optimizer, scheduler, *rest)

    return model, step


def random_batches(args: Namespace, vocabulary: int, distinct: int = 8) -> Iterator[dict[str, torch.Tensor]]:
    """Micro-batches of random tokens, over and over the same few: making them takes no time of a step."""
    shape = (args.micro_batch_size, args.seq_length)
    made = []
    for _ in range(distinct):
        tokens = torch.randint(0, vocabulary, shape)
        batch = {"tokens": tokens, "labels": tokens.roll(-1, 1), "loss_mask": torch.ones(shape)}
        made.append(batch | {"position_ids": torch.arange(shape[1]).repeat(shape[0], 1)})
    return itertools.cycle(made)
