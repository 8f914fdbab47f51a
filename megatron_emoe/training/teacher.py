"""A frozen teacher: the model of another checkpoint, whose output at its own k is a second target at every k'.

What a model lost or gained at some k' by continued training is measured against the model that it began as: with that
one as the teacher, budgets below and above k are drawn to what it says at k, and k itself is kept there (Hinton et al.,
arXiv 1503.02531, at temperature 1). It costs the weights once more in memory, without gradients or optimizer state, and
one forward pass of every micro-batch.
"""

from __future__ import annotations

from argparse import Namespace
from copy import copy
from dataclasses import fields
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import unwrap_model
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from torch import Tensor, nn

from megatron_emoe.model.checkpoint import locate, stored_args
from megatron_emoe.model.layer_spec import ElasticGPTModelConfig, elastic_model_config
from megatron_emoe.model.stored_model import check_shape
from megatron_emoe.routing.active_k import get_active_k
from megatron_emoe.settings.elastic_config import MODEL_FEATURES, ElasticConfig

SOURCE = "--emoe-teacher"


def check_teacher(args: Namespace) -> None:
    """Check the checkpoint of --emoe-teacher, where there is one, before anything is built.

    Raises:
        ValueError: it is not there, damaged, or of a model with other weights.
    """
    if args.emoe_teacher is not None:
        check_shape(
            args, stored_args(locate(args.emoe_teacher, source=SOURCE), SOURCE), f"{SOURCE} {args.emoe_teacher}"
        )


def load_teacher(args: Namespace) -> nn.Module:
    """The teacher, frozen and in evaluation mode, in the layout of this run. Collective; no random number is drawn, so
    that a run that goes on draws what one that never stopped draws."""
    config = _config(args)
    (model,) = config.get_builder_cls()(config).build_distributed_models(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        ddp_config=pretrain_cfg_container_from_args(args, config).ddp,
        wrap_with_ddp=False,
    )
    bare = unwrap_model(model)
    stored = dist_checkpointing.load({"model": bare.sharded_state_dict()}, str(config.checkpoint))
    bare.load_state_dict(stored["model"])
    return model.requires_grad_(False).eval()


def _config(args: Namespace) -> ElasticGPTModelConfig:
    """The configuration of this run's model as plain top-k at the teacher's own k."""
    checkpoint = locate(args.emoe_teacher, source=SOURCE)
    own = copy(args)
    own.load, own.pretrained_checkpoint, own.finetune, own.save = None, None, False, None
    for field in fields(ElasticConfig):
        if field.name not in MODEL_FEATURES:
            setattr(own, field.name, field.default)
    config = elastic_model_config(own)
    config.checkpoint = checkpoint
    config.transformer.moe_router_topk = stored_args(checkpoint, SOURCE).moe_router_topk
    config.transformer.perform_initialization = False
    return config


def teacher_logits(teacher: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """What the teacher says at its own k: logits [batch, sequence, V / ranks]. inputs: without labels."""
    with torch.no_grad(), get_active_k().evaluating(None):
        return teacher(**inputs)
