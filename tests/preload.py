"""What a rank of `run_ranks` finds in memory: imported once by the server (tests/programs), before the first is forked.

Importing Megatron and transformers takes ten seconds; so would reading the sources of the core's configuration classes,
for the help of 900 flags, again for every command line.
"""

import argparse
from typing import Any

from megatron.training.argument_utils import ArgumentGroupFactory
from megatron.training.arguments import add_megatron_arguments

import megatron_emoe.hf.export_model
import megatron_emoe.hf.layer_check
import megatron_emoe.hf.verify
import megatron_emoe.training.loop  # noqa: F401
import tests.hf_models  # noqa: F401
from megatron_emoe.training.arguments import add_arguments

_read = ArgumentGroupFactory._get_field_docstrings
_known: dict[type, dict[str, str]] = {}


def _remembered(self: Any, cls: type) -> dict[str, str]:
    if cls not in _known:
        _known[cls] = _read(self, cls)
    return _known[cls]


ArgumentGroupFactory._get_field_docstrings = _remembered
add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
