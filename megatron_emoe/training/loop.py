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
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.utils import get_attr_wrapped_model, unwrap_model
from megatron.training import training as core_training
from megatron.training.global_vars import get_signal_handler, get_tensorboard_writer, get_timers
from megatron.training.utils import print_rank_last
from torch import Tensor

from megatron_emoe.data.datasets import get_batch
from megatron_emoe.model.flops import lora_products
from megatron_emoe.routing.active_k import Place, get_active_k, keep_place_out_of_checkpoints, loss_weight
from megatron_emoe.routing.metrics import get_elastic_tracker
from megatron_emoe.routing.transformer_config import ElasticTransformerConfig
from megatron_emoe.settings.k_schedule import expected_k, loss_weights
from megatron_emoe.training import exit_signals
from megatron_emoe.training.distillation import forward_taught_by, forward_twice, forward_with_teacher, wants_teacher
from megatron_emoe.training.evaluation import Evaluator, OneMask, current_device
from megatron_emoe.training.gradient_check import check_gradients
from megatron_emoe.training.rejected import end_without_checkpoint
from megatron_emoe.training.teacher import load_teacher


def language_model_loss(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum of the token losses, number of tokens, and both for the log; losses [batch, sequence] in nats."""
    mask_T = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * mask_T)
    tokens = mask_T.sum().int()
    return loss, tokens, {"lm loss": torch.stack([loss.detach(), tokens.to(loss.dtype)])}


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What the model is called with, from what get_batch gave."""
    same = ("position_ids", "attention_mask", "labels", "loss_mask", "packed_seq_params", "padding_mask")
    return {"input_ids": batch["tokens"], **{name: batch[name] for name in same}}


SPIKE = 10.0  # --check-for-spiky-loss: a loss this many times the largest of the first hundred is computed again
_OVER, _NEVER = -1.0, 1e9  # minutes
_count_flops = core_training.num_floating_point_operations  # the core's own, before any loop replaced it


class ElasticLoop:
    """Forward step and evaluation for `megatron.training.pretrain`.

    args: Megatron's namespace, of which the loop itself changes curr_iteration. config: the model's configuration.
    """

    def __init__(self, args: Namespace, config: ElasticTransformerConfig) -> None:
        self.args = args
        self.config = config
        self._recorded: dict[int, list[Any]] = {}
        self._one_mask = OneMask(args.reset_attention_mask)
        self._source = self._validation_source = 0
        self._validated: int | None = None
        self._teacher: torch.nn.Module | None = None
        self._exit_duration = args.exit_duration_in_mins
        tracker = get_elastic_tracker()
        layers = config.num_layers + (config.mtp_num_layers or 0)
        folder = args.save or args.tensorboard_dir
        tracker.configure(layers, config.num_moe_experts, folder, config.emoe_router_watch)
        _report_expected_flops(args, config)
        check_gradients(args, config)
        end_without_checkpoint(args)
        keep_place_out_of_checkpoints()

    def forward_step(self, data_iterator: Iterator | None, model: torch.nn.Module) -> tuple[Tensor, partial]:
        """One micro-batch: output of this pipeline stage, and the loss function for the last one."""
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        if model.training:
            self._begin(model)
        else:
            self._let_evaluation_end()
            if self.config.emoe_eval_k:
                data_iterator = self._recording(data_iterator, vp_stage or 0)
        return self.forward(data_iterator, model)

    def forward(self, data_iterator: Iterator | None, model: torch.nn.Module) -> tuple[Tensor, partial]:
        """The same without a word to the owner of k or a record of the batch: for an evaluation at a given k'."""
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        batch = get_batch(data_iterator, vp_stage)
        timers("batch-generator").stop()
        if model.training and not vp_stage and batch["packed_seq_params"] is not None:
            # For the log's FLOPs, once per micro-batch on every rank: the core waits for their sum once a step.
            core_training.update_seqlen_stats_from_cu_seqlens(batch["packed_seq_params"].cu_seqlens_q)
        inputs = model_inputs(batch)
        if model.training and self.config.emoe_second_pass:
            return self._both_passes(model, inputs), partial(self._loss_of_both, batch["loss_mask"])
        weight = self._loss_weight(model) if model.training else 1.0
        if not (model.training and (self.config.emoe_teacher or self.config.emoe_distill_coeff)):
            return model(**inputs), partial(self._checked_loss, batch["loss_mask"], weight=weight)
        output, divergence, shares = self._taught(model, inputs)
        weights = (weight * shares[0], weight * shares[1])
        return output, partial(self._taught_loss, batch["loss_mask"], divergence, weights)

    def _taught(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """Token losses, their divergence from the teacher, and how much the two count."""
        config = self.config
        if config.emoe_teacher is not None:
            if self._teacher is None:
                self._teacher = load_teacher(self.args)
            shares = (1 - config.emoe_teacher_weight, config.emoe_teacher_weight)
            return *forward_taught_by(self._teacher, model, inputs), shares
        if self._wants_teacher(model):
            return *forward_with_teacher(model, inputs), (1.0, config.emoe_distill_coeff)
        output = model(**inputs)
        return output, torch.zeros_like(output), (1.0, config.emoe_distill_coeff)

    def _loss_weight(self, model: torch.nn.Module) -> float:
        """Of this micro-batch: host arithmetic."""
        if self.config.emoe_k_schedule != "stratified":
            return 1.0
        iteration, microbatch, microbatches = self._place(model)
        place = Place(iteration, microbatch, microbatches=microbatches)
        return loss_weight(self.config, self.config.moe_router_topk, place)

    def _both_passes(self, model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Token losses [2, batch, sequence]: at the model's own k, where `forward_step` has put the place, then at the
        k that is dealt to this micro-batch; with distillation [3, batch, sequence], the divergence between them last.
        Each pass is recomputed, if it is, at its own place."""
        go_on = partial(get_active_k().begin_microbatch, *self._place(model), second=True)
        if self.config.emoe_distill_coeff:
            return forward_twice(model, inputs, go_on)
        own = model(**inputs)
        go_on()
        return torch.stack([own, model(**inputs)])

    def _loss_of_both(self, loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        (own, other, *divergence), weights = losses, loss_weights(self.config)
        loss, tokens, report = self._checked_loss(loss_mask, own, weight=weights[0])
        if divergence:
            both = (weights[1], weights[1] * self.config.emoe_distill_coeff)
            other_loss, _, other_report = self._taught_loss(loss_mask, divergence[0], both, other)
        else:
            other_loss, _, other_report = self._checked_loss(loss_mask, other, weight=weights[1])
        report["second pass loss"] = other_report.pop("lm loss")
        return loss + other_loss, tokens, report | other_report

    def _place(self, model: torch.nn.Module) -> tuple[int, int, int]:
        return self.args.curr_iteration, _microbatch(model), get_num_microbatches()

    def _wants_teacher(self, model: torch.nn.Module) -> bool:
        config = self.config
        iteration, microbatch, microbatches = self._place(model)
        place = Place(iteration, microbatch, microbatches=microbatches)
        return wants_teacher(config, config.moe_router_topk, place, config.num_layers)

    def _taught_loss(
        self, loss_mask: Tensor, divergence: Tensor, weights: tuple[float, float], losses: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """weights: how much the losses and the divergence count."""
        loss, tokens, report = self._checked_loss(loss_mask, losses, weight=weights[0])
        distance, _, distance_report = language_model_loss(loss_mask, divergence)
        report["distillation loss"] = distance_report["lm loss"]
        return loss + weights[1] * distance, tokens, report

    def _checked_loss(
        self, loss_mask: Tensor, losses: Tensor, weight: float = 1.0
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """As language_model_loss, the sum times what this pass counts; the log has it as it is."""
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
        if self.args.check_for_spiky_loss and losses.requires_grad:
            machine = get_rerun_state_machine()
            machine.validate_result(
                result=loss,
                rejection_func=partial(machine.is_unexpectedly_large, threshold=SPIKE, context="loss"),
                message="spiky loss",
                tolerance=0.0,
                fatal=False,
            )
        return loss * weight, tokens, report

    def _begin(self, model: torch.nn.Module) -> None:
        """Tell the owner of k, and the metrics, where training stands: host arithmetic."""
        iteration, microbatch, microbatches = self._place(model)
        self.args.exit_duration_in_mins = self._exit_duration
        if self.config.draws:  # else the core's random-state tracker, which CUDA graphs read too, stays as it is
            get_active_k().begin_microbatch(iteration, microbatch, microbatches)
        interval = self.config.emoe_coactivation_interval
        get_elastic_tracker().begin_step(iteration, self.args.log_interval, interval)

    def _let_evaluation_end(self) -> None:
        """After a signal, end the running evaluation: the core leaves it where --exit-duration-in-mins is over on any
        rank, which is all that it looks at between two batches. Training has its own look at signals."""
        if self.args.exit_signal_handler:
            unless_asked = self._exit_duration or _NEVER
            self.args.exit_duration_in_mins = _OVER if exit_signals.came() else unless_asked

    def _asked_to_end(self) -> bool:
        """Whether a signal came on any rank. Collective; sync: evaluation only."""
        return self.args.exit_signal_handler and any(get_signal_handler().signals_received())

    def _recording(self, data_iterator: Iterator | None, chunk: int) -> Iterator | None:
        """The same iterator, whose batches are kept (on the CPU) to be evaluated again at other k'."""
        if data_iterator is None:
            return None
        self._source = id(data_iterator)
        batch = next(data_iterator)
        self._recorded.setdefault(chunk, []).append(self._one_mask(batch))
        return iter([batch])

    def validate_at_each_k(self, model: list[torch.nn.Module]) -> None:
        """Validation loss at each --emoe-eval-k on the batches just evaluated; the loop's `non_loss_data_func`.

        Once for an iteration: where the last one is evaluated anyway, Megatron does it once more, on other batches.
        """
        recorded, self._recorded = self._recorded, {}
        split, iteration = self._evaluated_split(), self._iteration()
        if split == "valid" and self._validated == iteration:
            return
        evaluator = Evaluator(self.args, self.forward)
        steps = self.args.eval_iters
        losses = {}
        for k in self.config.emoe_eval_k or []:
            if not self._asked_to_end():
                losses[k] = evaluator.loss_at_k(model, recorded, k, steps).loss
        if losses:
            self._validated = iteration if split == "valid" else self._validated
            self._log_losses(split, losses)

    def _evaluated_split(self) -> str:
        """valid or test: the loop does not say which; the first source of batches is validation where there is any.

        Only some ranks read data, so they agree by a reduction.
        """
        if self.args.do_valid and not self._validation_source:
            self._validation_source = self._source
        is_test = torch.tensor(float(self._source != self._validation_source), device=current_device())
        torch.distributed.all_reduce(is_test, op=torch.distributed.ReduceOp.MAX)
        return "test" if is_test.item() else "valid"  # sync: evaluation only

    def _log_losses(self, split: str, losses: dict[int, float]) -> None:
        """Log, TensorBoard, and one JSON line beside the checkpoint."""
        iteration, name = self._iteration(), {"valid": "validation", "test": "test"}[split]
        values = " | ".join(f"k'={k}: {loss:.6E}" for k, loss in losses.items())
        print_rank_last(f" {name} loss at iteration {iteration} | {values}")
        writer = get_tensorboard_writer()
        for k, loss in losses.items():
            if writer is not None:
                writer.add_scalar(f"emoe/{name} loss at k={k}", loss, iteration)
        folder = self.args.save or self.args.tensorboard_dir
        if folder and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
            record = {"iteration": iteration, "split": split, "loss": losses}
            append_json_line(Path(folder) / "validation_k.jsonl", record)

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


def _count_both(elastic: Namespace, config: ElasticTransformerConfig, *rest: Any, **kwargs: Any) -> float:
    """FLOPs of a pass at the model's own k and of one at a k from the grid."""
    own, grid = config.moe_router_topk, config.k_grid(config.moe_router_topk)
    total = 0.0
    for k in (own, sum(grid) / len(grid)):
        elastic.moe_router_topk = k
        total += _count_flops(elastic, *rest, **kwargs)
    return total


def _count_frozen(dense: Namespace, config: ElasticTransformerConfig, batch: int, *rest: Any, **kwargs: Any) -> float:
    """FLOPs of a dense model whose low-rank experts alone are trained: its own weights have no gradient, which are a
    third of what the core counts. The routers' are left out."""
    experts = 3 * 2.0 * batch * dense.seq_length * config.num_layers * lora_products(dense)
    dense.num_experts = None
    passes = 2 if config.emoe_second_pass else 1
    return passes * (_count_flops(dense, batch, *rest, **kwargs) * 2 / 3 + experts)


def _report_expected_flops(args: Namespace, config: ElasticTransformerConfig) -> None:
    """Let the log's FLOPs and MFU use E[k], or the measured mean where every token has its own: the core reads
    --moe-router-topk there, and has no seam for it."""

    def at_expected_k(namespace: Namespace, *rest: Any, **kwargs: Any) -> float:
        elastic = copy(namespace)
        if config.emoe_lora_experts is not None:
            return _count_frozen(elastic, config, *rest, **kwargs)
        k = expected_k(config, config.moe_router_topk, getattr(args, "curr_iteration", 0))
        if config.emoe_second_pass:
            return _count_both(elastic, config, *rest, **kwargs)
        measured = get_elastic_tracker().mean_k if config.counts_vary else None
        elastic.moe_router_topk = k if measured is None else measured
        return _count_flops(elastic, *rest, **kwargs)

    core_training.num_floating_point_operations = at_expected_k
    if config.emoe_lora_experts is not None:
        # The core's estimate of memory, printed with the first log, knows neither low-rank experts nor frozen weights.
        core_training.report_theoretical_memory = lambda *args, **kwargs: None
