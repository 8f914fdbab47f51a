#!/usr/bin/env python
"""Turn text into a Megatron data set: <output-prefix>.bin and .idx for --data-path, and .json that tells about them.

    python tools/preprocess_data.py --input corpus/ --output-prefix data/corpus --train-tokenizer 8192 --append-eod
    python tools/preprocess_data.py --input 'part-*.jsonl' --output-prefix data/web --append-eod --holdout 0.01 \\
        --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/model
    python tools/preprocess_data.py --chat --input chats.jsonl --output-prefix data/chats --seq-length 4096 \\
        --holdout 0.01 --tokenizer-type HuggingFaceTokenizer --tokenizer-model path/to/model

Reads JSONL, Parquet and plain text, also as .gz, .bz2, .xz or .zst. What a file is comes from its content; where that
does not tell, --input-format must. With --chat, records are chats (docs/sft.md has of which kinds), for training with
--sft. The result is the same for every number of workers. It appears whole at the end; a run that fails leaves nothing.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import copy
import functools
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from megatron_emoe.data.chat_request import (
    CHATS,
    TEMPLATE_HELP,
    add_chat_flags,
    check_chat,
    check_template_file,
    left_out,
    look_at_chats,
    schemas_of,
    told_of_chats,
)
from megatron_emoe.data.corpus import Piece, cut, group
from megatron_emoe.data.input_files import FORMATS, InputFile, find_files, look, not_read
from megatron_emoe.data.result_files import check_prefix, check_results, publish, staging
from megatron_emoe.settings.command_line import HELP_ALL, CommandLine, command_line
from megatron_emoe.settings.flag_types import MOST_WORKERS, path_word, whole_to
from megatron_emoe.settings.hf_folder import check_tokenizer_place
from megatron_emoe.settings.refusal import one_line

if TYPE_CHECKING:  # these, and Megatron's tokenizers, take ten seconds to import: not before the flags are checked
    from megatron_emoe.data.encoder import Encodes
    from megatron_emoe.data.files import Sidecar
    from megatron_emoe.data.preprocess import TokenWriter

# Remarks of the libraries on a machine without a GPU, which encoding text does not need.
warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

FOLDER_SUFFIXES = [".txt", ".md", ".py", ".jsonl", ".ndjson", ".json", ".parquet"]
MOST_ENTRIES = 2**31 - 1  # SentencePiece counts in 32 bits: entries of a vocabulary, bytes of a line
TRAINING_BYTES = 10_000_000
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """All flags; those of the tokenizer are generated from Megatron's TokenizerConfig."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.config import TokenizerConfig

    parser = own_flags()
    ArgumentGroupFactory(TokenizerConfig).build_group(parser, "tokenizer")
    args = parser.parse_args(argv)
    args.pad_vocab_size = False  # padding is a matter of the model's embedding, not of the ids
    _settle(args)
    return args


def _settle(args: argparse.Namespace) -> None:
    """Defaults that depend on other flags (ValueError as check_chat)."""
    check_chat(args)
    args.json_keys = args.json_keys or ([] if args.chat else ["text"])


def first_look(argv: list[str]) -> list[InputFile]:
    """Help, version, refusals before Megatron is imported (ValueError, or the program ends); what is to be read."""
    parser = own_flags()
    parser.add_argument(HELP_ALL, action="store_true", help="Print the help of Megatron's other flags of a tokenizer.")
    group = parser.add_argument_group("tokenizer")
    group.add_argument("--tokenizer-type", metavar="KIND", help="Megatron's name of the kind, as HuggingFaceTokenizer")
    group.add_argument("--tokenizer-model", type=path_word, metavar="PATH", help="a file, or the folder of a model")
    group.add_argument("--chat-template", metavar="NAME", help=TEMPLATE_HELP)
    args, _ = parser.parse_known_args(argv)
    check(args)
    paths, skipped = find_files(args.input, args.suffix)
    check_outputs(args, paths)
    if args.chat:
        files = [look_at_chats(path, args.input_format) for path in paths]
        schemas_of(args, files)
    else:
        files = [look(path, tuple(args.json_keys), args.input_format) for path in paths]
    if all(file.size == 0 for file in files):
        raise ValueError(f"--input {' '.join(args.input)}: all {len(files)} files are empty")
    if skipped:
        print(f"preprocess_data.py: {not_read(skipped)}", file=sys.stderr)
    return files


def own_flags() -> CommandLine:
    """A parser with all flags but the tokenizer's."""
    parser = command_line(__doc__)
    add = parser.add_argument_group("input").add_argument
    add("--input", nargs="+", type=path_word, required=True, metavar="PATH", help="files, folders, globs")
    add("--input-format", choices=FORMATS, default="auto", help="what the files are (default: their content tells)")
    add("--json-keys", nargs="+", help="keys to take (default: text); several make a data set each, <prefix>_<key>")
    add("--suffix", nargs="+", default=FOLDER_SUFFIXES, help="a folder's files ('' is all; default: %(default)s)")
    add("--errors", choices=["strict", "replace", "ignore"], default="strict", help="for bytes that are not UTF-8")
    add = parser.add_argument_group("output").add_argument
    add("--output-prefix", type=path_word, required=True, help="path of the result without .bin, .idx, .json")
    add("--overwrite", action="store_true", help="replace an earlier result")
    add("--append-eod", action="store_true", help="end every document with the end-of-document token")
    add("--holdout", type=float, default=0.0, help="share of documents, by a hash of each, for <prefix>_heldout")
    add("--workers", type=whole_to(MOST_WORKERS), default=CPUS, help="processes (default: %(default)s)")
    add_chat_flags(parser)
    add = parser.add_argument_group("tokenizer training").add_argument
    size = whole_to(MOST_ENTRIES)
    add("--train-tokenizer", type=size, metavar="VOCAB", help="first train a SentencePiece model, <prefix>.model")
    add("--train-tokenizer-bytes", type=size, help=f"text to train on (default: {TRAINING_BYTES})")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the tool; 0, or 2 after one message on stderr."""
    words = sys.argv[1:] if argv is None else argv
    if HELP_ALL in words:
        parse_args(["--help"])
    try:
        files = first_look(words)
        args = parse_args(words)
        check_model(args)
        run(args, files)
    except KeyboardInterrupt:
        print("preprocess_data.py: interrupted, nothing was written", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"preprocess_data.py: error: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def check(args: argparse.Namespace) -> None:
    """ValueError for flags that cannot work, before any file is read."""
    _settle(args)
    trains = args.train_tokenizer is not None
    rules = [
        (not 0 <= args.holdout < 1, f"--holdout {args.holdout}: must be at least 0 and below 1"),
        (len(set(args.json_keys)) < len(args.json_keys), f"--json-keys {' '.join(args.json_keys)}: a key twice"),
        (
            args.train_tokenizer_bytes and not trains,
            f"--train-tokenizer-bytes {args.train_tokenizer_bytes}: has no effect without --train-tokenizer",
        ),
        (trains and args.tokenizer_model, f"--train-tokenizer excludes --tokenizer-model {args.tokenizer_model}"),
        (
            trains and args.tokenizer_type not in (None, "SentencePieceTokenizer"),
            f"--train-tokenizer makes a SentencePieceTokenizer, not --tokenizer-type {args.tokenizer_type}",
        ),
        (not trains and args.tokenizer_type is None, "--tokenizer-type is missing (or --train-tokenizer VOCAB)"),
    ]
    for broken, message in rules:
        if broken:
            raise ValueError(message)
    check_tokenizer_place(args.tokenizer_model)
    check_prefix(args.output_prefix)


def check_model(args: argparse.Namespace) -> None:
    """ValueError where a kind of tokenizer that is a file has none, or that of chats has no template; sets chat_text to
    the template."""
    if args.chat:
        from megatron_emoe.data.chat_encoder import chat_tokenizer
        from megatron_emoe.data.chat_template import template_text

        tokenizer = chat_tokenizer(args.tokenizer_model, args.trust_remote_code)
        args.chat_text = template_text(args.chat_template, tokenizer)
    from megatron.core.tokenizers.utils.build_tokenizer import SP_TOKENIZERS

    needs_file = args.tokenizer_type in SP_TOKENIZERS and args.train_tokenizer is None
    if needs_file and not os.path.isfile(args.tokenizer_model or ""):
        raise ValueError(f"--tokenizer-model {args.tokenizer_model}: no such file")


def run(args: argparse.Namespace, files: list[InputFile]) -> None:
    """Read, tokenize and write everything into a folder of its own, then move the results to their place.

    Raises:
        ValueError: for everything that is wrong with the flags or the input.
        OSError: the results cannot be written.
    """
    from megatron_emoe.data.files import write_sidecar

    started = time.perf_counter()
    source_bytes = sum(file.size for file in files)
    directory, name = os.path.split(os.path.abspath(args.output_prefix))
    with staging(directory) as folder:
        staged = _with_tokenizer(args, files, os.path.join(folder, f"{name}.model"))
        tokenizer = load_tokenizer(staged)
        writers = _encode(staged, files, source_bytes, os.path.join(folder, name), tokenizer.vocab_size)
        about = _about(args, staged, tokenizer, files, source_bytes)
        for writer in writers.values():
            writer.close()
            write_sidecar(f"{writer.prefix}.json", _sidecar(args, about, writer))
        if args.chat:
            Path(folder, f"{name}.jinja").write_text(args.chat_text, encoding="utf-8")
        stale = publish(folder, directory)
    seconds = time.perf_counter() - started
    for writer in writers.values():
        path = os.path.join(os.path.dirname(args.output_prefix), os.path.basename(writer.prefix))
        held = f"{writer.documents} documents, {writer.tokens} tokens, ids up to {writer.max_token_id}"
        print(f"{path}: {told_of_chats(writer, args.seq_length) if args.chat else held}")
    for line in left_out(writers[CHATS, False]) if args.chat else ():
        print(line)
    for cache in stale:
        print(f"{cache}: removed, was of the earlier data; remove what a --data-cache-path holds of it too")
    kinds = collections.Counter(file.kind for file in files if file.size)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    print(f"{len(files)} files ({told}), {source_bytes / 1e6:.1f} MB in {seconds:.1f} s")


def _sidecar(args: argparse.Namespace, about: dict[str, Any], writer: TokenWriter) -> Sidecar:
    from megatron_emoe.data.files import Sidecar

    counts = {"documents": writer.documents, "tokens": writer.tokens, "max_token_id": writer.max_token_id}
    if not args.chat:
        return Sidecar(**about, **counts)
    from megatron_emoe.data.chat_encoder import chat_sidecar

    return chat_sidecar(about | counts, args.chat_template, writer)


def _outputs(args: argparse.Namespace) -> dict[tuple[str, bool], str]:
    """Prefix of every result by (key, is held out)."""
    keys = [CHATS] if args.chat else args.json_keys
    names = {key: f"_{key}" if len(keys) > 1 else "" for key in keys}
    sides = {False: ""} | ({True: "_heldout"} if args.holdout else {})
    return {(key, side): names[key] + end for key in names for side, end in sides.items()}


def check_outputs(args: argparse.Namespace, files: list[str]) -> None:
    """No result takes the place of an input, nor of an earlier result without --overwrite."""
    names = _outputs(args).values()
    check_results(args.output_prefix, names, bool(args.train_tokenizer), files, args.overwrite)
    if args.chat:
        check_template_file(args.output_prefix, files, args.overwrite)


def _with_tokenizer(args: argparse.Namespace, files: list[InputFile], model_path: str) -> argparse.Namespace:
    """The flags of the tokenizer to encode with: as given, or those of one trained now."""
    if args.train_tokenizer is None:
        return args
    from megatron_emoe.data.preprocess import train_tokenizer

    print(f"training a tokenizer of {args.train_tokenizer} entries ...", file=sys.stderr)
    keys = tuple(args.json_keys)
    size = args.train_tokenizer_bytes or TRAINING_BYTES
    train_tokenizer(files, model_path, args.train_tokenizer, size, keys, args.errors)
    args = copy.copy(args)
    args.tokenizer_type, args.tokenizer_model = "SentencePieceTokenizer", model_path
    return args


def load_tokenizer(args: argparse.Namespace) -> Any:
    """Megatron's tokenizer for Megatron's flags.

    Raises:
        ValueError: it cannot be loaded, or has no end-of-document token for --append-eod.
    """
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    named = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}"
    if args.chat:
        args = copy.copy(args)
        args.chat_template = None  # a name, or the template itself, which the ids do not depend on
    try:
        tokenizer = build_tokenizer(args)
        eod = tokenizer.eod if args.append_eod else 0
    except Exception as error:  # every tokenizer library has its own kinds
        raise ValueError(f"{named}: cannot be loaded ({type(error).__name__}: {error})") from error
    if eod is None or eod < 0:
        raise ValueError(f"{named}: has no end-of-document token for --append-eod")
    return tokenizer


def make_encoder(args: argparse.Namespace, files: list[InputFile]) -> Encodes:
    """What one worker process encodes with."""
    from megatron.core.datasets.indexed_dataset import DType

    from megatron_emoe.data.encoder import Encoder

    if args.chat:
        from megatron_emoe.data.chat_encoder import make_chat_encoder

        return make_chat_encoder(args, schemas_of(args, files))
    tokenizer = load_tokenizer(args)
    dtype = DType.optimal_dtype(tokenizer.vocab_size)
    return Encoder(tokenizer, dtype, tuple(args.json_keys), args.errors, args.append_eod, args.holdout)


def _encode(
    args: argparse.Namespace, files: list[InputFile], source_bytes: int, prefix: str, vocab_size: int
) -> dict[tuple[str, bool], TokenWriter]:
    """Encode everything into the staged .bin files; each of them has at least one document afterwards."""
    from megatron.core.datasets.indexed_dataset import DType
    from tqdm import tqdm

    from megatron_emoe.data.preprocess import TokenWriter, encode_in_order

    dtype = DType.optimal_dtype(vocab_size)
    writers = {output: TokenWriter(prefix + name, dtype, modes=args.chat) for output, name in _outputs(args).items()}
    results = encode_in_order(functools.partial(make_encoder, args, files), group(_pieces(args, files)), args.workers)
    progress = tqdm(total=source_bytes, unit="B", unit_scale=True, desc="encoding", disable=None)
    with progress, contextlib.closing(results):
        for size, parts in results:
            for output, part in parts.items():
                writers[output].add(part)
            progress.update(size)
    for (key, is_held_out), writer in writers.items():
        if writer.tokens == 0:
            unit, none = ("chat", "chat") if args.chat else ("document", "text")
            side = (
                f"--holdout {args.holdout} leaves no {unit} on one side" if args.holdout else f"no {none} in the input"
            )
            side = "; ".join([side, *(left_out(writers[CHATS, False]) if args.chat else [])])
            raise ValueError(f"{side} (key {key!r}{', held out' if is_held_out else ''})")
    return writers


def _pieces(args: argparse.Namespace, files: list[InputFile]) -> Iterator[Piece]:
    schemas = schemas_of(args, files) if args.chat else {}
    for file in files:
        schema = schemas.get(file.path)
        yield from cut(file, schema.columns if schema else tuple(args.json_keys))


def _about(
    args: argparse.Namespace, staged: argparse.Namespace, tokenizer: Any, files: list[InputFile], source_bytes: int
) -> dict[str, Any]:
    """What every sidecar of this run says alike; a tokenizer trained here is named by its final path."""
    from megatron_emoe.data.files import tokenizer_digest

    model = f"{args.output_prefix}.model" if args.train_tokenizer else args.tokenizer_model
    return {
        "tokenizer_type": staged.tokenizer_type,
        "tokenizer_model": model,
        "tokenizer_sha256": tokenizer_digest(staged.tokenizer_model),
        "vocab_size": int(tokenizer.vocab_size),
        "source_files": len(files),
        "source_bytes": source_bytes,
        "append_eod": args.append_eod,
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
