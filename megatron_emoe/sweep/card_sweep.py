"""The part of a card that is one sweep: quality and cost, routing, layers, and how it was produced."""

import shlex
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.allocation import moe_layers, sensitivities
from megatron_emoe.sweep.budget import flops_share, is_uniform, name
from megatron_emoe.sweep.card_table import Column, Section, Table, by_k, number, with_unit, words
from megatron_emoe.sweep.curve import SweepCell, SweepResult
from megatron_emoe.sweep.serving import has_learned_scales, tail_scale_at
from megatron_emoe.sweep.summary import scaled, speeds_count, to_k
from megatron_emoe.sweep.uncertainty import signed


def section_of(result: SweepResult, seed: str) -> Section:
    """All that is known of one sweep. seed: of the training run, empty where nobody said."""
    tables = [_cells(result), *_evidence(result), *_sensitivity(result), *_per_layer(result), _origin(result, seed)]
    return Section(result.label, tuple(tables), whole_command(result))


def whole_command(result: SweepResult) -> str:
    """The command of the sweep from its launcher on, where the file tells how many ranks there were."""
    command_words = shlex.split(result.command)
    ranks = {cell.ranks for cell in result.cells}
    scripts = [index for index, word in enumerate(command_words) if Path(word).name == "sweep_k.py"]
    plain = bool(scripts) and command_words[0].startswith("python")
    if result.framework == "transformers" or not plain or len(ranks) != 1 or None in ranks:
        return result.command
    return shlex.join(["torchrun", "--nproc-per-node", str(*ranks), *command_words[scripts[-1] :]])


def _cells(result: SweepResult) -> Table:
    """A row per k'."""
    reference = sweep.loss_at(result, result.k_train)
    cpu = "" if speeds_count(result) else "Speed and latency are left out: on a CPU they say nothing of a GPU."

    def speed(value: float | None, text: Callable[[float | None], str] = number) -> str:
        return text(value) if speeds_count(result) else ""

    columns = [
        Column("loss", lambda cell: f"{cell.loss:.4f}"),
        Column("to k", lambda cell: to_k(result, cell).text()),
        Column("to k, %", lambda cell: signed((cell.loss / reference - 1) * 100, 2)),
        Column("same next token as k", lambda cell: "" if cell.agreement is None else f"{cell.agreement:.2%}"),
        Column("KL to k", lambda cell: "" if cell.kl_to_k is None else f"{cell.kl_to_k:.4f}"),
        Column("tail scale", lambda cell: _tail_scale(result, cell)),
        Column("tokens/s", lambda cell: speed(cell.tokens_per_second, with_unit), cpu),
        Column("ms/token, alone", lambda cell: speed(cell.latency_ms_batch1), cpu),
        Column("ms/token, full batch", lambda cell: speed(cell.latency_ms_large), cpu),
        Column("FLOPs/token", lambda cell: with_unit(cell.flops_per_token)),
        Column("expert FLOPs/token", lambda cell: with_unit(cell.expert_flops_per_token)),
        Column("active parameters", lambda cell: with_unit(cell.active_params)),
    ]
    note = "Forward FLOPs."
    if speeds_count(result) and any(cell.latency_ms_large for cell in result.cells):
        note += " Alone: one token by itself. Full batch: a token of an evaluation micro-batch."
    return by_k("Quality and cost", result, columns, note)


def _tail_scale(result: SweepResult, cell: SweepCell) -> str:
    """a(k') past the k of training where the sweep says so; elsewhere there is no tail to scale."""
    if not scaled(result) or not isinstance(cell.k, int) or cell.k <= result.k_train:
        return ""
    return number(tail_scale_at(result, cell.k))


_NO_COVERAGE = (
    "Coverage is left out: the run that made the checkpoint kept no co-activation matrices "
    "(--emoe-coactivation-interval)."
)


def _evidence(result: SweepResult) -> list[Table]:
    """How the routers used the experts, over the MoE layers; no table where no cell has any of it."""
    measured = [(c.router_entropy, c.load, c.coverage) for c in sweep.curve(result).values()]
    if not any(any(part) for part in measured):
        return []
    columns = [
        Column("router entropy", lambda cell: _over(statistics.mean, cell.router_entropy)),
        Column("load: least", lambda cell: _load(min, cell, "min")),
        Column("5 %", lambda cell: _load(min, cell, "p5")),
        Column("median", lambda cell: _load(statistics.median, cell, "p50")),
        Column("95 %", lambda cell: _load(max, cell, "p95")),
        Column("most", lambda cell: _load(max, cell, "max")),
        Column("dead experts", lambda cell: _load(sum, cell, "dead")),
        Column("coverage, mean", lambda cell: _over(statistics.mean, cell.coverage), _NO_COVERAGE),
        Column("coverage, least", lambda cell: _over(min, cell.coverage), _NO_COVERAGE),
    ]
    note = (
        "Over the MoE layers: entropy in nats per token, mean of layers. Load in multiples of the even share: the "
        "lowest layer's least and 5th percentile, the median of the medians, the highest layer's 95th percentile and "
        "most; experts without a token, in all."
    )
    if any(coverage for _, _, coverage in measured):
        note += (
            " Coverage: share of the pairs active together at k' that were so for "
            f"{result.coverage_at_least or 1} or more tokens in training."
        )
    return [by_k("Routing", result, columns, note)]


def _over(reduce: Callable, by_layer: dict[str, float] | None) -> str:
    return f"{reduce(by_layer.values()):.3g}" if by_layer else ""


def _load(reduce: Callable, cell: SweepCell, key: Literal["min", "p5", "p50", "p95", "max", "dead"]) -> str:
    return f"{reduce([load[key] for load in cell.load.values()]):.3g}" if cell.load else ""


def _sensitivity(result: SweepResult) -> list[Table]:
    """Layer by k': what that k' at this layer alone adds to the loss."""
    table = sensitivities(result)
    ks = sorted(set().union(*table) - {result.k_train}) if table else []
    if not ks:
        return []
    rows = [
        (layer, *(f"{added[k]:+.4f}" if k in added else "" for k in ks))
        for layer, added in zip(layer_names(result), table, strict=True)
    ]
    note = f"Loss to k where only this layer runs k' and all others run k = {result.k_train}."
    return [Table("Layer sensitivity", ("layer", *(f"k' = {k}" for k in ks)), tuple(rows), note)]


def layer_names(result: SweepResult) -> list[str]:
    """Numbers of the MoE layers as counted rows have them; 1, 2, ... where nothing was counted."""
    counted = next((cell.rows_per_layer for cell in result.cells if cell.rows_per_layer), None)
    return sorted(counted, key=int) if counted else [str(n + 1) for n in range(moe_layers(result) or 0)]


def _per_layer(result: SweepResult) -> list[Table]:
    """Measured allocations that change more than one layer, beside the uniform k' of the same number of experts."""
    cells = [cell for cell in result.cells if not isinstance(cell.k, int) and _changed(result, cell.k) > 1]
    if not cells:
        return []
    uniform = {round(flops_share(result, cell), 6): cell for cell in sweep.curve(result).values()}
    rows = []
    for cell in cells:
        same = uniform.get(round(flops_share(result, cell), 6))
        rows.append((*_allocation(result, cell), *_beside(cell, same)))
    head = ("k' per layer", "experts", "expert FLOPs to k", "loss", "to k", "same cost, one k'", "loss there", "to it")
    return [Table("One k' per layer", head, tuple(rows), "Measured. Negative in the last column: better.")]


def _changed(result: SweepResult, ks: Sequence[int]) -> int:
    return sum(k != result.k_train for k in ks)


def _allocation(result: SweepResult, cell: SweepCell) -> list[str]:
    experts = sum(cell.k) if not isinstance(cell.k, int) else cell.k
    to_k = cell.loss - sweep.loss_at(result, result.k_train)
    return [name(cell.k), str(experts), f"{flops_share(result, cell):.3g}", f"{cell.loss:.4f}", f"{to_k:+.4f}"]


def _beside(cell: SweepCell, same: SweepCell | None) -> list[str]:
    if same is None or is_uniform(cell):
        return ["", "", ""]
    return [name(same.k), f"{same.loss:.4f}", f"{cell.loss - same.loss:+.4f}"]


def _origin(result: SweepResult, seed: str) -> Table:
    rows = [
        ("checkpoint", result.checkpoint),
        ("framework", result.framework),
        ("iteration", str(result.iteration)),
        ("k of training", f"{result.k_train} of {result.num_experts} experts"),
        ("MoE layers", str(moe_layers(result) or "")),
        ("training", "" if result.training is None else words(result.training) or "plain top-k"),
        ("tokens of training", with_unit(result.trained_tokens)),
        ("seed of training", seed),
        ("selection here", result.selection or ""),
        ("tail scale", _scales(result)),
        ("data", ", ".join(result.data.path) or "mock data"),
        ("tokens", _tokens(result)),
        ("digest of the tokens", result.data.digest or ""),
        ("ran on", _ran_on(result)),
        ("versions", ", ".join(f"{library} {version}" for library, version in (result.versions or {}).items())),
        ("date", result.date),
    ]
    return Table("How it was produced", ("", "value"), tuple(row for row in rows if row[1]))


def _scales(result: SweepResult) -> str:
    """What weighs the experts at each k' beside their router: learned scales are there at every k'."""
    entries = sorted((result.tail_scale or {}).items(), key=_first)
    fitted = ", ".join(map(_entry, entries)) if scaled(result) else ""
    if has_learned_scales(result):
        return f"{fitted}, on top of scales learned for each k'" if fitted else "scales learned for each k'"
    return fitted or "none: plain top-k'"


def _tokens(result: SweepResult) -> str:
    length = result.data.sequence_length
    return str(result.cells[0].tokens) + (f", in sequences of {length}" if length else "")


def _ran_on(result: SweepResult) -> str:
    """Each device with its number of ranks, in the order of the cells."""
    places = dict.fromkeys((cell.ranks, cell.device) for cell in result.cells if cell.ranks and cell.device)
    return ", ".join(f"{ranks} x {device}" for ranks, device in places)


def _first(item: tuple[str, float]) -> int:
    return int(item[0])


def _entry(item: tuple[str, float]) -> str:
    return f"{item[1]:.3g}" + (f" at k' = {item[0]}" if item[0] != "0" else " at every k'")
