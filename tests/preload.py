"""What a rank of `run_ranks` finds in memory: imported once by the server (tests/programs), before the first is forked.

Importing Megatron and transformers takes ten seconds. What every rank would do again, to the same end, is done here
too: the core's parser of 900 flags, which Megatron builds twice in a run, from help texts that it finds in its sources,
and the list of installed plug-ins, which torch reads from every package's metadata whenever a process group is made.
"""

import argparse
import functools
import importlib.metadata
from typing import Any

import megatron.core.datasets.helpers_cpp
import megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader  # at the first load
import megatron.core.models.mimo  # by pretrain()
import megatron.core.tokenizers.text.models  # noqa: F401  # by the first tokenizer
import pytest  # noqa: F401  # by the module of every function that is called
from megatron.training import arguments
from megatron.training.argument_utils import ArgumentGroupFactory

import megatron_emoe.hf.export_model
import megatron_emoe.hf.layer_check
import megatron_emoe.hf.verify
import megatron_emoe.training.finished
import megatron_emoe.training.loop
import megatron_emoe.training.one_run  # noqa: F401
import tests.hf_models
import tests.tiny  # noqa: F401
from megatron_emoe.settings import elastic_config, field_flags
from megatron_emoe.training import megatron_flags

_read = ArgumentGroupFactory._get_field_docstrings
_known: dict[type, dict[str, str]] = {}


def _read_once(self: Any, cls: type) -> dict[str, str]:
    if cls not in _known:
        _known[cls] = _read(self, cls)
    return _known[cls]


ArgumentGroupFactory._get_field_docstrings = _read_once

_add = arguments.add_megatron_arguments
_made = [vars(_add(argparse.ArgumentParser(allow_abbrev=False))) for _ in range(2)]
_OWN = {"prog", "usage", "description", "epilog", "formatter_class"}


def _add_once(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The core's function: a parser without flags takes over those of one that was made before the fork."""
    if len(parser._actions) > 1 or parser.allow_abbrev or not _made:  # more than --help
        return _add(parser)
    vars(parser).update({name: value for name, value in _made.pop().items() if name not in _OWN})
    return parser


arguments.add_megatron_arguments = _add_once
importlib.metadata.entry_points = functools.cache(importlib.metadata.entry_points)
importlib.metadata.entry_points(group="torch.distributed.backends")

field_flags.field_texts(elastic_config.ElasticConfig)  # read from the source once in a process
megatron_flags.why_refused("--none")  # all patterns: compiled once in a process
