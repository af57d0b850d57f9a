"""Optimizers by name: of a plug-in outside the package, trained and resumed; unknown names and options refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

from cllm.config import Config
from cllm.errors import UserError
from cllm.model.sizes import count_parameters, meta_decoder
from cllm.runs import RunFolder
from cllm.train.dryrun import memory_estimate
from cllm.train.launch import Launch
from cllm.train.optim import BUILT_IN, AdamW, find_optimizer
from cllm.train.run import train

Tiny = Callable[..., Config]
Check = Callable[[Config], None]
SGD = """
import torch
from cllm.train.optim import Optimizer

class SGD(Optimizer):
    states = ("momentum_buffer",)
    options = {"momentum": 0.9}

    def build(self, groups, config):
        return torch.optim.SGD(groups, lr=config.lr, momentum=self.option(config, "momentum"))

sgd = SGD()
"""
SETTINGS = ("--optim.name", "sgd", "--optim.lr", "0.1", "--train.keep_checkpoints", "9")


@pytest.fixture
def sgd(install_package: Callable[..., Path]) -> None:
    install_package("outside-sgd", {"outside_sgd": SGD}, {"cllm.optim": {"sgd": "outside_sgd:sgd"}})


@pytest.fixture
def command(load_file: Callable[[Path], ModuleType], tmp_path: Path) -> Callable[..., int]:
    script = load_file(Path(__file__).resolve().parents[2] / "train.py")

    def run(config: Config, *words: str) -> int:
        file = tmp_path / "command.yaml"
        file.write_text(yaml.safe_dump(config.as_yaml_data()), encoding="utf-8")
        return script.main(["--config", str(file), *words])

    return run


def last(folder: RunFolder) -> dict[str, Any]:
    return torch.load(folder.checkpoints()[-1][1], weights_only=True)


def test_an_optimizer_of_a_plugin_is_trained_and_resumed(sgd: None, tiny: Tiny, command: Callable[..., int]) -> None:
    config = tiny("--name", "uninterrupted", *SETTINGS)
    assert command(config) == 0
    wanted = RunFolder(Path(config.runs_dir) / config.name)
    losses = [row["train/loss"] for row in wanted.metrics() if "train/loss" in row]
    assert losses[-1] < losses[0]
    config = tiny("--name", "resumed", *SETTINGS)
    assert command(config) == 0
    folder = RunFolder(Path(config.runs_dir) / config.name)
    folder.checkpoints()[-1][1].unlink()
    assert command(config, "--resume", "auto") == 0
    assert [row["train/loss"] for row in folder.metrics() if "train/loss" in row] == losses
    saved, resumed = last(wanted), last(folder)
    assert saved["optimizer_states"][0]["state"][0].keys() == {"momentum_buffer"}
    for n, state in saved["optimizer_states"][0]["state"].items():
        assert torch.equal(state["momentum_buffer"], resumed["optimizer_states"][0]["state"][n]["momentum_buffer"])
    for name, tensor in saved["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name


def test_a_run_is_not_resumed_with_another_optimizer(sgd: None, tiny: Tiny) -> None:
    train(tiny("--train.steps", "2"))
    with pytest.raises(UserError, match=r"optim\.name is 'sgd', but the run in .* was started with 'adamw'"):
        train(tiny("--train.steps", "4", "--optim.name", "sgd"), resume="auto")


def test_options_reach_the_optimizer_and_others_are_refused(sgd: None, tiny: Tiny) -> None:
    config = tiny("--optim.name", "sgd", "--optim.options.momentum", "0.5")
    groups = [{"params": [torch.nn.Parameter(torch.zeros(2))]}]
    assert find_optimizer(config.optim).build(groups, config.optim).defaults["momentum"] == 0.5
    with pytest.raises(UserError, match=r"optim\.options has the key 'beta', which sgd does not have; allowed: mom"):
        train(tiny("--optim.name", "sgd", "--optim.options.beta", "0.5"))
    with pytest.raises(UserError, match=r"the key 'beta', which adamw does not have; allowed: none"):
        train(tiny("--optim.options.beta", "0.5"))


def test_a_step_without_a_finite_gradient_changes_nothing(sgd: None, tiny: Tiny, check_skipped_step: Check) -> None:
    """Also of an optimizer whose kernel cannot skip a step."""
    check_skipped_step(tiny(*SETTINGS, "--train.steps", "4", "--train.checkpoint_every", "1"))


def test_the_dry_run_counts_the_states_of_the_optimizer(sgd: None, tiny: Tiny) -> None:
    found = {}
    for name in ("adamw", "sgd"):
        for strategy in ("single", "zero2"):
            config = tiny("--optim.name", name, "--model.vocab_size", "320", "--train.strategy", strategy)
            config.train.accelerator = "gpu"
            model = meta_decoder(config.model)
            found[name, strategy] = memory_estimate(model, config, Launch.planned(config))["optimizer"] * 2**30
    parameters = count_parameters(model)
    assert found["adamw", "single"] == pytest.approx(8 * parameters)
    assert found["sgd", "single"] == pytest.approx(4 * parameters)
    assert found["adamw", "zero2"] == pytest.approx(12 * parameters)
    assert found["sgd", "zero2"] == pytest.approx(8 * parameters)


def test_an_unknown_name_is_refused_before_a_folder_appears(sgd: None, tiny: Tiny) -> None:
    config = tiny("--optim.name", "adamx")
    with pytest.raises(UserError, match=r"optim\.name is 'adamx'; allowed: adamw, muon, sgd, and what installed"):
        train(config)
    assert not Path(config.runs_dir).exists()


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("adamw", SGD, r'plug-in cllm\.optim "adamw" .*outside-sgd 1\.0.*: cllm has an optimizer of this name'),
        ("sgd", "sgd = 1", r'plug-in cllm\.optim "sgd" .*: not an instance of cllm\.train\.optim\.Optimizer'),
        ("sgd", "1 / 0", r'plug-in cllm\.optim "sgd" .*: cannot be loaded: ZeroDivisionError'),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named(
    install_package: Callable[..., Path], tiny: Tiny, name: str, source: str, message: str
) -> None:
    install_package("outside-sgd", {"outside_sgd": source}, {"cllm.optim": {name: "outside_sgd:sgd"}})
    with pytest.raises(UserError, match=message):
        find_optimizer(tiny("--optim.name", "sgd").optim)
    assert find_optimizer(tiny().optim) is BUILT_IN["adamw"], "which needs no plug-in"


def test_zero_refuses_an_optimizer_that_needs_entire_weights(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    class Entire(AdamW):
        elementwise = False

    monkeypatch.setitem(BUILT_IN, "entire", Entire())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    config = tiny("--optim.name", "entire", "--train.strategy", "zero1")
    with pytest.raises(UserError, match=r"train\.strategy is zero1, but optim\.name is entire, which needs entire"):
        Launch.on(config, "gpu", 1)
