"""What Megatron's training loop calls: the forward step, the validation at every k', FLOPs at the expected k."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Iterator
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, get_model_config, unwrap_model
from megatron.training import training as core_training
from megatron.training.global_vars import get_tensorboard_writer, get_timers
from megatron.training.utils import print_rank_last
from torch import Tensor

from megatron_emoe.active_k import expected_k, get_active_k
from megatron_emoe.data import get_batch
from megatron_emoe.metrics import get_elastic_tracker
from megatron_emoe.transformer_config import ElasticTransformerConfig

Batches = dict[int, list[Any]]


def language_model_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses, number of tokens, and both for the log; losses [batch, sequence] in nats."""
    mask_T = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask_T)
    tokens = mask_T.sum().int()
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.to(loss.dtype)])}


class ElasticLoop:
    """Forward step and evaluation for `megatron.training.pretrain`.

    args: Megatron's namespace, of which the loop itself changes curr_iteration. config: the model's configuration.
    """

    def __init__(self, args: Namespace, config: ElasticTransformerConfig) -> None:
        self.args = args
        self.config = config
        self._recorded: Batches = {}
        self._evaluated: list[int] = []
        tracker = get_elastic_tracker()
        layers = config.num_layers + (config.mtp_num_layers or 0)
        tracker.configure(layers, config.num_moe_experts, args.save or args.tensorboard_dir)
        _report_expected_flops(args, config)

    def forward_step(self, data_iterator: Iterator | None, model: torch.nn.Module) -> tuple[Tensor, partial]:
        """One micro-batch: output of this pipeline stage, and the loss function for the last one."""
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        if model.training:
            self._begin(model)
        elif self.config.emoe_eval_k:
            data_iterator = self._recording(data_iterator, vp_stage or 0)
        return self._forward(data_iterator, model)

    def _forward(self, data_iterator: Iterator | None, model: torch.nn.Module) -> tuple[Tensor, partial]:
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        batch = get_batch(data_iterator, get_attr_wrapped_model(model, "vp_stage"))
        timers("batch-generator").stop()
        output = model(
            batch["tokens"],
            batch["position_ids"],
            batch["attention_mask"],
            labels=batch["labels"],
            loss_mask=batch["loss_mask"],
        )
        return output, partial(self._checked_loss, batch["loss_mask"])

    def _checked_loss(self, loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        loss, tokens, report = language_model_loss(loss_mask, losses)
        if self.args.check_for_nan_in_loss_and_grad and losses.requires_grad:
            for rejects, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
                get_rerun_state_machine().validate_result(
                    result=loss,
                    rejection_func=rejects,
                    message=f"found {what} in the local forward loss",
                    tolerance=0.0,
                    fatal=True,
                )
        return loss, tokens, report

    def _begin(self, model: torch.nn.Module) -> None:
        """Tell the owner of k, and the metrics, where training stands: host arithmetic."""
        iteration = self.args.curr_iteration
        get_active_k().begin_microbatch(iteration, _microbatch(model))
        interval = self.config.emoe_coactivation_interval
        get_elastic_tracker().begin_step(iteration, self.args.log_interval, interval)

    def _recording(self, data_iterator: Iterator | None, chunk: int) -> Iterator | None:
        """The same iterator, whose batches are kept (on the CPU) to be evaluated again at other k'."""
        if data_iterator is None:
            return None
        batch = next(data_iterator)
        self._recorded.setdefault(chunk, []).append(batch)
        return iter([batch])

    def validate_at_each_k(self, model: list[torch.nn.Module]) -> None:
        """Validation loss at each --emoe-eval-k on the batches just evaluated; the loop's `non_loss_data_func`."""
        recorded, self._recorded = self._recorded, {}
        losses = {}
        for k in self.config.emoe_eval_k or []:
            losses[k] = self.loss_at_k(model, recorded, k, self.args.eval_iters)
        if losses and parallel_state.is_pipeline_last_stage():
            self._log_losses({k: loss for k, loss in losses.items() if loss is not None})

    def loss_at_k(self, model: list[torch.nn.Module], batches: Batches, k: Any, steps: int) -> float | None:
        """Mean token loss in nats with k' = `k` active experts; None on all but the last pipeline stage.

        k: as ActiveK.evaluating takes it. batches: by virtual pipeline chunk, as recorded. steps: global batches in them.
        """
        iterators = [iter(batches[i]) if i in batches else None for i in range(len(model))]
        totals = torch.zeros(2, dtype=torch.float64, device="cuda" if torch.cuda.is_available() else "cpu")
        with get_active_k().evaluating(k), torch.no_grad():
            for _ in range(steps):
                for report in self._evaluation_step(model, iterators):
                    totals += report["lm loss"].double()
        if not parallel_state.is_pipeline_last_stage():
            return None
        torch.distributed.all_reduce(totals, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        return (totals[0] / totals[1]).item()

    def _evaluation_step(self, model: list[torch.nn.Module], iterators: list[Iterator | None]) -> list[dict]:
        args, core_config = self.args, get_model_config(model[0])
        batch, micro = args.eval_global_batch_size, args.eval_micro_batch_size
        timers, core_config.timers = core_config.timers, None  # evaluation is not timed, as in the core
        try:
            return get_forward_backward_func()(
                forward_step_func=self._forward,
                data_iterator=iterators if len(model) > 1 else iterators[0],
                model=model,
                num_microbatches=batch // (micro * args.data_parallel_size),
                seq_length=args.seq_length,
                micro_batch_size=micro,
                decoder_seq_length=args.decoder_seq_length,
                forward_only=True,
            )
        finally:
            core_config.timers = timers

    def _log_losses(self, losses: dict[int, float]) -> None:
        """Log, TensorBoard, and one JSON line beside the checkpoint."""
        iteration = self._iteration()
        print_rank_last(
            f" validation at iteration {iteration} | " + " | ".join(f"k'={k}: {v:.6E}" for k, v in losses.items())
        )
        writer = get_tensorboard_writer()
        for k, loss in losses.items():
            if writer is not None:
                writer.add_scalar(f"emoe/validation loss at k={k}", loss, iteration)
        folder = self.args.save or self.args.tensorboard_dir
        if folder and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            append_json_line(Path(folder) / "validation_k.jsonl", {"iteration": iteration, "loss": losses})

    def _iteration(self) -> int:
        """Completed iterations; the loop counts curr_iteration from 0 and leaves it unset where it does not train."""
        return max(getattr(self.args, "curr_iteration", -1) + 1, self.args.iteration)


def append_json_line(path: Path, record: dict) -> None:
    """Append one JSON object as a line, in a single write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        file.write(json.dumps(record) + "\n")


def _microbatch(model: torch.nn.Module) -> int:
    """Index of the micro-batch within the step; the core's schedules write it into every layer before each forward."""
    unwrapped = unwrap_model(model)
    layers = list(unwrapped.decoder.layers)
    if not layers and getattr(unwrapped, "mtp", None) is not None:
        layers = [layer.mtp_model_layer for layer in unwrapped.mtp.layers]
    return layers[0].current_microbatch if layers else 0


def _report_expected_flops(args: Namespace, config: ElasticTransformerConfig) -> None:
    """Let the log's FLOPs and MFU use E[k]: the core reads --moe-router-topk there, and has no seam for it."""
    count = getattr(core_training.num_floating_point_operations, "stock", core_training.num_floating_point_operations)

    def at_expected_k(namespace: Namespace, *rest: Any, **kwargs: Any) -> float:
        elastic = copy(namespace)
        elastic.moe_router_topk = expected_k(config, config.moe_router_topk, getattr(args, "curr_iteration", 0))
        return count(elastic, *rest, **kwargs)

    at_expected_k.stock = count
    core_training.num_floating_point_operations = at_expected_k
