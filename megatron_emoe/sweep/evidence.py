"""Evidence of how experts work together at a k': co-activation matrices, coverage, router entropy, load.

Hooks on routers (Megatron) or gates (transformers) gather it, in a pass of its own, so that a plain evaluation pays
nothing and speeds stay comparable. Shape suffixes: T tokens, E experts, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from megatron_emoe.routing.losses import router_entropy
from megatron_emoe.routing.metrics import LOADS, load_statistics
from megatron_emoe.routing.router import ElasticRouter
from megatron_emoe.settings.atomic_file import write_atomically

TRAINING_FILE = "coactivation.safetensors"
"""What training with --emoe-coactivation-interval writes beside its checkpoints (metrics.py)."""


class Evidence:
    """Sums over the tokens that a model saw. Layers are numbered from 1 over all decoder layers.

    layers: numbers of all MoE layers of the model, also of those that other ranks hold.
    """

    def __init__(self, layers: Sequence[int], num_experts: int, device: torch.device) -> None:
        self.layers = list(layers)
        self.pairs_LEE = torch.zeros(len(self.layers), num_experts, num_experts, dtype=torch.int64, device=device)
        self._entropy_L2 = torch.zeros(len(self.layers), 2, dtype=torch.float64, device=device)

    def add(self, layer: int, logits_TE: Tensor, map_TE: Tensor) -> None:
        """Record a forward pass of one router. map_TE: bool, True where a token uses an expert."""
        place, used_TE = self.layers.index(layer), map_TE.float()  # exact: a pass has fewer than 2**24 tokens
        self.pairs_LEE[place] += (used_TE.t() @ used_TE).long()
        entropy = router_entropy(logits_TE=logits_TE, probs_TE=logits_TE.float().softmax(dim=-1))
        tokens = len(logits_TE)
        self._entropy_L2[place, 0] += entropy.double() * tokens
        self._entropy_L2[place, 1] += tokens

    def reduce(self) -> None:
        """Sum over all ranks. Collective."""
        torch.distributed.all_reduce(self.pairs_LEE)
        torch.distributed.all_reduce(self._entropy_L2)

    def matrices(self) -> dict[int, Tensor]:
        """Tokens that used both experts, int64 [E, E] on the CPU, by layer; the diagonal: tokens of an expert."""
        return dict(zip(self.layers, self.pairs_LEE.cpu(), strict=True))

    def fields(self, trained: Mapping[int, Tensor] | None, at_least: int = 1) -> dict[str, Any]:
        """The cell's fields router_entropy, load and coverage; sync.

        trained: co-activation matrices of training by layer, or None where there are none; coverage is then None too.
        """
        entropy_L = (self._entropy_L2[:, 0] / self._entropy_L2[:, 1]).tolist()
        statistics = load_statistics(self.pairs_LEE.diagonal(dim1=1, dim2=2).cpu())
        shares = {} if trained is None else covered(self.matrices(), trained, at_least)
        return {
            "router_entropy": {str(n): max(0.0, h) for n, h in zip(self.layers, entropy_L, strict=True)},
            "load": {str(n): _load(statistics, i) for i, n in enumerate(self.layers)},
            "coverage": {str(n): share for n, share in shares.items()} or None,
        }


def _load(statistics: Mapping[str, Tensor], layer: int) -> dict[str, float]:
    """One layer's numbers under the short names of the sweep file."""
    values = {name.removeprefix("load "): statistics[name][layer].item() for name in LOADS}
    return values | {"dead": int(values.pop("dead experts"))}


def covered(used: Mapping[int, Tensor], trained: Mapping[int, Tensor], at_least: int = 1) -> dict[int, float]:
    """By layer: the share of the expert pairs that some token uses together whose experts at least `at_least` tokens
    used together in training. Layers without such a pair (k' = 1) are left out. used, trained: int64 [E, E]."""
    shares = {}
    for layer, pairs_EE in used.items():
        together_EE = torch.triu(pairs_EE > 0, diagonal=1)
        if together_EE.any():
            known_EE = trained[layer] >= at_least if layer in trained else torch.zeros_like(together_EE)
            shares[layer] = (together_EE & known_EE).sum().item() / together_EE.sum().item()
    return shares


def training_pairs(
    folder: Path, num_experts: int, iteration: int | None, report: Callable[[str], None] = print
) -> dict[int, Tensor] | None:
    """The co-activation matrices that training left in the checkpoint folder, by layer; None where it left none.

    The folder has one file for all its checkpoints. iteration: of the checkpoint, None where unknown; pairs counted
    after it are not of its training, so None then too, and `report` says so.

    Raises:
        ValueError: a file that cannot be read or is of another number of experts.
    """
    path = folder / TRAINING_FILE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            counted = int((file.metadata() or {}).get("iteration", 0))  # 0: the file does not say
        stored = load_file(path)
    except Exception as error:  # safetensors has a class of its own, that is no OSError
        raise ValueError(f"{path}: cannot be read ({error})") from error
    for name, pairs in stored.items():
        if tuple(pairs.shape) != (num_experts, num_experts):
            raise ValueError(f"{path}: {name} is {list(pairs.shape)}; the model has {num_experts} experts")
    if iteration is not None and counted > iteration:
        report(f"{path}: pairs up to iteration {counted}, the checkpoint is of {iteration}: coverage stays empty")
        return None
    return {int(name.removeprefix("layer.")): pairs for name, pairs in stored.items()}


@contextmanager
def watching_routers(model: Sequence[nn.Module], layers: Sequence[int]) -> Iterator[Evidence]:
    """Gather evidence from the routers of a Megatron model that runs inside; `reduce` adds up the ranks.

    Where tensor-parallel ranks route copies of the same tokens, the first of them counts.
    """
    routers = [module for chunk in model for module in chunk.modules() if isinstance(module, ElasticRouter)]
    device = next(model[0].parameters()).device
    evidence = Evidence(layers, routers[0].config.num_moe_experts if routers else _experts(model), device)
    first = parallel_state.get_tensor_model_parallel_rank() == 0

    def keep(router: nn.Module, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        if first or router.config.sequence_parallel:
            logits_TE = router.gating(inputs[0]).flatten(end_dim=-2)  # a second small product: the hook sees no logits
            evidence.add(router.global_layer_number, logits_TE, output[1].bool())

    with hooked(routers, keep):
        yield evidence


def _experts(model: Sequence[nn.Module]) -> int:
    """On a pipeline stage without MoE layers."""
    module: Any = model[0]
    while not hasattr(module, "config"):
        module = module.module
    return module.config.num_moe_experts


@contextmanager
def hooked(modules: Sequence[nn.Module], hook: Any) -> Iterator[None]:
    """A forward hook on each of the modules inside."""
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def matrices_path(out: Path) -> Path:
    """Where the matrices of the sweep file `out` go."""
    return out.with_name(f"{out.stem}.coactivation.safetensors")


def save_matrices(out: Path, k: int | Sequence[int], matrices: Mapping[int, Tensor], keep: Sequence[Any]) -> None:
    """Add the matrices of one k' to the file beside `out`, under names such as k4.layer.1 and k2-4-4.layer.1.

    keep: the k' whose matrices stay in the file; those of an older sweep that was started anew go.
    """
    path = matrices_path(out)
    kept = {name_of(each) for each in keep} - {name_of(k)}
    stored = load_file(path) if path.is_file() else {}
    tensors = {name: pairs for name, pairs in stored.items() if name.partition(".")[0] in kept}
    tensors |= {f"{name_of(k)}.layer.{layer}": pairs.contiguous() for layer, pairs in matrices.items()}
    write_atomically(path, to_bytes(tensors))


def name_of(k: int | Sequence[int]) -> str:
    """k4, or k2-4-4 for one k' per layer."""
    return f"k{k}" if isinstance(k, int) else "k" + "-".join(map(str, k))
