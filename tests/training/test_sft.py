"""Training on packed chats (--sft) in host mode: the same in every layout, and padding counts nowhere."""

import contextlib
import io
import sys
from pathlib import Path

import pytest
import torch

from tests import hf_models, tiny
from tests.data.test_packed_chats import random_chats, write_chats
from tests.distributed import run_ranks

LAYOUTS = {
    "one": (1, ""),
    "tensor, recomputed": (
        2,
        "--tensor-model-parallel-size 2 --sequence-parallel --recompute-granularity full --recompute-method uniform "
        "--recompute-num-layers 1",
    ),
    "pipeline": (2, "--pipeline-model-parallel-size 2"),
}

RUN = """--sft --no-create-attention-mask-in-dataloader --tokenizer-type NullTokenizer --vocab-size 128 --seq-length 32
    --micro-batch-size 1 --global-batch-size 2 --train-iters 2 --lr 5e-3 --lr-decay-style constant --eval-iters 0
    --log-interval 1 --moe-token-dispatcher-type alltoall --moe-router-load-balancing-type aux_loss
    --moe-aux-loss-coeff 0.1 --finetune"""


def train(folder: Path, layout: str) -> tiny.Run:
    """A run of pretrain_emoe.py on this rank, with its own datasets, from the model in `folder`."""
    watch, log = tiny.Watch(), io.StringIO()
    own = ["--load", str(folder / "megatron"), "--train-data-path", str(folder / "chats")]
    sys.argv = ["pretrain_emoe.py", f"@{folder}/megatron/model.args", *RUN.split(), *own, *layout.split()]
    import pretrain_emoe

    with contextlib.redirect_stdout(log):
        pretrain_emoe.main()
    return watch.finish(log.getvalue())


def prepare(folder: Path) -> None:
    from megatron_emoe.hf.import_model import import_model

    torch.distributed.destroy_process_group()
    import_model(folder / "hf", folder / "megatron", report=lambda _: None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, tiny.Run]:
    """The last rank's of each layout: it has the losses."""
    folder = tmp_path_factory.mktemp("sft")
    write_chats(folder / "chats", random_chats(30))
    hf_models.save("olmoe", folder / "hf")
    run_ranks(prepare, 1, folder)
    return {name: run_ranks(train, ranks, folder, layout)[-1] for name, (ranks, layout) in LAYOUTS.items()}


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tensor, recomputed", "pipeline"])
def test_packed_chats_train_alike_in_every_layout(runs, layout):
    one, other = runs["one"], runs[layout]
    assert len(one.losses) == len(other.losses) == 4  # two micro-batches a step
    assert other.losses == pytest.approx(one.losses, rel=2e-5)
    for name, weight in other.weights.items():
        if weight.shape == one.weights[name].shape:
            torch.testing.assert_close(weight, one.weights[name], rtol=1e-4, atol=2e-5)
