"""A checkpoint's model and its held-out data, ready to be evaluated: built once, read once, the same in every tool."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.training import setup_model_and_optimizer
from torch import nn

from megatron_emoe.data.datasets import build_datasets
from megatron_emoe.settings.refusal import fail
from megatron_emoe.training.evaluation import Digest, OneMask, current_device, data_digest, sequences_to_evaluate


def load_model(args: Namespace, config: Any) -> list[nn.Module]:
    """The checkpoint's model in evaluation mode: no optimizer, no gradients buffers (--skip-train)."""
    model, _, _ = setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        checkpointing_context={},
        cfg_container=pretrain_cfg_container_from_args(args, config),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    for chunk in model:
        chunk.eval()
    return model


def micro_batches(args: Namespace) -> int:
    """This rank's micro-batches in one global batch of an evaluation."""
    return args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)


def read_batches(args: Namespace) -> tuple[dict[int, list[Any]], int, Digest]:
    """This rank's micro-batches by pipeline chunk, the number of global batches, and the digest of the data.

    Collective. SystemExit where the data do not fill one global batch.
    """
    datasets, steps = _open(args)
    batches: dict[int, list[Any]] = {}
    one_mask = OneMask(args.reset_attention_mask)
    for chunk, dataset in datasets.items():
        loader = iter(build_pretraining_data_loader(dataset, 0))
        batches[chunk] = [one_mask(next(loader)) for _ in range(steps * micro_batches(args))]
    return batches, steps, _digest(datasets, steps * args.eval_global_batch_size)


def read_digest(args: Namespace) -> Digest:
    """The digest of the data that read_batches would read. Collective; SystemExit as there."""
    datasets, steps = _open(args)
    return _digest(datasets, steps * args.eval_global_batch_size)


def _open(args: Namespace) -> tuple[dict[int, Any], int]:
    """The held-out data by pipeline chunk, where this rank reads any, and the number of global batches."""
    wanted = wanted_sequences(args)
    datasets: dict[int, Any] = {}
    for chunk in range(args.virtual_pipeline_model_parallel_size or 1):
        stage = chunk if args.virtual_pipeline_model_parallel_size else None
        dataset = build_datasets([0, wanted if args.mock_data else None, 0], vp_stage=stage)[1]
        if dataset is not None:
            datasets[chunk] = dataset
    return datasets, _steps(args, max(map(len, datasets.values()), default=0))


def wanted_sequences(args: Namespace) -> int:
    """How many sequences --max-eval-tokens stands for."""
    return args.max_eval_tokens // args.seq_length


def _steps(args: Namespace, length: int) -> int:
    """Global batches to evaluate; ranks that read no data learn it from those that do."""
    known = torch.tensor(length, device=current_device())
    torch.distributed.all_reduce(known, op=torch.distributed.ReduceOp.MAX)
    return check_enough(args, int(known.item())) // args.eval_global_batch_size


def check_enough(args: Namespace, held: int) -> int:
    """How many of the `held` sequences of the data are evaluated; SystemExit where they do not fill one batch."""
    wanted, batch = wanted_sequences(args), args.eval_global_batch_size
    available = min(wanted, held)
    if available < batch:
        cause = "--data-path" if held < wanted else f"--max-eval-tokens {args.max_eval_tokens}"
        fail(f"{cause}: {available} sequences of {args.seq_length} tokens, fewer than one batch of {batch}")
    return sequences_to_evaluate(available, batch)


def _digest(datasets: Mapping[int, Any], sequences: int) -> Digest:
    """The first rank is of the first pipeline stage and reads data; the others learn the digest from it."""
    known = [data_digest(datasets[0], sequences) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(known, src=0, device=current_device())
    assert known[0] is not None
    return known[0]
