"""What checkpoints hold beside weights: for every linear layer and most others an object called _extra_state.

Under FP8 it is a layer's scales, else it is empty. Which layers have one differs between the local layers, Transformer
Engine's, and versions of it, and the core stops on the first that a checkpoint lacks. Here a model takes what is there,
and one that computes in bf16 or fp32 leaves the scales of another precision where they are: they are of no use to it,
and Transformer Engine would not load some of them. The same for weights that a new selection adds to the routers, when
a run starts from a checkpoint of another one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from torch import nn

from megatron_emoe.model.stored_files import contents


def take_what_is_there(model: nn.Module, checkpoint: Path, new_weights: tuple[str, ...] = ()) -> None:
    """Let `model`, once, load the torch_dist `checkpoint` without the state that it lacks: that stays as it is built.

    What is there is loaded, so a continued FP8 run keeps its scales; weights are as required as ever, but those whose
    names end in one of `new_weights`. After the model is loaded it saves all its state as the core does.
    """
    stored = contents(checkpoint).keys
    whole = model.sharded_state_dict

    def asked_for(*args: Any, **kwargs: Any) -> dict[str, Any]:
        quantized = model.config.fp8 or model.config.fp4
        held = {key for key in stored if quantized or "_extra_state" not in key}
        return {name: _or_its_own(entry, held, new_weights) for name, entry in whole(*args, **kwargs).items()}

    def as_before(module: nn.Module, incompatible_keys: Any) -> None:
        vars(model).pop("sharded_state_dict", None)

    model.sharded_state_dict = asked_for
    model.register_load_state_dict_post_hook(as_before)


def _or_its_own(entry: Any, held: Any, new_weights: tuple[str, ...]) -> Any:
    """`entry` where the checkpoint holds it or must hold it, else what the model has now."""
    lacks_state = isinstance(entry, ShardedObject) and "_extra_state" in entry.key and entry.unique_key not in held
    weight = isinstance(entry, ShardedTensor | ShardedTensorFactory)
    lacks_weight = weight and entry.key.endswith(new_weights) and entry.key not in held
    return LocalNonpersistentObject(entry.data) if lacks_state or lacks_weight else entry
