"""What Megatron-Core and torch say at every start, on every rank, that nobody can act on: left out.

Each is named here by its words; all else that they say is printed as ever.
"""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    r"(Transformer Engine and )?Apex (is|are) not installed",  # host/engine.py says what that means
    r"Only transformer-engine>=[\d.]+ supports MoE experts",
    r"\w+ is experimental and still under active development",
    r"torch\.distributed is disabled, unavailable or",  # a checkpoint's arguments, read before ranks meet
    r"The argument order of load has been changed",
    r"Please use DTensor instead",
    r"`torch\.distributed\.all_gather_into_tensor` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",  # by the distributed optimizer
    r"'pin_memory' argument is set as true but no accelerator is found",
)
_LINES = {"torch.utils.cpp_extension": "No CUDA runtime is found"}
"""Logger -> how a line begins that it leaves out."""
_LISTS = ("megatron.core.distributed.param_and_grad_buffer",)
"""Loggers of lines that are followed by every parameter of a model, indented."""


def leave_out_noise() -> None:
    """Call before Megatron-Core is imported. What a user has set by -W or PYTHONWARNINGS for these does not count."""
    for words in _WARNINGS:
        warnings.filterwarnings("ignore", message=words)
    for name in _LINES:
        logging.getLogger(name).addFilter(_is_wanted)
    for name in _LISTS:
        logging.getLogger(name).addFilter(_without_list)


def _is_wanted(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LINES[record.name])


def _without_list(record: logging.LogRecord) -> bool:
    first, *rest = record.getMessage().split("\n")
    record.msg, record.args = "\n".join([first, *(line for line in rest if not line.startswith("\t"))]), ()
    return True
