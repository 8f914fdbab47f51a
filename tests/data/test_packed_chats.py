"""Chats in training: packed, each has the loss that transformers gives it alone; what a sample holds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from megatron.core.datasets.utils import Split

from megatron_emoe.data.files import read_token_files
from megatron_emoe.data.packed_chats import PackedChats, pack
from tests import hf_models
from tests.distributed import run_ranks

ROOM = 32
PAD, EOD = 0, 2

Chat = list[tuple[list[int], int]]
"""Stretches of ids, and whether they count."""


class Tokenizer:
    pad, eod, vocab_size = PAD, EOD, 128
    unique_identifiers = "none"


def write_chats(prefix: Path, chats: list[Chat]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.int32, multimodal=True)
    for chat in chats:
        for ids, counts in chat:
            builder.add_item(torch.tensor(ids), counts)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def dataset(prefix: str, split: Split = Split.valid, samples: int | None = None, **changes) -> PackedChats:
    settings = {
        "random_seed": 7,
        "sequence_length": ROOM,
        "tokenizer": Tokenizer(),
        "split": "1",
        "blend": ([prefix], None),
    }
    config = GPTDatasetConfig(
        **(settings | changes), reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False
    )
    low = PackedChats.build_low_level_dataset(prefix, config)
    chats = np.arange(PackedChats.numel_low_level_dataset(low), dtype=np.int32)
    return PackedChats(low, prefix, chats, samples, split, config)


def random_chats(count: int, seed: int = 3) -> list[Chat]:
    """Two turns each, questions that do not count and answers that do; all ids below 128, the first one EOD."""
    generator = np.random.default_rng(seed)
    parts = [generator.integers(3, 128, length).tolist() for length in generator.integers(2, 7, 4 * count)]
    return [[(parts[4 * n + i] + [EOD] * (i % 2), i % 2) for i in range(4)] for n in range(count)]


def test_best_fit_by_hand():
    # 10: 6 opens a, 5 opens b, 4 fills a, 3 goes to b (2 left), 2 fills b, 1 opens c.
    assert pack([6, 5, 4, 3, 2, 1], 10) == [[0, 2], [1, 3, 4], [5]]
    assert pack([], 10) == []
    with pytest.raises(ValueError, match="a chat takes 11 places; --seq-length 10 must hold it"):
        pack([3, 11], 10)


def test_packing_loses_no_chat_and_overfills_no_sequence():
    lengths = np.random.default_rng(1).integers(1, 101, 2000).tolist()
    packs = pack(lengths, 100)
    assert sorted(chat for each in packs for chat in each) == list(range(2000))
    assert all(sum(lengths[chat] for chat in each) <= 100 for each in packs)
    assert len(packs) <= 1.03 * sum(lengths) / 100


def test_a_sample_by_hand(tmp_path):
    # Two turns: the assistant says 6 7 2 and 9 2. Another chat: 11 2.
    chats = [[([4, 5], 0), ([6, 7, 2], 1), ([8], 0), ([9, 2], 1)], [([10], 0), ([11, 2], 1)]]
    sample = dataset(write_chats(tmp_path / "d", chats), sequence_length=12)[0]
    assert sample["tokens"].tolist() == [4, 5, 6, 7, 2, 8, 9, 10, 11, 0, 0, 0]
    assert sample["labels"].tolist() == [5, 6, 7, 2, 8, 9, 2, 11, 2, 0, 0, 0]
    assert sample["loss_mask"].tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0]
    assert sample["position_ids"].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1, 0, 1, 2]
    assert sample["cu_seqlens"].tolist() == [0, 7, 9, *[12] * 10]
    assert sample["max_seqlen"].item() == 7
    assert sample["padding_mask"].tolist() == [0] * 9 + [1] * 3


def test_with_context_parallelism_every_chat_is_filled_up(tmp_path):
    chats = [[([4], 0), ([6, 7, 2], 1)], [([10], 0), ([11, 2], 1)]]
    sample = dataset(write_chats(tmp_path / "d", chats), sequence_length=12, context_parallel_size=2)[0]
    assert sample["tokens"].tolist() == [4, 6, 7, 0, 10, 11, 0, 0, 0, 0, 0, 0]
    assert sample["cu_seqlens"].tolist()[:4] == [0, 4, 8, 12]
    assert sample["padding_mask"].tolist() == [0, 0, 0, 1, 0, 0, 1, 1, 1, 1, 1, 1]
    assert sample["loss_mask"].tolist() == [1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0]


def test_every_epoch_has_every_chat_in_another_order(tmp_path):
    prefix = write_chats(tmp_path / "d", random_chats(40))
    data = dataset(prefix, Split.train, samples=200)
    assert len(data) == 200 and 1 < data.packs < 100
    seen = [[tuple(data[epoch * data.packs + at]["tokens"].tolist()) for at in range(data.packs)] for epoch in (0, 1)]
    assert sorted(seen[0]) == sorted(seen[1]) and seen[0] != seen[1]
    again = dataset(prefix, Split.train, samples=5)  # of another length: the same samples
    assert [tuple(again[at]["tokens"].tolist()) for at in range(5)] == seen[0][:5]
    other = dataset(prefix, Split.train, samples=5, random_seed=8)
    assert [tuple(other[at]["tokens"].tolist()) for at in range(5)] != seen[0][:5]
    held_out = [dataset(prefix, random_seed=seed)[0]["tokens"].tolist() for seed in (7, 8)]
    first = random_chats(40)[0][0][0]  # what the first chat asks
    assert held_out[0] == held_out[1] and held_out[0][: len(first)] == first


def test_the_files_tell_of_chats(tmp_path):
    files = read_token_files(write_chats(tmp_path / "d", random_chats(3)))
    assert files.has_modes and files.documents == 3 and files.sequences == 12
    expected = [sum(len(ids) for ids, _ in chat) for chat in random_chats(3)]
    assert files.document_lengths().tolist() == expected and files.tokens == sum(expected)


def packed_losses(folder: Path, prefix: str, *flags: str) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Token losses of all packed sequences in one micro-batch, [1, T]: kept apart, and as one text; and the batch."""
    from torch.utils.data import default_collate

    from megatron_emoe.data.datasets import get_batch
    from megatron_emoe.hf.one_process import evaluating
    from megatron_emoe.model.layer_spec import elastic_model_config
    from megatron_emoe.training.held_out import load_model
    from megatron_emoe.training.loop import model_inputs

    torch.distributed.destroy_process_group()
    data = dataset(prefix)
    with evaluating(folder, length=ROOM, bf16=False, flags=flags) as args, torch.no_grad():
        (model,) = load_model(args, elastic_model_config(args))
        args.sft, args.create_attention_mask_in_dataloader = True, False
        args.micro_batch_size = data.packs
        batch = get_batch(iter([default_collate([data[at] for at in range(data.packs)])]))
        apart = model(**model_inputs(batch))
        as_one = model(**model_inputs(batch | {"packed_seq_params": None}))
    return apart, as_one, batch


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["olmoe", "deepseek_v2", "ernie4_5_moe"])
def test_packed_chats_have_the_losses_that_transformers_gives_them_alone(kind, tmp_path):
    chats = random_chats(7)
    hf_models.save(kind, tmp_path / "hf")
    prefix = write_chats(tmp_path / "chats", chats)
    apart, as_one, batch = run_ranks(_imported_and_packed, 1, tmp_path, prefix)[0]
    sums, together = (_sums_of_chats(losses, batch) for losses in (apart, as_one))
    alone = alone_by_transformers(tmp_path / "hf", chats)
    assert len(sums) == len(alone) and batch["packed_seq_params"].max_seqlen_q <= ROOM
    torch.testing.assert_close(sums, alone, rtol=1e-5, atol=1e-4)
    assert (together - alone).abs().max() > 0.05  # else the test would not see chats that look at each other


def _imported_and_packed(folder: Path, prefix: str):
    from megatron_emoe.hf.import_model import import_model

    torch.distributed.destroy_process_group()
    import_model(folder / "hf", folder / "megatron", report=lambda _: None)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return packed_losses(folder / "megatron", prefix)


def _sums_of_chats(losses: torch.Tensor, batch: dict) -> torch.Tensor:
    """Of the answers' losses, sorted by the ids of the chat."""
    bounds = batch["packed_seq_params"].cu_seqlens_q.tolist()
    found = {}
    for begin, end in zip(bounds, bounds[1:], strict=False):
        if not batch["padding_mask"][0, begin]:
            ids = tuple(batch["tokens"][0, begin:end].tolist())
            found[ids] = (losses * batch["loss_mask"])[0, begin:end].sum()
    return torch.stack([found[ids] for ids in sorted(found)])


def alone_by_transformers(hf: Path, chats: list[Chat], k: int | None = None) -> torch.Tensor:
    """The same from transformers, each chat in a forward pass of its own. k: active experts, if not the model's."""
    from megatron_emoe.hf.comparison import set_hf_k
    from megatron_emoe.hf.verify import load_hf

    model = load_hf(hf, torch.float32)
    if k is not None:
        set_hf_k(model.model.layers, k)
    found = {}
    for chat in chats:
        ids = torch.tensor([token for stretch, _ in chat for token in stretch])
        counts = torch.tensor([mode for stretch, mode in chat for _ in stretch])
        with torch.no_grad():
            logits = model(ids[None, :-1], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        found[tuple(ids[:-1].tolist())] = (losses * counts[1:]).sum()
    return torch.stack([found[ids] for ids in sorted(found)])
