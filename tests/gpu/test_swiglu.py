"""SwiGLU in the epilogues of quack-kernels' products: against fp32, and in training.

python -m pytest tests/gpu/test_swiglu.py -q
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import yaml

from cllm.config import ModelConfig
from cllm.kernels.swiglu import swiglu, unavailable
from cllm.model.mlp import GatedMLP
from cllm.model.sizes import build_decoder
from cllm.train.run import train
from cllm.uptrain.complete import load_config


@pytest.fixture(autouse=True)
def kernels(gpu: torch.device) -> None:
    """Skip if the kernels cannot be used."""
    if reason := unavailable(gpu):
        pytest.skip(reason)


@pytest.mark.parametrize(("n", "d", "d_ff"), [(4096, 1024, 2816), (1000, 2048, 5632), (333, 64, 200), (8, 3072, 8192)])
def test_output_and_gradients_are_as_close_to_fp32_as_those_of_torch(
    gpu: torch.device, n: int, d: int, d_ff: int
) -> None:
    draw = torch.Generator(gpu).manual_seed(0)
    shapes = ((n, d), (d_ff, d), (d_ff, d), (d, d_ff))
    x, *weights = (torch.randn(s, device=gpu, generator=draw).bfloat16() for s in shapes)
    weights = [w * w.shape[1] ** -0.5 for w in weights]
    d_out = torch.randn(n, d, device=gpu, generator=draw).bfloat16()

    def plain(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)

    def found(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, *weights)]
        out = function(*leaves)
        return [t.float() for t in (out.detach(), *torch.autograd.grad(out, leaves, d_out.to(dtype)))]

    exact = found(plain, torch.float32)
    ours, theirs = (
        [((a - b).norm() / b.norm()).item() for a, b in zip(found(f, torch.bfloat16), exact, strict=True)]
        for f in (swiglu, plain)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert mine < 1.1 * other < 0.02


def test_a_compiled_layer_under_autocast(gpu: torch.device) -> None:
    """One graph for all batches of a size, fp32 gradients, and less kept for the backward."""
    torch.manual_seed(0)
    layer = GatedMLP(512, 1536).to(gpu)
    x = torch.randn(2, 1024, 512, device=gpu, dtype=torch.bfloat16)
    outputs, kept = [], []
    for fused in (False, True):
        layer.fused = fused
        run = torch.compile(layer, fullgraph=True)
        for _ in range(2):
            layer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                before = torch.cuda.memory_allocated()
                out = run(x, x)
                kept.append(torch.cuda.memory_allocated() - before)
            out.float().square().sum().backward()
        outputs.append([out.detach().float(), *(p.grad.clone() for p in layer.parameters())])
    assert {t.dtype for t in outputs[1]} == {torch.float32}
    for mine, other in zip(*outputs, strict=True):
        assert ((mine - other).norm() / other.norm()).item() < 0.01
    assert kept[-1] < kept[1]


def test_a_decoder_without_gradients_of_some_weights(gpu: torch.device) -> None:
    config = ModelConfig(vocab_size=256, d_model=128, n_layers=2, n_heads=2, max_seq_len=64, kv={"preset": "fusedkv"})
    torch.manual_seed(0)
    with gpu:
        model = build_decoder(config, backend="sdpa")
    model.init_weights()
    for block in model.blocks:
        block.mlp.fused = True
        block.mlp.down_proj.requires_grad_(False)
    ids = torch.randint(256, (2, 64), device=gpu)
    with torch.autocast("cuda", torch.bfloat16):
        model.loss(ids, ids).backward()
    for block in model.blocks:
        assert block.mlp.down_proj.weight.grad is None
        assert block.mlp.gate_proj.weight.grad.abs().sum() > 0


def test_auto_takes_them_and_a_run_learns_as_without(made_up_text: Path, tmp_path: Path, caplog) -> None:
    config = {
        "runs_dir": str(tmp_path / "runs"),
        "model": {"d_model": 256, "n_layers": 4, "n_heads": 4, "max_seq_len": 64, "kv": {"preset": "fusedkv"}},
        "data": {"path": str(made_up_text), "seq_len": 64, "num_workers": 0, "validation_sequences": 4},
        "optim": {"lr": 3e-4, "min_lr": 1e-4, "warmup_steps": 4},
        "train": {"steps": 20, "global_batch": 8, "micro_batch": 4, "log_every": 1, "devices": 1},
    }
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    losses = []
    for how in ("torch", "auto"):
        caplog.clear()
        with caplog.at_level("INFO", "cllm"):
            folder = train(load_config([file], ["--name", how, "--train.swiglu", how]))
        assert ("swiglu: quack" in caplog.text) == (how == "auto")
        losses.append([row["train/loss"] for row in folder.metrics() if "train/loss" in row])
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], abs=0.01)
