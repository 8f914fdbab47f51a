"""check_data against files that were really damaged and flags that really contradict each other."""

import json
import struct
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from megatron.training.arguments import add_megatron_arguments

from megatron_emoe.data import check as data_check
from megatron_emoe.data import packing_check
from megatron_emoe.data.check import check_data
from megatron_emoe.data.files import Sidecar, read_sidecar, read_token_files, tokenizer_digest, write_sidecar

PARSER = add_megatron_arguments(ArgumentParser(allow_abbrev=False))
LENGTHS = [10, 20, 30, 40, 50, 60, 70, 80, 90, 100]  # tokens in each document: 550
VOCAB = 200


def write_dataset(prefix: Path, lengths=LENGTHS, dtype=np.uint16, top: int | None = None) -> str:
    """Documents that count 0, 1, 2, ... VOCAB - 1, 0, ... through the whole data set; `top` is the last token."""
    stream = np.arange(sum(lengths)) % VOCAB
    if top is not None:
        stream[-1] = top
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in np.split(stream, np.cumsum(lengths)[:-1]):
        builder.add_item(torch.from_numpy(document))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def sidecar(**changes) -> Sidecar:
    usual = Sidecar("NullTokenizer", None, None, VOCAB, 199, len(LENGTHS), sum(LENGTHS), 1, 1000, False)
    return replace(usual, **changes)


def parse(*flags: object) -> Namespace:
    """Megatron's own flags with their defaults, and what every case here shares."""
    usual = ["--tokenizer-type", "NullTokenizer", "--vocab-size", VOCAB, "--seq-length", 16, "--micro-batch-size", 2]
    return PARSER.parse_args([str(flag) for flag in (*usual, *flags)])


def message(*flags: object) -> str:
    with pytest.raises(ValueError) as caught:
        check_data(parse(*flags))
    return str(caught.value)


@pytest.fixture
def prefix(tmp_path) -> str:
    return write_dataset(tmp_path / "d")


def test_whole_data_passes(tmp_path, prefix):
    other = write_dataset(tmp_path / "e", dtype=np.int32)
    check_data(parse("--mock-data"))
    check_data(parse("--data-path", prefix, "--split", "60,20,20"))
    check_data(parse("--data-path", 0.3, prefix, 0.7, other, "--split", "60,20,20"))
    check_data(parse("--data-path", prefix, other, other, "--split", "100,0,0", "--eval-iters", 0))
    check_data(parse("--train-data-path", prefix, "--valid-data-path", other))
    (tmp_path / "args.txt").write_text(f"1 {prefix}\n2 {other}\n")
    check_data(parse("--data-args-path", tmp_path / "args.txt", "--split", "80,20"))
    (tmp_path / "args.json").write_text(json.dumps({"train": [prefix], "valid": f"1 {prefix} 2 {other}", "test": None}))
    check_data(parse("--per-split-data-args-path", tmp_path / "args.json"))
    write_sidecar(f"{prefix}.json", sidecar())
    check_data(parse("--data-path", prefix, "--split", "60,20,20"))


def test_the_reader_agrees_with_megatrons(tmp_path):
    for dtype in (np.uint16, np.int32):
        prefix = write_dataset(tmp_path / dtype.__name__, dtype=dtype)
        files, dataset = read_token_files(prefix), IndexedDataset(prefix)
        assert files.dtype == dataset.index.dtype
        assert files.sequence_lengths().tolist() == dataset.sequence_lengths.tolist() == LENGTHS
        assert (files.sequences, files.documents, files.tokens) == (10, len(dataset.document_indices) - 1, 550)
        assert files.max_token_id_at_the_ends() == 199


def cut_file(path: str, keep: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(keep)


def poke(path: str, offset: int, content: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)


# Header 34 bytes, 10 lengths of 4, 10 pointers of 8, 11 document ends of 8: 242 bytes of .idx; 1100 of .bin.
DAMAGE = {
    "empty bin": (lambda p: cut_file(f"{p}.bin", 0), "d.bin is empty"),
    "empty idx": (lambda p: cut_file(f"{p}.idx", 0), "d.idx is empty"),
    "missing bin": (lambda p: Path(f"{p}.bin").unlink(), "d.bin does not exist: a data set is a .bin and an .idx"),
    "missing idx": (lambda p: Path(f"{p}.idx").unlink(), "d.idx does not exist: a data set is a .bin and an .idx"),
    "cut bin": (lambda p: cut_file(f"{p}.bin", 1098), "d.bin has 1098 bytes, {p}.idx describes 1100: one of them"),
    "long bin": (lambda p: poke(f"{p}.bin", 1100, b"xx"), "d.bin has 1102 bytes, {p}.idx describes 1100: one of them"),
    "cut idx": (lambda p: cut_file(f"{p}.idx", 200), "d.idx has 200 bytes, its header asks for 242: half-written"),
    "cut header": (lambda p: cut_file(f"{p}.idx", 20), "d.idx has 20 bytes, its header alone takes 34: cut off"),
    "magic": (lambda p: poke(f"{p}.idx", 0, b"PARQUET!!"), "d.idx is not an index of token ids (magic b'PARQUET!!'"),
    "version": (lambda p: poke(f"{p}.idx", 9, struct.pack("<Q", 2)), "is not an index of token ids (magic b'MMIDIDX"),
    "dtype": (lambda p: poke(f"{p}.idx", 17, b"\x07"), "d.idx is not an index of token ids"),
    "other document ends": (lambda p: poke(f"{p}.idx", 234, struct.pack("<q", 9)), "one of them is half-written"),
    "a length below 0": (
        lambda p: poke(f"{p}.idx", 38, struct.pack("<i", -5)),
        "d.idx is damaged: its sequences do not",
    ),
    "a start elsewhere": (
        lambda p: poke(f"{p}.idx", 90, struct.pack("<q", 2)),
        "d.idx is damaged: its sequences do not",
    ),
    "a document elsewhere": (
        lambda p: poke(f"{p}.idx", 170, struct.pack("<q", 77)),
        "d.idx is damaged: its documents do not follow each other",
    ),
    "nested sidecar": (
        lambda p: Path(f"{p}.json").write_text("[" * 200_000),
        "d.json is not the sidecar of a data set (RecursionError",
    ),
    "a word in a sidecar": (
        lambda p: write_sidecar(f"{p}.json", sidecar(max_token_id="many")),
        "d.json is not the sidecar of a data set (ValueError: max_token_id is 'many', must be of int)",
    ),
    "a sidecar's count below 0": (
        lambda p: write_sidecar(f"{p}.json", sidecar(max_token_id=-1)),
        "(ValueError: max_token_id is -1, must be at least 0)",
    ),
    "sidecar of other data": (
        lambda p: write_sidecar(f"{p}.json", sidecar(tokens=551)),
        "d.json tells of 10 documents and 551 tokens, the data has 10 and 550",
    ),
    "no sidecar": (lambda p: Path(f"{p}.json").write_text("{}"), "d.json is not the sidecar of a data set (KeyError"),
    "cut sidecar": (
        lambda p: Path(f"{p}.json").write_text('{"tok'),
        "d.json is not the sidecar of a data set (JSONDec",
    ),
    "sidecar's largest id": (
        lambda p: write_sidecar(f"{p}.json", sidecar(max_token_id=200)),
        "d has token id 200, the tokenizer of this run (--tokenizer-type NullTokenizer) has ids below 200",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_files(case, prefix):
    damage, expected = DAMAGE[case]
    damage(prefix)
    text = message("--train-data-path", prefix, "--valid-data-path", prefix)
    assert text.startswith("--train-data-path: ")
    assert expected.replace("{p}", prefix) in text


def test_an_index_without_sequences(tmp_path):
    prefix = write_dataset(tmp_path / "d")
    builder = IndexedDatasetBuilder(f"{tmp_path}/none.bin", np.uint16)
    builder.finalize(f"{tmp_path}/none.idx")
    Path(f"{prefix}.idx").write_bytes((tmp_path / "none.idx").read_bytes())
    assert "lists no sequences: the data set is empty" in message("--train-data-path", prefix, "--eval-iters", 0)


def test_what_is_not_a_prefix(tmp_path, prefix):
    (tmp_path / "folder").mkdir()
    text = message("--data-path", tmp_path, "--split", "60,20,20")
    assert f"--data-path: {tmp_path} is a folder, not the prefix of a .bin and .idx pair (it holds d)" in text
    assert "(it holds no .idx file)" in message("--data-path", tmp_path / "folder", "--split", "60,20,20")
    for end in (".bin", ".idx"):
        text = message("--data-path", prefix + end, "--split", "60,20,20")
        assert f"{prefix}{end} is one file of a data set: give the prefix of both, {prefix}" in text
    assert f"{tmp_path}/x.bin does not exist" in message("--data-path", f"{tmp_path}/x", "--split", "60,20,20")
    assert f"{tmp_path}/x.bin does not exist" in message(
        "--data-path", 1, prefix, 1, tmp_path / "x", "--split", "60,40"
    )


def test_a_folder_that_megatron_made_for_its_index_cache_is_no_obstacle(prefix):
    Path(prefix, "cache").mkdir(parents=True)
    check_data(parse("--data-path", prefix, "--split", "60,20,20"))


def test_the_largest_token_id_is_found_without_a_sidecar(tmp_path):
    prefix = write_dataset(tmp_path / "d", top=201)
    text = message("--train-data-path", prefix, "--valid-data-path", prefix)
    assert f"{prefix} has token id 201, the tokenizer of this run" in text
    check_data(parse("--train-data-path", prefix, "--valid-data-path", prefix, "--vocab-size", 202))


def test_the_tokenizer_must_be_the_one_that_made_the_data(tmp_path, prefix):
    from megatron_emoe.data.input_files import look
    from megatron_emoe.data.preprocess import train_tokenizer

    (tmp_path / "a.txt").write_text("some words to learn from, and some more words\n" * 5)
    for name, size in (("a", 290), ("b", 291)):
        text = look(f"{tmp_path}/a.txt", ("text",))
        train_tokenizer([text], f"{tmp_path}/{name}.model", size, 10_000, ("text",), "strict")
    digest = tokenizer_digest(f"{tmp_path}/a.model")
    write_sidecar(f"{prefix}.json", sidecar(tokenizer_model="old/a.model", tokenizer_sha256=digest))
    flags = ["--train-data-path", prefix, "--valid-data-path", prefix, "--tokenizer-type", "SentencePieceTokenizer"]
    check_data(parse(*flags, "--tokenizer-model", tmp_path / "a.model"))
    text = message(*flags, "--tokenizer-model", tmp_path / "b.model")
    assert f"{prefix} was made with tokenizer old/a.model (SHA-256 {digest[:12]}...)" in text
    assert f"--tokenizer-model {tmp_path}/b.model is another one (" in text
    # Without files behind the name, the number of ids still tells. A NullTokenizer stands for any other.
    named = sidecar(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="org/a", vocab_size=290)
    write_sidecar(f"{prefix}.json", named)
    check_data(parse(*flags, "--tokenizer-model", tmp_path / "a.model"))
    check_data(parse("--train-data-path", prefix, "--valid-data-path", prefix))
    text = message(*flags, "--tokenizer-model", tmp_path / "b.model")
    assert f"made with tokenizer org/a (290 ids), --tokenizer-model {tmp_path}/b.model is another one (291 ids)" in text


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], "no data: give --data-path, --train-data-path or --mock-data"),
        (["--mock-data", "--data-path", "{p}"], "--mock-data makes up its data, so it excludes --data-path"),
        (["--data-path", "{p}"], "--data-path needs --split"),
        (["--data-path"], "--data-path lists nothing"),
        (["--data-path", "{p}", "--train-data-path", "{p}"], "--data-path, --train-data-path exclude each other"),
        (
            ["--train-data-path", "{p}", "--split", "9,1"],
            "--split 9,1 divides --data-path, it cannot divide --train-da",
        ),
        (
            ["--data-path", "1", "{p}", "{p}", "{p}", "--split", "9,1"],
            "every prefix has a weight before it, or none has",
        ),
        (["--data-path", "1", "{p}", "{p}", "--split", "9,1"], "every prefix has a weight before it, or none has"),
        (["--data-path", "-1", "{p}", "--split", "9,1"], "every weight must be a number above 0"),
        (["--data-path", "{p}", "--split", "a,b"], "--split a,b: must be up to three numbers >= 0, not all 0"),
        (["--data-path", "{p}", "--split", "0,0,0"], "--split 0,0,0: must be up to three numbers >= 0, not all 0"),
        (["--data-path", "{p}", "--split", "1,1,1,1"], "--split 1,1,1,1: must be up to three numbers >= 0, not all 0"),
        (["--data-path", "{p}", "--split", "0,1,0"], "--split 0,1,0 leaves nothing to train on"),
        (
            ["--data-path", "{p}", "--split", "1"],
            "--split 1 leaves no validation data: give some, or --eval-iters 0 (is 1",
        ),
        (["--train-data-path", "{p}"], "--train-data-path leaves no validation data"),
        (["--valid-data-path", "{p}"], "--valid-data-path leaves nothing to train on"),
        (["--train-data-path", "{p}", "--fim-data"], "--fim-data: its dataset is not supported"),
        (["--mock-data", "--hybrid-context-parallel"], "--hybrid-context-parallel: its data sampler is not supported"),
        (["--mock-data", "--multiple-validation-sets"], "--multiple-validation-sets needs --full-validation"),
        (
            ["--data-path", "{p}", "--split", "9,1", "--multiple-validation-sets", "--full-validation"],
            "--multiple-validation-sets needs --valid-data-path, not --data-path",
        ),
        (
            ["--data-path", "1", "{p}", "--split", "9,1", "--full-validation"],
            "--data-path has weights, --full-validation reads all of it: leave the weights out",
        ),
        (["--mock-data", "--sft"], "--sft reads conversations from --data-path: leave out --mock-data"),
        (
            ["--mock-data", "--dataloader-inter-document-masking", "--transformer-impl", "local"],
            "--dataloader-inter-document-masking needs --no-masked-softmax-fusion with local layers",
        ),
        (
            ["--mock-data", "--eval-micro-batch-size", "4", "--tensor-model-parallel-size", "2"],
            "--eval-micro-batch-size 4: must be --micro-batch-size 2 where --tensor-model-parallel-size > 1",
        ),
        (["--data-args-path", "{p}.none", "--split", "9,1"], "--data-args-path {p}.none: [Errno 2] No such file"),
        (["--per-split-data-args-path", "{p}.idx"], "--per-split-data-args-path {p}.idx: "),
        (["--mock-data", "--tokenizer-type", "SentencePieceTokenizer"], "--tokenizer-model None: no such file"),
        (
            ["--mock-data", "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "{p}.idx"],
            "--tokenizer-model {p}.idx: cannot be loaded (",
        ),
    ],
)
def test_flags_that_contradict_each_other(flags, expected, prefix):
    assert expected.replace("{p}", prefix) in message(*(flag.replace("{p}", prefix) for flag in flags))


def test_a_missing_tokenizer_type():
    with pytest.raises(ValueError, match="--tokenizer-type is missing: give the one the data was made with"):
        check_data(PARSER.parse_args(["--mock-data", "--seq-length", "16", "--micro-batch-size", "1"]))


def test_a_share_without_a_sample_in_it(prefix, monkeypatch):
    # 10 sequences, "969,30,1": training rounds to the first 10, validation and test to none. Megatron then adds empty
    # epochs for ever.
    text = message("--data-path", prefix, "--split", "969,30,1")
    assert (
        "d has 10 sequences; the valid share of --split 969,30,1 is 0 of them with 0 tokens, one sample takes" in text
    )
    # "10,80,10": the first sequence has 10 tokens, one sample 16 + 1.
    text = message("--data-path", prefix, "--split", "10,80,10")
    assert (
        "the train share of --split 10,80,10 is 1 of them with 10 tokens, one sample takes --seq-length + 1 = 17"
        in text
    )
    text = message("--train-data-path", prefix, "--valid-data-path", prefix, "--seq-length", 550)
    assert "its train data is 10 of them with 550 tokens, one sample takes --seq-length + 1 = 551" in text
    check_data(parse("--train-data-path", prefix, "--valid-data-path", prefix, "--seq-length", 549))
    monkeypatch.setattr(data_check, "SUM_AT_ONCE", 3)  # the sum goes on past the first stretch of lengths
    check_data(parse("--train-data-path", prefix, "--valid-data-path", prefix, "--seq-length", 549))


def test_conversations(tmp_path, monkeypatch):
    monkeypatch.setattr(packing_check.importlib.util, "find_spec", lambda name: object())  # as if datasets were there
    path = tmp_path / "chat.jsonl"
    flags = ["--sft", "--no-create-attention-mask-in-dataloader", "--train-data-path", path, "--valid-data-path", path]
    assert "chat.jsonl is missing or empty: --sft reads a JSONL file of conversations" in message(*flags)
    path.write_text('{"text": "plain"}\n')
    assert "chat.jsonl line 1: needs a list 'messages' of objects with a role (KeyError" in message(*flags)
    path.write_text('{"messages": [{"role": "user", "content": "hello"}]}\n')
    check_data(parse(*flags))
    local = [*flags, "--transformer-impl", "local", "--no-masked-softmax-fusion"]
    check_data(parse(*local))
    assert "--sft excludes --window-size with local layers" in message(*local, "--window-size", "4,0")
    assert "add --no-create-attention-mask-in-dataloader" in message("--sft", "--train-data-path", path)
    monkeypatch.setattr(packing_check.importlib.util, "find_spec", lambda name: None)
    assert "--sft needs the Python package 'datasets' to read JSONL" in message(*flags)


def test_tokenised_chats(tmp_path, prefix):
    chats, builder = str(tmp_path / "chats"), IndexedDatasetBuilder(f"{tmp_path}/chats.bin", np.uint16, multimodal=True)
    for length in (3, 9, 5):
        builder.add_item(torch.arange(length), 0)
        builder.add_item(torch.arange(2), 1)
        builder.end_document()
    builder.finalize(f"{chats}.idx")
    flags = ["--train-data-path", chats, "--valid-data-path", chats, "--no-create-attention-mask-in-dataloader"]
    check_data(parse(*flags, "--sft", "--seq-length", 10))
    assert f"--train-data-path: {chats} holds chats: add --sft" in message(*flags)
    assert "chats has a chat of 11 tokens: too long for --seq-length 9," in message(*flags, "--sft", "--seq-length", 9)
    split = ["--data-path", chats, "--split", "90,5,5", "--no-create-attention-mask-in-dataloader", "--sft"]
    assert "chats has 3 chats: none is in its valid share" in message(*split, "--seq-length", 10)
    text = ["--train-data-path", prefix, "--eval-iters", 0, "--no-create-attention-mask-in-dataloader", "--sft"]
    assert "d holds text, no chats: make it with preprocess_data.py --chat, or leave out --sft" in message(*text)
    (tmp_path / "chat.jsonl").touch()
    both = [*split[2:], "--data-path", 1, tmp_path / "chat.jsonl", 1, chats]
    assert f"chat.jsonl is a JSONL file, {chats} the prefix of tokenised chats: give one kind" in message(*both)
    assert "--dataloader-fast-cache-load: --sft keeps nothing on disk" in message(
        *flags, "--sft", "--dataloader-fast-cache-load", "--seq-length", 10
    )


def test_a_sidecar_survives_writing_and_reading(tmp_path):
    written = sidecar(tokenizer_model="a/b", tokenizer_sha256="0" * 64)
    write_sidecar(f"{tmp_path}/d.json", written)
    assert read_sidecar(f"{tmp_path}/d") == written
    assert read_sidecar(f"{tmp_path}/none") is None


def test_the_digest_of_a_tokenizer_folder_is_of_what_decides_the_ids(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    first = tokenizer_digest(str(tmp_path))
    (tmp_path / "model.safetensors").write_text("weights")
    assert tokenizer_digest(str(tmp_path)) == first
    (tmp_path / "tokenizer.json").write_text("{ }")
    assert tokenizer_digest(str(tmp_path)) != first
    assert tokenizer_digest(None) is tokenizer_digest("org/name-on-a-hub") is None
