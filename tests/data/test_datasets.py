"""The datasets and the batches of every rank, against a token stream whose order can be seen.

The corpus counts: one document 0, 1, 2, ... so that a sample is a run of consecutive numbers and its first token says
where in the stream it begins.
"""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_emoe.data import kept_order
from megatron_emoe.data.datasets import is_padding
from tests.distributed import run_ranks

SEQ, MICRO_BATCH, TOKENS, VOCAB = 32, 2, 1000, 1024
EOD = VOCAB - 1
KEYS = ["tokens", "labels", "loss_mask", "attention_mask", "position_ids"]
MODEL = "--num-layers 4 --hidden-size 32 --num-attention-heads 2 --max-position-embeddings 64 --lr 1e-3".split()
RUN = "--train-iters 4 --eval-iters 1 --eval-interval 4 --tokenizer-type NullTokenizer --num-workers 0".split()
SIZES = [
    "--seq-length",
    SEQ,
    "--micro-batch-size",
    MICRO_BATCH,
    "--global-batch-size",
    MICRO_BATCH,
    "--vocab-size",
    VOCAB,
]


def write(prefix: Path, *documents: list[int]) -> str:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", np.uint16)
    for document in documents:
        builder.add_item(torch.tensor(document))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


@pytest.fixture
def counting(tmp_path) -> str:
    return write(tmp_path / "counting", list(range(TOKENS)))


def start(*flags: object):
    """Megatron's state on this rank for these flags, as the training loop sets it up."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.global_vars import destroy_global_vars

    from megatron_emoe.host import mode as host_mode

    parallel_state.destroy_model_parallel()
    destroy_global_vars()
    destroy_num_microbatches_calculator()
    # Host mode has no attention over several context-parallel ranks; batches for them need none.
    sys.argv[1:] = [*host_mode.setup([*MODEL, *RUN, *map(str, SIZES)]), *map(str, flags)]
    args = parse_and_validate_args(extra_args_provider=host_mode.add_arguments)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        args.virtual_pipeline_model_parallel_size,
        context_parallel_size=args.context_parallel_size,
    )
    return args


def batches(sizes, count: int) -> tuple[list, list]:
    """The datasets of this rank and its part of the first batches of the training set."""
    from megatron.training.datasets.data_samplers import build_pretraining_data_loader

    from megatron_emoe.data.datasets import build_datasets, get_batch

    datasets = build_datasets(sizes)
    loader = build_pretraining_data_loader(datasets[0], 0)
    iterator = iter(loader) if loader is not None else None
    return datasets, [get_batch(iterator) for _ in range(count)]


def one_epoch(prefix: str) -> dict:
    start("--train-data-path", prefix, "--valid-data-path", prefix)
    samples = (TOKENS - 1) // SEQ
    datasets, found = batches([samples, 2, None], samples // MICRO_BATCH)
    assert datasets[2] is None
    assert all(list(batch) == [*KEYS, "packed_seq_params", "padding_mask"] for batch in found)
    assert all(batch["packed_seq_params"] is batch["padding_mask"] is None for batch in found)
    return {key: torch.cat([batch[key] for batch in found]) for key in KEYS}


def test_an_epoch_is_the_token_stream_in_runs_with_labels_one_ahead(counting):
    epoch = run_ranks(one_epoch, 1, counting)[0]
    tokens, labels = epoch["tokens"], epoch["labels"]
    # 1000 tokens: 31 samples of 32 and one token to predict, 992 + 1 <= 1000. A micro-batch of 2 leaves the last out.
    assert tokens.shape == labels.shape == epoch["loss_mask"].shape == epoch["position_ids"].shape == (30, SEQ)
    assert (tokens.dtype, labels.dtype, epoch["position_ids"].dtype) == (torch.int64, torch.int64, torch.int64)
    starts = tokens[:, :1]
    assert torch.equal(tokens, starts + torch.arange(SEQ))
    assert torch.equal(labels, tokens + 1)
    assert len(set(starts.flatten().tolist())) == 30
    assert set(starts.flatten().tolist()) < set(range(0, 992, SEQ))
    assert starts.flatten().tolist() != sorted(starts.flatten().tolist())  # shuffled
    assert torch.equal(epoch["loss_mask"], torch.ones(30, SEQ))
    assert torch.equal(epoch["position_ids"], torch.arange(SEQ).expand(30, SEQ))
    barred = torch.ones(SEQ, SEQ).triu(1).bool()  # True where a later token would be seen
    assert torch.equal(epoch["attention_mask"], barred.expand(30, 1, SEQ, SEQ))


def kept_between(prefix: str, cache: str | None) -> tuple:
    """Labels of the first sample before the data is replaced, after, and read once more; and what the last would be."""
    kept = ("--data-cache-path", cache) if cache else ()

    def first(*more: str) -> list[int]:
        start("--train-data-path", prefix, "--valid-data-path", prefix, *kept, *more)
        return sorted(int(batch["tokens"][0, 0]) for batch in batches([10, 2, None], 5)[1])

    before = first()
    write(Path(prefix), *[[number] * 100 for number in range(10)])
    if cache is None:
        return before, first(), first()
    args = start("--train-data-path", prefix, "--valid-data-path", prefix, *kept, "--dataloader-fast-cache-load")
    with pytest.raises(ValueError, match="leave out --dataloader-fast-cache-load once"):
        kept_order.check_kept_order(args, [prefix])
    args.dataloader_fast_cache_load = False
    kept_order.check_kept_order(args, [prefix])
    kept_order.why_not_written = lambda folder: "Read-only file system"
    with pytest.raises(ValueError, match="cannot be removed .Read-only file system.: name another folder"):
        kept_order.check_kept_order(args, [prefix])
    return before, first(), first("--dataloader-fast-cache-load")


@pytest.mark.parametrize("cache", [None, "elsewhere"])
def test_the_order_that_was_kept_of_replaced_data_is_made_anew(cache, counting, tmp_path, capfd):
    before, after, again = run_ranks(kept_between, 1, counting, cache and str(tmp_path / cache))[0]
    assert all(token % SEQ == 0 for token in before)
    assert after == again != before and max(after) < 10
    write(tmp_path / "other", list(range(TOKENS)))
    outdated = kept_order._outdated(str(tmp_path / "elsewhere"), [str(tmp_path / "other")])
    assert list(outdated) == []  # it is of other data


def end_of_document_flags(prefix: str) -> dict:
    flags = ["--eod-mask-loss", "--reset-position-ids", "--no-create-attention-mask-in-dataloader"]
    start("--train-data-path", prefix, "--eval-iters", 0, *flags)
    return batches([2, None, None], 1)[1][0]


def packed_documents(prefix: str):
    start("--train-data-path", prefix, "--eval-iters", 0, "--dataloader-inter-document-masking")
    return batches([2, None, None], 1)[1][0]


def mock_data() -> list:
    start("--mock-data")
    datasets, found = batches([4, 4, 4], 2)
    return [type(dataset).__name__ for dataset in datasets], found


def scenarios(prefix: str) -> tuple:
    return end_of_document_flags(prefix), packed_documents(prefix), mock_data()


@pytest.mark.slow
def test_document_boundaries_and_mock_data(tmp_path):
    # Documents of 9 tokens and an end: whatever their order, samples cut them at multiples of 32 of a row of tens.
    prefix = write(tmp_path / "d", *([*range(10 * i, 10 * i + 9), EOD] for i in range(20)))
    batch, packed, (classes, mock) = run_ranks(scenarios, 1, prefix)[0]

    is_end = batch["tokens"] == EOD
    assert is_end.any()
    assert torch.equal(batch["loss_mask"], (~is_end).float())
    assert batch["attention_mask"] is None
    for row, positions in zip(is_end.tolist(), batch["position_ids"].tolist(), strict=True):
        expected, position = [], 0
        for end in row:
            expected.append(position)
            position = 0 if end else position + 1
        assert positions == expected

    # Two samples in one row; a document begins at 0, where a sample does, and after every end-of-document token.
    tokens = packed["tokens"]
    assert tokens.shape == packed["labels"].shape == (1, 2 * SEQ)
    begins = sorted({0, SEQ, 2 * SEQ} | {index + 1 for index, token in enumerate(tokens[0].tolist()) if token == EOD})
    params = packed["packed_seq_params"]
    assert params.cu_seqlens_q.tolist() == params.cu_seqlens_kv.tolist() == begins
    assert params.cu_seqlens_q.dtype == torch.int32
    assert (params.max_seqlen_q, params.qkv_format, params.tokens_per_sample) == (10, "thd", SEQ)
    assert packed["padding_mask"] is None
    assert packed["attention_mask"] is None

    assert classes == ["MockGPTDataset"] * 3
    for batch in mock:
        assert batch["tokens"].shape == (MICRO_BATCH, SEQ)
        assert torch.equal(batch["tokens"][:, 1:], batch["labels"][:, :-1])


def parallel_layouts(prefix: str) -> dict:
    """This rank's first batch for every way to divide two ranks, and whether it reads the data itself."""
    layouts = {
        "tensor": ["--tensor-model-parallel-size", 2, "--sequence-parallel"],
        "pipeline": ["--pipeline-model-parallel-size", 2],
        "context": ["--context-parallel-size", 2],
        "data": ["--global-batch-size", 2 * MICRO_BATCH],
        "virtual pipeline": ["--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1],
        "multi-token": [
            "--pipeline-model-parallel-size",
            2,
            "--mtp-num-layers",
            1,
            "--position-embedding-type",
            "rope",
        ],
    }
    found = {}
    for name, flags in layouts.items():
        args = start("--train-data-path", prefix, "--eval-iters", 0, *flags)
        if name == "virtual pipeline":
            found[name] = virtual_stages(args)
            continue
        datasets, (batch,) = batches([20, None, None], 1)
        found[name] = (datasets[0] is not None, batch)
    return found


def virtual_stages(args) -> list:
    from megatron.training.datasets.data_samplers import build_pretraining_data_loader

    from megatron_emoe.data.datasets import build_datasets, get_batch

    found = []
    for vp_stage in range(args.virtual_pipeline_model_parallel_size):
        dataset = build_datasets([20, None, None], vp_stage=vp_stage)[0]
        iterator = None if dataset is None else iter(build_pretraining_data_loader(dataset, 0))
        batch = get_batch(iterator, vp_stage)
        found.append([key for key in KEYS if batch[key] is not None])
    return found


def same(left: dict, right: dict) -> bool:
    return all(torch.equal(left[key], right[key]) for key in KEYS)


@pytest.mark.slow
def test_two_ranks_share_a_batch_as_their_layout_asks(counting):
    first, second = run_ranks(parallel_layouts, 2, counting)
    whole = first["tensor"][1]
    assert torch.equal(whole["tokens"], whole["tokens"][:, :1] + torch.arange(SEQ))

    # Tensor parallel: one reads, both have everything.
    assert (first["tensor"][0], second["tensor"][0]) == (True, False)
    assert same(whole, second["tensor"][1])

    # Pipeline: the first stage embeds, the last computes the loss; each has only what it needs.
    embeds, computes = first["pipeline"][1], second["pipeline"][1]
    assert torch.equal(embeds["tokens"], whole["tokens"]) and torch.equal(computes["labels"], whole["labels"])
    assert embeds["labels"] is None and embeds["loss_mask"] is None
    assert computes["tokens"] is None and computes["position_ids"] is None
    assert torch.equal(computes["loss_mask"], whole["loss_mask"])

    # Context parallel: quarters 0 and 3 here, 1 and 2 there, so that causal attention is even work.
    quarter = SEQ // 4
    outer = [*range(quarter), *range(3 * quarter, SEQ)]
    inner = list(range(quarter, 3 * quarter))
    for batch, columns in ((first["context"][1], outer), (second["context"][1], inner)):
        for key in ("tokens", "labels", "loss_mask", "position_ids"):
            assert torch.equal(batch[key], whole[key][:, columns])
        assert torch.equal(batch["attention_mask"], whole["attention_mask"][:, :, columns])

    # Data parallel: different samples of the same stream, the first ranks' as before.
    assert same(first["data"][1], whole)
    assert not set(first["data"][1]["tokens"].flatten().tolist()) & set(second["data"][1]["tokens"].flatten().tolist())

    # Two model chunks on each rank: 0 and 2 here, 1 and 3 there; only 0 embeds and only 3 computes the loss.
    assert first["virtual pipeline"] == [["tokens", "attention_mask", "position_ids"], []]
    assert second["virtual pipeline"] == [[], ["labels", "loss_mask", "attention_mask"]]

    # Multi-token prediction is on the last stage and embeds there again: it needs the tokens too.
    assert same(second["multi-token"][1], whole)


def conversations(path: str, tokenizer: str, *layout: object) -> dict:
    flags = ["--sft", "--no-create-attention-mask-in-dataloader", "--sft-tokenizer-prompt-format", "default"]
    flags += ["--tokenizer-type", "SFTTokenizer", "--tokenizer-model", tokenizer]
    start("--train-data-path", path, "--eval-iters", 0, *flags, *layout)
    return batches([MICRO_BATCH, None, None], 1)[1][0]


def padding_by_layout(path: str, tokenizer: str) -> dict[str, torch.Tensor]:
    """What each of two ranks knows of the padding, and what it is given of the tokens."""
    tensor = ["--tensor-model-parallel-size", 2, "--sequence-parallel"]
    layouts = {"tensor": tensor, "pipeline": ["--pipeline-model-parallel-size", 2]}
    return {name: conversations(path, tokenizer, *flags)["padding_mask"] for name, flags in layouts.items()}


def save_letter_tokenizer(folder: Path) -> None:
    """A Hugging Face tokenizer of one-letter words: <unk> 0, <eos> 1, <pad> 2, a 3, b 4, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<eos>", "<pad>", *"abcdefghijklm"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.chat_template = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}"
    fast.save_pretrained(folder)


@pytest.mark.slow
def test_conversations_are_packed_and_kept_apart(tmp_path):
    pytest.importorskip("datasets")
    save_letter_tokenizer(tmp_path / "tokenizer")
    roles = ["system", "user", "assistant"] * 2
    contents = ["a b", "c d e", "f g", "h", "i", "j k l m"]  # two conversations: 7 tokens and 6
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    (tmp_path / "chat.jsonl").write_text(2 * (json.dumps({"messages": messages}) + "\n"))
    batch = run_ranks(conversations, 1, str(tmp_path / "chat.jsonl"), str(tmp_path / "tokenizer"))[0]
    letters = list(range(3, 16))
    sample = letters + [2] * (SEQ - 13)
    assert batch["tokens"].tolist() == [2 * sample]
    assert batch["labels"][0, :13].tolist() == [*letters[1:], 2]
    assert batch["loss_mask"][0, :SEQ].tolist() == [1.0] * 12 + [0.0] * (SEQ - 12)
    # The second conversation takes the padding after it; the second sample follows in the same row.
    assert batch["packed_seq_params"].cu_seqlens_q.tolist() == [0, 7, SEQ, SEQ + 7, 2 * SEQ]
    assert batch["position_ids"][0, :9].tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 1]
    assert batch["padding_mask"].tolist() == [2 * ([False] * 13 + [True] * (SEQ - 13))]
    for found in run_ranks(padding_by_layout, 2, str(tmp_path / "chat.jsonl"), str(tmp_path / "tokenizer")):
        assert all(torch.equal(mask, batch["padding_mask"]) for mask in found.values())  # not every stage has tokens


def test_what_fills_up_a_sequence():
    tokens = torch.tensor([[5, 2, 2, 7, 1, 2, 2], [2, 5, 6, 7, 1, 1, 1]])
    assert is_padding(tokens, pad=2, eod=1).tolist() == (tokens == 2).tolist()
    # Where the end of a document fills up too, one of them ends it.
    ends = is_padding(tokens, pad=1, eod=1)
    assert ends.nonzero().tolist() == [[1, 5], [1, 6]]


def a_blend(first: str, second: str) -> tuple:
    start("--data-path", 3, first, 1, second, "--split", "100", "--eval-iters", 0)
    datasets, found = batches([16, 0, 0], 8)
    return type(datasets[0]).__name__, torch.cat([batch["tokens"] for batch in found])


def test_a_blend_draws_by_weight(tmp_path, counting):
    other = write(tmp_path / "other", [0] * 700)
    name, tokens = run_ranks(a_blend, 1, counting, other)[0]
    assert name == "BlendedDataset"
    from_other = (tokens == 0).all(dim=1).sum().item()
    assert (from_other, len(tokens)) == (4, 16)  # a quarter
