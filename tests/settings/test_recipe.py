"""examples/recipe.args is what the study measured, and holds for every model that has a flag file."""

import argparse
import dataclasses
import re
import sys

import pytest
from megatron.training.argument_utils import ArgumentGroupFactory

from megatron_emoe.settings.elastic_config import ElasticConfig
from megatron_emoe.settings.elastic_rules import validate_elastic
from megatron_emoe.settings.flag_files import expand
from megatron_emoe.settings.k_schedule import k_probabilities
from tests.distributed import REPO

RECIPE = REPO / "examples/recipe.args"


def elastic(words: list[str]) -> ElasticConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    ArgumentGroupFactory(ElasticConfig).build_group(parser, "elastic MoE")
    return ElasticConfig(**vars(parser.parse_args(words)))


def test_the_study_measured_the_recipe(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(REPO / "benchmarks"), *sys.path])
    import study_regret_methods as study

    (measured,) = (method for method in study.MAIN if method.name == "stratified-scales")
    (recipe, of_study) = (elastic(words) for words in (expand([f"@{RECIPE}"]), measured.flags.split()))
    assert recipe.k_grid(study.K) == of_study.k_grid(study.K) == [k for k in study.GRID if k != study.K]
    assert recipe == dataclasses.replace(of_study, emoe_k_grid=None)


def test_the_study_measured_it_with_a_teacher(monkeypatch):
    """As README.md and the file itself say it."""
    monkeypatch.setattr(sys, "path", [str(REPO / "benchmarks"), *sys.path])
    import study_regret_methods as study

    (measured,) = (method for method in study.MAIN if method.name == "stratified-teacher")
    (line,) = re.findall(r"`@examples/recipe.args (--emoe-teacher .*)` for a k of 8", (REPO / "README.md").read_text())
    assert line.endswith("--emoe-k-grid 4 24")
    words = line.replace("CHECKPOINT", "{base}").replace("4 24", "2 12").split()
    assert elastic([*expand([f"@{RECIPE}"]), *words]) == elastic(measured.flags.split())
    assert line.replace("4 24", "K/2 3K") in RECIPE.read_text()


WITH_EXPERTS = [
    file for file in sorted((REPO / "examples/models").glob("*.args")) if "--num-experts" in file.read_text()
]


@pytest.mark.parametrize("file", WITH_EXPERTS, ids=lambda file: file.stem)
def test_every_model_can_take_it(file):
    words = expand([f"@{file}"])
    flags = dict(zip(words, [*words[1:], ""], strict=True))
    k, experts = int(flags["--moe-router-topk"]), int(flags["--num-experts"])
    settings = elastic(expand([f"@{RECIPE}"]))
    validate_elastic(settings, model_k=k, num_experts=experts)
    chances = k_probabilities(settings, k)
    assert list(chances) == [k // 2, k, 2 * k, 3 * k]
    assert chances[k] == 0.5 and chances[k // 2] == chances[2 * k] == chances[3 * k] == pytest.approx(1 / 6)
    assert settings.tail_scale_at(3 * k, k) == 0.25
    assert settings.tail_scale_at(k, k) == 1.0
