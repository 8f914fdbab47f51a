"""Train or continue-train an elastic mixture of experts with Megatron-Core.

    torchrun --nproc-per-node 2 pretrain_emoe.py --emoe-selection coactivation --emoe-pool-k 8 ...

All of Megatron's flags (--help-all), plus the group "elastic MoE" (--help). Continue from a checkpoint with --load DIR
--finetune.
"""

import os
from argparse import Namespace
from pathlib import Path

from megatron_emoe.host import mode as host_mode
from megatron_emoe.training import exit_signals
from megatron_emoe.training.first_look import look_at_training

exit_signals.start()
look_at_training(__doc__)
host_mode.start()

from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.enums import ModelType  # noqa: E402
from megatron.training import pretrain  # noqa: E402
from megatron.training.argument_utils import pretrain_cfg_container_from_args  # noqa: E402
from torch.distributed.checkpoint.api import CheckpointException  # noqa: E402

from megatron_emoe.data.datasets import build_datasets  # noqa: E402
from megatron_emoe.hf.companions import keep_companions  # noqa: E402
from megatron_emoe.model.checkpoint import recovery_of  # noqa: E402
from megatron_emoe.model.layer_spec import elastic_model_config  # noqa: E402
from megatron_emoe.model.recovery import failed_save, report_failed_save, set_aside_flipped  # noqa: E402
from megatron_emoe.settings.refusal import fail  # noqa: E402
from megatron_emoe.training import profiling  # noqa: E402
from megatron_emoe.training.arguments import parse  # noqa: E402
from megatron_emoe.training.finished import keep_finished  # noqa: E402
from megatron_emoe.training.loop import ElasticLoop  # noqa: E402
from megatron_emoe.training.one_run import take_folder  # noqa: E402


def main() -> None:
    args = parse()
    exit_signals.hand_over()
    try:
        profiling.start(args)
    except ValueError as error:
        fail(error)
    model = elastic_model_config(args)
    loop = ElasticLoop(args, model.transformer)
    keep_finished(args)
    if args.rank == 0:
        if args.save:
            take_folder(args.save)
        for source in (args.load, args.pretrained_checkpoint):  # a run that restarts itself loads where it saves
            keep_companions(source, args.save)
    try:
        pretrain(
            pretrain_cfg_container_from_args(args, model),
            build_datasets,
            ModelType.encoder_or_decoder,
            loop.forward_step,
            non_loss_data_func=loop.validate_at_each_k if model.transformer.emoe_eval_k else None,
        )
    except (Exception, CheckpointException) as error:  # torch's is no Exception
        if args.rank == 0:
            clean_up(args, error)
        raise
    if args.rank == 0 and "EMOE_FINISHED" in os.environ:  # a run that a signal ends leaves from within pretrain()
        Path(os.environ["EMOE_FINISHED"]).touch()


def clean_up(args: Namespace, error: BaseException) -> None:
    """What a run that ends with this error leaves in its folder: said, and put in order. Called on the first rank."""
    if args.save and failed_save(error):
        report_failed_save(Path(args.save), error, args.curr_iteration + 1)
    elif isinstance(error, CheckpointingException) and recovery_of(args) is not None:  # of --verify-integrity
        set_aside_flipped(Path(args.load), error)


if __name__ == "__main__":
    main()
