"""What a sweep adds to the block "emoe" in the config.json of an exported model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_emoe.sweep.curve import best_k, load, range_end
from megatron_emoe.sweep.serving import tail_words


def measured_in(sweep: Path, block: Mapping[str, Any]) -> dict[str, Any]:
    """The k' that were measured, the end of the effective range, the best k', and the words of the tail scale that they
    were measured with (None: plain top-k'). block: the model's settings.

    Raises:
        ValueError: the file is not the sweep of that model.
    """
    result = load(sweep)
    if result.iteration != block["iteration"] or result.k_train != block["k_train"]:
        raise ValueError(
            f"--sweep {sweep}: is of iteration {result.iteration} and k = {result.k_train}, the checkpoint of "
            f"iteration {block['iteration']} and k = {block['k_train']}"
        )
    evaluated = sorted(cell.k for cell in result.cells if isinstance(cell.k, int))
    return {"evaluated_k": evaluated, "range_end": range_end(result), "best_k": best_k(result)} | {
        "measured_tail_scale": tail_words(result.tail_scale) if result.tail_scale else None
    }
