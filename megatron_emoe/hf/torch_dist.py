"""Megatron's distributed checkpoints (torch_dist), read and written a few tensors at a time, without building a model.

The format is torch.distributed.checkpoint's, and its own reader and writer do the work: here each group of tensors
poses as the plan of one rank, so that no more than a group is in memory.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from megatron_emoe.hf.pieces import Place

COMMON_STATE = "common_state/shard_0_1"


class _GroupSavePlanner(SavePlanner):
    """Hands the writer one chunk at a time; a chunk is made only when it is written."""

    def __init__(self, make: Mapping[MetadataIndex, Callable[[], Any]]) -> None:
        self.make = make

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self.make[write_item.index]()

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the plan is ready made."""

    create_local_plan = create_global_plan = finish_plan = set_up_planner  # type: ignore[assignment]


class TorchDistWriter:
    """Writes a checkpoint group by group, each to a file of its own, in any order and from several threads.

    folder: exists, and is this checkpoint's own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._objects: dict[str, BytesStorageMetadata] = {}

    def declare(self, place: Place, dtype: torch.dtype) -> None:
        """Tell that a chunk is part of the checkpoint, whether it is written now or was before an interruption."""
        properties = TensorProperties(dtype=dtype)
        whole = TensorStorageMetadata(properties, torch.Size(place.shape), [])
        chunk = ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.size))
        self._tensors.setdefault(place.key, whole).chunks.append(chunk)

    def declare_object(self, key: str) -> None:
        """The same for an object."""
        self._objects[key] = BytesStorageMetadata()

    def write(
        self,
        number: int,
        chunks: Sequence[tuple[Place, torch.dtype, Callable[[], Tensor]]],
        objects: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Write chunks and objects to file `__{number}_0.distcp`; returns where each lies, as JSON values.

        chunks: place, type, and a function that makes the tensor (called once, when it is written).
        """
        make: dict[MetadataIndex, Callable[[], Any]] = {}
        items = []
        for place, dtype, tensor in chunks:
            index = MetadataIndex(place.key, torch.Size(place.offset))
            data = TensorWriteData(
                ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.size)),
                TensorProperties(dtype=dtype),
                torch.Size(place.shape),
            )
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            make[index] = _shaped(tensor, place)
        for key, value in objects.items():
            index = MetadataIndex(key)
            items.append(WriteItem(index, WriteItemType.BYTE_IO))
            make[index] = _serialized(value)
        writer = FileSystemWriter(self.folder)
        plan = writer.prepare_global_plan([SavePlan([])] * number + [SavePlan(items)])[number]
        return [_as_json(result) for result in writer.write_data(plan, _GroupSavePlanner(make)).wait()]

    def finish(self, results: Iterable[Mapping[str, Any]]) -> None:
        """Write the metadata, last of all: without it there is no checkpoint.

        results: what `write` returned, for all groups together.
        """
        writer = FileSystemWriter(self.folder)
        writer.set_up_storage_writer(is_coordinator=True)
        stored = [_from_json(result) for result in results]
        writer.finish(Metadata({**self._tensors, **self._objects}), [stored])
        save_config(CheckpointingConfig("torch_dist", 1), str(self.folder))


@contextmanager
def without_checksums() -> Iterator[None]:
    """torch.save inside does not compute the CRC-32 of each record: most of its time, for a number nobody reads.

    torch.load does not check it. For all threads of the process.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _shaped(make: Callable[[], Tensor], place: Place) -> Callable[[], Tensor]:
    return lambda: make().reshape(place.size).contiguous()


def _serialized(value: Any) -> Callable[[], io.BytesIO]:
    def make() -> io.BytesIO:
        """As Megatron stores objects: a list of one."""
        buffer = io.BytesIO()
        torch.save([value], buffer)
        return buffer

    return make


def _as_json(result: WriteResult) -> dict[str, Any]:
    index, where = result.index, result.storage_data
    offset = None if index.offset is None else list(index.offset)
    return {"key": index.fqn, "offset": offset, "bytes": result.size_in_bytes, "where": asdict(where)}


def _from_json(stored: Mapping[str, Any]) -> WriteResult:
    offset = None if stored["offset"] is None else torch.Size(stored["offset"])
    where = _StorageInfo(**stored["where"])
    return WriteResult(MetadataIndex(stored["key"], offset), stored["bytes"], where)


class _ChunkLoadPlanner(LoadPlanner):
    """Puts what is read into the tensors given, by key and offset."""

    def __init__(self, targets: Mapping[MetadataIndex, Tensor]) -> None:
        self.targets = targets

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        target = self.targets[read_item.dest_index]
        for dimension, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            target = target.narrow(dimension, start, length)
        return target

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up: the plan is ready made."""

    create_local_plan = create_global_plan = finish_plan = set_up_planner  # type: ignore[assignment]
    load_bytes = commit_tensor = set_up_planner  # type: ignore[assignment]


class TorchDistReader:
    """Reads parts of the tensors of a torch_dist checkpoint, whatever layout of ranks it was saved in."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            ValueError: path and reason.
        """
        self.folder = folder
        self._reader = FileSystemReader(folder)
        try:
            self._metadata = self._reader.read_metadata()
        except Exception as error:  # a damaged pickle may raise anything
            raise ValueError(f"{folder}: not a readable torch_dist checkpoint ({error})") from error
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        known = self._metadata.state_dict_metadata.items()
        self.tensors = {key: stored for key, stored in known if isinstance(stored, TensorStorageMetadata)}

    def read(self, places: Sequence[Place]) -> list[Tensor]:
        """The chunks at these places, in the type they are stored in, shaped as `place.size`.

        Raises:
            ValueError: a chunk that is not there whole, or a file that is missing or damaged.
        """
        by_key: dict[str, list[Place]] = {}
        for place in places:
            by_key.setdefault(place.key, []).append(place)
        items: list[ReadItem] = []
        targets: dict[MetadataIndex, Tensor] = {}
        for key, wanted in by_key.items():
            items += self._plan(key, wanted, targets)
        try:
            self._reader.read_data(LoadPlan(items), _ChunkLoadPlanner(targets)).wait()
        except Exception as error:  # torch raises its own for each kind of damage
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ValueError(f"{self.folder}: not readable ({reason})") from error
        return [targets[_index(place)] for place in places]

    def _plan(self, key: str, places: Sequence[Place], targets: dict[MetadataIndex, Tensor]) -> list[ReadItem]:
        """What to read for these chunks of one tensor; makes their targets."""
        stored = self._stored(places[0])
        for place in places:
            self._check_bounds(place, stored)
        wanted = [ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.size)) for place in places]
        # Other layers of a stacked tensor are left out: finding overlaps among all their chunks would take longest.
        first, last = min(c.offsets[0] for c in wanted), max(c.offsets[0] + c.sizes[0] for c in wanted)
        near = [c for c in stored.chunks if c.offsets[0] < last and c.offsets[0] + c.sizes[0] > first]
        items = create_read_items_for_chunk_list(key, replace(stored, chunks=near), wanted)
        found: Counter[MetadataIndex] = Counter()
        for item in items:
            found[item.dest_index] += torch.Size(item.lengths).numel()
        lengths = [chunk.sizes.numel() for chunk in wanted]
        # One allocation for all: it is given back whole, where many of a few MB each would stay with the allocator.
        memory = torch.empty(sum(lengths), dtype=stored.properties.dtype).split(lengths)
        for place, length, part in zip(places, lengths, memory, strict=True):
            targets[_index(place)] = part.view(place.size)
            if found[_index(place)] != length:
                raise ValueError(f"{self.folder}: {key} is not stored whole")
        return items

    def _stored(self, place: Place) -> TensorStorageMetadata:
        if place.key not in self.tensors:
            raise ValueError(f"{self.folder}: {place.key} is missing")
        return self.tensors[place.key]

    def _check_bounds(self, place: Place, stored: TensorStorageMetadata) -> None:
        """The stored tensor holds the chunk. It may have more rows: a vocabulary is padded."""
        ends = [start + length for start, length in zip(place.offset, place.size, strict=True)]
        fits = len(stored.size) == len(ends) and all(end <= size for end, size in zip(ends, stored.size, strict=True))
        if not fits:
            raise ValueError(f"{self.folder}: {place.key} has shape {list(stored.size)}, expected {list(place.shape)}")


def _index(place: Place) -> MetadataIndex:
    return MetadataIndex(place.key, torch.Size(place.offset))
