"""Every plan's blocks compile whole and once: no graph breaks, and nothing compiled anew from batch to batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.config.load import read_yaml
from cllm.model.sizes import build_decoder
from cllm.uptrain.complete import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SHAPE = {"vocab_size": 64, "d_model": 32, "n_heads": 4, "d_ff": 64, "max_seq_len": 48, "qk_norm": "true"}
BATCH, LENGTH = 2, 48
KINDS = ("mha", "fusedkv", "lckv", "mla", "yoco")
"""Plans with every kind of slot and read among the files: own, fused, from above, latents, windows."""


def plans() -> list[Path]:
    """Without those that spell out the layers of another depth."""
    return [f for f in sorted((CONFIGS / "kv").glob("*.yaml")) if "n_layers" not in read_yaml(f)["model"]]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(model: torch.nn.Module, documents: bool, seed: int) -> None:
    """Forward and backward of a batch; with `documents`, of as many and as long ones as `seed` draws."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(64, (BATCH, LENGTH + 1), generator=draw)
    where: tuple[torch.Tensor, ...] = ()
    if documents:
        begins = torch.rand(BATCH, LENGTH, generator=draw) < 0.05 * (seed + 1)
        begins[:, 0] = True
        place = torch.arange(LENGTH).expand(BATCH, -1)
        where = (place - torch.where(begins, place, 0).cummax(1).values, begins.long().cumsum(1) - 1)
    model.loss(ids[:, :-1], ids[:, 1:].contiguous(), *where).backward()


def cases() -> Iterator[Any]:
    """Every plan with documents and recomputation, and without both; one plan of each kind with either alone."""
    for plan in plans():
        for documents, checkpointing in itertools.product((False, True), repeat=2):
            if documents == checkpointing or plan.stem in KINDS:
                names = (plan.stem, ("whole", "documents")[documents], ("kept", "recomputed")[checkpointing])
                yield pytest.param(plan, documents, checkpointing, id="-".join(names))


@pytest.mark.parametrize(("plan", "documents", "checkpointing"), cases())
def test_blocks_are_whole_and_compiled_once(plan: Path, documents: bool, checkpointing: bool) -> None:
    settings = [word for key, value in SHAPE.items() for word in (f"--model.{key}", str(value))]
    files = [CONFIGS / "bench" / "374m.yaml", plan]
    config = load_config(files, [*settings, "--model.n_layers", "6", "--data.seq_len", str(LENGTH)])
    model = build_decoder(config.model)
    model.init_weights()
    model.gradient_checkpointing = checkpointing
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=8 * len(model.blocks)):
        step(model, documents, seed=0)
        with torch._dynamo.config.patch(error_on_recompile=True):
            for seed in (1, 2):
                step(model, documents, seed)
