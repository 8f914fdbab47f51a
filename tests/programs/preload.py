"""What programs find in memory beside what ranks do (tests/preload.py): the libraries of the tools and of torchrun."""

import gc

import lm_eval.models.huggingface  # noqa: F401
import matplotlib.figure  # noqa: F401
import torch.distributed.run
import torch.utils.tensorboard  # noqa: F401

import megatron_emoe.hf.import_model
import megatron_emoe.hf.inspect_model
import megatron_emoe.plan.preflight
import megatron_emoe.plan.report
import megatron_emoe.sweep.on_transformers
import megatron_emoe.sweep.tail_fit
import megatron_emoe.tasks.on_megatron
import megatron_emoe.tasks.on_transformers
import megatron_emoe.training.profiling  # noqa: F401

gc.freeze()  # what is here is never garbage: no child need look at it
