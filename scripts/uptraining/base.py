"""The checkpoint that students start from: tokens, a Llama of Hugging Face's pretrained on them, and its import."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

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
from uptraining.setup import Deadline, Folders, Size

LOGITS_CLOSE = 1e-4
"""Largest difference of fp32 logits that an import may have."""


def make_tokens(folders: Folders, size: Size, corpus: list[str], validation: list[str]) -> Manifest:
    """The corpus with a tokenizer trained on it; what `data/prepare.py` does, and done before costs nothing."""
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
    """Of Hugging Face's own, weights drawn with `base_seed`."""
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


def pretrain(
    folders: Folders, size: Size, manifest: Manifest, *, device: torch.device, compiled: bool, deadline: Deadline
) -> dict[str, Any] | None:
    """Pretrain and save the base model; its row, or None when time ran out first and the next call goes on.

    A plain loop: bf16 autocast on a GPU, one micro-batch a step, fused AdamW, cosine to a tenth of the peak.
    """
    with device:
        model = llama(size, manifest)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=size.lr, betas=(0.9, 0.95), fused=device.type == "cuda")
    schedule = OptimConfig(lr=size.lr, min_lr=size.lr / 10, warmup_steps=max(size.steps // 20, 1))
    saved, step, before = folders.out / "pretraining.pt", 0, 0.0
    if saved.exists():
        state = torch.load(saved, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, before = state["step"], state["seconds"]

    def loss_of(ids: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE)

    training_loss = torch.compile(loss_of) if compiled else loss_of
    text = PackedDataset(TokenStore(folders.tokens, "train"), size.seq_len, seed=size.base_seed)
    order = range(step * size.batch, size.steps * size.batch)
    workers = min(8, os.cpu_count() or 1) if device.type == "cuda" else 0
    batches = DataLoader(text, size.batch, sampler=order, num_workers=workers, pin_memory=device.type == "cuda")
    begin = time.perf_counter()
    for batch in batches:
        for group in optimizer.param_groups:
            group["lr"] = size.lr * learning_rate_factor(step, size.steps, schedule)
        loss = training_loss(*(batch[name].to(device, non_blocking=True) for name in ("input_ids", "labels")))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if step % 100 == 0 or step == size.steps:
            seconds = before + time.perf_counter() - begin
            print(f"pretraining: step {step} of {size.steps}, loss {loss.item():.4f}, {seconds:.0f} s", flush=True)
        if step % 10 == 0 and deadline.left < 0 and step < size.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            _save(state | {"seconds": before + time.perf_counter() - begin}, saved)
            return None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = before + time.perf_counter() - begin
    nats = scored = 0.0
    validation = ValidationDataset(
        TokenStore(folders.tokens, "validation"), size.seq_len, limit=size.validation_sequences
    )
    with torch.no_grad():
        for batch in DataLoader(validation, size.uptrain_batch):
            count = int((batch["labels"] != IGNORE).sum())
            nats += loss_of(batch["input_ids"].to(device), batch["labels"].to(device)).item() * count
            scored += count
    with new_folder(folders.base, "checkpoint") as partial:
        model.save_pretrained(partial)
    saved.unlink(missing_ok=True)
    return {
        "kind": "base",
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": size.steps * size.batch * size.seq_len,
        "unique_tokens": len(text) * size.seq_len,
        "loss": nats / scored,
        "ppl": math.exp(nats / scored),
        "seconds": seconds,
    }


def _save(state: dict[str, Any], file: Path) -> None:
    partial = file.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(file)


@torch.no_grad()
def check_import(folders: Folders, size: Size, device: torch.device) -> dict[str, Any]:
    """This project's model against Hugging Face's on validation text, in fp32.

    A best token counts as the same where theirs scores it, within `LOGITS_CLOSE`, as high as its own best one.
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
    found = {"kind": "import", "largest_difference": difference, "tokens": tokens, "same_best_token": same}
    return found | {"equal": difference <= LOGITS_CLOSE and same == tokens}
