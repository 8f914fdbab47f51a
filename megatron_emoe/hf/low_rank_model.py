"""Low-rank experts on a dense transformers model that is already loaded, at any k'.

The model's own modules stay; hooks on the MLP of every layer and on its three matrices add what the experts give, by
the functions that training routes with. Shape suffixes: T tokens, E experts, K active experts, X = E R.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

from megatron_emoe.routing import selection
from megatron_emoe.routing.budget_scales import at_budget
from megatron_emoe.settings.budget_table import read_budget_table
from megatron_emoe.settings.lora_file import FINGERPRINT, FIRST, TENSORS, LoraDescription, read_description
from megatron_emoe.settings.tail_scale import TailScale, given_tail_scale, parse_tail_scale

ATTACHED = "low_rank_experts"
"""Name of the module in each MLP."""
_ROUTER_DTYPES = {"fp32": torch.float32, "fp64": torch.float64, None: None}


class LayerExperts(nn.Module):
    """Router and experts of one layer. `k`, `tail` and `log_scales` are those of the next forward pass.

    tensors: of an export, without the layer in their names.
    """

    def __init__(self, about: LoraDescription, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.about, self.k, self.tail = about, about.k, 1.0
        self.log_scales: Tensor | None = None
        self.scale = about.alpha / about.rank
        for name, tensor in tensors.items():
            if name.endswith(".a"):
                tensor = tensor.flatten(0, 1)
            elif name.endswith(".b"):
                tensor = tensor.movedim(0, 1).flatten(1)
            self.register_buffer(name.replace(".", "_"), tensor.contiguous(), persistent=False)
        self._weights_TE: Tensor | None = None
        self._middle: Tensor | None = None

    def route(self, hidden: Tensor) -> Tensor:
        """Weights of the experts, [T, E] in the router's type; 0 for those that a token does not use."""
        rule, k = self.about.router, self.k
        dtype = _ROUTER_DTYPES[rule.dtype] or hidden.dtype
        bias = getattr(self, "bias", None)
        logits_TE = linear(
            hidden.flatten(0, -2).to(dtype), self.router.to(dtype), None if bias is None else bias.to(dtype)
        )
        scores_TE = selection.expert_scores(logits_TE, rule.score_function)
        by_scores = rule.score_function != "softmax" or rule.pre_softmax
        indices_TK = selection.rank_experts(scores_TE if by_scores else logits_TE, k, k=k)
        weights_TK = selection.combine_weights(
            logits_TE,
            scores_TE,
            indices_TK,
            score_function=rule.score_function,
            normalize=selection.normalizes(rule.combine, rule.score_function, rule.pre_softmax, k),
            scale=rule.scaling_factor,
            tail=(self.about.k, self.tail) if k > self.about.k and self.tail != 1.0 else None,
            log_scales_K=None if self.log_scales is None else self.log_scales.to(logits_TE.device),
        )
        return selection.to_dense(weights_TK, indices_TK, logits_TE)[0]

    def weighted(self, middle: Tensor) -> Tensor:
        """[..., X] with every expert's part times its weight and the scale."""
        assert self._weights_TE is not None
        parts = middle.unflatten(-1, (self.about.experts, self.about.rank))
        weights = self._weights_TE.view(*middle.shape[:-1], self.about.experts, 1)
        return (parts * (weights * self.scale)).flatten(-2).type_as(middle)

    def attach(self, mlp: nn.Module) -> None:
        """Hook this into a gated MLP."""
        rows = mlp.gate_proj.weight.shape[0]  # type: ignore[union-attr]
        mlp.add_module(ATTACHED, self)
        mlp.register_forward_pre_hook(self._before)
        mlp.gate_proj.register_forward_hook(lambda _m, _i, out: out + linear(self._middle, self.gate_up_b[:rows]))
        mlp.up_proj.register_forward_hook(lambda _m, _i, out: out + linear(self._middle, self.gate_up_b[rows:]))
        mlp.down_proj.register_forward_hook(self._down)

    def _before(self, _mlp: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._weights_TE = self.route(inputs[0])
        self._middle = self.weighted(linear(inputs[0], self.gate_up_a))

    def _down(self, _matrix: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        output = output + linear(self.weighted(linear(inputs[0], self.down_a)), self.down_b)
        self._weights_TE = self._middle = None
        return output


def add_low_rank_experts(model: PreTrainedModel, folder: str | Path) -> None:
    """Let `model`, the dense base, compute with the low-rank experts in `folder`, at their k of training;
    `set_active_experts` changes k'.

    Raises:
        ValueError: the files are missing, damaged or of another model, or the model has such experts already.
    """
    folder = Path(folder)
    about = read_description(folder)
    tensors = _read(folder)
    layers = _mlps(model, about, folder)
    _check_base(layers, tensors, folder)
    device, dtype = layers[0].down_proj.weight.device, layers[0].down_proj.weight.dtype
    for number, mlp in enumerate(layers):
        prefix = f"layers.{number}."
        own = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
        LayerExperts(about, own).to(device=device, dtype=dtype).attach(mlp)
    set_low_rank_k(model, about.k)


def attached(model: PreTrainedModel) -> list[LayerExperts]:
    """The low-rank experts of each layer; none where none were added."""
    return [module for module in model.modules() if isinstance(module, LayerExperts)]


def set_low_rank_k(
    model: PreTrainedModel, k: int | Sequence[int], tail_scale: float | Mapping[int, float] | None = None
) -> None:
    """As `set_active_experts`, for a model with low-rank experts (ValueError as there)."""
    parts = attached(model)
    if not isinstance(k, int) and len(k) != len(parts):
        raise ValueError(f"k' {list(k)}: has {len(k)} entries; must have one for each of the {len(parts)} layers")
    about = parts[0].about
    budgets = read_budget_table(about.emoe, len(parts), about.experts)
    tail = _own_tail(about) if tail_scale is None else given_tail_scale(tail_scale)
    ks = [k] * len(parts) if isinstance(k, int) else list(k)
    for layer_k in ks:
        if not 1 <= layer_k <= about.experts:
            raise ValueError(f"k' {layer_k}: must lie in [1, {about.experts}], the number of experts")
    for layer, (part, layer_k) in enumerate(zip(parts, ks, strict=True)):
        part.k = layer_k
        part.tail = 1.0 if tail is None or layer_k <= about.k else tail.at(layer_k)
        part.log_scales = None
        if budgets is not None and layer_k != about.k:
            part.log_scales = at_budget(torch.tensor(budgets.padded(layer)), budgets.ks, layer_k)


def _own_tail(about: LoraDescription) -> TailScale | None:
    words = about.emoe.get("tail_scale")
    return parse_tail_scale(words) if words else None


def _read(folder: Path) -> dict[str, Tensor]:
    path = folder / TENSORS
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from error


def _mlps(model: PreTrainedModel, about: LoraDescription, folder: Path) -> list[Any]:
    """The MLP of every layer, after a look at kind and sizes."""
    config, base = model.config, about.base
    sizes = {"layers": "num_hidden_layers", "hidden_size": "hidden_size", "intermediate_size": "intermediate_size"}
    for name, key in {"model_type": "model_type", **sizes}.items():
        wanted, found = getattr(base, name), getattr(config, key)
        if wanted != found:
            raise ValueError(f"{folder}: its experts are for a model of {key} {wanted}, this one has {found}")
    if attached(model):
        raise ValueError(f"{folder}: the model has low-rank experts already; load it anew")
    return [layer.mlp for layer in model.model.layers]


def _check_base(mlps: Sequence[Any], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """ValueError where the weights are another model's. A type with fewer digits than the base's passes."""
    if FINGERPRINT not in tensors:
        raise ValueError(f"{folder / TENSORS}: {FINGERPRINT} is missing")
    found = torch.stack([mlp.down_proj.weight[0, :FIRST].detach().float().cpu() for mlp in mlps])
    if not torch.allclose(found, tensors[FINGERPRINT], rtol=2**-7, atol=1e-6):
        raise ValueError(f"{folder}: its experts were trained on another base than this model's weights")
