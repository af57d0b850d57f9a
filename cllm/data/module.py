"""Prepared folders as a Lightning data module."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from cllm.config import Config
from cllm.data.integrity import Verify
from cllm.data.manifest import Manifest
from cllm.data.mixture import MixedDataset, check_same_tokenizer
from cllm.data.packing import PackedDataset, ValidationDataset
from cllm.data.sampler import StepBatchSampler
from cllm.data.store import TokenStore
from cllm.errors import DataError, UserError
from cllm.kernels.backends.mask import max_documents
from cllm.signals import STOPPING_RUNS

TRAIN, VALIDATION = "train", "validation"


def check_documents(document_ids: torch.Tensor) -> None:
    """Refuse `document_ids` (B, T), from 0 in each row, of more than `max_documents(B, T)` documents.

    Raises:
        UserError: naming the settings that change this.
    """
    room = max_documents(*document_ids.shape)
    found = int((document_ids[:, -1] + 1).sum())
    if found > room:
        batch, length = document_ids.shape
        raise UserError(
            f"data.document_mask: a micro-batch of {batch} x {length} tokens has {found} documents, and kernels have "
            f"room for {room}; lower train.micro_batch, join short texts into longer documents, or turn the mask off"
        )


def _outlive_signals(worker: int) -> None:
    """Ignore in a worker what asks a run to stop: schedulers and terminals send it to all processes, and the current
    step still needs batches.

    Workers end when the main process does.
    """
    for number in STOPPING_RUNS:
        signal.signal(number, signal.SIG_IGN)


class DataModule(LightningDataModule):
    """The training splits and the validation splits of one or more prepared folders.

    Batches are dicts of int64 (B, T) tensors, as `packing.window` describes. The Trainer needs
    `use_distributed_sampler=False` and `accumulate_grad_batches` = global_batch / (micro_batch x devices). The training
    loader is endless and starts at the trainer's `global_step`.

    Args:
        train_folder: a prepared folder, or several with their weights, see `cllm/data/mixture.py`.
        validation: names of validation sets and their prepared folders; default: the first training folder as
            "validation".
        only_repeated: score only training labels that repeat a bigram, see `PackedDataset`.
        validation_sequences: at most so many of each validation set; None: all.
        vocab_size: the model's; None: not checked.
        verify: the part of each split that is checked for damage.

    Raises:
        DataError: for a folder that is missing, damaged, too short, or prepared with another tokenizer than the first
            training folder.
        UserError: for a vocabulary that is too small.
    """

    def __init__(
        self,
        train_folder: str | Mapping[str, float],
        validation: dict[str, str] | None = None,
        *,
        seq_len: int,
        micro_batch: int,
        global_batch: int,
        seed: int = 0,
        document_mask: bool = False,
        only_repeated: bool = False,
        num_workers: int = 0,
        validation_sequences: int | None = None,
        vocab_size: int | None = None,
        verify: Verify = "sample",
    ):
        super().__init__()
        self.seq_len, self.document_mask = seq_len, document_mask
        self.micro_batch, self.global_batch = micro_batch, global_batch
        self.num_workers, self.validation_sequences = num_workers, validation_sequences
        limits: dict[str, Any] = {"verify": verify, "vocab_size": vocab_size, "whose": "the model (model.vocab_size)"}
        weights = {train_folder: 1.0} if isinstance(train_folder, str) else train_folder
        stores = {folder: TokenStore(folder, TRAIN, **limits) for folder in weights}
        self.manifests: dict[str, Manifest] = {folder: store.manifest for folder, store in stores.items()}
        """Those of the training folders, by folder."""
        check_same_tokenizer(list(self.manifests.values()))
        sources = {
            folder: PackedDataset(store, seq_len, seed=seed, document_mask=document_mask, only_repeated=only_repeated)
            for folder, store in stores.items()
        }
        self.train_dataset = sources[train_folder] if isinstance(train_folder, str) else MixedDataset(sources, weights)
        folders = validation or {VALIDATION: next(iter(weights))}
        self.validation_stores = {name: TokenStore(folder, VALIDATION, **limits) for name, folder in folders.items()}
        self._check_vocabulary(vocab_size)

    @classmethod
    def of(cls, config: Config, **changes: Any) -> DataModule:
        """The data of a run. Arguments in `changes` replace those of the config."""
        data, train = config.data, config.train
        arguments: dict[str, Any] = {
            "train_folder": data.mix or data.main_folder,
            "validation": data.validation_sets,
            "seq_len": data.seq_len,
            "micro_batch": train.micro_batch,
            "global_batch": train.global_batch,
            "seed": train.seed,
            "document_mask": data.document_mask,
            "only_repeated": data.scored == "repeated",
            "num_workers": data.num_workers,
            "validation_sequences": data.validation_sequences,
            "vocab_size": config.model.vocab_size,
            "verify": data.verify,
        }
        return cls(**(arguments | changes))

    @property
    def manifest(self) -> Manifest:
        """That of the first training folder, whose tokenizer is that of all folders."""
        return next(iter(self.manifests.values()))

    @property
    def validation_names(self) -> list[str]:
        """The validation sets, in the order of `val_dataloader`."""
        return list(self.validation_stores)

    @property
    def validation_digests(self) -> dict[str, str]:
        """`Manifest.digest()` of each validation set's folder, in the order of `validation_names`."""
        return {name: store.manifest.digest() for name, store in self.validation_stores.items()}

    @property
    def bytes_per_token(self) -> dict[str, float]:
        """UTF-8 bytes per token of each validation set: bits per byte = loss in nats / ln 2 / bytes per token."""
        return {name: store.manifest.bytes_per_token(VALIDATION) for name, store in self.validation_stores.items()}

    def train_dataloader(self) -> DataLoader:
        """Micro-batches of the trainer's rank, from its current step on."""
        trainer = self.trainer
        assert trainer is not None
        sampler = StepBatchSampler(
            self.micro_batch, self.global_batch, trainer.global_rank, trainer.world_size, trainer.global_step
        )
        return DataLoader(self.train_dataset, batch_sampler=sampler, **self._loading)

    def val_dataloader(self) -> list[DataLoader]:
        """One loader for each of `validation_names`, with this rank's sequences in a fixed order."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        return [
            DataLoader(
                ValidationDataset(
                    store,
                    self.seq_len,
                    limit=self.validation_sequences,
                    document_mask=self.document_mask,
                    rank=rank,
                    world_size=world_size,
                ),
                batch_size=self.micro_batch,
                **self._loading,
            )
            for store in self.validation_stores.values()
        ]

    def on_before_batch_transfer(self, batch: dict[str, torch.Tensor], dataloader_idx: int) -> dict[str, torch.Tensor]:
        """Refuse, on the host, a batch with more documents than attention kernels on a GPU allow."""
        trainer = self.trainer
        if "document_ids" in batch and trainer is not None and trainer.strategy.root_device.type == "cuda":
            check_documents(batch["document_ids"])
        return batch

    @property
    def _loading(self) -> dict[str, Any]:
        settings: dict[str, Any] = {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available()}
        if self.num_workers:
            settings |= {"persistent_workers": True, "prefetch_factor": 4, "worker_init_fn": _outlive_signals}
        return settings

    def _check_vocabulary(self, vocab_size: int | None) -> None:
        manifest = self.manifest
        for name, store in self.validation_stores.items():
            other = store.manifest
            if other.eos_id != manifest.eos_id or not other.same_tokenizer(manifest):
                raise DataError(
                    f"{other.folder}: validation set {name!r} was made with another tokenizer than {manifest.folder}; "
                    f"prepare it with --tokenizer.train null --tokenizer.load {manifest.folder}/tokenizer"
                )
        for manifest in self.manifests.values():
            if vocab_size is not None and vocab_size < manifest.vocab_size:
                raise UserError(
                    f"model.vocab_size {vocab_size} is less than the {manifest.vocab_size} tokens of the tokenizer in "
                    f"{manifest.folder}"
                )
