"""Every model has a verification card with results of the command it names; numbers and flags on the cards are so."""

import re
import sys
from pathlib import Path

import pytest

from megatron_emoe.hf.registry import architectures
from tests.hf.full_size import MODELS, PUBLISHED

REPO = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(REPO / "benchmarks"), str(REPO / "tools")]
import convert_checkpoint  # noqa: E402
import verification_cards as cards  # noqa: E402


def card(name: str) -> str:
    return (cards.CARDS / f"{name}.md").read_text()


def test_every_model_has_a_card():
    assert cards.CARD_OF.keys() == architectures().keys() == cards.SAYS.keys()
    assert sorted(cards.CARD_OF.values()) == MODELS == sorted(path.stem for path in cards.CARDS.glob("*.md"))


@pytest.mark.parametrize("name", MODELS)
def test_the_results_are_there_and_good(name):
    block = card(name).partition(cards.BEGIN)[2].partition(cards.END)[0]
    rows = [line for line in block.splitlines() if line.startswith("| ")][2:]
    whole = [row for row in rows if "whole models" in row]
    wanted = {f"fp32, k' = {k}" for k in cards.KS} | {"bf16, k' = 2", "bf16, k' = 8"}
    if name in (cards.CARD_OF[model_type] for model_type in cards.DENSE):
        wanted = {"fp32", "bf16"}
    assert {re.search(r"tokens, ((fp32|bf16)(, k' = \d+)?)", row)[1] for row in whole} >= wanted
    assert all("same model" in row for row in whole)
    layers = [float(re.search(r"largest relative difference (\S+)", row)[1]) for row in rows if "each layer" in row]
    trips = [re.search(r"(\d+) of (\d+) bit-identical", row).groups() for row in rows if "import and export" in row]
    assert len(layers) == len(trips) == 3
    assert max(layers) <= 1e-5 and all(same == all_ for same, all_ in trips)


@pytest.mark.parametrize("name", MODELS)
def test_parameter_counts_are_the_published_ones(name):
    for number in PUBLISHED[name]:
        assert f"{number:,}" in card(name).replace("\n", " ")


@pytest.mark.parametrize("file", [*(f"cards/{name}.md" for name in MODELS), "checkpoints.md"])
def test_commands_are_accepted(file):
    text = (REPO / "docs" / file).read_text()
    commands = re.findall(r"^python tools/convert_checkpoint.py (.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        words = re.sub(r"\s+#.*|[\[\]]", "", command).replace(" N", " 1").split()
        chosen = convert_checkpoint.parser().parse_args(words)
        assert chosen.verb in ("import", "export", "verify", "inspect", "grow")


def test_results_replace_their_block_alone():
    text = f"before\n{cards.BEGIN}old\n{cards.END}after\n"
    assert cards.with_results(text, "new\n") == text.replace("old", "new")
    with pytest.raises(ValueError, match="no place for results"):
        cards.with_results("no marks", "new")
