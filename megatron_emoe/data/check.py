"""check_data: every reason why the data flags cannot work, found before any work starts.

Cheap by construction: headers, file sizes and sidecars are read, token files only at their two ends. A message names
the flag or path, the value and the rule.
"""

import copy
import json
import os
from argparse import Namespace
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.utils import Split, get_blend_from_list
from megatron.core.tokenizers.utils.build_tokenizer import SP_TOKENIZERS, build_tokenizer

from megatron_emoe.data.files import Sidecar, TokenFiles, read_sidecar, read_token_files, tokenizer_digest
from megatron_emoe.data.kept_order import check_kept_order
from megatron_emoe.data.packing_check import (
    check_chat_flags,
    check_chats,
    check_conversations,
    is_jsonl,
    packing_rules,
)
from megatron_emoe.settings.command_line import is_first_rank
from megatron_emoe.settings.hf_folder import check_tokenizer_place

REMOTE_PREFIXES = ("s3://", "msc://")
SUM_AT_ONCE = 1 << 20  # sequence lengths read before looking whether they are enough


@dataclass(frozen=True)
class Source:
    """The value of one data flag: what it is called, its prefixes, its weights, and the one split it feeds, or all."""

    flag: str
    prefixes: list[str]
    weights: list[float] | None
    split: Split | None


def check_data(args: Namespace) -> None:
    """Refuse data that cannot be trained on.

    Args:
        args: Megatron's parsed flags.

    Raises:
        ValueError: contradictory data flags; files that are missing, empty, half-written or of another format; tokens
            that the tokenizer of the run does not have or that another one made; a split without a sequence in it.
    """
    sources = _data_sources(args)
    _check_flags(args, sources)
    vocab_size = _tokenizer_vocab_size(args)
    if args.padded_vocab_size is not None and args.padded_vocab_size < vocab_size:
        raise ValueError(f"--padded-vocab-size {args.padded_vocab_size}: the tokenizer has {vocab_size} ids")
    if args.mock_data:
        return
    _check_every_used_split_has_data(args, sources)
    if args.sft:
        check_chat_flags(args, [prefix for source in sources for prefix in source.prefixes])
    if is_first_rank() and not args.sft:
        check_kept_order(args, [prefix for source in sources for prefix in source.prefixes])
    for source in sources:
        for prefix in source.prefixes:
            if prefix.startswith(REMOTE_PREFIXES):
                continue
            try:
                if args.sft and is_jsonl(prefix):
                    check_conversations(prefix)
                else:
                    _check_tokens(args, source, prefix, vocab_size)
            except ValueError as error:
                raise ValueError(f"{source.flag}: {error}") from error


def _data_sources(args: Namespace) -> list[Source]:
    """The data flags that were given, with lists read from the files that two of them name."""
    given: list[tuple[str, list[str] | None, Split | None]] = [
        ("--data-path", args.data_path, None),
        ("--train-data-path", args.train_data_path, Split.train),
        ("--valid-data-path", args.valid_data_path, Split.valid),
        ("--test-data-path", args.test_data_path, Split.test),
    ]
    if args.data_args_path is not None:
        given.append(("--data-args-path", _read_text("--data-args-path", args.data_args_path).split(), None))
    if args.per_split_data_args_path is not None:
        given += _read_per_split("--per-split-data-args-path", args.per_split_data_args_path)
    return [_source(flag, values, split) for flag, values, split in given if values is not None]


def _read_text(flag: str, path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{flag} {path}: {error}") from error


def _read_per_split(flag: str, path: str) -> list[tuple[str, list[str] | None, Split | None]]:
    try:
        lists = json.loads(_read_text(flag, path))
        values = {split: lists[split.name] for split in Split}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{flag} {path}: must be JSON with the keys train, valid, test ({error!r})") from error
    return [
        (f"{flag} ({split.name})", value.split() if isinstance(value, str) else value, split)
        for split, value in values.items()
    ]


def _source(flag: str, values: list[str], split: Split | None) -> Source:
    if not values:
        raise ValueError(f"{flag} lists nothing: give a prefix, or weights and prefixes: w1 prefix1 w2 prefix2")
    prefixes, weights = get_blend_from_list(values)
    if weights is None and any(_is_number(value) and not os.path.exists(f"{value}.idx") for value in values):
        raise ValueError(f"{flag} {' '.join(values)}: every prefix has a weight before it, or none has")
    if weights is not None and (min(weights) <= 0 or not np.all(np.isfinite(weights))):
        raise ValueError(f"{flag} {' '.join(values)}: every weight must be a number above 0")
    return Source(flag, prefixes, weights, split)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _check_flags(args: Namespace, sources: list[Source]) -> None:
    """Contradictions between flags, whatever the files hold."""
    flags = [source.flag for source in sources]
    shared = [source.flag for source in sources if source.split is None]
    names = ", ".join(flags)
    rules = [
        (args.mock_data and flags, f"--mock-data makes up its data, so it excludes {names}"),
        (not args.mock_data and not flags, "no data: give --data-path, --train-data-path or --mock-data"),
        (
            len(shared) > 1 or (shared and len(flags) > 1),
            f"{names} exclude each other: one list, or one per split",
        ),
        (shared and not args.split, f"{names} needs --split, the shares of training, validation and test: 98,1,1"),
        (flags and not shared and args.split, f"--split {args.split} divides --data-path, it cannot divide {names}"),
        (args.fim_data, "--fim-data: its dataset is not supported here, give plain --data-path"),
        (args.hybrid_context_parallel, "--hybrid-context-parallel: its data sampler is not supported here"),
    ]
    _refuse_first(rules + _validation_rules(args, shared) + packing_rules(args))
    rigid = args.tensor_model_parallel_size > 1 and args.eval_micro_batch_size not in (None, args.micro_batch_size)
    if rigid:
        raise ValueError(
            f"--eval-micro-batch-size {args.eval_micro_batch_size}: must be --micro-batch-size {args.micro_batch_size} "
            "where --tensor-model-parallel-size > 1, whose ranks receive batches of that size"
        )


def _validation_rules(args: Namespace, shared: list[str]) -> list[tuple[object, str]]:
    several = args.multiple_validation_sets
    return [
        (
            several and not args.full_validation,
            "--multiple-validation-sets needs --full-validation",
        ),
        (
            several and shared,
            "--multiple-validation-sets needs --valid-data-path, not --data-path",
        ),
    ]


def _refuse_first(rules: list[tuple[object, str]]) -> None:
    for broken, message in rules:
        if broken:
            raise ValueError(message)


def _check_every_used_split_has_data(args: Namespace, sources: list[Source]) -> None:
    """Training without --skip-train needs training data; evaluation needs validation data, or the loop fails midway."""
    if sources[0].split is None:
        shares = _split_bounds(args.split)
        empty, where = {split for split in Split if shares[split.value] is None}, f"--split {args.split}"
    else:
        empty = set(Split) - {source.split for source in sources}
        where = ", ".join(source.flag for source in sources)
    if Split.train in empty and not args.skip_train:
        raise ValueError(f"{where} leaves nothing to train on: give --train-data-path or a share, or --skip-train")
    if Split.valid in empty and (args.full_validation or args.eval_iters > 0):
        raise ValueError(f"{where} leaves no validation data: give some, or --eval-iters 0 (is {args.eval_iters})")
    weighted = [source.flag for source in sources if source.weights and source.split in (None, Split.valid)]
    if args.full_validation and weighted:
        raise ValueError(f"{weighted[0]} has weights, --full-validation reads all of it: leave the weights out")


def _split_bounds(split: str) -> list[tuple[float, float] | None]:
    """Begin and end of the training, validation and test shares, as fractions; None for an empty share."""
    try:
        shares = [float(share) for share in split.split(",")]
        if len(shares) > len(Split) or min(shares) < 0 or not 0 < sum(shares) < float("inf"):
            raise ValueError
    except ValueError:
        raise ValueError(f"--split {split}: must be up to three numbers >= 0, not all 0, as in 98,1,1") from None
    return convert_split_vector_to_split_matrix(parse_and_normalize_split(split))


def _tokenizer_vocab_size(args: Namespace) -> int:
    """Ids the tokenizer of the run can give; the flags themselves are left as they are."""
    named = f"--tokenizer-type {args.tokenizer_type} --tokenizer-model {args.tokenizer_model}"
    if args.tokenizer_type is None:
        raise ValueError("--tokenizer-type is missing: give the one the data was made with")
    if args.tokenizer_type in SP_TOKENIZERS and not os.path.isfile(args.tokenizer_model or ""):
        raise ValueError(f"{named}: no such file")
    check_tokenizer_place(args.tokenizer_model)
    quiet = copy.copy(args)
    quiet.pad_vocab_size = False
    try:
        return int(build_tokenizer(quiet).vocab_size)
    except Exception as error:  # every tokenizer library has its own kinds
        raise ValueError(f"{named}: cannot be loaded ({type(error).__name__}: {error})") from error


def _check_tokens(args: Namespace, source: Source, prefix: str, vocab_size: int) -> None:
    files = read_token_files(prefix)
    if args.sft != files.has_modes:
        is_text = "holds text, no chats: make it with preprocess_data.py --chat, or leave out --sft"
        raise ValueError(f"{prefix} {is_text if args.sft else 'holds chats: add --sft'}")
    sidecar = read_sidecar(prefix)
    if sidecar is not None:
        _check_sidecar(args, files, sidecar, vocab_size)
    max_token_id = sidecar.max_token_id if sidecar else files.max_token_id_at_the_ends()
    if max_token_id >= vocab_size:
        raise ValueError(
            f"{prefix} has token id {max_token_id}, the tokenizer of this run (--tokenizer-type {args.tokenizer_type}) "
            f"has ids below {vocab_size}: the data was made with another one"
        )
    shares = {source.split: (0.0, 1.0)} if source.split else dict(zip(Split, _split_bounds(args.split), strict=True))
    for split, bounds in shares.items():
        if bounds is not None:
            (check_chats if args.sft else _check_share)(args, files, split, bounds)


def _check_sidecar(args: Namespace, files: TokenFiles, sidecar: Sidecar, vocab_size: int) -> None:
    """The files are the ones the sidecar was written for, and the run uses the tokenizer that made them."""
    counted, told = (files.documents, files.tokens), (sidecar.documents, sidecar.tokens)
    if counted != told:
        raise ValueError(
            f"{files.prefix}.json tells of {told[0]} documents and {told[1]} tokens, the data has {counted[0]} and "
            f"{counted[1]}: the files are not of one run, make them again"
        )
    digest = tokenizer_digest(args.tokenizer_model)
    if digest and sidecar.tokenizer_sha256:
        ours, theirs = f"SHA-256 {digest[:12]}...", f"SHA-256 {sidecar.tokenizer_sha256[:12]}..."
    elif "NullTokenizer" in (args.tokenizer_type, sidecar.tokenizer_type):
        return  # it stands for any other
    else:  # a name on a hub: only the size can be compared
        ours, theirs = f"{vocab_size} ids", f"{sidecar.vocab_size} ids"
    if ours != theirs:
        raise ValueError(
            f"{files.prefix} was made with tokenizer {sidecar.tokenizer_model} ({theirs}), --tokenizer-model "
            f"{args.tokenizer_model} is another one ({ours})"
        )


def _check_share(args: Namespace, files: TokenFiles, split: Split, bounds: tuple[float, float]) -> None:
    """A share needs one whole sample; with no sequence at all in it, Megatron would look for an epoch for ever."""
    begin, end = (round(bound * files.sequences) for bound in bounds)
    lengths, needed, tokens = files.sequence_lengths()[begin:end], args.seq_length + 1, 0
    for start in range(0, len(lengths), SUM_AT_ONCE):
        tokens += int(lengths[start : start + SUM_AT_ONCE].sum(dtype=np.int64))
        if tokens >= needed:
            return
    share = f"the {split.name} share of --split {args.split}" if args.split else f"its {split.name} data"
    raise ValueError(
        f"{files.prefix} has {files.sequences} sequences; {share} is {end - begin} of them with {tokens} tokens, "
        f"one sample takes --seq-length + 1 = {needed}"
    )
