"""Chats packed into sequences of --seq-length tokens, each kept apart from the others: the dataset of --sft.

Its files are those of preprocess_data.py --chat: in Megatron's indexed format a document is a chat, a sequence of it a
stretch of tokens of one kind, and the mode of the sequence says whether they count in the loss (1) or not (0).

A chat of L tokens takes L - 1 places: each of its tokens but the last is an input, each but the first a label. With
context parallelism every chat is filled up to a multiple of 2 x --context-parallel-size, as ranks share it. Chats are
packed whole, each into the fullest sequence that still has room (best fit); what stays empty is filled up, and is a
document of its own, so that nothing attends to it.
"""

import functools
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from torch import Tensor


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Which chats share a sequence: lists of places in `lengths`, by best fit in the order given.

    Args:
        lengths: places that each chat takes.
        room: places of a sequence.

    Raises:
        ValueError: a chat takes more.
    """
    packs: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)  # packs by the places that they have left
    rooms: list[int] = []  # the keys of it, in order
    for chat, length in enumerate(lengths):
        if length > room:
            raise ValueError(f"a chat takes {length} places; --seq-length {room} must hold it")
        at = bisect_left(rooms, length)
        if at == len(rooms):
            packs.append([])
            index, left = len(packs) - 1, room
        else:
            left = rooms[at]
            index = with_room[left].pop()
            if not with_room[left]:
                del rooms[at]
        packs[index].append(chat)
        left -= length
        if left:
            if not with_room[left]:
                insort(rooms, left)
            with_room[left].append(index)
    return packs


class PackedChats(MegatronDataset):
    """Samples for --sft: dictionaries of tensors, S = --seq-length.

    tokens, labels, position_ids: int64 [S]; positions begin at 0 with every chat. loss_mask: float32 [S], 1 where the
    label is the assistant's. cu_seqlens: int32 [S + 1], where chats begin, filled up with S as Megatron's own
    SFTDataset does. max_seqlen: int32, the longest of them. padding_mask: uint8 [S], 1 where a token fills up.

    Training shuffles chats before they are packed (--seed) and sequences anew for every epoch; validation and test
    sets keep the order of the data, so that a held-out loss does not depend on a seed. Nothing is kept on disk.
    """

    def __init__(
        self,
        dataset: IndexedDataset,
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        self._seed, self._shuffles = config.random_seed, index_split is Split.train
        ranks = config.context_parallel_size or 1
        self._unit = 2 * ranks if ranks > 1 else 1
        chats = self._shuffled(np.asarray(indices), 0)
        bounds = dataset.document_indices
        tokens = np.concatenate([[0], np.cumsum(dataset.sequence_lengths, dtype=np.int64)])[bounds]
        places = self._places(np.diff(tokens)[chats])
        packs = pack(places.tolist(), config.sequence_length)
        self._chats = chats[np.fromiter((chat for each in packs for chat in each), np.int64, len(chats))]
        self._begins = np.cumsum([0, *map(len, packs)])
        self._pad = _fill_id(config.tokenizer)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: IndexedDataset) -> int:
        """Chats, which --split divides."""
        return low_level_dataset.document_indices.shape[0] - 1

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> IndexedDataset:
        """The files, read with the modes of sequences."""
        return IndexedDataset(dataset_path, multimodal=True, mmap=config.mmap_bin_files)

    @property
    def packs(self) -> int:
        """Sequences in one epoch."""
        return len(self._begins) - 1

    def __len__(self) -> int:
        return self.packs if self.num_samples is None else self.num_samples

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        epoch, at = divmod(int(idx), self.packs)
        index = int(self._epoch_order(epoch)[at])
        room, pad = self.config.sequence_length, self._pad
        tokens, labels = np.full(room, pad, np.int64), np.full(room, pad, np.int64)
        loss_mask, padding = np.zeros(room, np.float32), np.ones(room, np.uint8)
        begins = [0]
        for chat in self._chats[self._begins[index] : self._begins[index + 1]]:
            ids, counts = self._read(int(chat))
            begin, end = begins[-1], begins[-1] + len(ids) - 1
            tokens[begin:end], labels[begin:end] = ids[:-1], ids[1:]
            loss_mask[begin:end], padding[begin:end] = counts[1:], 0
            begins.append(begin + int(self._places(len(ids))))
        if begins[-1] < room:
            begins.append(room)
        lengths = np.diff(begins)
        starts = np.full(room + 1, room, np.int32)
        starts[: len(begins)] = begins
        arrays = {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": loss_mask,
            "position_ids": np.concatenate([np.arange(length) for length in lengths]),
            "cu_seqlens": starts,
            "padding_mask": padding,
        }
        longest = torch.tensor(int(lengths.max()), dtype=torch.int32)
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"max_seqlen": longest}

    def _places(self, tokens: Any) -> Any:
        """Places that chats of so many tokens take."""
        return -(-(tokens - 1) // self._unit) * self._unit

    def _shuffled(self, values: np.ndarray, epoch: int) -> np.ndarray:
        return np.random.default_rng([self._seed, epoch]).permutation(values) if self._shuffles else values

    @functools.lru_cache(maxsize=2)  # noqa: B019  # a dataset lives as long as the run
    def _epoch_order(self, epoch: int) -> np.ndarray:
        return self._shuffled(np.arange(self.packs), epoch + 1)

    def _read(self, chat: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of a chat, int64 [L], and whether each counts, bool [L]."""
        stretches, modes = self.dataset[self.dataset.document_indices[chat] : self.dataset.document_indices[chat + 1]]
        counts = np.repeat(np.asarray(modes, bool), [len(stretch) for stretch in stretches])
        return np.concatenate(stretches).astype(np.int64), counts


def _fill_id(tokenizer: Any) -> int:
    """The id that fills up; which one does not matter, as the sample says where it stands."""
    for name in ("pad", "eod"):
        found = getattr(tokenizer, name, None)
        if isinstance(found, int) and found >= 0:
            return found
    return 0
