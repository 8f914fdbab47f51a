"""tools/preprocess_data.py: text comes back from the data files as it went in, and bad input leaves nothing behind."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

from megatron_emoe.data import corpus, preprocess
from megatron_emoe.data.encoder import Encoder
from megatron_emoe.data.files import read_sidecar, read_token_files, tokenizer_digest
from megatron_emoe.data.input_files import look
from tests.distributed import wait_until

TOOL = Path(__file__).resolve().parents[2] / "tools" / "preprocess_data.py"
SPEC = importlib.util.spec_from_file_location("preprocess_data", TOOL)
tool = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(tool)

# What a tokenizer likes to lose: runs of blanks, tabs, line ends of both kinds, characters it never saw, control codes.
AWKWARD = [
    "plain words and more plain words",
    "  two leading blanks,   three inside, two trailing  ",
    "\tdef f(x):\n\t\treturn  x\n\n\n",
    "crlf\r\nline\r\n",
    "Größe naïve €100 \u200b 日本語 😀 \U0001f9ea",
    "\x00\x01\x7f",
    "\n",
]


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """A JSONL file of 200 documents, the awkward ones first, and enough text to train a small vocabulary on."""
    path = tmp_path_factory.mktemp("words") / "docs.jsonl"
    texts = AWKWARD + [f"document number {i} says: " + "lorem ipsum dolor sit amet " * (i % 7) for i in range(193)]
    path.write_text("".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture(scope="module")
def model(words) -> str:
    """A SentencePiece model of 400 entries."""
    path = str(words.parent / "words.model")
    preprocess.train_tokenizer([look(str(words), ("text",))], path, 400, 1_000_000, ("text",), "strict")
    return path


def run(*flags: object, workers: int = 1) -> int:
    return tool.main([*map(str, flags), "--workers", str(workers)])


def load(prefix: object, **flags):
    """The data set, and Megatron's tokenizer for what its sidecar says."""
    sidecar = read_sidecar(str(prefix))
    args = tool.parse_args(["--input", "-", "--output-prefix", "-"])
    args.tokenizer_type, args.tokenizer_model = sidecar.tokenizer_type, sidecar.tokenizer_model
    vars(args).update(flags)
    return IndexedDataset(str(prefix)), build_tokenizer(args), sidecar


def decoded(prefix: object, **flags) -> list[str]:
    """The text of every document; asserts that each ends with the end-of-document token and has no other."""
    dataset, tokenizer, _ = load(prefix, **flags)
    texts, ends = [], dataset.document_indices
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        ids = [int(token) for index in range(begin, end) for token in dataset[index]]
        assert ids[-1] == tokenizer.eod and tokenizer.eod not in ids[:-1]
        texts.append(tokenizer.detokenize(ids[:-1]))
    return texts


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def ended(words: list[str]) -> object:
    """How the program ends: a flag's own type ends it at once."""
    try:
        return tool.main(words)
    except SystemExit as leave:
        return leave.code


def sp(model: str) -> list[str]:
    return ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model]


def test_jsonl_comes_back_as_it_went_in(tmp_path, words):
    assert run("--input", words, "--output-prefix", tmp_path / "d", "--train-tokenizer", 400, "--append-eod") == 0
    assert decoded(tmp_path / "d") == texts_of(words)
    assert sorted(os.listdir(tmp_path)) == ["d.bin", "d.idx", "d.json", "d.model"]
    dataset, tokenizer, sidecar = load(tmp_path / "d")
    assert (sidecar.documents, sidecar.vocab_size, sidecar.append_eod) == (200, 400, True)
    assert sidecar.tokens == sum(map(len, dataset)) == read_token_files(str(tmp_path / "d")).tokens
    assert sidecar.max_token_id == max(int(ids.max()) for ids in dataset)
    assert sidecar.tokenizer_sha256 == hashlib.sha256((tmp_path / "d.model").read_bytes()).hexdigest()
    assert (sidecar.source_files, sidecar.source_bytes) == (1, words.stat().st_size)


def test_a_folder_comes_back_as_it_went_in(tmp_path, model):
    for name, text in zip(
        ("b.py", "a/x.md", "a/y.txt", "empty.txt", "skipped.rst"), AWKWARD[1:4] + ["", "no"], strict=True
    ):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
    assert run("--input", tmp_path / "in", "--output-prefix", tmp_path / "out" / "d", *sp(model), "--append-eod") == 0
    assert decoded(tmp_path / "out" / "d") == [AWKWARD[1], AWKWARD[2], AWKWARD[3]]


def test_the_number_of_workers_changes_no_byte(tmp_path, words, model, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 300)  # dozens of tasks
    (tmp_path / "big.txt").write_text("\n".join(f"line {i} of a large text" for i in range(300)))
    for workers in (1, 2, 3):
        folder = tmp_path / str(workers)
        flags = ["--input", words, tmp_path / "big.txt", "--output-prefix", folder / "d", *sp(model), "--holdout", 0.3]
        assert run(*flags, "--append-eod", workers=workers) == 0
    for name in ("d.bin", "d.idx", "d.json", "d_heldout.bin", "d_heldout.idx", "d_heldout.json"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "3" / name).read_bytes()


def test_a_text_larger_than_a_piece_is_one_document(tmp_path, model, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 500)
    text = "\n".join(f"line {i} of a large text" for i in range(300)) + "\n"
    (tmp_path / "big.txt").write_text(text)
    assert run("--input", tmp_path / "big.txt", "--output-prefix", tmp_path / "d", *sp(model), "--append-eod") == 0
    assert len(IndexedDataset(str(tmp_path / "d"))) > 10  # sequences
    assert decoded(tmp_path / "d") == [text]


def test_without_append_eod_there_is_none(tmp_path, words, model):
    assert run("--input", words, "--output-prefix", tmp_path / "d", *sp(model)) == 0
    dataset, tokenizer, sidecar = load(tmp_path / "d")
    assert not any(tokenizer.eod in ids for ids in dataset)
    assert [tokenizer.detokenize(ids.tolist()) for ids in dataset] == texts_of(words)
    assert not sidecar.append_eod


def test_several_json_keys_make_a_data_set_each(tmp_path, model):
    records = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = ["--input", tmp_path / "in.jsonl", "--output-prefix", tmp_path / "d", "--json-keys", "q", "a", *sp(model)]
    assert run(*flags, "--append-eod") == 0
    assert (decoded(tmp_path / "d_q"), decoded(tmp_path / "d_a")) == (["one", "two"], ["1", "2"])


def test_the_holdout_is_disjoint_complete_and_a_matter_of_content(tmp_path, words, model):
    lines = words.read_text().splitlines(keepends=True)
    shuffled = tmp_path / "shuffled.jsonl"
    shuffled.write_text("".join(reversed(lines)) + lines[10])  # another order, one document twice
    for name, path in (("a", words), ("b", shuffled)):
        flags = ["--input", path, "--output-prefix", tmp_path / name, *sp(model), "--append-eod", "--holdout", 0.25]
        assert run(*flags) == 0
    kept, held = decoded(tmp_path / "a"), decoded(tmp_path / "a_heldout")
    assert not set(kept) & set(held)
    assert sorted(kept + held) == sorted(texts_of(words))
    assert set(decoded(tmp_path / "b_heldout")) == set(held)
    # 200 documents, each with probability 1/4: mean 50, standard deviation 6.1
    assert 25 < len(held) < 75


def test_a_hugging_face_tokenizer_from_a_folder(tmp_path, words):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=alphabet, special_tokens=["<eos>"], show_progress=False
    )
    tokenizer.train_from_iterator(texts_of(words), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(tmp_path / "hf")
    flags = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tmp_path / "hf", "--append-eod"]
    assert run("--input", words, "--output-prefix", tmp_path / "d", *flags, workers=2) == 0
    assert decoded(tmp_path / "d") == texts_of(words)
    sidecar = read_sidecar(str(tmp_path / "d"))
    assert sidecar.tokenizer_sha256 == tokenizer_digest(str(tmp_path / "hf")) is not None


def test_ids_written_as_text(tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"text": "5 7 0"}\n{"text": "99"}\n')
    flags = ["--input", tmp_path / "ids.jsonl", "--output-prefix", tmp_path / "d", "--tokenizer-type", "NullTokenizer"]
    assert run(*flags, "--vocab-size", 100) == 0
    dataset, _, sidecar = load(tmp_path / "d", vocab_size=100)
    assert [ids.tolist() for ids in dataset] == [[5, 7, 0], [99]]
    assert (sidecar.max_token_id, sidecar.tokenizer_sha256) == (99, None)


def test_the_same_input_trains_the_same_tokenizer(tmp_path, words, model):
    again = str(tmp_path / "again.model")
    preprocess.train_tokenizer([look(str(words), ("text",))], again, 400, 1_000_000, ("text",), "strict")
    assert Path(again).read_bytes() == Path(model).read_bytes()


def test_the_tokenizer_sample_is_spread_over_the_input_and_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 100)
    (tmp_path / "a.txt").write_text("".join(f"line{i:05d}\n" for i in range(10_000)))  # 100 KB in 1000 pieces
    numbers = [
        int(line[4:])
        for line in preprocess._sample_lines([look(f"{tmp_path}/a.txt", ("text",))], 10_000, ("text",), "strict")
    ]
    assert 900 <= len(numbers) <= 1100  # a tenth
    per_tenth = [sum(start <= number < start + 1000 for number in numbers) for start in range(0, 10_000, 1000)]
    assert all(90 <= count <= 110 for count in per_tenth)


BAD_FLAGS = {
    "missing input": (["--input", "{tmp}/none.jsonl"], "--input {tmp}/none.jsonl: no such file or folder"),
    "empty input": (["--input", "{tmp}/empty.txt"], "--input {tmp}/empty.txt: all 1 files are empty"),
    "bad JSON": (["--input", "{tmp}/bad.jsonl"], "bad.jsonl line 2: not valid JSON"),
    "missing key": (["--json-keys", "body"], "docs.jsonl line 1: no key 'body', there are 'text', 'id'"),
    "not UTF-8": (["--input", "{tmp}/latin.txt"], "latin.txt: byte 0xe9 at offset 3 is not UTF-8"),
    "blank documents": (["--input", "{tmp}/blank.jsonl"], "no text in the input (key 'text')"),
    "no holdout": (["--input", "{tmp}/one.txt", "--holdout", "0.5"], "--holdout 0.5 leaves no document on one side"),
    "holdout range": (["--holdout", "1.5"], "--holdout 1.5: must be at least 0 and below 1"),
    "workers": (["--workers", "0"], "--workers 0: must be a whole number of at least 1"),
    "many workers": (["--workers", "2000"], "--workers 2000: must be at most 1024"),
    "key twice": (["--json-keys", "text", "text"], "--json-keys text text: a key twice"),
    "output is a folder": (["--output-prefix", "{tmp}"], "--output-prefix {tmp}: is a folder, give a name in it"),
    "output has no name": (
        ["--output-prefix", "{tmp}/new/"],
        "--output-prefix {tmp}/new/: is a folder, give a name in",
    ),
    "output below a file": (
        ["--output-prefix", "{tmp}/one.txt/a/b"],
        "--output-prefix {tmp}/one.txt/a/b: {tmp}/one.txt is no folder",
    ),
    "output below a link to nothing": (
        ["--output-prefix", "{tmp}/dangling/b"],
        "--output-prefix {tmp}/dangling/b: {tmp}/dangling is no folder",
    ),
    "a tokenizer that is not there": (
        ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "no/such/folder"],
        "--tokenizer-model no/such/folder: no such file or folder",
    ),
    "output that cannot be written": (["--output-prefix", "/proc/new/d"], "new/d: /proc cannot be written to ("),
    "output where a folder is": (
        ["--output-prefix", "{tmp}/taken", "--overwrite"],
        "--output-prefix {tmp}/taken: {tmp}/taken.bin is a folder",
    ),
    "bytes for no training": (
        ["--train-tokenizer-bytes", "1000"],
        "--train-tokenizer-bytes 1000: has no effect without --train-tokenizer",
    ),
    "no bytes": (
        ["--train-tokenizer", "300", "--train-tokenizer-bytes", "0"],
        "--train-tokenizer-bytes 0: must be a whole number of at least 1",
    ),
    "too many bytes": (
        ["--train-tokenizer", "300", "--train-tokenizer-bytes", "100000000000000000000"],
        "--train-tokenizer-bytes 100000000000000000000: must be at most 2147483647",
    ),
    "binary": (["--input", "{tmp}/noise.jsonl"], "--input {tmp}/noise.jsonl: is binary (byte 0 is 0)"),
    "another format": (
        ["--input", "{tmp}/one.txt", "--input-format", "parquet"],
        "one.txt: cannot be read as Parquet (",
    ),
    "no such model": (["--tokenizer-model", "{tmp}/no.model"], "--tokenizer-model {tmp}/no.model: no such file"),
    "broken model": (["--tokenizer-model", "{tmp}/bad.jsonl"], "bad.jsonl: cannot be loaded ("),
    "no tokenizer": (["--tokenizer-type", "NullTokenizer"], "--tokenizer-type NullTokenizer --tokenizer-model"),
    "ids beyond the vocabulary": (
        ["--input", "{tmp}/ids.txt", "--tokenizer-type", "NullTokenizer", "--vocab-size", "10"],
        "ids.txt: token ids 3 to 12, the tokenizer has 0 to 9",
    ),
    "no ids": (
        ["--tokenizer-type", "NullTokenizer", "--vocab-size", "10"],
        "line 1: cannot be tokenized (ValueError",
    ),
    "both tokenizers": (["--train-tokenizer", "300"], "--train-tokenizer excludes --tokenizer-model"),
    "another kind": (
        ["--train-tokenizer", "300", "--tokenizer-type", "HuggingFaceTokenizer"],
        "--train-tokenizer makes a SentencePieceTokenizer, not --tokenizer-type HuggingFaceTokenizer",
    ),
    "vocabulary too large": (
        ["--train-tokenizer", "50000"],
        "--train-tokenizer 50000: the input has text for at most ",
    ),
    "vocabulary too small": (
        ["--train-tokenizer", "100"],
        "--train-tokenizer 100: bytes and single characters of the input alone take ",
    ),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
def test_bad_input_is_one_message_and_leaves_nothing(case, tmp_path, words, model, capsys):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": fine}\n')
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n\n{"text": ""}\n')
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "ids.txt").write_text("3 12 4")
    (tmp_path / "one.txt").write_text("a single document")
    (tmp_path / "noise.jsonl").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "taken.bin").mkdir()
    before = sorted(os.listdir(tmp_path))
    flags, message = BAD_FLAGS[case]
    flags = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    usual = ["--input", words, "--output-prefix", tmp_path / "new" / "d", "--append-eod", "--workers", 1]
    usual += [] if "--train-tokenizer" in flags and case != "both tokenizers" else sp(model)
    assert ended([*map(str, usual), *flags]) == 2
    printed = capsys.readouterr().err.strip().splitlines()[-1]
    assert ": error: " in printed
    assert message.replace("{tmp}", str(tmp_path)) in printed
    assert sorted(os.listdir(tmp_path)) == before


def test_an_error_in_a_worker_is_the_same_message(tmp_path, model, capsys):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": fine}\n')
    assert run("--input", tmp_path / "bad.jsonl", "--output-prefix", tmp_path / "d", *sp(model), workers=2) == 2
    assert "bad.jsonl line 2: not valid JSON" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["bad.jsonl"]


def test_an_earlier_result_is_kept_unless_told(tmp_path, words, model, capsys):
    (tmp_path / "one.txt").write_text("a single document")
    flags = ["--output-prefix", tmp_path / "d", *sp(model), "--append-eod"]
    assert run("--input", tmp_path / "one.txt", *flags) == 0
    assert run("--input", words, *flags) == 2
    assert f"{tmp_path}/d.bin exists (--overwrite replaces it)" in capsys.readouterr().err
    assert decoded(tmp_path / "d") == ["a single document"]
    assert run("--input", words, *flags, "--overwrite") == 0
    assert decoded(tmp_path / "d") == texts_of(words)


def test_an_overwrite_takes_the_cache_of_the_earlier_data_along(tmp_path, words, model, capsys):
    """Megatron names a cache by the data's path and the run's settings: it would read new data by old indices."""
    flags = ["--input", words, "--output-prefix", tmp_path / "d", *sp(model)]
    assert run(*flags) == 0
    indices = tmp_path / "d" / "cache" / "GPTDataset_indices"
    build = functools.partial(gpt_dataset, tmp_path / "d")
    build()
    assert os.listdir(indices)
    for name in ("d.bin", "d.idx", "d.json"):
        os.rename(tmp_path / name, tmp_path / f"kept.{name}")
    assert run(*flags) == 2
    assert f"{tmp_path}/d/cache is of earlier data (--overwrite removes it)" in capsys.readouterr().err
    for name in ("d.bin", "d.idx", "d.json"):
        os.rename(tmp_path / f"kept.{name}", tmp_path / name)
    (tmp_path / "one.txt").write_text("a single document " * 20)
    assert run("--input", tmp_path / "one.txt", *flags[2:]) == 2
    assert f"{tmp_path}/d.bin exists (--overwrite replaces it)" in capsys.readouterr().err
    assert run("--input", tmp_path / "one.txt", *flags[2:], "--overwrite") == 0
    assert f"{tmp_path}/d/cache: removed, was of the earlier data" in capsys.readouterr().out
    _, tokenizer, _ = load(tmp_path / "d")
    ids = tokenizer.tokenize("a single document " * 20)
    assert build()[0]["tokens"].tolist() in [ids[at : at + 8] for at in range(len(ids))]


def gpt_dataset(prefix: Path) -> GPTDataset:
    """Megatron's training set of samples of 8 tokens over a prefix."""
    dataset, tokenizer, _ = load(prefix)
    resets = dict.fromkeys(("reset_position_ids", "reset_attention_mask", "eod_mask_loss"), False)
    config = GPTDatasetConfig(
        random_seed=1, sequence_length=8, blend=([str(prefix)], None), split="1,0,0", tokenizer=tokenizer, **resets
    )
    return GPTDataset(dataset, str(prefix), np.arange(len(dataset), dtype=np.int32), 1, Split.train, config)


def test_a_failing_overwrite_keeps_the_earlier_result(tmp_path, words, model):
    (tmp_path / "bad.jsonl").write_text("{")
    flags = ["--output-prefix", tmp_path / "d", *sp(model), "--append-eod", "--overwrite"]
    assert run("--input", words, *flags) == 0
    assert run("--input", tmp_path / "bad.jsonl", *flags) == 2
    assert decoded(tmp_path / "d") == texts_of(words)


def test_an_input_is_never_overwritten(tmp_path, words, model, capsys):
    (tmp_path / "d.json").write_text(words.read_text())  # the place of the sidecar
    assert run("--input", tmp_path / "d.json", "--output-prefix", tmp_path / "d", *sp(model), "--overwrite") == 2
    assert f"{tmp_path}/d.json is one of the inputs" in capsys.readouterr().err
    assert (tmp_path / "d.json").read_text() == words.read_text()


@contextlib.contextmanager
def file_size_limit(limit: int):
    """Writing past `limit` bytes fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_is_one_message_and_leaves_nothing(tmp_path, words, model, capsys):
    with file_size_limit(4096):
        assert run("--input", words, "--output-prefix", tmp_path / "d", *sp(model)) == 2
    assert "preprocess_data.py: error: [Errno 27] File too large" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_worker_that_dies_is_reported():
    tasks = [(corpus.Piece("unused", "text", b"1", 1, 1, 0),)] * 3
    with pytest.raises(ValueError, match=r"--workers 2: a worker died, perhaps for lack of memory: try fewer"):
        list(preprocess.encode_in_order(functools.partial(os._exit, 9), tasks, 2))


def slow_encode(folder: Path, self: Encoder, task: tuple) -> dict:
    (folder / f"{os.getpid()}.worker").touch()
    time.sleep(0.5)
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing_and_no_process(tmp_path, words, model, monkeypatch, capfd, signum):
    monkeypatch.setattr(corpus, "PIECE_BYTES", 10)  # 200 tasks: a minute of work
    monkeypatch.setattr(Encoder, "encode", functools.partialmethod(functools.partial(slow_encode, tmp_path)))
    flags = ["--input", str(words), "--output-prefix", str(tmp_path / "new" / "d"), *sp(model), "--workers", "2"]

    def as_a_program() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in a shell's background
        signal.signal(signal.SIGTERM, tool._interrupt)
        sys.exit(tool.main(flags))

    process = multiprocessing.get_context("fork").Process(target=as_a_program)
    process.start()
    wait_until(lambda: len(list(tmp_path.glob("*.worker"))) == 2)
    os.kill(process.pid, signum)
    process.join(timeout=30)
    assert process.exitcode == 130
    assert "preprocess_data.py: interrupted, nothing was written" in capfd.readouterr().err
    assert not (tmp_path / "new").exists()
    for worker in tmp_path.glob("*.worker"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(worker.stem), 0)
