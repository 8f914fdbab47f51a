"""Self-distillation: where more than k experts run, the model's own output at k is a second target.

The teacher is the same weights at --moe-router-topk, in evaluation mode and without a gradient, so the added experts
are drawn to what the model already knows. It costs a second forward pass of every micro-batch in which a layer draws
k' > k, and both passes' logits of that micro-batch in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_emoe.routing.active_k import Place, get_active_k, scheduled_k
from megatron_emoe.settings.elastic_config import ElasticConfig


def wants_teacher(elastic: ElasticConfig, model_k: int, iteration: int, microbatch: int, num_layers: int) -> bool:
    """Whether any layer draws more than `model_k` experts in this micro-batch. Pure; equal on every rank."""
    if not elastic.emoe_distill_coeff:
        return False
    layers = range(1, num_layers + 1) if elastic.emoe_k_draw == "layer" else (1,)
    places = (Place(iteration, microbatch, layer) for layer in layers)
    return any(scheduled_k(elastic, model_k, place) > model_k for place in places)


def forward_with_teacher(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token losses of the model at the drawn k', and their divergence from the model at its own k.

    model: one pipeline stage that holds the whole model. inputs: the model's keyword arguments with labels. Returns the
    language-model loss and KL(teacher || model), both [batch, sequence] in nats.
    """
    labels = inputs["labels"]
    unlabelled = inputs | {"labels": None, "loss_mask": None}
    model.eval()
    with torch.no_grad(), get_active_k().evaluating(None):
        teacher_BSV = model(**unlabelled)
    model.train()
    logits_BSV = model(**unlabelled)
    losses_BS = unwrap_model(model).compute_language_model_loss(labels, logits_BSV.transpose(0, 1).contiguous())
    return losses_BS, teacher_divergence(logits_BSV, teacher_BSV, get_tensor_model_parallel_group())


def teacher_divergence(logits_V: Tensor, teacher_V: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """KL(softmax(teacher) || softmax(logits)) over the last dimension, which the ranks of `group` share.

    logits_V, teacher_V: [..., V / ranks], any float. Returns [...], float32, in nats; the gradient reaches the logits
    alone.
    """
    return _Divergence.apply(logits_V, teacher_V, group)


class _Divergence(torch.autograd.Function):
    """The gradient is softmax(logits) - softmax(teacher): autograd would keep three more tensors of that size."""

    @staticmethod
    def forward(context: Any, logits_V: Tensor, teacher_V: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        own_V, teacher_log_V = (_log_softmax(values_V, group) for values_V in (logits_V, teacher_V))
        probs_V = teacher_log_V.exp()
        divergence = (probs_V * (teacher_log_V - own_V)).sum(dim=-1)
        torch.distributed.all_reduce(divergence, group=group)
        context.save_for_backward(own_V.exp().sub_(probs_V))
        context.dtype = logits_V.dtype
        return divergence

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (difference_V,) = context.saved_tensors
        return (difference_V * grads[0].unsqueeze(-1)).to(context.dtype), None, None


def _log_softmax(values_V: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """log softmax over a dimension that the ranks of `group` share, float32."""
    values_V = values_V.float()
    largest = values_V.amax(dim=-1, keepdim=True)
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    values_V = values_V - largest
    total = values_V.exp().sum(dim=-1, keepdim=True)
    torch.distributed.all_reduce(total, group=group)
    return values_V.sub_(total.log())
