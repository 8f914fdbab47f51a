"""What `make bench-gpu` measures: one cell for each kind of layers, precision, routing and elastic setting."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_emoe.host import flags as host_flags
from megatron_emoe.settings import flag_files

REPO = Path(__file__).resolve().parent.parent
GB = 1e9

# OLMoE's layers at full size. Its norm of queries and keys over their whole width is this project's own: here both
# models norm each head, as the core does. The learning rate leaves the routers about as they start.
JOB = """--emoe-qk-norm core --seq-length 4096 --micro-batch-size 1 --global-batch-size 4 --train-iters 1000000
    --lr 1e-6 --lr-decay-style constant --log-interval 1000000 --eval-iters 0 --mock-data --tokenizer-type NullTokenizer
    --no-create-attention-mask-in-dataloader --moe-token-dispatcher-type alltoall --seed 1 --distributed-backend nccl
    --no-gradient-accumulation-fusion"""
LAYERS = {
    "te": "--transformer-impl transformer_engine --moe-grouped-gemm",
    "local": " ".join(host_flags.words_of(host_flags.LOCAL_LAYERS)),
}
PRECISION = {"bf16": "", "fp8": "--fp8-format hybrid"}
ROUTING = {"balanced": "--moe-router-force-load-balancing", "live": ""}
ELASTIC = {
    "coactivation": "--emoe-selection coactivation --emoe-pool-k 24",
    "mean-k": "--emoe-selection prefix --emoe-k-schedule uniform --emoe-k-min 4 --emoe-k-max 12 --emoe-k-draw layer",
    "recipe": f"@{REPO}/examples/recipe.args",
}
SWEEP = (8, 12, 16, 20, 24)  # k' = k ... 3 k


@dataclass(frozen=True)
class Cell:
    """layers, precision, routing, elastic: keys of the tables above. sweep: k' of the forward passes, if any."""

    layers: str
    precision: str
    routing: str
    elastic: str
    sweep: tuple[int, ...] = ()
    flags: tuple[str, ...] = field(default=(), compare=False)

    @property
    def name(self) -> str:
        """As --only and the results know it."""
        return f"{self.layers}-{self.precision}-{self.routing}-{self.elastic}"

    def job(self, num_layers: int, pairs: int, rounds: int) -> dict[str, Any]:
        """What measure_gpu.py is asked for."""
        return {"flags": self.command(num_layers), "pairs": pairs, "rounds": rounds, "sweep": list(self.sweep)}

    def command(self, num_layers: int) -> list[str]:
        """Megatron's flags and ours, the stock model's too; the cell's own instead, if it has any."""
        if self.flags:
            return list(self.flags)
        text = f"@{REPO}/examples/models/olmoe_1b_7b.args --num-layers {num_layers} {JOB} {LAYERS[self.layers]} "
        text += f"{PRECISION[self.precision]} {ROUTING[self.routing]} {ELASTIC[self.elastic]}"
        return flag_files.expand(text.split())


def all_cells() -> list[Cell]:
    """Every cell, in the order of the report; the sweep belongs to live routing with co-activation."""
    kinds = [("te", "bf16"), ("te", "fp8"), ("local", "bf16")]
    return [
        Cell(layers, precision, routing, elastic, SWEEP if (routing, elastic) == ("live", "coactivation") else ())
        for layers, precision in kinds
        for routing in ROUTING
        for elastic in ELASTIC
    ]


def chosen(only: Iterable[str], quick: bool) -> list[Cell]:
    """The cells whose name has every word of `only`; quick: of them those with live routing, and no mean-k.

    Raises:
        ValueError: a word is in no name, or no name has them all.
    """
    cells, words = all_cells(), list(only)
    for word in words:
        if not any(word in cell.name.split("-", 3) for cell in cells):
            parts = sorted({part for cell in cells for part in cell.name.split("-", 3)})
            raise ValueError(f"--only {word}: must be one of {', '.join(parts)}")
    found = [cell for cell in cells if set(words) <= set(cell.name.split("-", 3))]
    if quick:
        found = [cell for cell in found if cell.routing == "live" and cell.elastic != "mean-k"]
    if not found:
        raise ValueError(f"--only {' '.join(words)}: nothing is all of that")
    return found


def why_skipped(cell: Cell, engine: bool, fp8: bool, asked: bool) -> str | None:
    """Why this machine leaves the cell out. engine: Transformer Engine is there. fp8: the GPU has it. asked: named."""
    if cell.layers == "te" and not engine:
        return "Transformer Engine is not installed"
    if cell.precision == "fp8" and not fp8:
        return "the GPU has no FP8 (compute capability below 8.9)"
    if cell.layers == "local" and engine and not asked:
        return "Transformer Engine is there; --only local measures it"
    return None


def layers_that_fit(memory: float) -> int:
    """Layers of two OLMoE models with optimizer that `memory` bytes hold, at most 4; 0 where not even one does.

    For a layer 419 million parameters at 18 bytes, twice, and 3 GB of activations at k' = 24; for embedding and head
    half as many parameters, twice; 8 GB for the rest.
    """
    layer, ends = 2 * 0.419e9 * 18 + 3 * GB, 2 * 0.206e9 * 18 + 8 * GB
    return max(0, min(4, int((0.9 * memory - ends) / layer)))
