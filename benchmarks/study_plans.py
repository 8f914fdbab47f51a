"""The studies that `make study` knows: what each is made of, where its files are, and what it writes at the end."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import study_corpus
import study_methods
import study_regret_methods
import study_regret_report
import study_report
from study_cell import REPO
from study_family import Family, Method

REPORT = REPO / "docs/study.md"
Text = tuple[list[str], tuple[str, ...], list[str]]
"""Inputs and suffixes for preprocess_data.py, and the packages that are missing."""


@dataclass(frozen=True)
class Plan:
    """order: every cell as its method and seed, what says most first. held_out: share of the documents. kept_base:
    folder with the bases and the tokenizer, where they are kept. report: writes from the folder of results."""

    family: Family
    methods: Sequence[Method]
    order: Sequence[tuple[Method, int]]
    text: Callable[[], Text]
    vocabulary: int
    held_out: float
    work: Path
    results: Path
    report: Callable[[Path], None]
    kept_base: Path | None = None


def _reach_order() -> list[tuple[Method, int]]:
    plan = study_methods
    first, *others = plan.SEEDS
    core = [method for method in plan.MAIN if method.name in plan.CORE]
    rest = [method for method in plan.MAIN if method.name not in plan.CORE]
    order = [(method, first) for method in plan.MAIN] + list(_each(core, others))
    order += [(method, seed) for seed in plan.SEEDS for method in plan.RAW]
    return order + [(method, first) for method in plan.ABLATIONS] + list(_each(rest, others))


def _each(methods: Sequence[Method], seeds: Sequence[int]) -> list[tuple[Method, int]]:
    return [(method, seed) for seed, method in itertools.product(seeds, methods)]


def _regret_order() -> list[tuple[Method, int]]:
    """The main base first, and of it what is wanted with every seed."""
    plan = study_regret_methods
    first, *others = plan.SEEDS
    core = [method for method in plan.MAIN if method.name in plan.CORE]
    rest = [method for method in plan.MAIN if method.name not in plan.CORE]
    order = _each(core, plan.SEEDS) + _each(rest, [first]) + _each(rest, others)
    return order + _each(plan.RAW, plan.SEEDS)


def _print_table(folder: Path) -> None:
    for name, part in study_regret_report.parts(folder).items():
        print(f"\n{name}\n\n{part}", end="")


REACH = Plan(
    family=study_methods.FAMILY,
    methods=study_methods.METHODS,
    order=_reach_order(),
    text=lambda: (study_corpus.python_sources(), (".py",), []),
    vocabulary=study_methods.VOCAB,
    held_out=0.05,
    work=REPO / "study",
    results=REPO / "docs/study",
    report=lambda folder: study_report.write(folder, REPORT),
)
REGRET = Plan(
    family=study_regret_methods.FAMILY,
    methods=study_regret_methods.METHODS,
    order=_regret_order(),
    text=study_corpus.text,
    vocabulary=study_regret_methods.VOCAB,
    held_out=0.03,
    work=REPO / "study/regret",
    results=REPO / "docs/study/regret",
    report=lambda folder: study_regret_report.write(folder, REPORT),
    kept_base=REPO / "benchmarks/regret_base",
)
QUICK = Plan(
    family=study_regret_methods.QUICK,
    methods=study_regret_methods.QUICK_MAIN,
    order=_each(study_regret_methods.QUICK_MAIN, study_regret_methods.SEEDS),
    text=study_corpus.text,
    vocabulary=study_regret_methods.VOCAB,
    held_out=0.03,
    work=REPO / "study/regret-quick",
    results=REPO / "study/regret-quick/results",
    report=_print_table,
    kept_base=REPO / "benchmarks/regret_base",
)
PLANS = {"regret": REGRET, "reach": REACH, "quick": QUICK}
