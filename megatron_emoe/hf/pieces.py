"""The vocabulary of a name table: which Hugging Face tensors make which chunk of which Megatron tensor, and back.

A table lists pieces. A piece is a chunk that Megatron stores as a whole (one expert's gate matrix, one layer's q, k and
v) and the Hugging Face tensors it holds. Both directions of a conversion, and the layout of the checkpoint, follow from
the same list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, ...]


class Transform(Protocol):
    """How a chunk is made of Hugging Face tensors. pack and unpack are inverse bit by bit."""

    def pack(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        """The chunk of this shape."""

    def unpack(self, chunk: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        """The tensors, of these shapes."""


@dataclass(frozen=True)
class Copy:
    """One tensor, as it is; ERNIE's selection bias alone has another shape ([1, E] and [E])."""

    def pack(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        return tensors[0].reshape(shape)

    def unpack(self, chunk: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        return [chunk.reshape(shapes[0])]


@dataclass(frozen=True)
class PackQKV:
    """q, k and v interleaved by query group: for each group its query heads, then its key head, then its value head.

    Tensor parallelism cuts linear_qkv between groups, so each rank gets whole groups. Weights and biases alike.
    """

    groups: int

    def pack(self, tensors: Sequence[Tensor], shape: Shape) -> Tensor:
        by_group = [tensor.unflatten(0, (self.groups, -1)) for tensor in tensors]
        return torch.cat(by_group, dim=1).flatten(0, 1)

    def unpack(self, chunk: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
        by_group = chunk.unflatten(0, (self.groups, -1))
        rows = [shape[0] // self.groups for shape in shapes]
        return [part.flatten(0, 1).contiguous() for part in by_group.split(rows, dim=1)]


@dataclass(frozen=True)
class Piece:
    """A chunk of a Megatron tensor.

    name: of the Megatron tensor; within a decoder layer where `layer` is given. shape: of that whole tensor, in one
    layer and of one expert. hf: names and shapes of the Hugging Face tensors. layer, expert: 0-based. first_row, rows:
    which rows of the tensor the chunk is (all by default). fp32: stored in fp32 whatever the model's type.
    """

    name: str
    shape: Shape
    hf: tuple[tuple[str, Shape], ...]
    layer: int | None = None
    expert: int | None = None
    first_row: int = 0
    rows: int | None = None
    transform: Transform = field(default_factory=Copy)
    fp32: bool = False

    @property
    def chunk_shape(self) -> Shape:
        return self.shape if self.rows is None else (self.rows, *self.shape[1:])


@dataclass(frozen=True)
class Group:
    """Pieces that are converted together: the embedding, one decoder layer, or the head. One file on either side.

    layer: 0-based number of the decoder layer, None outside of the decoder.
    """

    name: str
    pieces: tuple[Piece, ...]
    layer: int | None = None

    def hf_tensors(self) -> dict[str, Shape]:
        """Names and shapes of all Hugging Face tensors in this group."""
        return {name: shape for piece in self.pieces for name, shape in piece.hf}


@dataclass(frozen=True)
class Place:
    """Where a chunk lies in a torch_dist checkpoint: key, shape of the whole tensor, offset and size of the chunk."""

    key: str
    shape: Shape
    offset: Shape
    size: Shape


_OWN_NORMS = ("decoder.final_layernorm", "input_layernorm", "pre_mlp_layernorm")


@dataclass(frozen=True)
class Layout:
    """Keys and shapes of a Megatron checkpoint of this model.

    stacked: all layers in one tensor per parameter. Megatron does so where --moe-layer-freq is a number, and writes
    every layer on its own where it is a list. Experts are stacked in both.
    """

    stacked: bool
    num_layers: int
    num_experts: int

    def place(self, piece: Piece) -> Place:
        """Where a piece lies."""
        whole, offset = piece.shape, (piece.first_row, *(0 for _ in piece.shape[1:]))
        size, key = piece.chunk_shape, piece.name
        if piece.expert is not None:
            whole, offset, size = (self.num_experts, *whole), (piece.expert, *offset), (1, *size)
        if piece.layer is None:
            return Place(key, whole, offset, size)
        if self.stacked:
            return Place(f"decoder.layers.{key}", (self.num_layers, *whole), (piece.layer, *offset), (1, *size))
        return Place(f"decoder.layers.{piece.layer}.{key}", whole, offset, size)

    def extra_state(self, piece: Piece) -> str | None:
        """The key of the empty `_extra_state` object that Megatron stores beside some weights, if any.

        Transformer Engine keeps FP8 scales there, in linear layers and in norms that stand alone. This package's models
        load without it; stock Megatron asks for it even where it is empty.
        """
        module, _, kind = piece.name.rpartition(".")
        own = module in _OWN_NORMS or module.rpartition(".")[2].startswith("linear_")
        if kind != "weight" or piece.first_row or not own:
            return None
        index, counts = [], []
        if piece.layer is not None and self.stacked:
            index, counts = [piece.layer], [self.num_layers]
        if piece.expert is not None:
            index, counts = [*index, piece.expert], [*counts, self.num_experts]
        index, counts = index or [0], counts or [1]
        prefix = "" if piece.layer is None else "decoder.layers." + ("" if self.stacked else f"{piece.layer}.")
        shard = ".".join(map(str, index)) + "_" + ".".join(map(str, counts))
        return f"{prefix}{module}._extra_state/shard_{shard}"


def linear(name: str, hf: str, shape: Shape, layer: int | None = None) -> Piece:
    """A tensor that both sides hold alike."""
    return Piece(name, shape, ((hf, shape),), layer)


def gated(
    name: str,
    hf: str,
    width: int,
    hidden: int,
    layer: int,
    expert: int | None = None,
    *,
    called: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> list[Piece]:
    """A gated MLP: linear_fc1 is [gate; up] by rows, linear_fc2 is down. hf: prefix of these matrices. called: their
    names there."""
    fc1, fc2 = f"{name}.linear_fc1.weight", f"{name}.linear_fc2.weight"
    gate, up, down_name = called
    halves = [
        Piece(
            fc1,
            (2 * width, hidden),
            ((f"{hf}.{half}.weight", (width, hidden)),),
            layer,
            expert,
            first_row=start,
            rows=width,
        )
        for half, start in ((gate, 0), (up, width))
    ]
    down = Piece(fc2, (hidden, width), ((f"{hf}.{down_name}.weight", (hidden, width)),), layer, expert)
    return [*halves, down]
