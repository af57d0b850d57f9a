"""`train.cuda_graph`: when a step can be one CUDA graph, and that a replayed step trains as any other.

Recording needs a GPU: tests/gpu/test_replay.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from cllm.config import Config
from cllm.errors import UserError
from cllm.train import run
from cllm.train.launch import Launch
from cllm.train.replay import Replay
from cllm.train.run import train

GRAPH = ("--train.cuda_graph", "true", "--train.accelerator", "gpu", "--train.micro_batch", "4")
STUDENT = ("--init.from", "teacher", "--uptrain.loss.kl", "1.0")


class Eager(Replay):
    """A replay without a graph: it computes each batch, and keeps the gradients as a graph does."""

    calls = 0

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        Eager.calls += 1
        self._batch = dict(batch)
        parts = {name: part.detach() for name, part in self._pass().items()}
        self._gradients = [parameter.grad for parameter in self._parameters]
        self._clear()
        return parts


@pytest.fixture
def eager_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run replays, through `Eager`."""
    here = Launch.here

    def graphed(config: Config) -> Launch:
        return dataclasses.replace(here(config), graphed=True)

    monkeypatch.setattr(run.Launch, "here", staticmethod(graphed))
    monkeypatch.setattr(run, "Replay", Eager)
    Eager.calls = 0


def losses(config: Config, rows: str = "train/loss") -> list[float]:
    folder = train(config, overwrite=True)
    return [row[rows] for row in folder.metrics() if rows in row]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_replayed_step_trains_as_any_other(
    tiny: Callable[..., Config], request: pytest.FixtureRequest, accumulate: int
) -> None:
    config = tiny("--train.micro_batch", str(4 // accumulate), "--optim.grad_clip", "0.5")
    plain = losses(config), losses(config, "val/loss"), losses(config, "train/gradient_norm")
    request.getfixturevalue("eager_replay")
    if accumulate == 1:
        assert (losses(config), losses(config, "val/loss"), losses(config, "train/gradient_norm")) == plain
        assert Eager.calls == 3 * config.train.steps
    else:  # gradients of one micro-batch replace those of the one before: why accumulation is refused
        assert losses(config) != plain[0]


def test_a_replayed_student_trains_as_any_other(tiny: Callable[..., Config], request: pytest.FixtureRequest) -> None:
    teacher = train(tiny("--name", "teacher"))
    words = (
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
    assert Eager.calls == len(rows) * config.train.steps


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--train.accelerator", "cpu"), "train.accelerator is cpu"),
        (("--train.micro_batch", "2"), "train.global_batch 4 is 2 x train.micro_batch"),
        (("--train.devices", "2", "--train.micro_batch", "2"), "train.strategy is ddp"),
        (("--data.document_mask", "true"), "data.document_mask is true"),
        (("--uptrain.random_sources", "0.5"), "uptrain.random_sources"),
        (("--uptrain.curriculum_steps", "2"), "uptrain.curriculum_steps"),
        (("--uptrain.loss.kl", "0.0"), "no part of uptrain.loss reads a teacher"),
    ],
)
def test_steps_that_cannot_be_recorded(tiny: Callable[..., Config], words: tuple[str, ...], named: str) -> None:
    with pytest.raises(UserError, match="train.cuda_graph is true, which cannot be: " + named):
        Launch.planned(tiny(*GRAPH, *STUDENT, *words))
    assert not Launch.planned(tiny(*GRAPH, *STUDENT, *words, "--train.cuda_graph", "auto")).graphed


def test_auto_records_where_it_can(tiny: Callable[..., Config]) -> None:
    assert Launch.planned(tiny(*GRAPH, *STUDENT)).graphed
    assert Launch.planned(tiny(*GRAPH, *STUDENT, "--train.cuda_graph", "auto")).graphed
    assert not Launch.planned(tiny(*GRAPH, *STUDENT, "--train.cuda_graph", "false")).graphed
    assert not Launch.planned(tiny(*GRAPH, "--train.cuda_graph", "auto")).graphed


def test_another_shape_is_refused() -> None:
    replay = Replay(torch.nn.Linear(2, 2), lambda batch: {})
    made: Any = object()
    replay._graph, replay._batch = made, {"input_ids": torch.zeros(2, 3)}
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
        replay({"input_ids": torch.zeros(2, 4)})
