"""What a training or evaluation loop of one's own says to elastic layers: where training stands, and which k' to use.

pretrain_emoe.py and the tools say both themselves (training/loop.py, training/evaluation.py).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy

from torch import nn

from megatron_emoe.routing.active_k import get_active_k
from megatron_emoe.routing.combinations import check_elastic
from megatron_emoe.routing.router import ElasticRouter


@contextmanager
def active_experts(
    model: nn.Module | Sequence[nn.Module],
    k: int | Sequence[int],
    tail_scale: float | Mapping[int, float] | None = None,
) -> Iterator[None]:
    """Inside, evaluation of `model` uses k' = `k` experts per token; afterwards what was used before.

    model: of elastic layers and in evaluation mode, or the list of its pipeline chunks on this rank. k: one number, or
    one for each MoE layer in layer order, which needs all layers on this rank. tail_scale: a, the factor of the weights
    of the experts past the model's own k, one number or a by k' (linear between); None: what the configuration's
    emoe_tail_scale gives at k'. The k' is the process's: a second model that is evaluated inside uses it, too.

    Raises:
        ValueError: a k' that the model cannot run, a tail scale that is negative or not finite, a list of another
            length than it has MoE layers, a model without elastic layers, or one in training mode, where k is the
            schedule's.
    """
    routers = _routers([model] if isinstance(model, nn.Module) else model)
    ks = _one_per_router(k, routers)
    _check(routers, ks)
    by_layer = {router.global_layer_number: layer_k for router, layer_k in zip(routers, ks, strict=True)}
    owner = get_active_k()
    with (
        owner.evaluating(k if isinstance(k, int) else by_layer),
        nullcontext() if tail_scale is None else owner.scaling_tail(tail_scale),
    ):
        yield


def begin_microbatch(iteration: int, microbatch: int = 0, microbatches: int = 1) -> None:
    """Call before each training forward pass of a model whose k or experts are drawn: draws depend on this place alone.

    iteration: optimizer steps so far. microbatch: of the step, from 0, of `microbatches`. Where a pass begins without
    it, the first elastic layer raises a RuntimeError.
    """
    get_active_k().begin_microbatch(iteration, microbatch, microbatches)


def _routers(chunks: Iterable[nn.Module]) -> list[ElasticRouter]:
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, ElasticRouter)]
    if not routers:
        raise ValueError("the model has no elastic layer: build it with the spec that elastic_spec() returns")
    if any(router.training for router in routers):
        raise ValueError("the model is in training mode, where k is the schedule's: call its eval() first")
    return routers


def _one_per_router(k: int | Sequence[int], routers: list[ElasticRouter]) -> list[int]:
    if isinstance(k, int):
        return [k] * len(routers)
    if len(k) != len(routers):
        raise ValueError(f"k' {list(k)}: has {len(k)} entries; must have one for each of the {len(routers)} MoE layers")
    return list(k)


def _check(routers: list[ElasticRouter], ks: list[int]) -> None:
    """The rules of --emoe-eval-k, which say what a model can run: range, groups, parts of the core with a fixed k."""
    asked = copy(routers[0].config)
    asked.emoe_eval_k = sorted(set(ks))
    try:
        check_elastic(asked)
    except ValueError as error:
        raise ValueError(str(error).replace("--emoe-eval-k", "k'")) from error
