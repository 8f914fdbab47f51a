"""The data path: check_data before any work starts, the datasets, and one rank's share of a batch.

The datasets themselves are Megatron-Core's: GPTDataset, MockGPTDataset (--mock-data) or, with --sft and files of JSONL,
SFTDataset; and PackedChats with --sft and what preprocess_data.py --chat wrote. All under its
BlendedMegatronDatasetBuilder. The flags are Megatron's: --data-path, --train-data-path and its two sisters,
--data-args-path, --per-split-data-args-path, --split.
"""

import functools
import json
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
)
from megatron.training import get_args, get_tokenizer, print_rank_0
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage
from torch import Tensor

from megatron_emoe.data.check import check_data
from megatron_emoe.data.kept_order import remove_outdated
from megatron_emoe.data.packed_chats import PackedChats
from megatron_emoe.data.packing_check import is_jsonl

__all__ = ["build_datasets", "check_data", "dataset_config", "get_batch", "is_padding"]

# What forward_step reads. The five tensors are None on a pipeline stage that needs none of them.
MODEL_KEYS = ("tokens", "labels", "loss_mask", "attention_mask", "position_ids")
FOR_MODEL = ("packed_seq_params", "padding_mask")
# What a dataset may hand over besides: where packed documents begin (int32, per sample) and how long the longest is.
PACKING_KEYS = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


def build_datasets(train_val_test_num_samples: list[int | None], vp_stage: int | None = None) -> list[Any]:
    """Build the training, validation and test datasets: Megatron's dataset provider.

    Args:
        train_val_test_num_samples: samples (sequences of --seq-length tokens) to provide; None is one epoch.
        vp_stage: virtual pipeline stage the data is for.

    Returns:
        One dataset for each split, None where the split is empty or this rank needs no data.
    """
    args = get_args()
    print_rank_0("> building train, validation and test datasets ...")
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        remove_outdated(args, _prefixes(args))
    is_built_here = functools.partial(_needs_data, args, vp_stage)
    builder = BlendedMegatronDatasetBuilder(
        _dataset_class(args), train_val_test_num_samples, is_built_here, dataset_config(args)
    )
    return builder.build()


build_datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank calls it, Megatron asks for the mark


def _prefixes(args: Namespace) -> list[str]:
    blend, per_split = get_blend_and_blend_per_split(args)
    return [prefix for each in (blend, *(per_split or ())) if each is not None for prefix in each[0]]


def _dataset_class(args: Namespace) -> type:
    if args.sft:
        return SFTDataset if any(map(is_jsonl, _prefixes(args))) else PackedChats
    return MockGPTDataset if args.mock_data else GPTDataset


def dataset_config(args: Namespace) -> GPTDatasetConfig:
    """Megatron's dataset settings from its own flags; the attention mask is left out where the flags say so."""
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=get_tokenizer(),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
        object_storage_cache_path=args.object_storage_cache_path,
        mid_level_dataset_surplus=args.mid_level_dataset_surplus,
        allow_ambiguous_pad_tokens=args.allow_ambiguous_pad_tokens,
        fast_cache_load=args.dataloader_fast_cache_load,
        sequences_per_dataset=_sequences_per_dataset(args.per_dataset_sequences_path),
        defer_npy_index_mmap=args.dataloader_defer_npy_index_mmap,
        context_parallel_size=args.context_parallel_size,
        inter_document_masking=args.dataloader_inter_document_masking,
    )


def _sequences_per_dataset(path: str | None) -> dict | None:
    if path is None:
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def get_batch(data_iterator: Iterator | None, vp_stage: int | None = None) -> dict[str, Any]:
    """Take the next micro-batch and return this rank's part of it, on this rank's device.

    The first tensor-parallel rank reads and broadcasts; context-parallel ranks each keep their share of the sequence.

    Args:
        data_iterator: yields the dictionaries of the dataset; None on ranks that build no dataset.
        vp_stage: virtual pipeline stage of the model chunk that asks.

    Returns:
        tokens, labels, position_ids: int64 [micro batch, sequence / context-parallel size].
        loss_mask: float32 of the same shape, 1 where the token counts.
        attention_mask: bool [micro batch, 1, sequence, sequence], True where attention is barred, or None.
        packed_seq_params: PackedSeqParams where documents are kept apart (--sft, --dataloader-inter-document-masking);
            the tensors above then have the micro batch in one row. None otherwise.
        padding_mask: with --sft bool, True where a token fills up a sequence, of the shape that this stage's model
            takes; the routers of every stage leave those tokens out of their losses and counts. None otherwise.
        An entry that this pipeline stage has no use for is None.
    """
    args = get_args()
    has_cu_seqlens = _keeps_documents_apart(args)
    needs_tensors = _needs_tensors(args, vp_stage)
    if not needs_tensors and not has_cu_seqlens:
        return dict.fromkeys((*MODEL_KEYS, *FOR_MODEL))
    batch, padding = _read_and_broadcast(args, data_iterator, vp_stage)
    batch = flatten_batch_for_packed_sequences(batch)
    for_model = dict.fromkeys(FOR_MODEL)
    if has_cu_seqlens:
        for_model["packed_seq_params"] = _packed_seq_params(batch, args)
    if padding is not None:
        for_model["padding_mask"] = _padding_here(args, batch, padding, vp_stage)
    if not needs_tensors:
        return dict.fromkeys(MODEL_KEYS) | for_model
    batch = _on_this_cp_rank(args, batch)
    return {key: batch[key] for key in MODEL_KEYS} | for_model


def _on_this_cp_rank(args: Namespace, batch: dict[str, Any]) -> dict[str, Any]:
    return get_batch_on_this_cp_rank(
        batch,
        is_hybrid_cp=False,
        cp_group=parallel_state.get_context_parallel_group(),
        # Documents of a plain corpus have any length, so they cannot be shared out one by one as conversations are.
        use_per_sequence_balancing=args.dataloader_inter_document_masking and not args.sft,
    )


def _read_and_broadcast(
    args: Namespace, data_iterator: Iterator | None, vp_stage: int | None
) -> tuple[dict[str, Any], Tensor | None]:
    """The whole micro-batch, and where it is padding, on every rank of the tensor-parallel group."""
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    batch: dict[str, Any] = {}
    sample: dict[str, Tensor] | None = None
    if tp_rank == 0:
        assert data_iterator is not None, "a rank that reads data got no iterator"
        sample, device = next(data_iterator), torch.cuda.current_device()
        batch = dict.fromkeys((*MODEL_KEYS, *PACKING_KEYS))
        batch |= {key: sample[key].to(device, non_blocking=True) for key in batch if sample.get(key) is not None}
    padding = _shared_padding(args, sample) if _marks_padding(args) else None
    batch = get_batch_on_this_tp_rank(
        batch,
        has_cu_seqlens=_keeps_documents_apart(args),
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=parallel_state.get_tensor_model_parallel_src_rank(),
        broadcast_group=parallel_state.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=_has_mtp_layers(args, vp_stage),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=parallel_state.is_pipeline_first_stage(),
        is_pipeline_last_stage=parallel_state.is_pipeline_last_stage(),
    )
    return batch, padding


def _marks_padding(args: Namespace) -> bool:
    """Not where the core's layers take no mask."""
    return (
        args.sft and args.cuda_graph_impl == "none" and "quantile_balancing" not in args.moe_router_load_balancing_type
    )


def is_padding(tokens: Tensor, pad: int, eod: int) -> Tensor:
    """Which tokens fill up a sequence, bool like `tokens` [..., sequence].

    A tokenizer may fill up with the token that ends a document: then the first of several in a row is one.
    """
    padding = tokens == pad
    if pad == eod:
        padding = padding & torch.nn.functional.pad(padding, (1, 0))[..., :-1]
    return padding


def _shared_padding(args: Namespace, sample: dict[str, Tensor] | None) -> Tensor:
    """bool [micro batch, sequence], from the rank that reads the samples. Every pipeline stage has experts, and only
    the first is given tokens. Megatron's own SFTDataset does not say where it filled up."""
    device = torch.cuda.current_device()
    if sample is None:
        padding = torch.empty((args.micro_batch_size, args.seq_length), dtype=torch.uint8, device=device)
    elif "padding_mask" in sample:
        padding = sample["padding_mask"].to(device, non_blocking=True)
    else:
        tokenizer = get_tokenizer()
        tokens = sample["tokens"].to(device, non_blocking=True)
        padding = is_padding(tokens, tokenizer.pad, tokenizer.eod).to(torch.uint8)
    if args.tensor_model_parallel_size > 1:
        group = parallel_state.get_tensor_model_parallel_group()
        torch.distributed.broadcast(padding, parallel_state.get_tensor_model_parallel_src_rank(), group=group)
    return padding.bool()


def _padding_here(args: Namespace, batch: dict[str, Any], padding: Tensor, vp_stage: int | None) -> Tensor:
    """This rank's part, bool [1, tokens]. With sequence parallelism the first stage's model takes its part itself."""
    lengths = {key: batch[key] for key in ("cu_seqlens", "cu_seqlens_padded")}
    # Under the name of tokens the core shares it out as it does those.
    mine = _on_this_cp_rank(args, {"tokens": padding.reshape(1, -1), "labels": None, **lengths})["tokens"]
    if args.sequence_parallel and not parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage):
        shards = args.tensor_model_parallel_size
        mine = mine.chunk(shards, dim=1)[parallel_state.get_tensor_model_parallel_rank()].contiguous()
    return mine


def _packed_seq_params(batch: dict[str, Any], args: Namespace) -> PackedSeqParams:
    """Where the documents of a flattened micro-batch begin, in the form attention reads."""
    starts, padded = batch["cu_seqlens"][0], batch["cu_seqlens_padded"]
    longest = int(batch["max_seqlen"].item())
    padded = padded[0] if padded is not None else (starts if args.context_parallel_size > 1 else None)
    # Losses per sequence need to know where one ends; where ranks share a sequence, the core has no way to tell.
    shared = args.sequence_parallel or args.context_parallel_size > 1
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=starts,
        cu_seqlens_kv=starts,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        tokens_per_sample=None if shared else args.seq_length,
    )


def _keeps_documents_apart(args: Namespace) -> bool:
    return args.sft or args.dataloader_inter_document_masking


def _needs_tensors(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this pipeline stage embeds tokens, computes the loss, or predicts several tokens."""
    return is_first_or_last_pipeline_stage(vp_stage) or _has_mtp_layers(args, vp_stage)


def _needs_data(args: Namespace, vp_stage: int | None) -> bool:
    """Whether this rank reads the dataset itself: the first tensor-parallel rank of a stage that uses it."""
    if parallel_state.get_tensor_model_parallel_rank() != 0:
        return False
    return _needs_tensors(args, vp_stage) or _keeps_documents_apart(args)


def _has_mtp_layers(args: Namespace, vp_stage: int | None) -> bool:
    layout = args.pipeline_model_parallel_layout
    if layout is not None:
        layout = _parsed_layout(layout, args.pipeline_model_parallel_size)
    return mtp_on_this_rank(layout, args.mtp_num_layers, ignore_virtual=False, vp_stage=vp_stage)


@functools.cache
def _parsed_layout(layout: str, pipeline_model_parallel_size: int) -> PipelineParallelLayerLayout:
    return PipelineParallelLayerLayout(layout, pipeline_model_parallel_size)
