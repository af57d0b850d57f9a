"""`train.cuda_graph`: when a step can be one CUDA graph, and that a replayed step trains as any other.

Recording needs a GPU: tests/gpu/test_replay.py.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import nn

from cllm import lightning_modules
from cllm.config import Config
from cllm.errors import UserError
from cllm.kernels.attention import Mask
from cllm.kernels.backends import flex
from cllm.train import run
from cllm.train.launch import Launch
from cllm.train.replay import Replay
from cllm.train.run import train

GRAPH = ("--train.cuda_graph", "true", "--train.accelerator", "gpu", "--train.micro_batch", "4")
STUDENT = ("--init.from", "teacher", "--uptrain.loss.kl", "1.0")
AUTO = ("--train.cuda_graph", "auto")


class Passes:
    """Stands for a graph: a replay computes the pass, and writes its results where the first call of it has put them.

    So whoever keeps a result sees it change in the next step, as with a graph.
    """

    made: ClassVar[list[Passes]] = []

    def __init__(self, replay: Replay):
        Passes.made.append(self)
        self.of, self.calls = replay, 0
        self.parameters = [p for p in replay._model.parameters() if p.requires_grad]

    def replay(self) -> None:
        self.calls += 1
        kept = self.of._parameters
        self.of._parameters = self.parameters
        parts, gradients = self.of._pass()
        self.of._parameters = kept
        if self.calls == 1:
            self.of._parts, self.of._gradients = parts, gradients
        for name, part in parts.items():
            self.of._parts[name].copy_(part)
        for gradient, new in zip(self.of._gradients, gradients, strict=True):
            if gradient is not None and new is not None:
                gradient.copy_(new)


@pytest.fixture
def eager_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run with `train.cuda_graph: auto` replays, through `Passes`."""
    here = Launch.here

    def graphed(config: Config) -> Launch:
        launch = here(config)
        return launch if config.train.cuda_graph is False else dataclasses.replace(launch, not_graphed=None)

    monkeypatch.setattr(run.Launch, "here", staticmethod(graphed))
    monkeypatch.setattr(Replay, "_capture", lambda replay: Passes(replay))
    Passes.made = []


def replays() -> int:
    return sum(graph.calls for graph in Passes.made)


def losses(config: Config, rows: str = "train/loss") -> list[float]:
    folder = train(config, overwrite=True)
    return [row[rows] for row in folder.metrics() if rows in row]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replayed_step_trains_as_any_other(
    tiny: Callable[..., Config], request: pytest.FixtureRequest, accumulate: int
) -> None:
    config = tiny(*AUTO, "--train.micro_batch", str(4 // accumulate), "--optim.grad_clip", "0.5")
    plain = losses(config), losses(config, "val/loss"), losses(config, "train/gradient_norm")
    request.getfixturevalue("eager_replay")
    if accumulate == 1:
        assert (losses(config), losses(config, "val/loss"), losses(config, "train/gradient_norm")) == plain
        assert replays() == 3 * config.train.steps
    else:  # gradients of one micro-batch replace those of the one before: why accumulation is refused
        assert losses(config) != plain[0]


def test_a_replayed_student_trains_as_any_other(tiny: Callable[..., Config], request: pytest.FixtureRequest) -> None:
    teacher = train(tiny("--name", "teacher"))
    words = (
        *AUTO,
        "--name",
        "student",
        "--init.from",
        str(teacher.path),
        "--model.kv.preset",
        "cla",
        "--train.micro_batch",
        "4",
    )
    losses_of = ("--uptrain.loss.kl", "1.0", "--uptrain.loss.attention", "1.0", "--uptrain.loss.hidden", "1.0")
    config = tiny(*words, *losses_of)
    rows = ("train/loss", "train/objective", "train/kl", "train/attention", "val/loss")
    plain = [losses(config, row) for row in rows]
    request.getfixturevalue("eager_replay")
    assert [losses(config, row) for row in rows] == plain
    assert replays() == len(rows) * config.train.steps


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--train.accelerator", "cpu"), "train.accelerator is cpu"),
        (("--train.micro_batch", "2"), "train.global_batch 4 is 2 x train.micro_batch"),
        (("--train.devices", "2", "--train.micro_batch", "2"), "train.strategy is auto: ddp"),
        (("--train.strategy", "ddp"), "train.strategy is ddp"),
        (("--data.document_mask", "true"), "data.document_mask is true"),
        (("--uptrain.random_sources", "0.5"), "uptrain.random_sources"),
        (("--uptrain.curriculum_steps", "2"), "uptrain.curriculum_steps"),
        (("--uptrain.loss.kl", "0.0"), "no part of uptrain.loss reads a teacher"),
    ],
)
def test_steps_that_cannot_be_recorded(tiny: Callable[..., Config], words: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match="train.cuda_graph is true, which cannot be: " + named):
        Launch.planned(tiny(*GRAPH, *STUDENT, *words))
    assert Launch.planned(tiny(*GRAPH, *STUDENT, *words, "--train.cuda_graph", "auto")).not_graphed is not None


def test_auto_records_where_it_can(tiny: Callable[..., Config]) -> None:
    assert Launch.planned(tiny(*GRAPH, *STUDENT)).not_graphed is None
    assert Launch.planned(tiny(*GRAPH, *STUDENT, "--train.cuda_graph", "auto")).not_graphed is None
    assert Launch.planned(tiny(*GRAPH, *STUDENT, "--train.cuda_graph", "false")).not_graphed is not None
    assert Launch.planned(tiny(*GRAPH, "--train.cuda_graph", "auto")).not_graphed is not None


def test_a_machine_without_a_gpu_is_named(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"this machine has no GPU; allowed here: auto, false"):
        Launch.here(tiny(*GRAPH, "--train.accelerator", "auto"))


def test_auto_logs_why_steps_are_not_replayed(tiny: Callable[..., Config], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        train(tiny(*AUTO, "--train.steps", "1"))
    assert "cuda_graph: not used (train.accelerator is cpu)" in caplog.text


@pytest.mark.parametrize("preset", ["mla", "ced"])
def test_the_backward_computes_without_autocast(
    tiny: Callable[..., Config], request: pytest.FixtureRequest, preset: str
) -> None:
    """Under autocast it would round gradients to bf16 that are fp32 without a graph."""
    words = ("--train.precision", "bf16", "--model.kv.preset", preset)
    config = tiny(*AUTO, *words, "--train.micro_batch", "4")
    plain = losses(config), losses(config, "train/gradient_norm")
    request.getfixturevalue("eager_replay")
    assert (losses(config), losses(config, "train/gradient_norm")) == plain


def test_an_optimizer_that_clears_gradients_in_place(
    tiny: Callable[..., Config], request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear = torch.optim.AdamW.zero_grad
    monkeypatch.setattr(torch.optim.AdamW, "zero_grad", lambda self: clear(self, set_to_none=False))
    config = tiny(*AUTO, "--train.micro_batch", "4")
    plain = losses(config)
    request.getfixturevalue("eager_replay")
    assert losses(config) == plain


class Freezing(Callback):
    """Freezes the embedding from the third step to the fifth."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        pl_module.model.embed.requires_grad_(not 2 <= trainer.global_step < 5)


class Replacing(Callback):
    """Gives the model other memory for a weight in the fourth step."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 3:
            weight = pl_module.model.norm.weight
            weight.data = weight.data * 2


@pytest.mark.parametrize(("callback", "recordings"), [(Freezing, 3), (Replacing, 2)])
def test_a_changed_model_is_recorded_again(
    tiny: Callable[..., Config], request: pytest.FixtureRequest, callback: type[Callback], recordings: int
) -> None:
    def run_losses() -> list[float]:
        folder = train(tiny(*AUTO, "--train.micro_batch", "4"), overwrite=True, callbacks=[callback()])
        return [row["train/loss"] for row in folder.metrics() if "train/loss" in row]

    plain = run_losses()
    request.getfixturevalue("eager_replay")
    assert run_losses() == plain
    assert len(Passes.made) == recordings


class Hooking(Callback):
    """Hooks a module or a weight before `step`."""

    def __init__(self, step: int, *, weight: bool):
        self.step, self.weight = step, weight

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step != self.step:
            return
        if self.weight:
            pl_module.model.norm.weight.register_hook(lambda gradient: gradient)
        else:
            pl_module.model.norm.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("weight", [False, True])
def test_hooks_are_refused(tiny: Callable[..., Config], eager_replay: None, step: int, weight: bool) -> None:
    hooking, named = Hooking(step, weight=weight), "norm.weight" if weight else "norm"
    with pytest.raises(UserError, match=f"train.cuda_graph: {named} has a hook .*train.cuda_graph false"):
        train(tiny(*AUTO, "--train.micro_batch", "4"), callbacks=[hooking])


@pytest.mark.parametrize("words", [(), AUTO])
def test_callbacks_may_not_accumulate(tiny: Callable[..., Config], eager_replay: None, words: tuple[str, ...]) -> None:
    config = tiny(*words, "--train.micro_batch", "4")
    with pytest.raises(UserError, match=r"256 tokens instead of 128.*accumulate_grad_batches to 2"):
        train(config, callbacks=[GradientAccumulationScheduler(scheduling={0: 2})])


def test_a_trainer_of_ones_own_gets_no_replay(tiny: Callable[..., Config], eager_replay: None) -> None:
    module, _ = lightning_modules(tiny(*AUTO, "--train.micro_batch", "4"))
    assert module.replay is None


def test_block_masks_that_a_graph_reads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex, "_static_blocks", lambda *_: object())
    monkeypatch.setattr(flex, "_RECORDED", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    flex.block_mask(Mask(4, False, None, None), 8, 8, torch.device("cuda"))
    assert flex._RECORDED == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kept = flex.block_mask(Mask(4, False, None, None), 8, 8, torch.device("cuda"))
    assert [kept] == flex._RECORDED


def test_another_shape_is_refused() -> None:
    replay = Replay(nn.Linear(2, 2), lambda batch: {})
    replay._batch = {"input_ids": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
        replay({"input_ids": torch.zeros(2, 4)})
