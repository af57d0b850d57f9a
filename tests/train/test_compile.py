"""Every plan's blocks compile whole and once: no graph breaks, and nothing compiled anew from batch to batch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm.config import ModelConfig
from cllm.config.load import read_yaml
from cllm.model.sizes import build_decoder
from cllm.model.sources import Reader, WriteMix
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
    """Every plan with documents and recomputation; one plan of each kind also with either alone, and without both."""
    for plan in plans():
        for documents, checkpointing in itertools.product((False, True), repeat=2):
            if (documents and checkpointing) or plan.stem in KINDS:
                names = (plan.stem, ("whole", "documents")[documents], ("kept", "recomputed")[checkpointing])
                yield pytest.param(plan, documents, checkpointing, id="-".join(names))


@pytest.mark.parametrize(("plan", "documents", "checkpointing"), list(cases()))
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


TOGETHER: list[dict[str, Any]] = [
    {"own": {"tie": "kv"}},
    {"own": {"only": "keys", "input": 0}, "values": {"share": 0}},
    {"own": {"mix": [0]}, "keys": {"fuse": [2, 1], "granularity": "complex"}, "values": {"fuse": [2, 0]}},
    {"keys": {"share": 1}, "values": {"fuse": [0, 2], "granularity": "matrix"}},
    {"own": {"head_dim": 6, "n_kv_heads": 1}},
    {"read": {"join": [4, {"own": {"head_dim": 6, "window": 3, "tie": "kv"}}], "sink": True}},
    {"read": {"gate": [{"share": 4, "window": 9}, {"own": {"head_dim": 6, "window": 3}}], "gates": "complementary"}},
]
"""Every form of owner and every read that is not among the files' plans."""


def test_compiled_blocks_have_the_gradients_of_plain_ones() -> None:
    """Through the compiler's own backward, not only its tracing."""
    layers = [{"layers": i, **layer} for i, layer in enumerate(TOGETHER)]
    config = ModelConfig(
        vocab_size=64, d_model=16, n_layers=7, n_heads=2, d_ff=24, max_seq_len=48, qk_norm=True, kv={"layers": layers}
    )
    model = build_decoder(config)
    with torch.no_grad():  # many weights of sums and gates start at zero, and hide what they multiply
        for module in model.modules():
            if isinstance(module, Reader):
                for weight in module.parameters():
                    weight.add_(0.1 * torch.randn_like(weight) / (35 if isinstance(module, WriteMix) else 1))

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        step(model, documents=True, seed=0)
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    plain = gradients()
    for block in model.blocks:
        block.compile(dynamic=False, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=8 * len(model.blocks)):
        compiled = gradients()
    for name, gradient in plain.items():
        assert gradient.any(), name
        assert (compiled[name] - gradient).norm() < 1e-5 * gradient.norm(), name
