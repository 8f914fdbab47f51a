"""What a comparison of two models found, as JSON values and as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from megatron_emoe.hf.comparison import Distance


@dataclass(frozen=True)
class KRow:
    """The comparison at one k' (None: a dense model, which has none).

    tokens: all of them; compared: those that no tie reaches; ties: (token, MoE layer) pairs that differ by a tie alone.
    ours: our distance from transformers over the compared tokens; noise: that of transformers from itself. first_layer:
    the first decoder layer (0-based) whose output differs by more than rounding, first_layer_sets: the first in which
    a routed set does, and not by a tie; None where there is none. failures: what is out of bounds, in words.
    """

    k: int | None
    tokens: int
    compared: int
    ties: int
    ours: Distance
    noise: Distance
    first_layer: int | None
    first_layer_sets: int | None
    failures: tuple[str, ...]


@dataclass(frozen=True)
class VerifyReport:
    """The comparison of two models at every k'. dtype: "fp32" or "bf16"."""

    hf: str
    checkpoint: str
    dtype: str
    rows: tuple[KRow, ...]

    @property
    def passed(self) -> bool:
        """Whether everything is within its bounds."""
        return not any(row.failures for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {**asdict(self), "passed": self.passed}

    def table(self) -> str:
        """For people: a line for each k' (in brackets the noise), then what failed."""
        lines = [f"{'k':>4} {'max |dlogit|':>20} {'mean KL':>20} {'same top-1':>11} {'same sets':>10} {'compared':>11}"]
        for row in self.rows:
            ours, noise = row.ours, row.noise
            lines.append(
                f"{row.k or '-':>4} {ours.max_difference:>10.1e} ({noise.max_difference:.1e}) "
                f"{ours.kl:>10.1e} ({noise.kl:.1e}) {1 - ours.other_top1:>11.2%} {1 - ours.other_sets:>10.2%} "
                f"{row.compared:>5}/{row.tokens}"
            )
        at = {row.k: "" if row.k is None else f"k = {row.k}: " for row in self.rows}
        lines += [f"{at[row.k]}{failure}" for row in self.rows for failure in row.failures]
        return "\n".join([*lines, f"{self.dtype}: {'the same model' if self.passed else 'NOT the same model'}"])
