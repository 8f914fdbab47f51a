"""What packed documents and chats must satisfy (--sft, --dataloader-inter-document-masking): a part of check_data."""

import importlib.util
import json
import os
from argparse import Namespace

from megatron.core.datasets.utils import Split

from megatron_emoe.data.files import TokenFiles


def packing_rules(args: Namespace) -> list[tuple[object, str]]:
    """Rules between flags where documents are kept apart, as pairs: whether it is broken, and what to say."""
    sequences = max(args.micro_batch_size, args.eval_micro_batch_size or 0)
    apart = "--sft" if args.sft else "--dataloader-inter-document-masking" if _packs(args) else ""
    return [
        (args.sft and args.mock_data, "--sft reads conversations from --data-path: leave out --mock-data"),
        (
            args.sft and args.create_attention_mask_in_dataloader,
            "--sft packs conversations without masks: add --no-create-attention-mask-in-dataloader",
        ),
        (
            apart and args.transformer_impl == "local" and args.window_size is not None,
            f"{apart} excludes --window-size with local layers, whose attention takes one mask",
        ),
        (
            apart and args.pipeline_model_parallel_size > 1 and sequences > 1,
            f"--micro-batch-size {sequences}: must be 1 with {apart} and --pipeline-model-parallel-size "
            f"{args.pipeline_model_parallel_size}: stages of megatron-core 0.19 pass on one sequence at a time",
        ),
        (
            apart and args.transformer_impl == "local" and args.masked_softmax_fusion,
            f"{apart} needs --no-masked-softmax-fusion with local layers: the fused kernel takes no mask",
        ),
    ]


def is_jsonl(path: str) -> bool:
    """Whether --sft reads this path with Megatron's own SFTDataset: a JSONL file, not the prefix of .bin and .idx."""
    return not os.path.exists(f"{path}.idx") and (path.endswith((".jsonl", ".json")) or os.path.isfile(path))


def check_chat_flags(args: Namespace, prefixes: list[str]) -> None:
    """What --sft needs for the kind of data at all of `prefixes` (ValueError)."""
    files = [prefix for prefix in prefixes if is_jsonl(prefix)]
    if files and len(files) < len(prefixes):
        other = next(prefix for prefix in prefixes if prefix not in files)
        raise ValueError(f"--sft: {files[0]} is a JSONL file, {other} the prefix of tokenised chats: give one kind")
    if files and importlib.util.find_spec("datasets") is None:
        raise ValueError("--sft needs the Python package 'datasets' to read JSONL")
    if not files and args.dataloader_fast_cache_load:
        raise ValueError("--dataloader-fast-cache-load: --sft keeps nothing on disk that could be loaded")


def _packs(args: Namespace) -> bool:
    return args.sft or args.dataloader_inter_document_masking


def check_conversations(path: str) -> None:
    """ValueError unless a JSONL file for --sft begins with a conversation."""
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        raise ValueError(f"{path} is missing or empty: --sft reads a JSONL file of conversations")
    try:
        with open(path, encoding="utf-8") as file:
            roles = [message["role"] for message in json.loads(file.readline())["messages"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} line 1: needs a list 'messages' of objects with a role ({error!r})") from error
    if not roles:
        raise ValueError(f"{path} line 1: 'messages' is empty")


def check_chats(args: Namespace, files: TokenFiles, split: Split, bounds: tuple[float, float]) -> None:
    """ValueError unless a share of tokenised chats (bounds: as fractions) has one, and each fits into a sequence."""
    begin, end = (round(bound * files.documents) for bound in bounds)
    if begin == end:
        raise ValueError(f"{files.prefix} has {files.documents} chats: none is in its {split.name} share")
    unit = 2 * args.context_parallel_size if args.context_parallel_size > 1 else 1
    longest = int(files.document_lengths().max()) - 1
    if -(-longest // unit) * unit > args.seq_length:
        raise ValueError(
            f"{files.prefix} has a chat of {longest + 1} tokens: too long for --seq-length {args.seq_length}, which "
            "preprocess_data.py --chat takes too"
        )
