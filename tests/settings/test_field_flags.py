"""Flags made of a dataclass's fields, against those that Megatron-Core's own factory makes of the same class."""

import argparse
import inspect
from dataclasses import dataclass, fields

import pytest
from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.field_flags import add_elastic_flags, add_field_flags, field_texts

COMPARED = ("option_strings", "dest", "nargs", "const", "default", "type", "choices", "required", "help", "metavar")


def parsers() -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """Ours and Megatron's, of the same class."""
    ours, theirs = argparse.ArgumentParser(), argparse.ArgumentParser()
    add_elastic_flags(ours)
    ArgumentGroupFactory(ElasticConfig).build_group(theirs, "elastic MoE")
    return ours, theirs


def test_every_action_is_the_one_that_megatron_makes():
    ours, theirs = ([action for action in parser._actions if action.dest != "help"] for parser in parsers())
    assert [action.dest for action in ours] == [field.name for field in fields(ElasticConfig)]
    for own, other in zip(ours, theirs, strict=True):
        assert type(own) is type(other), own
        assert {name: getattr(own, name) for name in COMPARED} == {name: getattr(other, name) for name in COMPARED}


def test_the_group_has_the_same_title_and_text():
    ours, theirs = (parser._action_groups[-1] for parser in parsers())
    assert (ours.title, ours.description) == (theirs.title, theirs.description)


WORDS = [
    "--emoe-pool-k 6 --emoe-pool-fixed --emoe-selection coactivation",
    "--emoe-k-weights 1 0.5 2e-3 --emoe-eval-k 1 2 --emoe-tail-scale 4:0.5 8:0.1",
    "--emoe-eval-k=3 --emoe-distill-coeff nan",
    "",
    "--emoe-pool-k six",
    "--emoe-pool-k",
    "--emoe-selection best",
    "--emoe-pool-fixed yes",
    "--emoe-k-weights one",
    "--emoe-pool 6",
]


@pytest.mark.parametrize("line", WORDS)
def test_the_same_words_give_the_same_values_or_the_same_message(line, capsys):
    def outcome(parser: argparse.ArgumentParser) -> str:
        try:
            return str(parser.parse_args(line.split()))
        except SystemExit:
            return capsys.readouterr().err

    ours, theirs = parsers()
    assert outcome(ours) == outcome(theirs)


def test_the_texts_are_those_of_the_source_in_one_line():
    texts = field_texts(ElasticConfig)
    source = " ".join(inspect.getsource(ElasticConfig).split())
    assert texts.keys() == {field.name for field in fields(ElasticConfig)}
    assert all(f'"""{text}"""' in source for text in texts.values())


@dataclass
class Pairs:
    """A field that no flag can hold."""

    pair: tuple[int, int] = (0, 0)
    """Two numbers."""


@dataclass
class Either:
    """Two types for one field."""

    either: int | str = 0
    """A number or a word."""


@pytest.mark.parametrize("cls", [Pairs, Either])
def test_another_type_is_refused(cls, monkeypatch):
    monkeypatch.setattr("megatron_emoe.settings.field_flags.field_texts", lambda cls: {"pair": "", "either": ""})
    with pytest.raises(TypeError, match="no flag can be made of a field of type"):
        add_field_flags(argparse.ArgumentParser(), cls, "settings")
