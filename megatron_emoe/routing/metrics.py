"""What elastic layers report: names, values, reductions. Measured on logged steps alone; other steps pay nothing.

The core's loop calls the MoE metrics tracker's report() after every step on every rank; this tracker adds its own lines
there. All ranks agree on which steps are logged (a pure function of the iteration) and on the shapes, so pipeline
stages without MoE layers take part in the one reduction and nothing hangs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.moe.moe_logging import (
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_emoe.routing.losses import mean_over_tokens
from megatron_emoe.routing.watch import RouterWatch

OPTIONAL = ("importance loss", "load loss")  # logged where a selection has them
SUMS = ("active k", "pool size", "hierarchical router loss", "router entropy", *OPTIONAL)
LOADS = ("load min", "load p5", "load p50", "load p95", "load max", "dead experts")


def load_statistics(counts_LE: Tensor) -> dict[str, Tensor]:
    """Per-layer load of the experts as multiples of the even share, fp32 [L] each; `dead experts` counts zeros.

    counts_LE: tokens per layer and expert.
    """
    counts_LE = counts_LE.float()
    share_LE = counts_LE / counts_LE.mean(dim=1, keepdim=True).clamp(min=1e-9)
    p5, p50, p95 = torch.quantile(share_LE, torch.tensor([0.05, 0.5, 0.95], device=share_LE.device), dim=1)
    values = (share_LE.amin(dim=1), p5, p50, p95, share_LE.amax(dim=1), (counts_LE == 0).sum(dim=1).float())
    return dict(zip(LOADS, values, strict=True))


def load_entropy(counts_LE: Tensor) -> Tensor:
    """Entropy of the load of each layer's experts, nats, fp32 [L]; log E where all have the same, 0 without tokens."""
    share_LE = counts_LE / counts_LE.sum(dim=1, keepdim=True).clamp(min=1)
    return torch.special.entr(share_LE).sum(dim=1)


def coverage(pairs_LEE: Tensor, at_least: int = 1) -> Tensor:
    """Share of the E(E-1)/2 expert pairs used together by at least `at_least` tokens, fp32 [L]."""
    rows, columns = torch.triu_indices(pairs_LEE.shape[-1], pairs_LEE.shape[-1], offset=1, device=pairs_LEE.device)
    return (pairs_LEE[:, rows, columns] >= at_least).float().mean(dim=1)


class ElasticMetricsTracker(MoEMetricsTracker):
    """The core's tracker plus elastic metrics, one packed all-reduce per logged step."""

    def __init__(self) -> None:
        super().__init__()
        self.measuring = False
        self.measuring_pairs = False
        self.folder: Path | None = None
        self.mean_k: float | None = None  # of the last measured step, over layers and tokens
        self._shape: tuple[int, int] | None = None
        self._watch = RouterWatch("off", None)
        self._sums: dict[int, dict[str, Tensor | float]] = {}
        self._loads: dict[int, Tensor] = {}
        self._pairs: dict[int, Tensor] = {}
        self._total_pairs: Tensor | None = None

    def configure(self, num_layers: int, num_experts: int, folder: str | None, watch: str = "warn") -> None:
        """Shapes for ranks without MoE layers; `folder` receives coactivation.safetensors (None: nowhere). watch:
        --emoe-router-watch."""
        self._shape = (num_layers, num_experts)
        self._watch = RouterWatch(watch, folder)
        self.folder = Path(folder) if folder else None

    def begin_step(self, iteration: int, log_interval: int, coactivation_interval: int) -> None:
        """Decide what the step `iteration` (from 0) measures: host arithmetic, equal on every rank."""
        self.measuring = (iteration + 1) % log_interval == 0
        self.measuring_pairs = coactivation_interval > 0 and (iteration + 1) % coactivation_interval == 0

    def add_routing(
        self, layer: int, map_TE: Tensor, padding_T: Tensor | None, k: int | None, pool: Tensor | int
    ) -> None:
        """Record one forward pass of a layer. map_TE: bool; padding_T: bool, True for tokens that do not count. k: None
        where it differs from token to token; then the mean is measured."""
        if not (self.measuring or self.measuring_pairs):
            return
        if padding_T is not None:
            map_TE = map_TE & ~padding_T.unsqueeze(-1)
        if self.measuring:
            mean_k, mean_pool = _mean_k(map_TE, padding_T, k), _mean_pool(pool, padding_T)
            self.add_values(layer, {"passes": 1.0, "active k": mean_k, "pool size": mean_pool})
            self._loads[layer] = self._loads.get(layer, 0) + map_TE.sum(dim=0)
        if self.measuring_pairs:
            used_TE = map_TE.float()  # exact: counts stay below 2**24 per step and rank
            self._pairs[layer] = self._pairs.get(layer, 0) + used_TE.t() @ used_TE

    def add_values(self, layer: int, values: dict[str, Tensor | float]) -> None:
        """Add scalars to the layer's sums; tensors stay on their device."""
        sums = self._sums.setdefault(layer, {})
        for name, value in values.items():
            sums[name] = sums.get(name, 0.0) + (value.detach() if isinstance(value, Tensor) else value)

    def report(
        self,
        loss_scale: float,
        iteration: int,
        writer: Any = None,
        wandb_writer: Any = None,
        per_layer_logging: bool = False,
        **rest: Any,
    ) -> str:
        """The elastic metrics of a measured step after the core's report. The training loop calls it on every rank."""
        text = ""
        if self._shape is not None and self.measuring:
            text += self._report_layers(iteration, writer, per_layer_logging)
        if self._shape is not None and self.measuring_pairs:
            text += self._report_pairs(iteration, writer)
        core = super().report(loss_scale, iteration, writer, wandb_writer, per_layer_logging, **rest)
        return core + text  # measured first: the core's report ends with clear(), which forgets these values too

    def clear(self) -> None:
        """Forget what was recorded since the last report (also called after every evaluation)."""
        super().clear()
        self._sums, self._loads, self._pairs = {}, {}, {}

    def _report_layers(self, iteration: int, writer, per_layer: bool) -> str:
        packed = self._packed()
        torch.distributed.all_reduce(packed)
        packed = packed.cpu()  # sync: on logged steps only
        moe_layers = packed[:, 0] > 0
        if not moe_layers.any():
            return ""
        packed = packed[moe_layers]
        means = packed[:, 1 : 1 + len(SUMS)] / packed[:, :1]
        sums = dict(zip(SUMS, means.t(), strict=True))
        sums = {name: value for name, value in sums.items() if name not in OPTIONAL or value.any()}
        counts_LE = packed[:, 1 + len(SUMS) :]
        values = sums | {"load entropy": load_entropy(counts_LE)} | load_statistics(counts_LE)
        self.mean_k = values["active k"].mean().item()
        layers = [place + 1 for place in moe_layers.nonzero().flatten().tolist()]
        if writer is not None:
            _write(writer, values, iteration, layers if per_layer else [])
        line = "".join(f" {name}: {value.mean():.4g} |" for name, value in values.items())
        return line + self._watch.look(values, layers, self._size()[1], iteration)

    def _size(self) -> tuple[int, int]:
        assert self._shape is not None
        return self._shape

    def _packed(self) -> Tensor:
        """fp32 [layers, 1 + len(SUMS) + E]: passes, sums, loads; zero where this rank holds no such layer."""
        layers, experts = self._size()
        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        packed = torch.zeros(layers, 1 + len(SUMS) + experts, device=device)
        for layer, sums in self._sums.items():
            for column, name in enumerate(("passes", *SUMS)):
                packed[layer - 1, column] = sums.get(name, 0.0)
            packed[layer - 1, 1 + len(SUMS) :] = self._loads[layer]
        return packed

    def _report_pairs(self, iteration: int, writer) -> str:
        layers, experts = self._size()
        pairs = torch.zeros(layers, experts, experts)
        for layer, counts in self._pairs.items():
            pairs[layer - 1] = counts.cpu()  # sync: every --emoe-coactivation-interval iterations only
        on_device = pairs.cuda() if torch.cuda.is_available() else pairs
        torch.distributed.all_reduce(on_device)
        if self._total_pairs is None:
            self._total_pairs = self._stored_pairs(iteration)
        self._total_pairs += on_device.cpu().long()
        seen = self._total_pairs[self._total_pairs.sum(dim=(1, 2)) > 0]
        share = coverage(seen).mean().item() if len(seen) else 0.0
        if writer is not None:
            writer.add_scalar("emoe/co-activation coverage", share, iteration)
        if torch.distributed.get_rank() == 0 and self.folder is not None:
            self._save_pairs(iteration)
        return f" co-activation coverage: {share:.4f} |"

    def _stored_pairs(self, iteration: int) -> Tensor:
        """int64 [layers, E, E]: what an earlier part of this run counted up to `iteration`, from rank 0's file."""
        layers, experts = self._size()
        total = torch.zeros(layers, experts, experts, dtype=torch.long)
        path = self.folder / "coactivation.safetensors" if self.folder else None
        if torch.distributed.get_rank() == 0 and path is not None and path.is_file():
            with safe_open(path, "pt") as file:
                if int(file.metadata()["iteration"]) < iteration:
                    for name in file.keys():  # noqa: SIM118, it is no mapping
                        total[int(name.removeprefix("layer.")) - 1] = file.get_tensor(name)
        on_device = total.cuda() if torch.cuda.is_available() else total
        torch.distributed.broadcast(on_device, src=0)
        return on_device.cpu()

    def _save_pairs(self, iteration: int) -> None:
        assert self.folder is not None and self._total_pairs is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"layer.{i + 1}": pairs for i, pairs in enumerate(self._total_pairs) if pairs.any()}
        target = self.folder / "coactivation.safetensors"
        save_file(tensors, f"{target}.tmp", metadata={"iteration": str(iteration)})
        os.replace(f"{target}.tmp", target)


def _mean_k(map_TE: Tensor, padding_T: Tensor | None, k: int | None) -> Tensor | float:
    """Mean number of experts of the tokens that count."""
    if k is not None:
        return float(k)
    tokens = map_TE.shape[0] if padding_T is None else (~padding_T).sum().clamp(min=1)
    return map_TE.sum() / tokens


def _mean_pool(pool: Tensor | int, padding_T: Tensor | None) -> Tensor | float:
    """Mean pool size of the tokens that count; pool: one number, or one for each token [T, 1]."""
    if not isinstance(pool, Tensor):
        return float(pool)
    return mean_over_tokens(pool.view(-1).float(), None if padding_T is None else ~padding_T)


def _write(writer, values: dict[str, Tensor], iteration: int, layers: list[int]) -> None:
    for name, per_layer in values.items():
        writer.add_scalar(f"emoe/{name}", per_layer.mean().item(), iteration)
        for layer, value in zip(layers, per_layer.tolist(), strict=False):
            writer.add_scalar(f"emoe/{name}_layer_{layer}", value, iteration)


def get_elastic_tracker() -> ElasticMetricsTracker:
    """The process's metrics tracker, put in the place of the core's on first use."""
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, ElasticMetricsTracker):
        tracker = ElasticMetricsTracker()
        set_moe_metrics_tracker(tracker)
    return tracker
