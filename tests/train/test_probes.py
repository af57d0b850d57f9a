"""Suites during training: what they log, and that training is what it is without them."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm.commands import evaluate as evaluate_command
from cllm.commands import train as train_command
from cllm.config import Config
from cllm.errors import UserError
from cllm.evaluate.during_training import choose_suites, training_probes
from cllm.runs import RunFolder
from cllm.runs.checkpoint import read_weights
from cllm.train.probes import Probe
from cllm.train.run import train
from cllm.trust import read_object

Tiny = Callable[..., Config]
SUITE = "copying:samples=2,length=4,distances=8"
ENTRY = f'[{{suite: "{SUITE}", every: 3, name: copies}}]'
UNEQUAL = ("time", "throughput", "memory", "suite")


def rows(folder: RunFolder) -> list[dict[str, Any]]:
    """The rows without what differs between two equal runs."""
    kept = [{tag: v for tag, v in row.items() if not tag.startswith(UNEQUAL)} for row in folder.metrics()]
    return [row for row in kept if len(row) > 2]


def command(config: Config, tmp_path: Path, *words: str) -> int:
    file = tmp_path / f"{config.name}.yaml"
    file.write_text(yaml.safe_dump(config.as_yaml_data()), encoding="utf-8")
    return train_command.main(["--config", str(file), *words])


def test_a_run_with_suites_is_the_run_without_them(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    plain = train(tiny("--name", "plain"))
    config = tiny("--name", "watched", "--evaluate_suites", ENTRY)
    assert command(config, tmp_path) == 0
    folder = RunFolder(plain.path.parent / "watched")
    assert rows(folder) == rows(plain)
    for mine, theirs in zip(folder.checkpoints(), plain.checkpoints(), strict=True):
        weights = read_weights(mine[1])
        assert all(tensor.equal(weights[name]) for name, tensor in read_weights(theirs[1]).items())
    found = {row["step"]: row for row in folder.metrics() if "suite/copies/accuracy" in row}
    assert sorted(found) == [3, 6, 8]
    assert "suites took" in capsys.readouterr().err
    events = EventAccumulator(str(folder.tensorboard_folder)).Reload()
    assert [event.step for event in events.Scalars("suite/copies/loss")] == [3, 6, 8]
    assert evaluate_command.main(["--run", str(folder.path), "--suite", SUITE, "--device", "cpu"]) == 0
    record = read_object(folder.evaluation_folder / "copying" / "copying.json")
    assert found[8]["suite/copies/loss"] == pytest.approx(record["loss"], rel=1e-6), "the model of the checkpoint"
    assert found[8]["suite/copies/accuracy"] == record["accuracy"]
    assert found[3]["suite/copies/loss"] != found[8]["suite/copies/loss"]

    assert command(config, tmp_path, "--resume", str(folder.checkpoint_path(4))) == 0
    assert rows(folder) == rows(plain)
    again = {row["step"]: row["suite/copies/loss"] for row in folder.metrics() if "suite/copies/loss" in row}
    assert again == {step: row["suite/copies/loss"] for step, row in found.items()}


def test_a_suite_that_takes_more_than_its_share_is_left_out(tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    entries = [
        {"suite": SUITE, "every": 2, "name": name, "at_most": share} for name, share in (("a", 1e-6), ("b", 0.999))
    ]
    config = tiny(
        "--name", "bounded", "--evaluate_suites", yaml.safe_dump(entries, default_flow_style=True, width=1000)
    )
    assert command(config, tmp_path) == 0
    folder = RunFolder(Path(config.runs_dir) / "bounded")
    steps = {name: [r["step"] for r in folder.metrics() if f"suite/{name}/loss" in r] for name in "ab"}
    assert steps == {"a": [2, 8], "b": [2, 4, 6, 8]}
    error = capsys.readouterr().err
    assert "step 4: suite/a is left out: another" in error
    assert "at_most is 1e-06" in error


class Draws(Callback):
    """Draws a number of each generator after every step."""

    def __init__(self) -> None:
        self.found: list[tuple[float, float, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append((torch.rand(()).item(), np.random.rand(), random.random()))  # noqa: NPY002


def test_a_probe_that_draws_and_changes_modes_disturbs_nothing(tiny: Tiny) -> None:
    short = ("--train.steps", "3", "--train.validate_every", "null", "--train.checkpoint_every", "null")
    undisturbed, disturbed = Draws(), Draws()
    plain = train(tiny("--name", "plain", *short), callbacks=[undisturbed])
    seen = []

    def measure(decoder: Any, step: int) -> dict[str, float]:
        seen.append(step)
        assert not decoder.training
        torch.rand(3), np.random.rand(3), random.random()  # noqa: NPY002
        torch.manual_seed(7)
        decoder.train()
        decoder.gradient_checkpointing = True
        return {"one": 1.0}

    probe = Probe(name="suite/x", every=2, measure=measure)
    folder = train(tiny("--name", "watched", *short), callbacks=[disturbed], probes=[probe])
    assert seen == [2, 3]
    assert rows(folder) == rows(plain)
    assert disturbed.found == undisturbed.found


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{suite: copyin, every: 2}", r"evaluate_suites\.0\.suite: --suite is 'copyin'; "),
        ("{suite: 'copying:sample=2', every: 2}", r'evaluate_suites\.0\.suite: .*unknown option "sample" of copying'),
        ("{suite: perplexity, every: 2}", r"evaluate_suites\.0\.suite is 'perplexity', which measures on texts"),
        (
            "{suite: 'copying:distances=64', every: 2}",
            r"^evaluate_suites\.0\.suite: .*of distance=64 has \d+ tokens; allowed: up to the context",
        ),
    ],
)
def test_suites_that_cannot_be_measured_are_refused_before_a_folder_appears(
    tiny: Tiny, entry: str, message: str
) -> None:
    config = tiny("--evaluate_suites", f"[{entry}]")
    with pytest.raises(UserError, match=message):
        training_probes(config)
    assert not Path(config.runs_dir).exists()


def test_entries_that_contradict_each_other_or_the_strategy_are_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="evaluate_suites has two entries called 'mqar'; give one"):
        tiny("--evaluate_suites", "[{suite: mqar, every: 2}, {suite: 'mqar:pairs=2', every: 4}]")
    with pytest.raises(UserError, match=r"evaluate_suites is set, but train\.strategy is zero3"):
        tiny("--evaluate_suites", "[{suite: mqar, every: 2}]", "--train.strategy", "zero3")
    with pytest.raises(UserError, match="`train` was called without probes"):
        train(tiny("--evaluate_suites", "[{suite: mqar, every: 2}]"))
    chosen = choose_suites(tiny("--evaluate_suites", "[{suite: mqar, every: 2}, {suite: mqar, every: 4, name: b}]"))
    assert chosen[0].suite is not chosen[1].suite, "each entry keeps its own samples"
