"""Text to token ids: train a tokenizer, encode pieces of a corpus on several processes, write Megatron's data files."""

import io
import os
import re
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context

import numpy as np
import sentencepiece
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_emoe.data.corpus import Piece, cut, read_documents
from megatron_emoe.data.encoder import Encoded, Encodes, Part
from megatron_emoe.data.input_files import InputFile

TASKS_AHEAD = 4  # for each worker: bounds the results that wait to be written


def train_tokenizer(
    files: Sequence[InputFile], model_path: str, vocab_size: int, max_bytes: int, keys: tuple[str, ...], errors: str
) -> None:
    """Train a SentencePiece BPE model that gives back every text it encodes, byte for byte, and write it.

    Nothing is normalised, unknown characters fall back to bytes, and there is a piece for the end of a document (</s>)
    and for padding. The same input gives the same model.

    Args:
        files: what to learn from.
        model_path: where to write the model.
        vocab_size: entries, with 256 bytes and 4 control pieces among them.
        max_bytes: of text to learn from, taken in pieces spread evenly over the input.
        keys: of JSONL records.
        errors: for bytes that are not UTF-8.

    Raises:
        ValueError: the vocabulary is too small or too large for the text.
    """
    lines = list(_sample_lines(files, max_bytes, keys, errors))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9995,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            pad_id=3,
            num_threads=1,
            max_sentence_length=max_bytes,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"--train-tokenizer {vocab_size}: {_training_problem(str(error), len(lines))}") from error
    with open(model_path, "wb") as file:
        file.write(model.getvalue())


def _training_problem(message: str, lines: int) -> str:
    """SentencePiece's reason in words that name a vocabulary that would do."""
    if found := re.search(r"value <= (\d+)", message):
        return f"the input has text for at most {found[1]} entries"
    if found := re.search(r"smaller than required_chars. \d+ vs (\d+)", message):
        return f"bytes and single characters of the input alone take {found[1]} entries: ask for more"
    return f"cannot train on {lines} lines of text ({message})"


def _sample_lines(files: Sequence[InputFile], max_bytes: int, keys: tuple[str, ...], errors: str) -> Iterator[str]:
    """Non-empty lines from about max_bytes of the input, in whole pieces spread evenly over it."""
    total = sum(file.size for file in files)
    seen = taken = 0
    for piece in (piece for file in files for piece in cut(file, keys)):
        if taken * total <= seen * max_bytes:
            for document in read_documents(piece, keys, errors):
                for line in "\n".join(document.texts).split("\n"):
                    if line:
                        yield line
            taken += len(piece.data)
        seen += piece.cost


def encode_in_order(
    make_encoder: Callable[[], Encodes], tasks: Iterable[tuple[Piece, ...]], workers: int
) -> Iterator[tuple[int, Encoded]]:
    """Bytes of input and Parts of each task, in the order of the tasks whatever the number of workers.

    Args:
        make_encoder: called without arguments in every process; picklable.
        tasks: from corpus.group.
        workers: processes; 1 is this one.

    Raises:
        ValueError: from an encoder, or because a worker died.
    """
    if workers == 1:
        encoder = make_encoder()
        yield from ((_task_bytes(task), encoder.encode(task)) for task in tasks)
        return
    start = "fork" if sys.platform == "linux" else None
    pool = ProcessPoolExecutor(workers, get_context(start), _start_worker, (make_encoder,))
    ahead: deque = deque()
    try:
        for task in tasks:
            ahead.append((_task_bytes(task), pool.submit(_encode_here, task)))
            if len(ahead) > TASKS_AHEAD * workers:
                size, future = ahead.popleft()
                yield size, future.result()
        yield from ((size, future.result()) for size, future in ahead)
    except BrokenProcessPool as error:
        raise ValueError(f"--workers {workers}: a worker died, perhaps for lack of memory: try fewer") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _task_bytes(task: tuple[Piece, ...]) -> int:
    return sum(piece.cost for piece in task)


_encoder: Encodes | None = None  # of a worker process, set when it starts


def _start_worker(make_encoder: Callable[[], Encodes]) -> None:
    global _encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent ends the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the processes are the parallelism
    _encoder = make_encoder()


def _encode_here(task: tuple[Piece, ...]) -> Encoded:
    assert _encoder is not None
    return _encoder.encode(task)


class TokenWriter:
    """Writes Parts to <prefix>.bin, and <prefix>.idx when closed; counts what it wrote. modes: with those of chats."""

    def __init__(self, prefix: str, dtype: type[np.integer], *, modes: bool = False) -> None:
        self.prefix = prefix
        self.documents = self.tokens = self.max_token_id = 0
        self.longest = self._length = 0  # tokens of the longest document, and of the one at hand
        self.counts: Counter[str] = Counter()
        self.first_left_out = ""
        self._builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype, multimodal=modes)

    def add(self, part: Part) -> None:
        """Append the sequences of a part."""
        modes = part.modes or [0] * len(part.ids)
        for ids, length, ends, mode in zip(part.ids, part.lengths, part.ends, modes, strict=True):
            if length:
                self._builder.add_item(torch.from_numpy(ids), mode)
                self.max_token_id = max(self.max_token_id, int(ids.max()))
            self._length += length
            if ends:
                self._builder.end_document()
                self.longest, self._length = max(self.longest, self._length), 0
            self.documents += ends
            self.tokens += length
        self.counts += part.counts
        self.first_left_out = self.first_left_out or part.first_left_out

    def close(self) -> None:
        """Write the index: the data set is complete."""
        self._builder.finalize(f"{self.prefix}.idx")
