"""Self-distillation: where another number of experts than k runs, the model's own output at k is a second target.

The teacher is the same weights at --moe-router-topk without a gradient, so that fewer and added experts are drawn to
what the model says with k. It costs a second forward pass of every micro-batch in which a layer draws another k', in
evaluation mode, and both passes' logits of that micro-batch in memory; with --emoe-second-pass the first pass, at k
anyway, is the teacher of the second, and no pass is added.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.parallel_state import get_tensor_model_parallel_group
from megatron.core.utils import unwrap_model
from torch import Tensor, nn

from megatron_emoe.routing.active_k import Place, get_active_k, scheduled_k
from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.training.teacher import teacher_logits


def wants_teacher(elastic: ElasticConfig, model_k: int, place: Place, num_layers: int) -> bool:
    """Whether any layer draws another number of experts than `model_k` in the micro-batch at `place`, whose layer does
    not matter. Pure; equal on every rank."""
    if not elastic.emoe_distill_coeff:
        return False
    layers = range(1, num_layers + 1) if elastic.emoe_k_draw == "layer" else (1,)
    return any(scheduled_k(elastic, model_k, replace(place, layer=layer)) != model_k for layer in layers)


def forward_with_teacher(model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Token losses of the model at the drawn k', and their divergence from the model at its own k.

    model: one pipeline stage that holds the whole model. inputs: the model's keyword arguments with labels. Returns the
    language-model loss and KL(teacher || model), both [batch, sequence] in nats.
    """
    model.eval()
    with torch.no_grad(), get_active_k().evaluating(None):
        teacher_BSV = model(**_unlabelled(inputs))
    model.train()
    return _taught(model, inputs, teacher_BSV)


def forward_taught_by(teacher: nn.Module, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The same with a frozen teacher (teacher.py), at any k' of the model."""
    return _taught(model, inputs, teacher_logits(teacher, _unlabelled(inputs)))


def forward_twice(model: nn.Module, inputs: dict[str, Any], before_second: Callable[[], None]) -> Tensor:
    """Token losses of a pass at k and of a second one, then the divergence of the second from the first.

    before_second: called between them. Returns [3, batch, sequence] in nats; the divergence has no gradient in the
    first pass.
    """
    logits_BSV = model(**_unlabelled(inputs))
    teacher_BSV = logits_BSV.detach().clone()
    own_BS = _losses(model, inputs, logits_BSV)
    before_second()
    return torch.stack([own_BS, *_taught(model, inputs, teacher_BSV)])


def _taught(model: nn.Module, inputs: dict[str, Any], teacher_BSV: Tensor) -> tuple[Tensor, Tensor]:
    logits_BSV = model(**_unlabelled(inputs))
    # The divergence first: the core's cross-entropy writes into logits in fp32 where a micro-batch is one sequence.
    divergence_BS = teacher_divergence(logits_BSV, teacher_BSV, get_tensor_model_parallel_group())
    return _losses(model, inputs, logits_BSV), divergence_BS


def _unlabelled(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"labels": None, "loss_mask": None}


def _losses(model: nn.Module, inputs: dict[str, Any], logits_BSV: Tensor) -> Tensor:
    logits_SBV = logits_BSV.transpose(0, 1).contiguous()
    return unwrap_model(model).compute_language_model_loss(inputs["labels"], logits_SBV)


def teacher_divergence(logits_V: Tensor, teacher_V: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """KL(softmax(teacher) || softmax(logits)) over the last dimension, which the ranks of `group` share.

    logits_V, teacher_V: [..., V / ranks], any float of which the teacher's are overwritten. Returns [...], float32, in
    nats; the gradient reaches the logits alone.
    """
    return _Divergence.apply(logits_V, teacher_V, group)


_CHUNK = 2**24
"""Numbers that are turned into probabilities at a time: 64 MiB in float32, where whole logits are gigabytes."""


class _Divergence(torch.autograd.Function):
    """The gradient is softmax(logits) - softmax(teacher), which takes the teacher's memory: beside the logits of both,
    nothing of their size is held."""

    @staticmethod
    def forward(context: Any, logits_V: Tensor, teacher_V: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
        shape, columns = logits_V.shape, logits_V.shape[-1]
        both = [values_V.reshape(-1, columns) for values_V in (logits_V, teacher_V)]
        rows = max(1, _CHUNK // columns)
        norms = _norms([tensor_TV.split(rows) for tensor_TV in both], group)
        divergences = []
        for own_CV, teacher_CV, *norm in zip(*(tensor_TV.split(rows) for tensor_TV in both), *norms, strict=True):
            own_log_CV, teacher_log_CV = _log_softmax(own_CV, norm[0]), _log_softmax(teacher_CV, norm[1])
            probs_CV = teacher_log_CV.exp()
            divergences.append((probs_CV * teacher_log_CV.sub_(own_log_CV)).sum(dim=-1))
            teacher_CV.copy_(own_log_CV.exp_().sub_(probs_CV))
        divergence = torch.cat(divergences)
        torch.distributed.all_reduce(divergence, group=group)
        context.save_for_backward(both[1].view(shape))
        context.dtype = logits_V.dtype
        return divergence.view(shape[:-1])

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (difference_V,) = context.saved_tensors
        return (difference_V * grads[0].unsqueeze(-1)).to(context.dtype), None, None


Norm = tuple[Tensor, Tensor]
"""Of some rows: the largest of each, and the logarithm of the sum of exp(value - largest), float32 [rows, 1]."""


def _norms(tensors: list[tuple[Tensor, ...]], group: torch.distributed.ProcessGroup) -> list[list[Norm]]:
    """What turns each chunk of each tensor into log-probabilities over a dimension that the ranks of `group` share."""
    largest = torch.stack([torch.cat([chunk_CV.amax(-1, True).float() for chunk_CV in chunks]) for chunks in tensors])
    torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
    sizes = [len(chunk_CV) for chunk_CV in tensors[0]]
    split = [each.split(sizes) for each in largest]
    totals = [
        torch.cat([(chunk_CV.float() - top).exp_().sum(-1, True) for chunk_CV, top in zip(chunks, tops, strict=True)])
        for chunks, tops in zip(tensors, split, strict=True)
    ]
    total = torch.stack(totals)
    torch.distributed.all_reduce(total, group=group)
    return [list(zip(tops, each.log().split(sizes), strict=True)) for tops, each in zip(split, total, strict=True)]


def _log_softmax(values_CV: Tensor, norm: Norm) -> Tensor:
    """Log-probabilities, float32, in memory of their own."""
    return (values_CV.float() - norm[0]).sub_(norm[1])
