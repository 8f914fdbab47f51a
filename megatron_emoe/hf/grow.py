"""A Hugging Face model with every expert several times over: a start for more experts, or for finer budgets.

With n copies of each expert and n times the active experts the model computes what it did. A softmax over all experts
gives each copy 1 / n of the original's score, and all n are chosen where the original was; weights that are divided by
their sum, and sigmoids, come to the same. A selection bias beside softmax scores is divided by n with them. The copies
then differ by noise alone, until training parts them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from megatron_emoe.hf.architecture import Architecture, experts_in
from megatron_emoe.hf.companions import copy_companions
from megatron_emoe.hf.config_file import with_floats
from megatron_emoe.hf.import_model import check_tensors
from megatron_emoe.hf.output_folder import OutputFolder, in_parallel, state_of
from megatron_emoe.hf.pieces import Group, Piece
from megatron_emoe.hf.registry import architecture_of, read_moe_config
from megatron_emoe.hf.safetensors_files import SafetensorsFolder, write_index, write_shard
from megatron_emoe.settings.hf_folder import CONFIG, read_config_json

_EXPERT = re.compile(r"(?P<before>.*\.experts\.)(?P<expert>\d+)(?P<after>\..*)")
_NUMBER_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""What a config.json calls the number of experts."""


def grow_model(
    hf: Path,
    out: Path,
    *,
    times: int,
    k: int | None = None,
    noise: float = 0.0,
    seed: int = 1234,
    workers: int = 2,
    report: Callable[[str], None] = print,
) -> None:
    """Write the model in `hf` with `times` copies of each expert and of its row of the router to the new folder `out`.

    k: active experts to write into config.json; None: times the model's, with which the function is unchanged. noise:
    standard deviation of Gaussian noise on every copy but the first, over the standard deviation of the matrix. seed:
    of that noise, which depends on it and the tensor's name alone. workers: threads; each holds one layer in memory.

    Raises:
        ValueError: as an import, for what is read; a k out of range; a model with scales by k' (their ranks would be
            others); an output that cannot be written. Nothing is left behind.
    """
    config = read_moe_config(hf)
    architecture, source = architecture_of(config), SafetensorsFolder(hf)
    groups = architecture.groups(config)
    carried = check_tensors(source, architecture, config, groups)
    k = _asked_k(config, times, k)
    _refuse_scales(config, hf)
    asked = {"times": times, "k": k, "noise": noise, "seed": seed}
    folder = OutputFolder(out)
    with folder.making({"files": state_of([hf / CONFIG, *source.files.values()]), "grow": asked}):
        folder.check_space(sum(stored.bytes for stored in source.tensors.values()) * times + (16 << 20))
        grow = _Growth(architecture, config, times, noise, seed)
        _write(folder, source, [*groups, *([_carried_group(carried)] if carried else [])], grow, workers)
        copy_companions(hf, folder.path)
        _write_config(folder.path, architecture, experts_in(config) * times, k)
    unchanged = k == times * config.num_experts_per_tok and not noise
    report(f"{out}: {config.model_type}, {experts_in(config) * times} experts, {architecture.k_key} {k}")
    report("it computes what the model did" if unchanged else _change(config, times, k, noise))


class _Growth:
    """What becomes of the tensors of a layer."""

    def __init__(
        self, architecture: Architecture, config: PretrainedConfig, times: int, noise: float, seed: int
    ) -> None:
        self.architecture, self.times, self.noise, self.seed = architecture, times, noise, seed
        self.experts = experts_in(config)
        self.softmax = architecture.flags(config).get("moe_router_score_function", "softmax") == "softmax"
        self.routers: set[str] = set()
        self.biases: set[str] = set()
        for layer in range(config.num_hidden_layers):
            for piece in architecture.router(config, layer) if architecture.is_moe(config, layer) else []:
                names = {name for name, _ in piece.hf}
                (self.biases if piece.name.endswith("expert_bias") else self.routers).update(names)

    def __call__(self, name: str, tensor: Tensor) -> dict[str, Tensor]:
        """The tensor `name`, or what takes its place."""
        if name in self.routers:
            return {name: torch.cat([self._copy(name, tensor, copy) for copy in range(self.times)])}
        if name in self.biases:
            repeated = torch.cat([tensor] * self.times, dim=-1)
            return {name: repeated / self.times if self.softmax else repeated}
        match = _EXPERT.fullmatch(name)
        if match is None:
            return {name: tensor}
        numbers = [int(match["expert"]) + copy * self.experts for copy in range(self.times)]
        names = [f"{match['before']}{number}{match['after']}" for number in numbers]
        return {new: self._copy(name, tensor, copy) for copy, new in enumerate(names)}

    def _copy(self, name: str, tensor: Tensor, copy: int) -> Tensor:
        if copy == 0 or not self.noise:
            return tensor.clone()
        generator = torch.Generator().manual_seed(_number(f"{self.seed} {name} {copy}"))
        values = tensor.float()
        drawn = torch.randn(values.shape, generator=generator)
        return (values + self.noise * values.std() * drawn).to(tensor.dtype)


def _number(text: str) -> int:
    """63 bits of a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def _asked_k(config: PretrainedConfig, times: int, k: int | None) -> int:
    experts = experts_in(config) * times
    if k is None:
        return config.num_experts_per_tok * times
    if not 1 <= k <= experts:
        raise ValueError(f"--k {k}: must lie in [1, {experts}], the number of experts")
    return k


def _refuse_scales(config: PretrainedConfig, hf: Path) -> None:
    block = getattr(config, "emoe", None) or {}
    for key in ("tail_scale", "budget_scales"):
        if block.get(key):
            raise ValueError(
                f"{hf / CONFIG}: emoe.{key}: scales of ranks, and a grown model has others; delete the key"
            )


def _carried_group(names: list[str]) -> Group:
    """Tensors that are only carried along, as a group of their own."""
    return Group("carried", tuple(Piece(name, (), ((name, ()),)) for name in names))


def _write(folder: OutputFolder, source: SafetensorsFolder, groups: list[Group], grow: _Growth, workers: int) -> None:
    """One file for each group."""
    files = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]

    def convert(file: str, group: Group) -> None:
        tensors: dict[str, Tensor] = {}
        for name, tensor in source.read(group.hf_tensors()).items():
            tensors |= grow(name, tensor)
        tensors = grow.architecture.on_disk(tensors)
        write_shard(tensors, folder.path / file)
        folder.finished(group.name, {name: tensor.nbytes for name, tensor in tensors.items()})

    calls = [(file, group) for file, group in zip(files, groups, strict=True) if group.name not in folder.done]
    in_parallel(convert, calls, workers)
    write_index({file: folder.done[group.name] for file, group in zip(files, groups, strict=True)}, folder.path)


def _write_config(folder: Path, architecture: Architecture, experts: int, k: int) -> None:
    raw: dict[str, Any] = with_floats(read_config_json(folder))
    key = next(key for key in _NUMBER_KEYS if key in raw)
    changes: dict[str, Any] = {key: experts, architecture.k_key: k}
    kept = {name: value for name, value in raw.items() if name != "emoe"}
    (folder / CONFIG).write_text(json.dumps(kept | changes, indent=2) + "\n")


def _change(config: PretrainedConfig, times: int, k: int, noise: float) -> str:
    """What makes the grown model another one."""
    own = times * config.num_experts_per_tok
    parts = [f"noise of {noise:g} on the copies"] if noise else []
    if k != own:
        parts.append(f"{k} active experts, where {own} would be as many as before")
    return f"another model than before: {'; '.join(parts)}"
