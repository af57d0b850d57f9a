"""`train.swiglu`: where products with SwiGLU in their epilogues are taken or refused, and training as without them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cllm.config import Config
from cllm.errors import UserError
from cllm.kernels import swiglu
from cllm.model.sizes import build_decoder
from cllm.train.dryrun import block_activation_bytes
from cllm.train.launch import Launch
from cllm.train.run import train
from cllm.train.swiglu import fuse_swiglu

Tiny = Callable[..., Config]
BF16 = ("--train.precision", "bf16", "--model.d_ff", "96")
SIZED = ("--model.vocab_size", "64", "--model.d_model", "32")


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators' CPU form passes for the kernels."""
    monkeypatch.setattr(swiglu, "unavailable", lambda device: None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--train.precision", "fp32"], "swiglu is quack, but precision is fp32"),
        (["--train.strategy", "zero3"], "swiglu is quack, but strategy is zero3"),
        (["--train.fp8", "rowwise"], "swiglu is quack, but fp8 is rowwise"),
    ],
)
def test_settings_that_contradict_it_are_refused(tiny: Tiny, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny("--train.swiglu", "quack", *settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ((), "precision is fp32"),
        (BF16, "needs a CUDA device"),
        ((*BF16, "--train.fp8", "rowwise"), "fp8 is rowwise"),
        ((*BF16, "--train.strategy", "zero3"), "zero3 would keep every weight"),
        ((*BF16, "--model.mlp_activation", "gelu_tanh"), "model.mlp_activation is gelu_tanh"),
        ((*BF16[:2], "--model.d_ff", "100"), "needs widths in multiples of 8, not 32 and 100"),
    ],
)
def test_auto_says_what_it_took_and_why(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, settings: tuple[str, ...], reason: str
) -> None:
    config = tiny(*SIZED, *settings)
    model = build_decoder(config.model)
    with caplog.at_level(logging.INFO, "cllm"):
        assert not fuse_swiglu(model, config, Launch.on(config, "cpu", 1))
    assert f"swiglu: torch; not quack ({reason}" in caplog.text
    assert not any(block.mlp.fused for block in model.blocks)


def test_a_layer_that_was_replaced_is_left_alone(tiny: Tiny, kernels: None) -> None:
    config = tiny(*SIZED, *BF16, "--train.swiglu", "quack")
    model = build_decoder(config.model)
    model.blocks[1].mlp.up_proj = torch.nn.Sequential(model.blocks[1].mlp.up_proj)
    with pytest.raises(UserError, match=r"train\.swiglu is quack, which cannot be: up_proj is a Sequential"):
        fuse_swiglu(model, config, Launch.on(config, "cpu", 1))


def test_asked_for_and_missing_it_stops_before_a_folder_appears(tiny: Tiny) -> None:
    config = tiny(*BF16, "--train.swiglu", "quack")
    with pytest.raises(UserError, match=r"cannot be: needs a CUDA device; allowed here: auto, torch"):
        train(config)
    assert not (Path(config.runs_dir) / config.name).exists()


@pytest.mark.usefixtures("eager_graphs")
def test_a_run_learns_as_without(tiny: Tiny, kernels: None) -> None:
    """Also with blocks that are recomputed, and compiled."""

    def losses(*settings: str) -> list[float]:
        folder = train(tiny(*BF16, "--optim.warmup_steps", "2", *settings), overwrite=True)
        return [row["train/loss"] for row in folder.metrics() if "train/loss" in row]

    wanted = losses("--train.swiglu", "torch")
    for settings in ((), ("--train.gradient_checkpointing", "true"), ("--train.compile", "true")):
        found = losses("--train.swiglu", "quack", *settings)
        assert found != wanted
        assert found == pytest.approx(wanted, abs=5e-3), settings
        assert found[-1] < found[0]


def test_the_dry_run_counts_one_tensor_less(tiny: Tiny) -> None:
    found = {}
    for how in ("torch", "quack"):
        config = tiny(*SIZED, *BF16, "--train.swiglu", how)
        found[how] = block_activation_bytes(build_decoder(config.model), config, Launch.planned(config), 0)
    assert found["torch"] - found["quack"] == 2 * 96


def test_the_dry_run_counts_what_norms_after_read(tiny: Tiny) -> None:
    found = {}
    for after in ("false", "true"):
        config = tiny(*SIZED, *BF16, "--model.norms_after", after)
        found[after] = block_activation_bytes(build_decoder(config.model), config, Launch.planned(config), 0)
    assert found["true"] - found["false"] == 2 * 2 * 32
