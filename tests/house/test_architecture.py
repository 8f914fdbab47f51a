"""docs/architecture.md: its arrows are the imports between the wings, its functions those that a real run calls."""

import re
import sys
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import grimp
import pytest

from tests.distributed import run_ranks
from tests.tiny import COACTIVATION, flags

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parents[2]
PACKAGE = REPO / "megatron_emoe"
PAGE = (REPO / "docs" / "architecture.md").read_text()
WINGS = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
ARROWS = set(re.findall(r"^  (\w+) --> (\w+)$", PAGE, re.MULTILINE))


def imports_between_wings() -> set[tuple[str, str]]:
    graph = grimp.build_graph("megatron_emoe", cache_dir=None)
    pairs = set()
    for one in WINGS:
        for other in WINGS - {one}:
            names = {"importer": f"megatron_emoe.{one}", "imported": f"megatron_emoe.{other}"}
            if graph.direct_import_exists(**names, as_packages=True):
                pairs.add((one, other))
    return pairs


def reached(arrows: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """Pairs that one arrow or several in a row connect."""
    found = set(arrows)
    while longer := {(a, d) for a, b in found for c, d in arrows if b == c} - found:
        found |= longer
    return found


def test_the_arrows_are_the_imports():
    imports = imports_between_wings()
    assert imports >= ARROWS, f"drawn, but not so: {ARROWS - imports}"
    assert imports <= reached(ARROWS), f"neither drawn nor implied: {imports - reached(ARROWS)}"
    implied = {arrow for arrow in ARROWS if arrow in reached(ARROWS - {arrow})}
    assert not implied, f"drawn, although others imply it: {implied}"


def test_every_wing_is_in_picture_and_table():
    rows = re.findall(r"^\| (\w+) \| .* \| `(\S+)` \|$", PAGE, re.MULTILINE)
    assert {wing for arrow in ARROWS for wing in arrow} == {wing for wing, _ in rows} == WINGS
    for wing, file in rows:
        assert file.startswith(f"{wing}/") and (PACKAGE / file).is_file(), file


def ways() -> list[list[str]]:
    """The two tables of calls: file and qualified name of each."""
    tables = re.split(r"^## ", PAGE, flags=re.MULTILINE)[2:]
    return [
        [f"{file}:{name}" for file, name in re.findall(r"^\| `(\S+)` \| `(\S+)` \|", table, re.MULTILINE)]
        for table in tables
    ]


def first_calls(words: list[str]) -> list[str]:
    """The functions of this package that a run of pretrain_emoe.py calls, each once, in the order of first calls."""
    seen: dict[CodeType, None] = {}

    def note(frame: FrameType, event: str, _value: Any) -> None:
        if event == "call":
            seen.setdefault(frame.f_code)

    sys.argv = ["pretrain_emoe.py", *words]
    sys.setprofile(note)
    try:
        import pretrain_emoe  # what it calls before Megatron-Core is imported

        pretrain_emoe.main()
    finally:
        sys.setprofile(None)
    ours = [(Path(code.co_filename), code.co_qualname) for code in seen]
    names = [f"{file.relative_to(PACKAGE)}:{name}" for file, name in ours if file.is_relative_to(PACKAGE)]
    return list(dict.fromkeys(names))


@pytest.fixture(scope="module")
def calls() -> list[str]:
    run = {"train_iters": 2, "eval_interval": 2, "eval_iters": 1, "emoe_eval_k": [2, 4]}
    return run_ranks(first_calls, 1, flags(**COACTIVATION, **run))[0]


@pytest.mark.parametrize("way", [0, 1], ids=["start", "step"])
def test_a_run_makes_the_calls_of_the_page_in_its_order(way, calls):
    named = ways()[way]
    assert len(named) == (13, 18)[way]
    assert set(named) <= set(calls), f"never called: {set(named) - set(calls)}"
    for first, second in pairwise(named):
        assert calls.index(first) < calls.index(second), f"{second} comes before {first}"


def test_the_way_of_a_step_passes_every_wing_that_a_step_needs(calls):
    """What runs from the first step on, and is in a wing: no wing is left out of the page."""
    start, step = ways()
    running = {call.partition("/")[0] for call in calls[calls.index(step[0]) :]}
    assert running <= {call.partition("/")[0] for call in [*start, *step]}
