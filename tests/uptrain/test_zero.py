"""Weights that ZeRO does not train. Needs DeepSpeed and runs on a CPU, as the end of `tests/train/test_strategy.py`."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

from cllm.config import Config
from cllm.runs import RunFolder, load_run
from cllm.runs.checkpoint import read_weights
from cllm.train.run import train
from cllm.uptrain.complete import load_config

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None or torch.cuda.is_available(), reason="needs DeepSpeed, and no GPU"
)
FOLDER = Path(__file__).resolve().parents[1]
WAYS = {
    "kv": ["--uptrain.trainable", "kv"],
    "lora": ["--uptrain.trainable", "lora", "--uptrain.lora.rank", "2"],
    "curriculum": ["--uptrain.curriculum_steps", "6"],
    "all": [],
}


@pytest.fixture(scope="module")
def zero(load_file: Callable[[Path], ModuleType]) -> ModuleType:
    return load_file(FOLDER / "train" / "test_strategy.py")


@pytest.fixture
def student(tiny: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    teacher = train(tiny("--name", "teacher", "--model.init.std", "0.2", "--train.steps", "4")).path
    data = tiny("--train.precision", "bf16").as_yaml_data()
    del data["model"]
    file = tmp_path / "student.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    settings = ["--init.from", str(teacher), "--model.kv.preset", "fusedkv", "--uptrain.loss.kl", "1.0"]
    return lambda *more: load_config([file], [*settings, *more])


def losses(folder: RunFolder, tag: str) -> list[float]:
    return [row[tag] for row in folder.metrics() if tag in row]


@pytest.mark.parametrize(
    ("name", "way"), [("zero1", "kv"), ("zero2", "lora"), ("zero3", "lora"), ("zero3", "curriculum"), ("zero2", "all")]
)
def test_frozen_weights_come_out_as_they_went_in_and_a_run_resumes(
    student: Callable[..., Config], zero: ModuleType, tmp_path: Path, name: str, way: str
) -> None:
    alone = train(student("--name", "alone", *WAYS[way]))
    config = student("--name", name, "--train.strategy", name, "--train.devices", "1", *WAYS[way])
    folder = zero.on_cpu(config, tmp_path / "on_cpu.py")
    for tag in ("train/loss", "train/objective", "val/loss", "val/teacher_loss"):
        assert losses(folder, tag) == pytest.approx(losses(alone, tag), abs=0.03), tag
    reached, wanted = (read_weights(run.checkpoints()[-1][1]) for run in (folder, alone))
    start, _, _ = load_run(tmp_path / "runs" / "teacher")
    teachers = start.state_dict()
    assert reached.keys() == wanted.keys() == load_run(folder.path)[0].state_dict().keys()
    frozen = {tag for tag, tensor in wanted.items() if tag in teachers and torch.equal(tensor, teachers[tag])}
    assert bool(frozen) == (way in ("kv", "lora"))
    assert any((teachers[tag] != teachers[tag].bfloat16()).any() for tag in frozen) or not frozen
    for tag in frozen:
        assert torch.equal(reached[tag], teachers[tag]), tag
    for tag in wanted.keys() - frozen:
        assert not torch.equal(reached[tag], teachers.get(tag, torch.tensor(torch.nan))), tag

    shutil.rmtree(folder.checkpoints()[-1][1])
    before = {tag: losses(folder, tag) for tag in ("train/objective", "val/loss", "val/recovery")}
    resumed = zero.on_cpu(config, tmp_path / "on_cpu.py", "--resume", "auto")
    assert {tag: losses(resumed, tag) for tag in before} == before
    for tag, tensor in read_weights(resumed.checkpoints()[-1][1]).items():
        assert torch.equal(tensor, reached[tag]), tag


def test_resuming_without_the_frozen_weights_is_refused(
    student: Callable[..., Config], zero: ModuleType, tmp_path: Path
) -> None:
    config = student("--name", "z", "--train.strategy", "zero1", "--train.devices", "1", *WAYS["lora"])
    folder = zero.on_cpu(config, tmp_path / "on_cpu.py")
    shutil.rmtree(folder.checkpoints()[-1][1])
    for damage in (lambda file: file.write_bytes(b"cut off"), Path.unlink):
        damage(folder.checkpoints()[-1][1] / "resume.safetensors")
        with pytest.raises(AssertionError, match=r"resume\.safetensors: not readable"):
            zero.on_cpu(config, tmp_path / "on_cpu.py", "--resume", "auto")
