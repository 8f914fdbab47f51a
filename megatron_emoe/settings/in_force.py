"""Which elastic settings a run has, in one line: flag files and earlier flags leave settings that nobody typed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from megatron_emoe.settings.elastic_config import MODEL_FEATURES, ElasticConfig, flag


def settings_in_force(elastic: ElasticConfig, words: Iterable[str]) -> str | None:
    """The flags of every elastic setting that is not at its default; None where there is none.

    words: the command line, flag files already read. Of a flag that it has more than once the last counts, and the
    others are named: `--emoe-selection coactivation (not prefix)`.
    """
    given = _given(words)
    parts = []
    for field in fields(ElasticConfig):
        value, default = getattr(elastic, field.name), field.default
        if value == default or field.name in MODEL_FEATURES:
            continue
        others = [other for other in given.get(flag(field.name), [])[:-1] if other != setting_words(value)]
        given_before = f" (not {', '.join(others)})" if others else ""
        parts.append(f"{flag(field.name)} {setting_words(value)}".rstrip() + given_before)
    return f"elastic settings: {' '.join(parts)}" if parts else None


def setting_words(value: object) -> str:
    """As on a command line; a switch has none."""
    if isinstance(value, bool):
        return ""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _given(words: Iterable[str]) -> dict[str, list[str]]:
    """Every value that each elastic flag is given, in order."""
    found: dict[str, list[str]] = {}
    last: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, _, value = word.partition("=")
            last = found.setdefault(name, [])
            last.append(value)
        elif last:
            last[-1] = f"{last[-1]} {word}".strip()
    return {name: values for name, values in found.items() if name.startswith("--emoe-")}
