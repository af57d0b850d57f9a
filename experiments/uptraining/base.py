"""The base model of the students: tokens, pretraining of Hugging Face's Llama, and the check of its import."""

from __future__ import annotations

import math
import os
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import wait
from cllm.config import OptimConfig
from cllm.config.load import validate
from cllm.data.manifest import Manifest
from cllm.data.packing import PackedDataset, ValidationDataset
from cllm.data.prepare.build import prepare
from cllm.data.prepare.recipe import Recipe
from cllm.data.store import TokenStore
from cllm.files import new_folder
from cllm.kernels.cross_entropy import IGNORE
from cllm.train.schedule import learning_rate_factor
from cllm.uptrain.teacher import load_teacher
from experiments.uptraining.setup import Deadline, Folders, Size

LOGITS_CLOSE = 1e-4
"""Largest allowed difference of fp32 logits after the import."""


def make_tokens(folders: Folders, size: Size, corpus: list[str], validation: list[str]) -> Manifest:
    """Prepare the corpus and train a tokenizer on it, as data/prepare.py does; a finished corpus is reused."""
    recipe: dict[str, Any] = {
        "name": "evidence",
        "out": str(folders.tokens),
        "source": {"kind": "files", "paths": corpus},
        "tokenizer": {"train": {"vocab_size": size.vocab_size, "sample_bytes": 50_000_000}},
        "validation": {"paths": validation} if validation else {"fraction": 0.02},
    }
    if size.corpus_bytes is not None:
        recipe |= {"max_bytes": size.corpus_bytes, "workers": 1}
    return prepare(validate(Recipe, recipe))


def llama(size: Size, manifest: Manifest) -> LlamaForCausalLM:
    """Hugging Face's Llama, with random weights of `base_seed`."""
    torch.manual_seed(size.base_seed)
    config = LlamaConfig(
        hidden_size=size.d_model,
        intermediate_size=size.d_ff,
        num_hidden_layers=size.n_layers,
        num_attention_heads=size.n_heads,
        num_key_value_heads=size.n_heads,
        vocab_size=-(-manifest.vocab_size // 64) * 64,
        max_position_embeddings=size.seq_len,
        tie_word_embeddings=False,
        bos_token_id=manifest.eos_id,
        eos_token_id=manifest.eos_id,
        use_cache=False,
    )
    config._attn_implementation = "sdpa"
    return LlamaForCausalLM(config)


class Pretraining:
    """The base model, its optimizer and its progress, which one file saves."""

    def __init__(self, folders: Folders, size: Size, manifest: Manifest, *, device: torch.device, compiled: bool):
        self.folders, self.size, self.device = folders, size, device
        self.file = folders.out / "pretraining.pt"
        with device:
            self.model = llama(size, manifest)
        decayed = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=size.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
        self.schedule = OptimConfig(lr=size.lr, min_lr=size.lr / 10, warmup_steps=max(size.steps // 20, 1))
        self.training_loss = torch.compile(self.loss) if compiled else self.loss
        self.step, self.seconds = 0, 0.0
        """Steps so far, and their time, that of earlier commands included."""
        if self.file.exists():
            state = torch.load(self.file, map_location=device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.seconds = state["step"], state["seconds"]

    def loss(self, ids: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy in nats, the mean over scored tokens; `ids` and `labels` (B, T)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            logits = self.model(input_ids=ids).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)

    def save(self) -> None:
        """Write the state that another command resumes from."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        partial = self.file.with_suffix(".partial")
        torch.save(state | {"seconds": self.seconds}, partial)
        partial.replace(self.file)

    def train(self, text: PackedDataset, deadline: Deadline) -> bool:
        """Take the steps that are left. Returns False, with the state saved, if time ran out first."""
        size, device, gpu = self.size, self.device, self.device.type == "cuda"
        order = range(self.step * size.batch, size.steps * size.batch)
        workers = min(8, os.cpu_count() or 1) if gpu else 0
        before, begin = self.seconds, time.perf_counter()
        for batch in DataLoader(text, size.batch, sampler=order, num_workers=workers, pin_memory=gpu):
            loss = self._step(*(batch[name].to(device, non_blocking=True) for name in ("input_ids", "labels")))
            self.seconds = before + time.perf_counter() - begin
            if self.step % 100 == 0 or self.step == size.steps:
                print(
                    f"pretraining: step {self.step} of {size.steps}, loss {loss.item():.4f}, {self.seconds:.0f} s",
                    flush=True,
                )
            if self.step % 10 == 0 and deadline.left < 0 and self.step < size.steps:
                self.save()
                return False
        wait(device)
        self.seconds = before + time.perf_counter() - begin
        return True

    def _step(self, ids: Tensor, labels: Tensor) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.size.lr * learning_rate_factor(self.step, self.size.steps, self.schedule)
        loss = self.training_loss(ids, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return loss

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Nats a token over the validation sequences."""
        nats = scored = 0.0
        validation = ValidationDataset(
            TokenStore(self.folders.tokens, "validation"), self.size.seq_len, limit=self.size.validation_sequences
        )
        for batch in DataLoader(validation, self.size.uptrain_batch):
            count = int((batch["labels"] != IGNORE).sum())
            loss = self.loss(batch["input_ids"].to(self.device), batch["labels"].to(self.device))
            nats += loss.item() * count
            scored += count
        return nats / scored


def pretrain(
    folders: Folders, size: Size, manifest: Manifest, *, device: torch.device, compiled: bool, deadline: Deadline
) -> dict[str, Any] | None:
    """Pretrain and save the base model: bf16 autocast on a GPU, fused AdamW, cosine decay to a tenth of the peak rate.

    Returns:
        The row of the model, or None if time ran out; the next call resumes.
    """
    pretraining = Pretraining(folders, size, manifest, device=device, compiled=compiled)
    text = PackedDataset(TokenStore(folders.tokens, "train"), size.seq_len, seed=size.base_seed)
    if not pretraining.train(text, deadline):
        return None
    loss = pretraining.validation_loss()
    with new_folder(folders.base, "checkpoint") as partial:
        pretraining.model.save_pretrained(partial)
    pretraining.file.unlink(missing_ok=True)
    return {
        "kind": "base",
        "parameters": sum(p.numel() for p in pretraining.model.parameters()),
        "tokens": size.steps * size.batch * size.seq_len,
        "unique_tokens": len(text) * size.seq_len,
        "loss": loss,
        "ppl": math.exp(loss),
        "seconds": pretraining.seconds,
    }


@torch.no_grad()
def check_import(folders: Folders, size: Size, device: torch.device) -> dict[str, Any]:
    """Compare the imported model with Hugging Face's on validation text, in fp32.

    A best token counts as the same if Hugging Face's logit of it is its largest one, within `LOGITS_CLOSE`.
    """
    theirs: nn.Module = LlamaForCausalLM.from_pretrained(folders.base, dtype=torch.float32, local_files_only=True)
    theirs.to(device).eval()
    ours = load_teacher(folders.base).decoder.to(device)
    text = ValidationDataset(TokenStore(folders.tokens, "validation"), size.seq_len, limit=4)
    difference, same, tokens = 0.0, 0, 0
    for i in range(len(text)):
        ids = text[i]["input_ids"][None].to(device)
        a, b = theirs(input_ids=ids).logits, ours(ids)
        difference = max(difference, (a - b).abs().max().item())
        chosen = a.gather(-1, b.argmax(-1, keepdim=True))
        same += int((chosen[..., 0] >= a.amax(-1) - LOGITS_CLOSE).sum())
        tokens += ids.numel()
    row = {"kind": "import", "largest_difference": difference, "tokens": tokens, "same_best_token": same}
    return row | {"equal": difference <= LOGITS_CLOSE and same == tokens}
