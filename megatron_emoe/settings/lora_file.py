"""What an export of low-rank experts says beside their tensors: lora_moe.json. No tensors here.

The experts of a token depend on the token, so nothing of this can be merged into the weights of the base.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from megatron_emoe.settings.result_file import STRICT, Count, Positive, read_checked

TENSORS, DESCRIPTION = "lora_moe.safetensors", "lora_moe.json"
FINGERPRINT = "base.fingerprint"
"""Tensor: the first numbers of every layer's second MLP matrix in the base, fp32 [layers, FIRST]."""
FIRST = 8


def _check_scale(scale: float | None) -> float | None:
    if scale is not None and not 0 < scale <= 1e6:
        raise ValueError("must be above 0, and at most 1e6")
    return scale


@dataclass(config=STRICT)
class RouterRule:
    """How a router's logits become weights, in Megatron's words."""

    score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"]
    pre_softmax: bool
    scaling_factor: Annotated[float | None, AfterValidator(_check_scale)]
    combine: Literal["model", "renormalize", "raw"]
    dtype: Literal["fp32", "fp64"] | None


@dataclass(config=STRICT)
class Base:
    """The dense model that the experts belong to. checkpoint: where training took it from, if it is known."""

    model_type: str
    layers: Count
    hidden_size: Count
    intermediate_size: Count
    checkpoint: str | None


@dataclass(config=STRICT)
class LoraDescription:
    """experts, rank: of every layer. alpha: an expert's output is multiplied by alpha / rank. k: of training. emoe: how
    the experts were trained, as the block "emoe" of other exports, with the tail scale and learned scales."""

    schema_version: Literal[1]
    experts: Annotated[int, Field(ge=2, le=2**20)]
    rank: Annotated[int, Field(ge=1, le=2**20)]
    alpha: Positive
    k: Count
    router: RouterRule
    base: Base
    emoe: dict[str, Any]

    def check(self) -> None:
        """ValueError where k is no number of these experts."""
        if self.k > self.experts:
            raise ValueError(f"k: {self.k}; must be at most experts ({self.experts})")


ADAPTER = TypeAdapter(LoraDescription)


def read_description(folder: Path) -> LoraDescription:
    """lora_moe.json in `folder` (ValueError with path, key, value and rule where it is none)."""
    path = folder / DESCRIPTION
    if not path.is_file():
        raise ValueError(f"{path}: no such file; {folder} has no low-rank experts")
    found = read_checked(ADAPTER, path)
    try:
        found.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return found
