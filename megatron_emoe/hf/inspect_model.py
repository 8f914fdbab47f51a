"""What a checkpoint is, on either side, from headers and metadata alone: no tensor is read.

Each side imports its own libraries: a Hugging Face folder needs no Megatron, and what Megatron saved no transformers
unless hf/ lies beside it.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_emoe.settings.elastic_config import MODEL_FEATURES, ElasticConfig, flag
from megatron_emoe.settings.hf_folder import read_config_json

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

_EXPERTS = (".experts.", ".mlp.lora.")
_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
_MODEL_KEYS = ("embedding", "decoder", "output_layer", "mtp")  # the rest is the optimizer's
_LAYOUT = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "expert": "expert_model_parallel_size",
    "context": "context_parallel_size",
    "data": "data_parallel_size",
}


@dataclass(frozen=True)
class Tensors:
    """Sizes of a model's tensors. parameters, routed: numbers, the routed experts' among the parameters. beside: what
    is stored and no parameter of the model, by kind. dtypes: parameters by type. bytes: of all these tensors."""

    parameters: int
    routed: int
    beside: dict[str, int]
    dtypes: dict[str, int]
    bytes: int

    def active(self, k: int, experts: int) -> int:
        """Parameters that a token meets with k active experts; both embedding tables count."""
        return self.parameters - self.routed + self.routed // experts * min(k, experts)


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is. active: parameters by number of active experts, at k, 2k and 3k (at most all experts).

    experts, k: of training; 0 and None in a dense model. emoe: a Hugging Face folder's "emoe" block; k_served: the k in
    its config.json. The fields after them are a Megatron folder's: iteration ("release" after an import), elastic
    settings and model features that differ from the defaults, ranks by kind of parallelism, bytes of optimizer state,
    and whether hf/ is there, which an export needs.
    """

    folder: str
    kind: str
    architecture: str | None
    layers: int
    hidden_size: int
    experts: int
    k: int | None
    parameters: int
    active: dict[int, int]
    beside: dict[str, int]
    dtypes: dict[str, int]
    bytes: int
    emoe: dict[str, Any] | None = None
    k_served: int | None = None
    iteration: int | str | None = None
    elastic: dict[str, Any] = field(default_factory=dict)
    features: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, int] | None = None
    optimizer_bytes: int | None = None
    has_hf: bool | None = None

    def as_json(self) -> str:
        """All fields as JSON."""
        return json.dumps(asdict(self), indent=2)

    def as_text(self) -> str:
        """For people, a line for each fact."""
        facts = self._model_facts() + (self._megatron_facts() if self.iteration is not None else [])
        width = max(len(name) for name, _ in facts)
        return "\n".join([f"{self.folder}: {self.kind}", *(f"  {name:{width}}  {value}" for name, value in facts)])

    def _model_facts(self) -> list[tuple[str, str]]:
        served = f" ({self.k_served} in config.json)" if self.k_served not in (None, self.k) else ""
        experts = f"{self.experts} experts, k = {self.k}{served}" if self.experts else "dense: no experts"
        shape = f"{self.layers} layers, hidden size {self.hidden_size}, {experts}"
        facts = [
            ("architecture", self.architecture or "not recorded (no hf/ folder)"),
            ("shape", shape),
            ("parameters", f"{self.parameters:,}"),
        ]
        facts += [(f"active at {k}", f"{number:,}") for k, number in self.active.items()]
        facts += [(name, f"{number:,} values, not counted above") for name, number in self.beside.items()]
        types = ", ".join(f"{name} {number / self.parameters:.2%}" for name, number in self.dtypes.items())
        facts.append(("stored as", f"{types}; {_size(self.bytes)}"))
        return facts + ([("emoe", _settings(self.emoe))] if self.emoe else [])

    def _megatron_facts(self) -> list[tuple[str, str]]:
        layout = ", ".join(f"{kind} {ranks}" for kind, ranks in (self.layout or {}).items())
        return [
            ("iteration", str(self.iteration)),
            ("elastic settings", _settings(self.elastic) or "defaults: plain top-k"),
            *([("model features", _settings(self.features))] if self.features else []),
            ("saved by", f"ranks: {layout}" if layout else "an import"),
            ("optimizer state", _size(self.optimizer_bytes) if self.optimizer_bytes else "none"),
            ("hf/", "there" if self.has_hf else "missing: an export needs it"),
        ]


def inspect(folder: Path) -> Inspection:
    """Look at a Hugging Face folder, a Megatron folder, or one iteration in a Megatron folder.

    Raises:
        ValueError: it is none of these, or damaged: path and reason.
    """
    if (folder / "config.json").is_file():
        return _inspect_hf(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    if (folder / ".metadata").is_file():
        return _inspect_megatron(folder, folder.parent)
    from megatron.training.checkpointing import get_checkpoint_tracker_filename

    from megatron_emoe.model.checkpoint import locate

    if Path(get_checkpoint_tracker_filename(str(folder))).is_file():
        return _inspect_megatron(locate(str(folder), source="inspect"), folder)
    raise ValueError(f"{folder}: neither a Hugging Face model (config.json) nor a Megatron checkpoint")


def _inspect_hf(folder: Path) -> Inspection:
    from megatron_emoe.hf.architecture import experts_in, own_k
    from megatron_emoe.hf.registry import architecture_of, read_config
    from megatron_emoe.hf.safetensors_files import SafetensorsFolder

    config = read_config(folder)
    architecture = architecture_of(config)
    stored = SafetensorsFolder(folder).tensors
    unused = ("lm_head.weight",) if config.tie_word_embeddings else ()
    tensors = _count(
        (_kind_of_hf(name, architecture.carried), name, tensor.shape, tensor.dtype)
        for name, tensor in stored.items()
        if name not in unused and not name.endswith("rotary_emb.inv_freq")
    )
    k, experts = own_k(config), experts_in(config)
    model = (config.model_type, config.num_hidden_layers, config.hidden_size, experts, k)
    return Inspection(
        *(str(folder), "Hugging Face model (safetensors)", *model),
        **_sizes(tensors, k, experts),
        emoe=_emoe(config),
        k_served=read_config_json(folder).get(architecture.k_key, k) if experts else None,
    )


def _inspect_megatron(checkpoint: Path, folder: Path) -> Inspection:
    """checkpoint: the folder of one iteration; folder: what it lies in, with hf/ beside it."""
    from megatron_emoe.hf.torch_dist import TorchDistReader
    from megatron_emoe.model.checkpoint import iteration_of, stored_args

    args = stored_args(checkpoint, source="inspect")
    config = _companion(folder / "hf")
    vocabulary = config.vocab_size if config else args.vocab_size
    stored = TorchDistReader(checkpoint).tensors
    model, optimizer = {}, 0
    for key, tensor in stored.items():
        if key.partition(".")[0] in _MODEL_KEYS:
            model[key] = tensor
        else:
            optimizer += prod(tensor.size) * tensor.properties.dtype.itemsize
    tensors = _count(
        (_kind_of_megatron(key), key, _unpadded(key, tensor.size, vocabulary), tensor.properties.dtype)
        for key, tensor in model.items()
    )
    experts, name = args.num_experts or 0, config and config.model_type
    k = args.moe_router_topk if experts else None
    imported = checkpoint.name == "release"
    return Inspection(
        str(folder),
        "Megatron checkpoint (torch_dist)",
        *(name, args.num_layers, args.hidden_size, experts, k),
        **_sizes(tensors, k, experts),
        iteration="release" if imported else iteration_of(checkpoint),
        elastic=_changed(args, {f.name for f in fields(ElasticConfig)} - set(MODEL_FEATURES)),
        features=_changed(args, set(MODEL_FEATURES)),
        layout=None if imported else {kind: getattr(args, name) for kind, name in _LAYOUT.items()},
        optimizer_bytes=optimizer,
        has_hf=config is not None,
    )


def _companion(folder: Path) -> PretrainedConfig | None:
    """The configuration of the Hugging Face model that was imported, where it was kept."""
    if not folder.is_dir():
        return None
    from megatron_emoe.hf.registry import read_config

    return read_config(folder)


def _count(tensors: Iterable[tuple[str | None, str, Iterable[int], torch.dtype]]) -> Tensors:
    """Add up (kind beside the parameters or None, name, shape, type)."""
    parameters = routed = size = 0
    beside: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for kind, name, shape, dtype in tensors:
        number = prod(shape)
        size += number * dtype.itemsize
        if kind is not None:
            beside[kind] += number
            continue
        parameters += number
        dtypes[str(dtype).removeprefix("torch.")] += number
        routed += number if any(part in name for part in _EXPERTS) else 0
    return Tensors(parameters, routed, dict(beside), dict(dtypes.most_common()), size)


def _sizes(tensors: Tensors, k: int | None, experts: int) -> dict[str, Any]:
    at = sorted({min(times * k, experts) for times in (1, 2, 3)}) if k else []
    return {
        "parameters": tensors.parameters,
        "active": {number: tensors.active(number, experts) for number in at},
        "beside": tensors.beside,
        "dtypes": tensors.dtypes,
        "bytes": tensors.bytes,
    }


def _kind_of_hf(name: str, carried: tuple[str, ...]) -> str | None:
    if carried and name.startswith(carried):
        return "carried along"
    return "selection bias" if name.endswith("e_score_correction_bias") else None


def _kind_of_megatron(key: str) -> str | None:
    if key.startswith("mtp."):
        return "multi-token prediction"
    return "selection bias" if key.endswith("router.expert_bias") else None


def _unpadded(key: str, size: Iterable[int], vocabulary: int | None) -> tuple[int, ...]:
    """Rows beyond the vocabulary are padding for tensor parallelism, and no parameters of the model."""
    rows, *columns = size
    return (min(rows, vocabulary or rows) if key in _VOCABULARY else rows, *columns)


def _changed(args: Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Settings that differ from their defaults, by flag."""
    defaults = {f.name: f.default for f in fields(ElasticConfig) if f.name in names}
    stored = {name: getattr(args, name, default) for name, default in defaults.items()}
    return {flag(name): value for name, value in stored.items() if value != defaults[name]}


def _emoe(config: PretrainedConfig) -> dict[str, Any] | None:
    return getattr(config, "emoe", None)


def _settings(settings: Mapping[str, Any] | None) -> str:
    """As on a command line."""
    return ", ".join(f"{name} {_word(value)}" for name, value in (settings or {}).items())


def _word(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _size(number: int | None) -> str:
    return f"{(number or 0) / 1e9:.2f} GB" if (number or 0) >= 1e8 else f"{(number or 0) / 1e6:.2f} MB"
