"""Training on packed chats (--sft) in host mode: the same in every layout, and padding counts nowhere."""

import contextlib
import io
import json
import sys
from pathlib import Path

import pytest
import torch

from tests import hf_models, sweeps, tiny
from tests.data.test_packed_chats import alone_by_transformers, random_chats, write_chats
from tests.distributed import run_ranks

CHATS = random_chats(30)
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
def folder(tmp_path_factory) -> Path:
    """A model, and chats."""
    folder = tmp_path_factory.mktemp("sft")
    write_chats(folder / "chats", CHATS)
    hf_models.save("olmoe", folder / "hf", tokenizer=True)
    run_ranks(prepare, 1, folder)
    return folder


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, tiny.Run]:
    """The last rank's of each layout: it has the losses."""
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


def swept(folder: Path) -> dict:
    packed = {"sft": True, "no_create_attention_mask_in_dataloader": True, "seq_length": 32, "max_eval_tokens": 10**6}
    words = sweeps.flags(folder / "chats", folder / "sweep.json", k=[2, 4], micro_batch_size=1, **packed)
    answer = sweeps.run_tool("sweep_k", "--load", folder / "megatron", "--global-batch-size", 1, *words)
    assert answer.status in (0, None), answer.err
    return {cell["k"]: cell for cell in json.loads((folder / "sweep.json").read_text())["cells"]}


@pytest.mark.slow
def test_a_sweep_counts_every_answer_alike(folder):
    cells = run_ranks(swept, 1, folder)[0]
    answers = sum(len(ids) for chat in CHATS for ids, counts in chat if counts)
    for k, cell in cells.items():
        expected = alone_by_transformers(folder / "hf", CHATS, k).sum().item() / answers
        assert cell["loss"] == pytest.approx(expected, rel=1e-5)
