"""fp8 products on a GPU that supports them: in compiled blocks, under autocast and ZeRO.

python -m pytest tests/gpu/test_fp8.py -q
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from cllm.kernels.fp8_casts import FP8_CASTS
from cllm.model.sizes import build_decoder
from cllm.runs import RunFolder, load_run
from cllm.train.float8 import convert_blocks
from cllm.train.run import train
from cllm.uptrain.complete import load_config
from tests.watched import run_watched

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False"),
    pytest.mark.skipif(
        torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9),
        reason="needs a GPU of compute capability 8.9 or higher",
    ),
    pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao, which is not installed"),
]
ROOT = Path(__file__).resolve().parents[2]
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
STEPS = 20
LR = 3e-4
"""At 1e-3 losses fall to 0.35 so steeply that runs part by up to 0.08 by rounding alone."""
PARTING = 0.03
"""Of losses in bf16 and in fp8, which fall from 5.9 to 1.3 (emulated on a CPU: 0.013 at most, six runs)."""


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_compiled_casts_saturate_without_a_clamp(dtype: torch.dtype, transposed: bool) -> None:
    """Bit for bit, over and at the ends of the range, infinities and NaN included."""

    def cast(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = x.clamp(min=-torch.finfo(dtype).max, max=torch.finfo(dtype).max).to(dtype)
        return rows, rows.t().contiguous() if transposed else rows

    m = torch.finfo(dtype).max
    ends = [0.0, m, m * (1 + 2**-23), m * 1.03, m * 1.04, m * 1.2, 2 * m, 1e30, 1e-9, torch.inf, torch.nan]
    torch.manual_seed(0)
    x = torch.randn(128, 192, device="cuda") * torch.logspace(-8, 8, 192, base=2.0, device="cuda") * m / 512
    x[:, : len(ends)] = torch.tensor(ends, device="cuda")
    x[1::2].neg_()
    torch._dynamo.reset()
    code = torch.compile(cast, fullgraph=True, options={"post_grad_custom_post_pass": FP8_CASTS})
    for found, wanted in zip(code(x), cast(x), strict=True):
        bits, real = (tensor.view(torch.uint8) for tensor in (found, wanted))
        nan = wanted.float().isnan()
        assert torch.equal(found.float().isnan(), nan)
        assert torch.equal(bits[~nan], real[~nan])


@pytest.fixture(scope="module")
def base(made_up_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config of four fusedkv layers of width 256 that trains on made-up text."""
    folder = tmp_path_factory.mktemp("fp8")
    config: dict[str, Any] = {
        "runs_dir": str(folder / "runs"),
        "model": {"d_model": 256, "n_layers": 4, "n_heads": 4, "max_seq_len": 128, "kv": {"preset": "fusedkv"}},
        "attention": {"backend": "sdpa"},
        "data": {"path": str(made_up_text), "seq_len": 128, "num_workers": 0, "validation_sequences": 16},
        "optim": {"lr": LR, "min_lr": 1e-4, "warmup_steps": 4},
        "train": {"steps": STEPS, "global_batch": 8, "micro_batch": 4, "log_every": 1, "devices": 1},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    return file


def losses(base: Path, name: str, *settings: str, tag: str = "train/loss") -> list[float]:
    folder = train(load_config([base], ["--name", name, *settings]))
    return [row[tag] for row in folder.metrics() if tag in row]


@pytest.fixture(scope="module")
def plain(base: Path) -> list[float]:
    """Losses of the bf16 run."""
    return losses(base, "plain", "--train.compile", "false")


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_converted_layer_multiplies_in_fp8(base: Path, recipe: str) -> None:
    """Three products a layer; with the weights' gradients in bf16, two."""
    config = load_config([base], ["--model.vocab_size", "320"])
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = build_decoder(config.model, backend="sdpa")
    model.init_weights()
    ids = torch.randint(320, (2, 128), device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        exact = model.loss(ids, ids)
    converted = convert_blocks(model, recipe)
    assert converted == 2 * 7 + 2 * 5
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as trace:
        with torch.autocast("cuda", torch.bfloat16):
            loss = model.loss(ids, ids)
        loss.backward()
    counts = {event.key: event.count for event in trace.key_averages()}
    assert counts["aten::_scaled_mm"] == converted * (2 if recipe == "rowwise_with_gw_hp" else 3)
    assert loss.item() == pytest.approx(exact.item(), rel=2e-3)
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_runs_learn_as_in_bf16_and_leave_plain_checkpoints(
    base: Path, plain: list[float], recipe: str
) -> None:
    found = losses(base, recipe, "--train.fp8", recipe, "--train.compile", "true")
    assert found != plain
    assert found == pytest.approx(plain, abs=PARTING)
    runs = Path(load_config([base]).runs_dir)
    ours, theirs = (load_run(runs / name)[0].state_dict() for name in (recipe, "plain"))
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}


def test_gradient_checkpointing_runs(base: Path, plain: list[float]) -> None:
    found = losses(base, "again", "--train.fp8", "tensorwise", "--train.gradient_checkpointing", "true")
    assert found == pytest.approx(plain, abs=PARTING)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed, which is not installed")
@pytest.mark.parametrize("strategy", ["zero1", "zero2"])
def test_zero_keeps_bf16_weights_and_multiplies_in_fp8(base: Path, plain: list[float], strategy: str) -> None:
    """In another process, because DeepSpeed keeps its state until the process ends."""
    settings = ["--name", strategy, "--train.strategy", strategy, "--train.fp8", "tensorwise"]
    command = [sys.executable, "train.py", "--config", str(base), *settings]
    done = run_watched(command, seconds=300, tell=print, cwd=ROOT, environment=os.environ)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "fp8: 24 of 24 linear layers" in done.stderr
    folder = RunFolder(Path(load_config([base]).runs_dir) / strategy)
    found = [row["train/loss"] for row in folder.metrics() if "train/loss" in row]
    assert found == pytest.approx(plain, abs=PARTING)
