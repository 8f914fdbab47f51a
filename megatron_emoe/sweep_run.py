"""Runs a k' sweep on a Megatron checkpoint: builds the model, reads the held-out data once, fills the cells."""

from __future__ import annotations

import math
import shlex
import sys
from argparse import Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.datasets.data_samplers import build_pretraining_data_loader
from megatron.training.initialize import initialize_megatron
from megatron.training.training import setup_model_and_optimizer
from torch import nn
from tqdm import tqdm

from megatron_emoe.arguments import fail
from megatron_emoe.checkpoint import locate, stored_args
from megatron_emoe.data import build_datasets
from megatron_emoe.elastic_config import flag
from megatron_emoe.evaluation import Evaluator, HeldOutLoss, counting_rows, current_device
from megatron_emoe.layer_spec import elastic_model_config
from megatron_emoe.moe_layer import ElasticMoELayer
from megatron_emoe.sweep import (
    SweepCell,
    SweepData,
    SweepResult,
    expert_flops_per_token,
    missing_ks,
    resume,
    save,
    upsert_cell,
)
from megatron_emoe.training import ElasticLoop
from megatron_emoe.transformer_config import elastic_config_from_args

_SAMPLES_UNIT = 64


def check_sweep(args: Namespace) -> SweepResult:
    """The result so far: the header of this sweep with the finished cells of --out. Nothing is built yet.

    Raises:
        ValueError: a k' out of range, or an --out that cannot be written or belongs to another sweep.
    """
    _check_ks(args)
    out = Path(args.out)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    if args.max_eval_tokens < args.seq_length:
        raise ValueError(
            f"--max-eval-tokens {args.max_eval_tokens}: must hold one sequence of {args.seq_length} tokens"
        )
    checkpoint = locate(args.load, args.ckpt_step)
    header = SweepResult(
        schema=1,
        label=args.label or Path(args.load).name,
        checkpoint=args.load,
        iteration=int(checkpoint.name.removeprefix("iter_")) if checkpoint.name.startswith("iter_") else 0,
        k_train=stored_args(checkpoint).moe_router_topk,
        num_experts=args.num_experts,
        data=SweepData(path=tuple(map(str, args.data_path or [])), tokens=args.max_eval_tokens),
        cells=(),
        command=shlex.join([Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return resume(out, header)


def _check_ks(args: Namespace) -> None:
    """The rules of --emoe-eval-k for --k: range, groups, and what in the core cannot follow another k."""
    args.emoe_eval_k = list(dict.fromkeys(args.k))
    try:
        elastic_config_from_args(args)
    except ValueError as error:
        raise ValueError(str(error).replace(flag("emoe_eval_k"), "--k")) from error


def run_sweep(args: Namespace, result: SweepResult) -> SweepResult:
    """Evaluate what is missing of --k; --out is rewritten after every cell, from rank 0. Collective."""
    todo = missing_ks(result, args.k)
    if not todo:
        return result
    initialize_megatron()
    config = elastic_model_config(args)
    model = load_model(args, config)
    loop = ElasticLoop(args, config.transformer)
    batches, steps = _read_batches(args)
    evaluator = Evaluator(args, loop.forward)
    evaluator.loss_at_k(model, {i: part[: _micro_batches(args)] for i, part in batches.items()}, None, 1)  # warm-up
    cost = CostModel(args, model)
    rank = torch.distributed.get_rank()
    for k in tqdm(todo, desc="k'", unit="k", disable=rank != 0):
        with counting_rows(model) as rows:
            measured = evaluator.loss_at_k(model, batches, k, steps)
            result = upsert_cell(result, cost.cell(k, measured, rows()))
        if rank == 0:
            save(result, args.out)
    torch.distributed.barrier()
    return result


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


def _micro_batches(args: Namespace) -> int:
    return args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)


def _read_batches(args: Namespace) -> tuple[dict[int, list[Any]], int]:
    """This rank's micro-batches by pipeline chunk, and the number of global batches.

    The number of sequences is a multiple of 64 where the data allow it, so that layouts with other batch sizes evaluate
    the same tokens.
    """
    wanted = args.max_eval_tokens // args.seq_length
    batches: dict[int, list[Any]] = {}
    length = 0
    for chunk in range(args.virtual_pipeline_model_parallel_size or 1):
        stage = chunk if args.virtual_pipeline_model_parallel_size else None
        dataset = build_datasets([0, wanted if args.mock_data else None, 0], vp_stage=stage)[1]
        if dataset is not None:
            length = len(dataset)
            batches[chunk] = dataset
    steps = _steps(args, wanted, length)
    for chunk, dataset in batches.items():
        loader = iter(build_pretraining_data_loader(dataset, 0))
        batches[chunk] = [next(loader) for _ in range(steps * _micro_batches(args))]
    return batches, steps


def _steps(args: Namespace, wanted: int, length: int) -> int:
    """Global batches to evaluate; ranks that read no data learn it from those that do."""
    known = torch.tensor(length, device=current_device())
    torch.distributed.all_reduce(known, op=torch.distributed.ReduceOp.MAX)
    samples, batch = min(wanted, int(known.item())), args.eval_global_batch_size
    if samples < batch:
        fail(f"--data-path: {samples} sequences of {args.seq_length} tokens, fewer than one batch of {batch}")
    unit = math.lcm(_SAMPLES_UNIT, batch)
    return (samples // unit * unit or samples // batch * batch) // batch


class CostModel:
    """Active parameters and expert FLOPs at each k', counted on the built model. Collective to construct."""

    def __init__(self, args: Namespace, model: list[nn.Module]) -> None:
        self.args = args
        layers = [m for chunk in model for m in chunk.modules() if isinstance(m, ElasticMoELayer)]
        routed = {id(p) for layer in layers for p in layer.experts.parameters()}
        counts = torch.zeros(3, dtype=torch.float64, device=current_device())
        counts[2] = len(layers)
        for chunk in model:
            for parameter in chunk.parameters():
                counts[int(id(parameter) in routed)] += _whole_size(parameter, id(parameter) in routed)
        torch.distributed.all_reduce(counts, group=parallel_state.get_pipeline_model_parallel_group())
        self.shared, self.routed, self.moe_layers = (int(count) for count in counts.tolist())

    def cell(self, k: int, measured: HeldOutLoss, rows: dict[int, int]) -> SweepCell:
        """The finished cell of one k'."""
        flops = expert_flops_per_token(
            hidden_size=self.args.hidden_size,
            moe_ffn_hidden_size=self.args.moe_ffn_hidden_size,
            num_moe_layers=self.moe_layers,
            k=k,
            gated=self.args.swiglu,
        )
        return SweepCell(
            k=k,
            loss=measured.loss,
            tokens=measured.tokens,
            seconds=measured.seconds,
            tokens_per_second=measured.tokens / measured.seconds,
            rows_per_layer={str(layer): count for layer, count in rows.items()},
            expert_flops_per_token=float(flops),
            active_params=self.shared + self.routed * k // self.args.num_experts,
        )


def _whole_size(parameter: nn.Parameter, routed: bool) -> int:
    """Elements of a parameter over the ranks that share it: expert and tensor parallel. A tied copy counts as
    nothing."""
    if getattr(parameter, "shared_embedding", False) and not parallel_state.is_pipeline_first_stage():
        return 0
    if routed:
        split = parallel_state.get_expert_tensor_parallel_world_size() if _is_split(parameter) else 1
        return parameter.numel() * parallel_state.get_expert_model_parallel_world_size() * split
    return parameter.numel() * (parallel_state.get_tensor_model_parallel_world_size() if _is_split(parameter) else 1)


def _is_split(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))
