"""One Megatron model on all its ranks, driven from rank 0: it sends rows of tokens, all compute, answers come back.

What to run next depends on what came back (generation) and on data that only one process should fetch, so rank 0 alone
runs the program and the other ranks follow its orders: every collective of a forward pass meets on every rank, whatever
rank 0 decides. Data-parallel ranks take a share of the rows each, of one shape, so that experts split over them
(expert parallelism) exchange tokens in the same forward passes. Shape suffixes: B rows, S positions, V vocabulary.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, nn

from megatron_emoe.routing.active_k import get_active_k
from megatron_emoe.tasks.results import Passage
from megatron_emoe.training.evaluation import counting_rows, current_device


@dataclass(frozen=True)
class Score:
    """How likely are these ends? tokens: the input. Each of `ends` was to follow: its last token after all of `tokens`,
    the others inside them. Answer: for each end the sum of its log-probabilities (nats), and whether greedy decoding
    would give exactly it."""

    tokens: Sequence[int]
    ends: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Next:
    """Which token follows? draw: a number in [0, 1) that decides where a token is sampled, None for the most likely
    one. temperature, top_k (0: all), top_p: of the distribution to sample from. Answer: a token id."""

    tokens: Sequence[int]
    draw: float | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


Row = Score | Next

NO_TOKEN = -1
"""Answer to Next where the logits are no numbers."""


def check_layout(args: Namespace) -> None:
    """Raises `ValueError` for a parallel layout that cannot answer single rows."""
    if args.context_parallel_size > 1:
        raise ValueError(f"--context-parallel-size {args.context_parallel_size}: tasks have short sequences; must be 1")
    if args.virtual_pipeline_model_parallel_size is not None:
        raise ValueError("virtual pipeline stages: tasks run one batch at a time; leave them out")


def control_group() -> Any:
    """For orders and answers between all ranks, on the CPU. Rank 0 may be busy for hours in between, when a device's
    group would give up. Collective."""
    return torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))


def from_rank_0(group: Any, value: Any) -> Any:
    """On every rank what rank 0 gives. Collective."""
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, group=group)
    return box[0]


class ForwardServer:
    """Every rank makes one; rank 0 asks (`answer`, inside `active`), the others `serve` until rank 0 calls `stop`.

    args: Megatron's namespace. model: of this rank, in evaluation mode. vocabulary: tokens that can follow; what the
    output layer has beyond them is padding. group: see control_group.
    """

    def __init__(self, args: Namespace, model: list[nn.Module], vocabulary: int, group: Any) -> None:
        self.args, self.model, self.vocabulary, self._group = args, model, vocabulary, group
        self.shares = parallel_state.get_data_parallel_world_size()
        self._measured = ExitStack()
        self._rows: Any = None
        self._passage = Passage()

    def serve(self) -> None:
        """On every rank but 0: do what rank 0 says until it stops."""
        while (order := from_rank_0(self._group, None)) is not None:
            self._obey(*order)

    def stop(self) -> None:
        """On rank 0: let the other ranks go on after `serve`."""
        from_rank_0(self._group, None)

    @contextmanager
    def active(self, k: int) -> Iterator[Passage]:
        """On rank 0: inside, k' = `k`. The value is complete on the way out: what went through the model inside."""
        self._order("begin", k)
        passage = self._passage = Passage()
        yield passage
        passage.rows = self._order("end", None)

    def answer(self, rows: Sequence[Row]) -> list[Any]:
        """On rank 0: one forward pass over rows of one kind, all ranks together; the answers in order."""
        return self._order("run", list(rows))

    def _order(self, what: str, value: Any) -> Any:
        from_rank_0(self._group, (what, value))
        return self._obey(what, value)

    def _obey(self, what: str, value: Any) -> Any:
        return {"begin": self._begin, "end": self._end, "run": self._run}[what](value)

    def _begin(self, k: int) -> None:
        self._measured.enter_context(get_active_k().evaluating(k))
        self._rows = self._measured.enter_context(counting_rows(self.model))

    def _end(self, _: None) -> dict[int, int]:
        rows = self._rows()
        self._measured.close()
        return rows

    @torch.no_grad()
    def _run(self, rows: list[Row]) -> list[Any] | None:
        share = -(-len(rows) // self.shares)
        first = parallel_state.get_data_parallel_rank() * share
        own = rows[first : first + share]
        tokens_BS = torch.zeros(share, self._length(rows), dtype=torch.int64)  # padding, at the end: seen by no token
        for tokens_S, row in zip(tokens_BS, own, strict=False):
            tokens_S[: len(row.tokens)] = torch.tensor(row.tokens)
        self._passage.tokens += tokens_BS.numel() * self.shares
        outputs = self._forward(tokens_BS.to(current_device()))
        return self._collect([self._read(logits_BSV, own) for logits_BSV in outputs])

    def _length(self, rows: list[Row]) -> int:
        """Of all shares, so that they have one shape; a whole number of parts where the sequence is split."""
        longest = max(len(row.tokens) for row in rows)
        parts = self.args.tensor_model_parallel_size if self.args.sequence_parallel else 1
        return -(-longest // parts) * parts

    def _forward(self, tokens_BS: Tensor) -> list[Tensor]:
        """Logits [B, S, V / tensor-parallel size], on the last pipeline stage; elsewhere nothing."""
        batch, length = tokens_BS.shape
        positions_BS = torch.arange(length, device=tokens_BS.device).expand_as(tokens_BS)

        def step(_data: None, model: nn.Module) -> tuple[Tensor, Any]:
            return model(tokens_BS, positions_BS, None), lambda logits_BSV, non_loss_data: logits_BSV

        return get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=None,
            model=self.model,
            num_microbatches=1,
            seq_length=length,
            micro_batch_size=batch,
            decoder_seq_length=length,
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _read(self, logits_BSV: Tensor, rows: list[Row]) -> list[Any]:
        """The answers of this rank's rows. Collective over the ranks that share the vocabulary."""
        return [self._read_row(logits_SV, row) for logits_SV, row in zip(logits_BSV, rows, strict=False)]

    def _read_row(self, logits_SV: Tensor, row: Row) -> Any:
        if isinstance(row, Next):
            return next_token(self._whole(logits_SV, len(row.tokens), 1)[0], row)
        longest = max(len(end) for end in row.ends)
        logits_SV = self._whole(logits_SV, len(row.tokens), longest)
        return [score(logits_SV[longest - len(end) :], end) for end in row.ends]

    def _whole(self, logits_SV: Tensor, stop: int, count: int) -> Tensor:
        """`count` positions before `stop`, fp32, over the vocabulary without the rows that pad it."""
        part_SV = logits_SV[stop - count : stop].contiguous()
        return gather_from_tensor_model_parallel_region(part_SV)[:, : self.vocabulary].float()

    def _collect(self, answers: list[list[Any]]) -> list[Any] | None:
        """On rank 0 the answers of all shares in order, from one rank each; None elsewhere."""
        speaks = bool(answers) and parallel_state.get_tensor_model_parallel_rank() == 0
        said = (parallel_state.get_data_parallel_rank(), answers[0]) if speaks else None
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        box: list[Any] | None = [None] * world if rank == 0 else None
        torch.distributed.gather_object(said, box, dst=0, group=self._group)
        if box is None:
            return None
        return [answer for _, share in sorted(said for said in box if said is not None) for answer in share]


def score(logits_SV: Tensor, end: Sequence[int]) -> tuple[float, bool]:
    """Sum of the log-probabilities (nats) of the tokens in `end`, and whether each is the most likely one.

    logits_SV: fp32, the position before each of them.
    """
    end_S = torch.tensor(end, device=logits_SV.device)
    chosen_S = logits_SV.log_softmax(dim=-1).gather(1, end_S[:, None])
    return float(chosen_S.sum()), bool((logits_SV.argmax(dim=-1) == end_S).all())  # sync: evaluation only


def next_token(logits_V: Tensor, row: Next) -> int:
    """The most likely token, or the one at row.draw of the distribution that temperature, top_k and top_p leave.

    top_p keeps the fewest most likely tokens that reach it together (arXiv 1904.09751). logits_V: fp32. NO_TOKEN where
    one of them is NaN or infinitely large.
    """
    if not logits_V.max().isfinite():  # sync: evaluation only
        return NO_TOKEN
    if row.draw is None:
        return int(logits_V.argmax())  # sync: evaluation only
    probs_V, tokens_V = (logits_V.double() / row.temperature).softmax(dim=-1).sort(descending=True, stable=True)
    if row.top_k:
        probs_V[row.top_k :] = 0
    probs_V[probs_V.cumsum(0) - probs_V >= row.top_p * probs_V.sum()] = 0
    cumulative_V = probs_V.cumsum(0)
    place = torch.searchsorted(cumulative_V, row.draw * cumulative_V[-1], right=True)
    return int(tokens_V[place.clamp(max=int((probs_V > 0).sum()) - 1)])
