"""What programs find in memory beside what ranks do (tests/preload.py): the libraries of the tools and of torchrun."""

import gc
import multiprocessing.managers
import multiprocessing.popen_fork
import multiprocessing.queues  # noqa: F401
import sys
import weakref

import lm_eval.models.huggingface  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch.distributed.run
import torch.utils.serialization.config
import torch.utils.tensorboard  # noqa: F401
from torch.distributed.elastic.rendezvous import dynamic_rendezvous

import megatron_emoe.hf.import_model
import megatron_emoe.hf.inspect_model
import megatron_emoe.plan.preflight
import megatron_emoe.plan.report
import megatron_emoe.sweep.on_transformers
import megatron_emoe.sweep.tail_fit
import megatron_emoe.tasks.on_megatron
import megatron_emoe.tasks.on_transformers
import megatron_emoe.training.profiling  # noqa: F401

# The name of a caller, which torchrun notes a dozen times: it reads the sources of all callers, which takes a second.
dynamic_rendezvous.get_method_name = lambda depth=2: sys._getframe(depth).f_code.co_name

gc.freeze()  # what is here is never garbage: no child need look at it
for finalizer in list(weakref.finalize._registry):  # type: ignore[attr-defined]
    finalizer.atexit = False  # what is here is not for a child to take apart at its end: torch's operators, one by one
