"""What a card is made of: tables of text under headings."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_emoe.sweep import curve as sweep
from megatron_emoe.sweep.curve import SweepCell, SweepResult

UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class Table:
    """Texts by row and column; the first column names the row. note: what a reader must know to read it."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


@dataclass(frozen=True)
class Section:
    """One heading of the card, lines of text and the tables under it. command: the command line that produced them, if
    one did."""

    title: str
    tables: tuple[Table, ...]
    command: str = ""
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A column of a table with a row for each k'. absent: why it may be empty everywhere; it is left out then."""

    head: str
    text: Callable[[SweepCell], str]
    absent: str = ""


def by_k(title: str, result: SweepResult, columns: Sequence[Column], note: str) -> Table:
    """A row per k'. A column with nothing in it is left out, and the note says why."""
    cells = sweep.curve(result)
    filled = [column for column in columns if any(column.text(cell) for cell in cells.values())]
    reasons = dict.fromkeys(column.absent for column in columns if column not in filled and column.absent)
    rows = tuple((str(k), *(column.text(cell) for column in filled)) for k, cell in cells.items())
    return Table(title, ("k'", *(column.head for column in filled)), rows, " ".join([note, *reasons]).strip())


def number(value: float | None) -> str:
    """To three digits; empty where there is none."""
    return "" if value is None else f"{value:.3g}"


def with_unit(value: float | None) -> str:
    """A count to three digits with its unit, `12.3 M`; empty where there is none."""
    if value is None:
        return ""
    scale, unit = next((entry for entry in UNITS if value >= entry[0]), (1.0, ""))
    return f"{value / scale:.3g} {unit}".strip()


def words(settings: Mapping[str, str]) -> str:
    """Flags and their words, as on a command line."""
    return " ".join(f"{flag} {value}".rstrip() for flag, value in settings.items())  # a switch has no word
