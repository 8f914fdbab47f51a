"""The part of a card that a load test of the server gives (tools/serve_bench.py)."""

from megatron_emoe.sweep.card_table import Section, Table
from megatron_emoe.sweep.curve import SweepResult
from megatron_emoe.sweep.served import HEAD, ServedResult, row

NOTE = (
    "Offered load in requests/s, then the k' that requests named, or the server's own. Mean k' and loss are over the "
    "tokens that ran, of prompts and of answers, the loss being that of each one's k' on held-out data. TTFT: time to "
    "the first token, ms/token: for each after it, means and percentiles. Speeds are those of the machine and the vLLM "
    "that served."
)


def served_section(found: ServedResult, result: SweepResult) -> Section:
    """The section of a load test of the model of `result`.

    Raises:
        ValueError: the server's model was trained at another k.
    """
    k_train = found.server.get("k_train")
    if k_train != result.k_train:
        raise ValueError(f"--served: of a model with k = {k_train}, {result.label} has {result.k_train}; must be equal")
    rows = tuple(tuple(row(cell)) for cell in found.cells)
    note = f"{NOTE} {_how(found)}"
    return Section("Served", (Table("Under load", HEAD, rows, note),), found.command, tuple(_own(found)))


def _own(found: ServedResult) -> list[str]:
    """How the server's own k' went with the load, where it was measured."""
    means = [(cell.mean_k_written or cell.mean_k, cell.rate) for cell in found.cells if cell.k is None]
    words = ", ".join(f"{mean:.3g} at {rate:g}" for mean, rate in means if mean)
    return [f"the server's own k' of answers, mean: {words} requests/s"] if words else []


def _how(found: ServedResult) -> str:
    return (
        f"Each: {found.prompts} requests of {found.prompt_tokens} tokens, {found.output_tokens} to write, seed "
        f"{found.seed}, Poisson arrivals; vLLM {found.vllm or 'of unknown version'}, {found.date}."
    )
