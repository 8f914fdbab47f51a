"""What GPU libraries offer Megatron's dispatchers, computed naively on the CPU: the core's own code runs around it.

deep_ep's Buffer and HybridEPBuffer over any torch.distributed backend, and Transformer Engine's fused permutation. Each
records what it was given, and each is as strict as the library: rows that do not fit are an error, rows that nobody
filled are not numbers. Shape suffixes: T tokens of a rank, W ranks, E experts, L experts of a rank, K, D hidden.
"""

import importlib
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CALLS: list[dict[str, Any]] = []
"""Every forward call of a library, in order."""


def one_pass(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Any]]]:
    """Output of a layer, gradients of its squared output by name ("input" among them), and the libraries' calls."""
    CALLS.clear()
    layer.zero_grad()
    x.grad = None
    output = layer(x)[0]
    output.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    return output.detach(), gradients | {"input": x.grad}, list(CALLS)


def install_deep_ep() -> None:
    """The package deep_ep for this process, as if it had been there when Megatron was imported."""
    package, utils = ModuleType("deep_ep"), ModuleType("deep_ep.utils")
    package.Buffer, package.HybridEPBuffer, package.utils = Buffer, HybridEPBuffer, utils
    utils.EventHandle, utils.EventOverlap = Event, Event
    sys.modules |= {"deep_ep": package, "deep_ep.utils": utils}
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    importlib.reload(fused_a2a)
    for name in ("fused_dispatch", "fused_combine", "set_deepep_num_sms", "hybrid_ep_dispatch", "hybrid_ep_combine"):
        setattr(token_dispatcher, name, getattr(fused_a2a, name))


def gather(mine: Tensor, group: Any) -> Tensor:
    """What every rank of the group has, [W, ...]."""
    everyone = [torch.empty_like(mine) for _ in range(group.size())]
    dist.all_gather(everyone, mine.contiguous(), group=group)
    return torch.stack(everyone)


def sum_of_mine(partial_WTD: Tensor, group: Any) -> Tensor:
    """The sum over ranks of what each has for this rank's tokens, [T, D]."""
    dist.all_reduce(partial_WTD, group=group)
    return partial_WTD[group.rank()]


class Event:
    """A point on a stream, which a CPU has none of."""

    def __init__(self, *_: Any) -> None:
        pass

    def current_stream_wait(self) -> None:
        pass


class Buffer:
    """DeepEP: a token goes once to every rank that holds one of its experts; combine sums what came back."""

    sms = 0

    def __init__(self, group: Any, num_nvl_bytes: int, num_rdma_bytes: int) -> None:
        self.group, self.num_nvl_bytes, self.num_rdma_bytes = group, num_nvl_bytes, num_rdma_bytes
        self.asked: dict[str, Any] = {}

    @classmethod
    def set_num_sms(cls, number: int) -> None:
        cls.sms = number

    @staticmethod
    def get_dispatch_config(ranks: int) -> Any:
        def size(hidden_bytes: int, _: int) -> int:
            return hidden_bytes

        return SimpleNamespace(get_nvl_buffer_size_hint=size, get_rdma_buffer_size_hint=size)

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int, **_: Any) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64 and topk_idx.shape[1] <= 32  # a lane of a warp for each
        self.asked = {"num_experts": num_experts}
        return None, None, None, None, None

    def dispatch(
        self, x: Tensor, *, handle: Any = None, topk_idx: Any = None, topk_weights: Any = None, **_: Any
    ) -> Any:
        if handle is not None:
            return gather(x, self.group)[handle.needed_WT], None, None, None, None, Event()
        assert topk_weights.dtype == torch.float32
        local = self.asked["num_experts"] // self.group.size()
        CALLS.append({"topk_idx": topk_idx, "topk_weights": topk_weights, "bytes": self.num_nvl_bytes} | self.asked)
        idx_WTK = gather(topk_idx, self.group) - self.group.rank() * local
        here_WTK = (idx_WTK >= 0) & (idx_WTK < local) & (gather(topk_idx, self.group) >= 0)
        handle = SimpleNamespace(needed_WT=here_WTK.any(dim=2), tokens=x.shape[0])
        kept = handle.needed_WT
        weights_WTK = gather(topk_weights, self.group) * here_WTK
        counts = [int((idx_WTK[here_WTK] == expert).sum()) for expert in range(local)]
        idx_WTK = idx_WTK.masked_fill(~here_WTK, -1)
        return gather(x, self.group)[kept], idx_WTK[kept], weights_WTK[kept], counts, handle, Event()

    def combine(self, x: Tensor, handle: Any, topk_weights: Tensor | None = None, **_: Any) -> Any:
        def back(rows: Tensor) -> Tensor:
            whole = rows.new_zeros(*handle.needed_WT.shape, rows.shape[1])
            whole[handle.needed_WT] = rows
            return sum_of_mine(whole, self.group)

        return back(x), None if topk_weights is None else back(topk_weights), Event()


@dataclass
class Layout:
    """Which tokens of which rank this rank's rows are, expert by expert, and where each expert's rows begin."""

    rows: Tensor  # of the [W * T] tokens
    columns: Tensor  # of the E experts
    places: Tensor  # among the rows handed out
    size: int
    ranks: int
    experts: int


class HybridEPBuffer:
    """HybridEP: dispatch and permute in one, by the routing map; each expert's rows padded to a multiple."""

    made: list[dict[str, Any]] = []

    def __init__(self, group: Any, **sizes: Any) -> None:
        self.group = group
        self.made.append(sizes)

    def dispatch_with_permute(
        self,
        *,
        hidden: Tensor,
        handle: Any = None,
        routing_map: Any = None,
        probs: Any = None,
        num_of_experts_per_rank: int = 0,
        pad_multiple: int | None = None,
        num_permuted_tokens: Any = None,
        **_: Any,
    ) -> tuple[Any, ...]:
        counts = None
        if handle is None:
            assert routing_map.dtype == torch.bool and probs.dtype == torch.float32
            CALLS.append({"routing_map": routing_map, "probs": probs, "num_permuted_tokens": num_permuted_tokens})
            layout, counts = self._layout(routing_map, num_of_experts_per_rank, pad_multiple, num_permuted_tokens)
            handle = (layout, torch.zeros(1, dtype=torch.int64))
        layout = handle[0]
        assert num_permuted_tokens is None or int(num_permuted_tokens) == layout.size
        permuted = hidden.new_zeros(layout.size, hidden.shape[1])
        permuted[layout.places] = gather(hidden, self.group).flatten(0, 1)[layout.rows]
        weights = None
        if probs is not None:
            weights = probs.new_zeros(layout.size)
            weights[layout.places] = gather(probs, self.group).flatten(0, 1)[layout.rows, layout.columns]
        return permuted, weights, None, counts, handle

    def _layout(self, map_TE: Tensor, local: int, multiple: int | None, given: int | None) -> tuple[Layout, Tensor]:
        first = self.group.rank() * local
        map_RL = gather(map_TE.byte(), self.group).bool().flatten(0, 1)[:, first : first + local]
        columns, rows = map_RL.t().nonzero(as_tuple=True)
        held = map_RL.sum(dim=0)
        counts = held if not multiple else (held + multiple - 1) // multiple * multiple
        starts = counts.cumsum(0) - counts
        places = starts[columns] + torch.arange(len(rows)) - (held.cumsum(0) - held)[columns]
        size = int(counts.sum()) if given is None else given
        assert size >= int(counts.sum()), "rows beyond the budget would be dropped"
        return Layout(rows, columns + first, places, size, self.group.size(), map_TE.shape[1]), counts

    def combine_with_unpermute(self, *, hidden: Tensor, handle: Any, probs: Tensor | None = None, **_: Any) -> Any:
        layout = handle[0]
        tokens = hidden.new_zeros(layout.ranks * self._tokens(layout), hidden.shape[1])
        tokens.index_add_(0, layout.rows, hidden[layout.places])
        combined = sum_of_mine(tokens.view(layout.ranks, -1, hidden.shape[1]), self.group)
        if probs is None:
            return combined, None
        weights = probs.new_zeros(len(tokens), layout.experts)
        weights[layout.rows, layout.columns] = probs[layout.places]
        return combined, sum_of_mine(weights.view(layout.ranks, -1, layout.experts), self.group)

    def _tokens(self, layout: Layout) -> int:
        return self.made[-1]["max_num_of_tokens_per_rank"]


def install_fused_permutation() -> None:
    """Transformer Engine's fused permutation, with its signatures, in the place where Megatron found none."""
    from megatron.core.transformer.moe import moe_utils

    moe_utils.HAVE_TE, moe_utils.is_te_min_version = True, lambda version: True
    moe_utils.fused_permute = fused_permute
    moe_utils.fused_permute_with_probs = fused_permute_with_probs
    moe_utils.fused_unpermute = fused_unpermute
    moe_utils.fused_sort_chunks_by_index = fused_sort_chunks_by_index
    moe_utils.fused_sort_chunks_by_index_with_probs = fused_sort_chunks_by_index_with_probs


def fused_permute_with_probs(
    tokens_TD: Tensor, probs_TE: Tensor, map_TE: Tensor, num_out_tokens: Any = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Exactly `num_out_tokens` rows are there, whatever the map says: too few to write to, or left as they were."""
    columns, rows = map_TE.t().nonzero(as_tuple=True)
    CALLS.append({"num_out_tokens": int(num_out_tokens), "rows": len(rows)})
    if len(rows) > int(num_out_tokens):
        raise IndexError(f"{len(rows)} rows do not fit into num_out_tokens {num_out_tokens}")
    left = int(num_out_tokens) - len(rows)
    rest = tokens_TD.new_full((left, tokens_TD.shape[1]), torch.nan)
    permuted = torch.cat([tokens_TD[rows], rest])
    return permuted, torch.cat([probs_TE[rows, columns], probs_TE.new_full((left,), torch.nan)]), rows


def fused_permute(tokens_TD: Tensor, map_TE: Tensor, num_out_tokens: Any = None) -> tuple[Tensor, Tensor]:
    """The same without probabilities."""
    permuted, _, rows = fused_permute_with_probs(tokens_TD, map_TE.float(), map_TE, num_out_tokens)
    return permuted, rows


def fused_unpermute(
    permuted: Tensor, rows: Tensor, merging_probs: Any = None, restore_shape: Any = None, pad_offsets: Any = None
) -> Tensor:
    """Sum each token's rows."""
    assert merging_probs is None and pad_offsets is None
    return permuted.new_zeros(restore_shape).index_add(0, rows, permuted[: len(rows)])


def fused_sort_chunks_by_index(rows: Tensor, split_sizes: Tensor, order: Tensor) -> Tensor:
    """Chunks of rows in another order."""
    chunks = rows.split(split_sizes.tolist())
    return torch.cat([chunks[place] for place in order.tolist()])


def fused_sort_chunks_by_index_with_probs(
    rows: Tensor, probs: Tensor, split_sizes: Tensor, order: Tensor
) -> tuple[Tensor, Tensor]:
    """The same, of rows and their probabilities."""
    return (fused_sort_chunks_by_index(rows, split_sizes, order), fused_sort_chunks_by_index(probs, split_sizes, order))
