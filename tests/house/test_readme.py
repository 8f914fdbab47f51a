"""What the README says of flags and files is so."""

import re
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
README = (REPO / "README.md").read_text()
TREE = README.split("## What is where")[1].split("```")[1]

sys.path.insert(0, str(REPO / "tools"))
import flag_table  # noqa: E402


def test_the_flag_table_is_the_one_that_the_settings_give():
    assert flag_table.written(README, flag_table.table()) == README


def test_every_file_of_the_tree_exists():
    package = TREE.split("tools/ ")[0].splitlines()
    named = [line.split()[0] for line in package if line.strip().split(" ")[0].endswith(".py")]
    assert named, "the tree names no file"
    for name in named:
        assert (REPO / name).is_file() or (REPO / "megatron_emoe" / name).is_file(), name
    for name in re.findall(r"\w+\.(?:py|sh)", TREE.split("tools/ ")[1].splitlines()[0]):
        assert (REPO / "tools" / name).is_file(), name


def test_every_module_is_in_the_tree():
    for module in (REPO / "megatron_emoe").glob("*.py"):
        assert module.name in TREE or module.name == "__init__.py", module.name


def test_every_flag_in_a_command_of_the_readme_is_a_flag_of_ours_or_of_megatron():
    import argparse

    from megatron.training.arguments import add_megatron_arguments

    from megatron_emoe.training.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    known = {option for action in parser._actions for option in action.option_strings}
    known |= {"--baseline", "--max-flops", "--max-latency-ms", "--min-quality", "--layer-sensitivity"}
    known |= {"--k-per-layer", "--latency", "--evidence"}
    known |= {"--model", "--tasks"}
    known |= {"--nproc-per-node", "--k", "--out", "--write", "--hf", "--megatron"}  # of torchrun and of the tools
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]+", README)) <= known
