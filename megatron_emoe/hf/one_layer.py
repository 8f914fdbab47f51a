"""A model one layer at a time: transformers' own, and ours out of a checkpoint. Both in fp32, in evaluation mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from megatron_emoe.hf.one_process import completed, model_arguments, quiet, silent_transformers
from megatron_emoe.hf.pieces import Place
from megatron_emoe.hf.registry import architectures, read_config
from megatron_emoe.hf.safetensors_files import SafetensorsFolder
from megatron_emoe.hf.torch_dist import TorchDistReader
from megatron_emoe.model.checkpoint import stored_args
from megatron_emoe.model.layer_spec import ElasticGPTModelBuilder, elastic_model_config
from megatron_emoe.training.evaluation import current_device


class HFLayers:
    """A Hugging Face model on the disk, of which transformers loads one layer at a time.

    Which layer is dense is read off the names of its tensors; how a name becomes a parameter is transformers' business.
    """

    def __init__(self, folder: Path) -> None:
        """ValueError, by path, for what is no complete model of a supported architecture."""
        self.config = read_config(folder)
        self._files = SafetensorsFolder(folder)

    def is_moe(self, layer: int) -> bool:
        """Whether a layer (0-based) has experts."""
        prefix = f"model.layers.{layer}."
        return any(name.startswith(prefix) and ".experts." in name for name in self._files.tensors)

    def layer(self, layer: int) -> PreTrainedModel:
        """A model with this layer as its only one, and a vocabulary of one token."""
        prefix = f"model.layers.{layer}."
        names = [name for name in self._files.tensors if name.startswith(prefix)]
        tensors = {name.replace(prefix, "model.layers.0."): t for name, t in self._files.read(names).items()}
        tensors = architectures()[self.config.model_type].on_disk(tensors)
        made = _one_layer(self.config, self.is_moe(layer))
        made.vocab_size, made.pad_token_id = 1, None
        return self._load(made, tensors, f"layer {layer}", needed="model.layers.")

    def ends(self) -> PreTrainedModel:
        """A model without layers: embedding, final norm and head."""
        names = [name for name in self._files.tensors if not name.startswith(("model.layers.", "model.mtp_"))]
        made = copy.deepcopy(self.config)
        made.num_hidden_layers = 0
        return self._load(made, self._files.read(names), "embedding and head", needed="")

    def _load(self, made: PreTrainedConfig, tensors: Mapping[str, Tensor], part: str, needed: str) -> PreTrainedModel:
        made._attn_implementation = made._experts_implementation = "eager"
        try:
            with silent_transformers():
                model, loading = _class_of(made).from_pretrained(
                    None, config=made, state_dict=dict(tensors), dtype=torch.float32, output_loading_info=True
                )
        except (TypeError, ValueError, AttributeError, KeyError, ZeroDivisionError, OverflowError) as error:
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            rule = f"transformers cannot build the {part} that config.json describes ({why})"
            raise ValueError(f"{self._files.folder}: {rule}") from error
        lost = [name for name in loading["missing_keys"] if name.startswith(needed)]
        problems = [*lost, *loading["unexpected_keys"], *loading["mismatched_keys"]]
        if problems:
            raise ValueError(f"{self._files.folder}: {part}: transformers cannot place {', '.join(map(str, problems))}")
        return model.to(current_device()).eval()


def _class_of(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return AutoModelForCausalLM._model_mapping[type(config)]


def _one_layer(config: PreTrainedConfig, moe: bool) -> PreTrainedConfig:
    """The configuration of a model with one layer of this kind."""
    first_moe = 0 if moe else 1
    kinds: dict[str, dict[str, Any]] = {
        "olmoe": {},
        "llama": {},
        "mixtral": {},
        "granitemoe": {"embedding_multiplier": 1.0},
        "qwen3_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [0] * first_moe},
        "deepseek_v3": {"first_k_dense_replace": first_moe},
        "qwen2_moe": {"decoder_sparse_step": 1, "mlp_only_layers": [0] * first_moe},
        "deepseek_v2": {"first_k_dense_replace": first_moe},
        "ernie4_5_moe": {"moe_layer_start_index": first_moe, "moe_layer_end_index": 0, "moe_layer_interval": 1},
    }
    made = copy.deepcopy(config)
    made.num_hidden_layers = 1
    for name, value in kinds[config.model_type].items():
        setattr(made, name, value)
    return made


class MegatronLayers:
    """A Megatron checkpoint, of which our one-layer model reads one layer at a time.

    The model's own sharded state dict names what to read: the layer is told its number in the whole model, and keys and
    offsets follow, whether the checkpoint stacks its layers or not.
    """

    def __init__(self, checkpoint: Path, length: int, flags: Sequence[str] = ()) -> None:
        """checkpoint: the folder release or iter_... length: of a sequence. ValueError: not readable."""
        self.checkpoint = checkpoint
        self.stored = stored_args(checkpoint, "checkpoint")
        self._arguments = model_arguments(checkpoint, length=length, flags=flags)
        self._reader = TorchDistReader(checkpoint)
        self._built: dict[str, nn.Module] = {}

    @property
    def num_layers(self) -> int:
        return self.stored.num_layers

    def layer(self, layer: int, moe: bool) -> nn.Module:
        """A GPTModel of this layer alone: hidden states in, hidden states out. The last one of its kind is reused."""
        model = self._model("MoE" if moe else "dense", moe, ends=False)
        model.decoder.layers[0].layer_number = layer + 1
        self._load(model, f"layer {layer}", lambda name: True)
        return model

    def ends(self) -> nn.Module:
        """A GPTModel with embedding, final norm and head, and a layer that must not be used."""
        model = self._model("ends", True, ends=True)
        self._load(model, "embedding and head", lambda name: not name.startswith("decoder.layers."))
        return model

    def _model(self, kind: str, moe: bool, ends: bool) -> nn.Module:
        if kind not in self._built:
            self._built.clear()  # one at a time: an embedding may be larger than a layer
            self._built[kind] = self._build(moe, ends)
        return self._built[kind]

    def _build(self, moe: bool, ends: bool) -> nn.Module:
        frequency = 1 if self.stored.moe_layer_freq == 1 else [int(moe)]
        args = completed(self._arguments, num_layers=1, moe_layer_freq=frequency, perform_initialization=False)
        args.padded_vocab_size = self.stored.padded_vocab_size
        with quiet():
            builder = ElasticGPTModelBuilder(elastic_model_config(args))
            groups = ProcessGroupCollection.use_mpu_process_groups()
            model = builder.build_model(groups, pre_process=ends, post_process=ends)
        model.decoder.config = copy.copy(model.decoder.config)
        model.decoder.config.num_layers = self.num_layers  # of the checkpoint's stacked tensors
        return model.to(current_device()).eval()

    def _load(self, model: nn.Module, part: str, wanted: Callable[[str], bool]) -> None:
        """Fill the model's parameters, one after the other. The core's own loader cannot take one layer of a stacked
        tensor in one process."""
        metadata = dist_checkpointing.load_content_metadata(str(self.checkpoint)) or {}
        metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
        described = {name: t for name, t in model.sharded_state_dict(metadata=metadata).items() if wanted(name)}
        number = model.decoder.layers[0].layer_number - 1
        targets = {name: t for name, t in model.state_dict().items() if wanted(name) and isinstance(t, Tensor)}
        for name, description in described.items():
            here = name.replace(f"decoder.layers.{number}.", "decoder.layers.0.")
            if here in targets:  # the others are extra states: objects
                targets.pop(here).copy_(self._read(description, part))
        assert not targets, f"{part}: not loaded: {list(targets)}"

    def _read(self, description: Any, part: str) -> Tensor:
        """The tensor that the core describes: one chunk, or several that it merges."""
        sharded, _, factories = load_preprocess({"tensor": description})
        chunks = [chunk for chunk in nested_values(sharded) if isinstance(chunk, ShardedTensor)]
        try:
            tensors = self._reader.read([_place(chunk) for chunk in chunks])
        except ValueError as error:
            raise ValueError(f"{part}: {error}") from error
        found = {id(chunk): t.view(chunk.local_shape) for chunk, t in zip(chunks, tensors, strict=True)}
        loaded = dict_list_map_outplace(lambda chunk: found[id(chunk)], sharded)
        return apply_factory_merges(loaded, factories)["tensor"]


def _place(chunk: ShardedTensor) -> Place:
    """Where the core would read a part of the model."""
    size = (1,) * chunk.prepend_axis_num + tuple(chunk.local_shape)
    return Place(chunk.key, tuple(chunk.global_shape), tuple(chunk.global_offset), size)
