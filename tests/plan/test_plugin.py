"""A kind of read, a kind of source and a preset from a package outside of cllm, through everything that cllm does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.warm import warm_executable

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = Path(__file__).with_name("plugin") / "cllm_mix.py"
LAYERS = [
    {"layers": [0, 1], "own": {}},
    {"layers": [2, 3], "keys": {"mix": [0, 1], "rank": 2}, "values": {"mix": [1, 0]}},
]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process in which the plug-in is installed."""
    site = tmp_path_factory.mktemp("site")
    shutil.copy(PLUGIN, site)
    metadata = site / "cllm_mix-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: cllm-mix\nVersion: 1\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text("[cllm.plans]\nmix = cllm_mix:Mix\n", encoding="utf-8")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(site)]), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def libraries() -> Iterator[Path]:
    """A Python whose processes start with libraries imported, but not cllm, which looks for plug-ins once."""
    with warm_executable(("lightning", "transformers", "tensorboard", "hypothesis", "pytest")) as file:
        yield file


COMMANDS = """
import contextlib, importlib.util, io, json, sys

def main_of(file):
    spec = importlib.util.spec_from_file_location("command", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main

ends = []
for file, *words in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main_of(file)(words) or 0
    ends.append([status, out.getvalue(), err.getvalue(), "torch" in sys.modules])
json.dump(ends, sys.stdout)
"""
End = tuple[int, str, str, bool]


def run(environment: dict[str, str], *commands: list[Any], python: str | Path = sys.executable) -> list[End]:
    """(status, output, errors, whether torch was imported by then) of commands that one new process runs in turn."""
    words = json.dumps([[str(word) for word in command] for command in commands])
    done = subprocess.run(
        [python, "-c", COMMANDS],
        cwd=ROOT,
        env=environment,
        input=words,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(end) for end in json.loads(done.stdout)]


@pytest.fixture
def config(prepare_texts, tmp_path: Path) -> Path:
    """A run that reads through the plug-in, with its data prepared."""
    prepared = prepare_texts(
        tmp_path, ["the plan says where keys and values come from " * n for n in range(2, 40)], 0.2
    )
    file = tmp_path / "mix.yaml"
    settings = {
        "name": "mix",
        "runs_dir": str(tmp_path / "runs"),
        "model": {"d_model": 32, "n_layers": 4, "n_heads": 2, "max_seq_len": 32, "kv": {"layers": LAYERS}},
        "data": {"path": str(prepared), "seq_len": 32, "num_workers": 0, "validation_sequences": 4},
        "optim": {"lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 1, "fusion_lr_multiplier": 2.0},
        "train": {"steps": 6, "global_batch": 4, "micro_batch": 2, "log_every": 1, "checkpoint_every": 3},
    }
    settings["train"] |= {"validate_every": 3, "accelerator": "cpu"}
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return file


GENERATE = """
import sys, torch, cllm
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(12)[None]
tokens = model.generate(ids, max_new_tokens=6, do_sample=False)
assert torch.equal(model(tokens[:, :-1]).logits.argmax(-1)[:, 11:], tokens[:, 12:]), "the cache computes something else"
reads = [block.attention.keys for block in model.model.blocks[2:]]
assert all(read.up.shape == (2, 2) and read.up.abs().sum() > 0 for read in reads)
print(model.config.design, type(reads[0]).__name__)
"""


def test_a_plug_in_is_trained_resumed_evaluated_exported_compressed_and_started_from(
    installed, libraries: Path, config: Path
):
    folder, out, mha = (config.parent / name for name in ("runs/mix", "exported", "runs/mha"))
    specs = [w for spec in ("none", "xkv:group=2,ratio=2") for w in ("--posthoc", spec)]
    start = ["train.py", "--config", mha / "config.yaml", "--init.from", mha, "--model.kv.preset", "mixed_half"]
    ends = run(
        installed,
        ["train.py", "--config", config, "--dry-run"],
        ["train.py", "--config", config, "--train.steps", "3"],
        ["train.py", "--config", config, "--resume", "auto"],
        ["evaluate.py", "--run", folder, *specs, "--max-tokens", "64"],
        ["scripts/convert.py", "export", folder, out],
        ["train.py", "--config", config, "--name", "mha", "--model.kv.preset", "mha"],
        [*start, "--name", "copied", "--init.method", "copy"],
        [*start, "--name", "fitted", "--init.method", "fit"],
        python=libraries,
    )
    assert [status for status, *_ in ends] == [0, 0, 0, 0, 0, 0, 0, 2], ends
    assert "2-3    -           mix 0 + 1  mix 1 + 0  all" in ends[0][1]
    assert "0.5x resident, 1.5x read" in ends[0][1]
    assert "rank: 2" in (folder / "config.yaml").read_text(encoding="utf-8")
    assert "xkv" in ends[3][1]
    assert "layer 2 reads its keys by mix, which least squares cannot fit; allowed: copy, mean, aligned" in ends[7][2]
    words = [libraries, "-c", GENERATE, str(out)]
    done = subprocess.run(words, env=installed, capture_output=True, text=True, timeout=300)
    assert done.stdout == "layers MixRead\n", done.stderr


def test_a_plug_in_passes_the_property_tests(installed, libraries: Path):
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/plan/test_random_plans.py"]
    command = [libraries, *words, "--hypothesis-show-statistics"]
    done = subprocess.run(command, cwd=ROOT, env=installed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    for event in ("accepted, reads by Mix", "accepted, owns Single"):
        assert event in done.stdout


def test_mistakes_with_a_plug_in_are_one_line_without_torch(installed, tmp_path: Path):
    mistakes = {
        "layer 2: keys: mix names 1 owners; allowed: two": {"mix": [0]},
        "layer 2: keys: needs exactly one of share, fuse, mix": {"mix": [0, 1], "share": 0},
        "layer 2: keys: rank goes with mix, not with fuse": {"fuse": [0, 1], "rank": 2},
    }
    commands = []
    for n, keys in enumerate(mistakes.values()):
        layers = [LAYERS[0], {"layers": [2, 3], "keys": keys, "values": {"share": 0}}]
        model = {"d_model": 32, "n_layers": 4, "n_heads": 2, "kv": {"layers": layers}}
        (tmp_path / f"{n}.yaml").write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
        commands.append(["train.py", "--config", tmp_path / f"{n}.yaml", "--print-config"])
    ends = run(installed, *commands)
    for message, (status, _, errors, torch) in zip(mistakes, ends, strict=True):
        assert status == 2
        assert message in errors
        assert not torch
    (end,) = run({**installed, "PYTHONPATH": str(ROOT)}, commands[0])  # without the plug-in
    assert "mix: unknown key" in end[2]


def test_a_kind_that_comes_too_late_is_refused():
    from cllm.config import Config  # noqa: F401
    from cllm.errors import PlanError
    from cllm.plan.kinds import Share
    from cllm.plan.registry import register_read
    from cllm.section import Section

    class Late(Share):
        key = "late"

        class Settings(Section):
            late: int | None = None

    with pytest.raises(PlanError, match=r"comes too late; import its module before cllm\.config"):
        register_read(Late)
