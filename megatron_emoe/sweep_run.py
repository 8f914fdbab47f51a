"""Runs a k' sweep on a Megatron checkpoint: builds the model, reads the held-out data once, measures the cells."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
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

from megatron_emoe.data import build_datasets
from megatron_emoe.elastic_config import ElasticConfig
from megatron_emoe.evaluation import (
    Evaluator,
    HeldOutLoss,
    counting_rows,
    current_device,
    data_digest,
    sequences_to_evaluate,
)
from megatron_emoe.evidence import training_pairs, watching_routers
from megatron_emoe.flops import flops_per_token, is_gated, moe_layer_numbers
from megatron_emoe.latency import Latency
from megatron_emoe.layer_spec import elastic_model_config
from megatron_emoe.moe_layer import ElasticMoELayer
from megatron_emoe.refusal import fail
from megatron_emoe.sweep import expert_flops_per_token
from megatron_emoe.sweep_plan import Budget, by_layer, fill, say, unfinished
from megatron_emoe.sweep_result import SweepCell, SweepResult
from megatron_emoe.training import ElasticLoop


def run_sweep(args: Namespace, result: SweepResult) -> SweepResult:
    """Measure what is missing of what `args` ask for; --out is rewritten after every cell, from rank 0. Collective."""
    if not unfinished(args, result):
        return result
    try:
        folder = Path(args.load)
        training = training_pairs(folder, args.num_experts, result.iteration, say) if args.evidence else None
    except ValueError as error:
        fail(error)
    initialize_megatron()
    config = elastic_model_config(args)
    model = load_model(args, config)
    swept = MegatronSweep(args, ElasticLoop(args, config.transformer), model, training)
    result = fill(args, result, swept, writes=torch.distributed.get_rank() == 0)
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


class MegatronSweep:
    """A Megatron model with its held-out data (see sweep_plan.Model). Collective to construct.

    training: co-activation matrices of training by layer, or None.
    """

    def __init__(
        self, args: Namespace, loop: ElasticLoop, model: list[nn.Module], training: Mapping[int, torch.Tensor] | None
    ) -> None:
        self.args, self.model, self.training = args, model, training
        self.layers = moe_layer_numbers(args)
        self.batches, self.steps, self.digest = read_batches(args)
        self.evaluator = Evaluator(args, loop.forward)
        self.cost = CostModel(args, model)
        first = {i: part[: _micro_batches(args)] for i, part in self.batches.items()}
        self.evaluator.loss_at_k(model, first, None, 1)  # warm-up

    def cell(self, k: Budget) -> SweepCell:
        """Loss, speed, rows and cost at k'."""
        with counting_rows(self.model) as rows:
            measured = self.evaluator.loss_at_k(self.model, self.batches, by_layer(k, self.layers), self.steps)
            return self.cost.cell(k, measured, rows())

    def evidence(self, k: Budget) -> tuple[dict[str, Any], Mapping[int, torch.Tensor]]:
        """Router entropy, load, coverage; co-activation matrices."""
        with watching_routers(self.model, self.layers) as evidence:
            self.evaluator.loss_at_k(self.model, self.batches, by_layer(k, self.layers), self.steps)
        evidence.reduce()
        return evidence.fields(self.training, self.args.coverage_at_least), evidence.matrices()

    def latency(self, k: Budget) -> dict[str, float | None]:
        """Milliseconds per token, alone and in a full micro-batch."""
        latency = Latency(self.args, self.evaluator, self.model, self.batches)
        return latency.fields(by_layer(k, self.layers))


def _micro_batches(args: Namespace) -> int:
    return args.eval_global_batch_size // (args.eval_micro_batch_size * args.data_parallel_size)


def read_batches(args: Namespace) -> tuple[dict[int, list[Any]], int, str]:
    """This rank's micro-batches by pipeline chunk, the number of global batches, and the digest of the data.

    Collective. SystemExit where the data do not fill one global batch.
    """
    wanted = wanted_sequences(args)
    datasets: dict[int, Any] = {}
    for chunk in range(args.virtual_pipeline_model_parallel_size or 1):
        stage = chunk if args.virtual_pipeline_model_parallel_size else None
        dataset = build_datasets([0, wanted if args.mock_data else None, 0], vp_stage=stage)[1]
        if dataset is not None:
            datasets[chunk] = dataset
    steps = _steps(args, max(map(len, datasets.values()), default=0))
    batches = {}
    for chunk, dataset in datasets.items():
        loader = iter(build_pretraining_data_loader(dataset, 0))
        batches[chunk] = [next(loader) for _ in range(steps * _micro_batches(args))]
    return batches, steps, _digest(datasets, steps * args.eval_global_batch_size)


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


def _digest(datasets: Mapping[int, Any], sequences: int) -> str:
    """The first rank is of the first pipeline stage and reads data; the others learn the digest from it."""
    known = [data_digest(datasets[0], sequences) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(known, src=0, device=current_device())
    assert known[0] is not None
    return known[0]


class CostModel:
    """Active parameters and FLOPs at each k', counted on the built model. Collective to construct."""

    def __init__(self, args: Namespace, model: list[nn.Module]) -> None:
        self.args = args
        layers = [m for chunk in model for m in chunk.modules() if isinstance(m, ElasticMoELayer)]
        routed = {id(p) for layer in layers for p in layer.experts.parameters()}
        counts = torch.zeros(2, dtype=torch.float64, device=current_device())
        for chunk in model:
            for parameter in chunk.parameters():
                counts[int(id(parameter) in routed)] += _whole_size(parameter, id(parameter) in routed)
        torch.distributed.all_reduce(counts, group=parallel_state.get_pipeline_model_parallel_group())
        self.shared, self.routed = (int(count) for count in counts.tolist())

    def cell(self, k: Budget, measured: HeldOutLoss, rows: Mapping[int, int]) -> SweepCell:
        """The plain cell of one k'."""
        return costed_cell(self.args, k, measured, rows, shared=self.shared, routed=self.routed)


def costed_cell(
    args: Namespace, k: Budget, measured: HeldOutLoss, rows: Mapping[int, int], *, shared: int, routed: int
) -> SweepCell:
    """The plain cell of one k'. shared, routed: parameters of the whole model outside of, and in, routed experts.

    Where every token has its own number of experts (top-p, null experts), costs are those of the mean that ran.
    """
    layers = len(moe_layer_numbers(args))
    ks: list[float] = [k] * layers if isinstance(k, int) else list(k)
    if ElasticConfig(emoe_selection=args.emoe_selection).counts_vary:
        ks = [count / measured.positions for count in rows.values()]
    expert = expert_flops_per_token(
        hidden_size=args.hidden_size,
        moe_ffn_hidden_size=args.moe_ffn_hidden_size,
        num_moe_layers=1,
        k=1,
        gated=is_gated(args),
    )
    return SweepCell(
        k=k,
        loss=measured.loss,
        tokens=measured.tokens,
        seconds=measured.seconds,
        tokens_per_second=measured.tokens / measured.seconds,
        rows_per_layer={str(layer): count for layer, count in rows.items()},
        expert_flops_per_token=float(expert * sum(ks)),
        active_params=shared + int(routed * sum(ks) // (args.num_experts * layers)),
        flops_per_token=flops_per_token(args, ks),
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
