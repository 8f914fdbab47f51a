"""Megatron-Core's own GPT training on mock data, nothing of this project's model: what host mode must be able to run.

As a script it takes Megatron's flags. As a module, `train(flags)` runs in this process and returns what happened.
"""

import functools
import sys
from collections.abc import Callable
from typing import Any

from megatron_emoe.host import mode as host_mode


class Recorder:
    """What one rank saw: the loss of every micro-batch in order (on the last pipeline stage), and the model."""

    def __init__(self, watch: Callable[["Recorder"], None]) -> None:
        self.watch = watch
        self.train_losses: list[float] = []
        self.valid_losses: list[float] = []
        self.model: Any = None

    def result(self) -> dict[str, Any]:
        weights = {name: weight.detach().clone() for name, weight in self.model.named_parameters()}
        return {"train": self.train_losses, "valid": self.valid_losses, "weights": weights}


def train(flags: list[str], watch: Callable[[Recorder], None] = lambda recorder: None) -> dict[str, Any]:
    """Run megatron.training.pretrain with these flags until it ends or exits in order; returns Recorder.result().

    `watch` is called with the recorder before each forward step.
    """
    sys.argv = ["pretrain_stock.py", *host_mode.setup(flags)]
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(extra_args_provider=host_mode.add_arguments)
    config = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    recorder = Recorder(watch)
    step = functools.partial(forward_step, recorder)
    try:
        pretrain(config, build_datasets, ModelType.encoder_or_decoder, step)
    except SystemExit as leave:
        if leave.code or recorder.model is None:
            raise
    return recorder.result()


def build_datasets(sizes: list[int], vp_stage: int | None = None) -> Any:
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
    from megatron.training import get_args, get_tokenizer

    config = GPTDatasetConfig(
        random_seed=get_args().seed,
        sequence_length=get_args().seq_length,
        split="90,5,5",
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    return BlendedMegatronDatasetBuilder(MockGPTDataset, sizes, lambda: True, config).build()


build_datasets.is_distributed = True


def forward_step(recorder: Recorder, data_iterator: Any, model: Any) -> tuple[Any, Any]:
    batch = {key: value.cuda() for key, value in next(data_iterator).items()}
    recorder.model = model
    recorder.watch(recorder)
    losses = recorder.train_losses if model.training else recorder.valid_losses
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"], labels=batch["labels"])
    return output, functools.partial(mean_loss, losses, batch["loss_mask"])


def mean_loss(losses: list[float], mask: Any, output: Any) -> tuple[Any, Any, dict[str, Any]]:
    import torch

    total = (output.float() * mask).sum()
    count = mask.sum().to(torch.int)
    losses.append(total.item() / count.item())
    return total, count, {"lm loss": torch.stack([total.detach(), count.float()])}


if __name__ == "__main__":
    train(sys.argv[1:])
