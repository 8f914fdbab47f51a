"""What is left out of a start's output: these words of the installed libraries, and no others."""

import logging
import warnings
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_emoe.settings.quiet import leave_out_noise

SAID = {
    "megatron/core/optimizer/__init__.py": "Transformer Engine and Apex are not installed. Falling back",
    "megatron/core/models/backends.py": "Apex is not installed. Falling back to Torch Norm",
    "torch/distributed/checkpoint/state_dict_loader.py": "torch.distributed is disabled, unavailable or",
}


@pytest.mark.parametrize("name", SAID)
def test_what_nobody_can_act_on_is_left_out_and_the_rest_is_said(name):
    package, _, rest = name.partition("/")
    (folder, *_) = find_spec(package).submodule_search_locations
    assert SAID[name] in (Path(folder) / rest).read_text()  # else nobody says it any more
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        leave_out_noise()
        warnings.warn(SAID[name], stacklevel=1)
        warnings.warn(f"Loss of data: {SAID[name]}", stacklevel=1)
    assert [str(each.message)[:12] for each in said] == ["Loss of data"]


def test_the_list_of_a_model_s_parameters_is_left_out(caplog):
    leave_out_noise()
    logger = logging.getLogger("megatron.core.distributed.param_and_grad_buffer")
    both = caplog.at_level(logging.INFO, logger.name), caplog.at_level(logging.INFO, "torch.utils.cpp_extension")
    with both[0], both[1]:
        logger.info("Number of buckets: %d\nParams for bucket 1 (3 elements):\n\ta.weight\n\tb.weight", 1)
        logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found, using %s", "/cuda")
        logging.getLogger("torch.utils.cpp_extension").warning("a compiler is missing")
    assert caplog.messages == ["Number of buckets: 1\nParams for bucket 1 (3 elements):", "a compiler is missing"]
