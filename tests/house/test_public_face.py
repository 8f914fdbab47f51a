"""`import megatron_emoe`: light, with the names of docs/python.md and no others, each the one that it stands for."""

import ast
import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import megatron_emoe

REPO = Path(__file__).resolve().parents[2]
PAGE = (REPO / "docs" / "python.md").read_text()
HEAVY = ("torch", "megatron", "transformers", "numpy", "pydantic")

SAYS_WHAT_IS_LOADED = f"""
import sys
import megatron_emoe
print([name for name in {HEAVY} if name in sys.modules])
dir(megatron_emoe), megatron_emoe.__version__, megatron_emoe.load_sweep, megatron_emoe.pick_cell, megatron_emoe.wall
print([name for name in {HEAVY} if name in sys.modules])
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise RuntimeError("imported: " + name)
sys.meta_path.insert(0, Refuse())
try:
    megatron_emoe.ElasticTransformerConfig
except RuntimeError as error:
    print(error)
"""


@pytest.mark.slow
def test_the_import_loads_no_library_and_a_name_only_its_own():
    done = subprocess.run([sys.executable, "-c", SAYS_WHAT_IS_LOADED], cwd=REPO, capture_output=True, text=True)
    at_import, for_sweeps, for_models = done.stdout.splitlines()[:3]
    assert (at_import, for_sweeps) == ("[]", "['pydantic']")
    assert for_models == "imported: torch"


def documented() -> list[str]:
    return re.findall(r"^\| `(\w+)[^`]*` \|", PAGE, re.MULTILINE)


def test_the_names_are_those_of_the_page():
    assert sorted(documented()) == sorted(megatron_emoe.__all__)
    assert set(megatron_emoe.__all__) <= set(dir(megatron_emoe))


def for_type_checkers() -> dict[str, tuple[str, str]]:
    """Module and name there of each name that the package imports for type checkers alone."""
    tree = ast.parse((REPO / "megatron_emoe" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {a.asname or a.name: (node.module, a.name) for node in block.body for a in node.names}


@pytest.mark.parametrize("name", sorted(set(megatron_emoe.__all__) - {"__version__"}))
def test_a_name_is_what_a_type_checker_takes_it_for(name):
    module, there = for_type_checkers()[name]
    value = getattr(megatron_emoe, name)
    assert value is getattr(import_module(module), there)
    assert value.__doc__


def test_another_name_is_none_of_ours():
    assert for_type_checkers().keys() == set(megatron_emoe.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="^module 'megatron_emoe' has no attribute 'spec'$"):
        megatron_emoe.spec  # noqa: B018


def test_arguments_are_those_of_the_page():
    for name, words in re.findall(r"^\| `(\w+)\(([^`]*)\)` \|", PAGE, re.MULTILINE):
        named = [word.strip().partition("=") for word in words.split(",")]
        parameters = list(inspect.signature(getattr(megatron_emoe, name)).parameters.values())
        assert [word for word, _, _ in named] == [parameter.name for parameter in parameters], name
        shown = [ast.literal_eval(value) if equals else inspect.Parameter.empty for _, equals, value in named]
        assert shown == [parameter.default for parameter in parameters], name


def test_the_version_stands_once():
    done = subprocess.run([sys.executable, "setup.py", "--version"], cwd=REPO, capture_output=True, text=True)
    assert done.stdout.split()[-1] == megatron_emoe.__version__
    changes = (REPO / "CHANGELOG.md").read_text()
    assert re.search(r"^## (\S+)", changes, re.MULTILINE)[1] == megatron_emoe.__version__
