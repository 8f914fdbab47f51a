"""Hugging Face weights: safetensors files, sharded or not. Headers are checked before any tensor is read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_emoe.hf.fused_experts import parts
from megatron_emoe.hf.pieces import Shape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor on disk. at: index of the part that is meant, where the file holds several experts in one tensor."""

    file: Path
    name: str
    shape: Shape
    dtype: torch.dtype
    at: tuple[int | slice, ...] = ()

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class SafetensorsFolder:
    """The tensors of a Hugging Face folder by their per-expert names, read one by one."""

    def __init__(self, folder: Path) -> None:
        """Read and check all headers.

        Raises:
            ValueError: no weights, a missing or damaged file, an index that disagrees with the files, a type that is
                not a float of 16, 32 or 64 bits.
        """
        self.folder = folder
        self.files = _files(folder)
        self.tensors: dict[str, StoredTensor] = {}
        for file in sorted(set(self.files.values())):
            for stored in header(file):
                self._add(stored)
        _check_index(folder, self.files, self.tensors)
        for stored in [*self.tensors.values()]:
            self._split_fused(stored)

    def _add(self, stored: StoredTensor) -> None:
        twin = self.tensors.get(stored.name)
        if twin is not None:
            raise ValueError(f"{stored.file}: holds {stored.name}, which {twin.file.name} holds too")
        self.tensors[stored.name] = stored

    def _split_fused(self, stored: StoredTensor) -> None:
        """Name each expert's part of a tensor that holds all of a layer as in the per-expert format."""
        places = parts(stored.name, stored.shape)
        if places:
            del self.tensors[stored.name]
        for name, (expert, rows) in places.items():
            shape = (rows.stop - rows.start, stored.shape[2])
            self.tensors[name] = StoredTensor(stored.file, stored.name, shape, stored.dtype, (expert, rows))

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors of these names, on the CPU, in the type they are stored in.

        Raises:
            ValueError: a file that has changed since its header was read.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self.tensors[name].file, []).append(name)
        tensors = {}
        for file, wanted in by_file.items():
            try:
                with safe_open(file, framework="pt") as opened:
                    for name in wanted:
                        stored = self.tensors[name]
                        part = opened.get_slice(stored.name)[stored.at] if stored.at else opened.get_tensor(stored.name)
                        tensors[name] = part
            except (SafetensorError, OSError, RuntimeError) as error:  # the last: too large to be mapped into memory
                raise ValueError(f"{file}: not readable ({error})") from error
        return tensors

    def check_shapes(self, expected: Mapping[str, Shape], config_path: Path) -> None:
        """Compare with the shapes that the configuration leads to.

        Raises:
            ValueError: the first tensor that is missing or has another shape.
        """
        for name, shape in expected.items():
            stored = self.tensors.get(name)
            if stored is None:
                raise ValueError(f"{self.folder}: {name} is missing, which {config_path} asks for")
            if stored.shape != shape:
                raise ValueError(
                    f"{stored.file}: {name} has shape {list(stored.shape)}, {config_path} leads to {list(shape)}"
                )


def _files(folder: Path) -> dict[str, Path]:
    """File of each tensor that the index names; a folder without an index has one file, under the name ""."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            files = {name: folder / file for name, file in weight_map.items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
            raise ValueError(f"{index}: not a safetensors index ({error!r})") from error
        for name, file in files.items():
            if file.parent != folder or not os.path.isfile(file):
                raise ValueError(f"{index}: names {file.name} for {name}, and there is no such file in {folder}")
        return files
    if single.is_file():
        return {"": single}
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    hint = f"; {pickled[0]} is pickled and not read: save the model with safe_serialization=True" if pickled else ""
    raise ValueError(f"{folder}: no weights ({SINGLE} or {INDEX}){hint}")


def header(file: Path) -> list[StoredTensor]:
    """All tensors of one file (ValueError: not readable, or of a type that is not supported)."""
    try:
        with safe_open(file, framework="pt") as opened:
            entries = []
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                entries.append((name, tuple(part.get_shape()), part.get_dtype()))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error
    for name, _, dtype in entries:
        if dtype not in _DTYPES:
            raise ValueError(f"{file}: {name} is of type {dtype}; supported: {', '.join(_DTYPES)}")
    return [StoredTensor(file, name, shape, _DTYPES[dtype]) for name, shape, dtype in entries]


def _check_index(folder: Path, files: Mapping[str, Path], tensors: Mapping[str, StoredTensor]) -> None:
    if "" in files:
        return
    for name, file in files.items():
        if name not in tensors or tensors[name].file != file:
            raise ValueError(f"{folder / INDEX}: names {name} in {file.name}, which does not hold it")
    for name, stored in tensors.items():
        if name not in files:
            raise ValueError(f"{stored.file}: holds {name}, which {INDEX} does not name")


def write_shard(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write one safetensors file and bring it to the disk (OSError)."""
    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # of a disk that is full, say
        raise OSError(f"{path}: {error}") from error
    with path.open("rb+") as written:
        os.fsync(written.fileno())


def write_index(shards: Mapping[str, Mapping[str, int]], folder: Path) -> None:
    """Write the index. shards: file name -> tensor name -> bytes."""
    weight_map = {name: file for file, names in shards.items() for name in names}
    total = sum(size for names in shards.values() for size in names.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
