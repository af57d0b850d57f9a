"""Sequences of a fixed length, cut from a split's tokens without gaps.

Sequence i is tokens [i T, i T + T), and its labels are the same window one token on. With document masks each token
also carries its document, so that attention can be limited to documents.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from cllm.data.order import shuffled
from cllm.data.recall import recall_distance
from cllm.data.store import TokenStore
from cllm.errors import DataError
from cllm.kernels.cross_entropy import IGNORE


def window(store: TokenStore, start: int, seq_len: int, document_mask: bool) -> dict[str, Tensor]:
    """The sequence that begins at token `start`: a dict of int64 (T,) tensors.

    `input_ids`; `labels`, the next token at each position; and with `document_mask` also `positions`, from 0 at the
    window's start and at each document's start, and `document_ids`, counting up from 0. With `document_mask` the label
    of an EOS, which would be the first token of the next document, is `IGNORE`. If the split ends inside the window or
    before it, the window is padded with EOS, whose labels are `IGNORE`.
    """
    start = min(start, len(store))
    stop = min(start + seq_len + 1, len(store))
    tokens = np.full(seq_len + 1, store.eos_id, dtype=np.int64)
    tokens[: stop - start] = store.read(start, stop)
    labels = tokens[1:].copy()
    labels[max(stop - start - 1, 0) :] = IGNORE
    sequence = {"input_ids": tokens[:-1], "labels": labels}
    if document_mask:
        document_ids, positions = np.zeros_like(tokens), np.arange(seq_len + 1)
        if stop > start:
            document_ids[: stop - start], positions[: stop - start] = store.documents(start, stop)
            document_ids[stop - start :] = document_ids[stop - start - 1]
        labels[document_ids[1:] != document_ids[:-1]] = IGNORE
        sequence |= {"positions": positions[:-1], "document_ids": document_ids[:-1]}
    return {name: torch.from_numpy(array) for name, array in sequence.items()}


class PackedDataset(Dataset):
    """Training sequences for any index from 0 on.

    Index i is position i mod n of epoch i // n, with n = `len(self)`. With `shuffle` an epoch's order is a function of
    (seed, epoch). There is no state between calls: every worker, rank and resumed run gets the same sequence for an
    index. With `only_repeated` labels that complete no earlier bigram of the sequence (`cllm/data/recall.py`) are
    `IGNORE`.

    Raises:
        DataError: if the split is too short for one sequence.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        document_mask: bool = False,
        only_repeated: bool = False,
    ):
        self.store, self.seq_len = store, seq_len
        self.seed, self.shuffle, self.document_mask = seed, shuffle, document_mask
        self.only_repeated = only_repeated
        self._n_sequences = (len(store) - 1) // seq_len
        if self._n_sequences < 1:
            raise DataError(
                f"{store.folder}: its {store.split} split has {len(store)} tokens, too few for one sequence of "
                f"seq_len {seq_len} and the token after it"
            )

    def __len__(self) -> int:
        """Sequences in an epoch."""
        return self._n_sequences

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sequence `index`, as `window` returns it. Raises `IndexError` if it is negative."""
        if index < 0:
            raise IndexError(f"sequence {index}")
        epoch, position = divmod(index, self._n_sequences)
        if self.shuffle:
            position = shuffled(position, self._n_sequences, self.seed, epoch)
        sequence = window(self.store, position * self.seq_len, self.seq_len, self.document_mask)
        if self.only_repeated:
            ids, labels, documents = (sequence.get(key) for key in ("input_ids", "labels", "document_ids"))
            assert ids is not None
            assert labels is not None
            distance = recall_distance(ids[None], labels[None], None if documents is None else documents[None])[0]
            sequence["labels"] = torch.where(distance > 0, labels, IGNORE)
        return sequence


class ValidationDataset(Dataset):
    """One rank's part of a fixed set of sequences, in a fixed order.

    The sequences cover the split to its last token; the last one is padded. `limit` takes that many, evenly spaced.
    Sequences are dealt to the ranks in turn. Ranks with one sequence fewer get one whose labels are all `IGNORE`: all
    ranks see the same number of batches, and together they score the same tokens whatever their number. A mean over
    tokens must therefore weight each batch by its number of scored labels, which may be 0.

    Raises:
        DataError: if there is nothing to predict.
    """

    def __init__(
        self,
        store: TokenStore,
        seq_len: int,
        *,
        limit: int | None = None,
        document_mask: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.store, self.seq_len, self.document_mask = store, seq_len, document_mask
        self.rank, self.world_size = rank, world_size
        self._n_sequences = -(-(len(store) - 1) // seq_len)
        if self._n_sequences < 1:
            raise DataError(f"{store.folder}: its {store.split} split has {len(store)} tokens, too few to predict one")
        self._n_taken = min(limit or self._n_sequences, self._n_sequences)

    def __len__(self) -> int:
        """Sequences for this rank, the same on every rank."""
        return -(-self._n_taken // self.world_size)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Sequence `index` of this rank, as `window` returns it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        turn = index * self.world_size + self.rank
        # Evenly spaced. A turn after the last lies beyond the split's end, so its window is all padding.
        sequence = turn * self._n_sequences // self._n_taken
        return window(self.store, sequence * self.seq_len, self.seq_len, self.document_mask)
