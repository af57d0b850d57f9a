"""Every entry of `tests/bad_inputs/`: one line, its exit status, and nothing written or deleted."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import logging
import os
import random
import shlex
import shutil
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

ROOT = Path(__file__).resolve().parents[1]
FOLDER = Path(__file__).resolve().parent / "bad_inputs"
COMMANDS = {
    "train": "train.py",
    "evaluate": "evaluate.py",
    "prepare": "data/prepare.py",
    "compare": "scripts/compare.py",
    "convert": "scripts/convert.py",
    "analyze": "scripts/analyze.py",
    "sweep": "experiments.sweep_posthoc",
    "tradeoff": "experiments.tradeoff",
    "study": "cllm.commands.study",
    "search": "cllm.uptrain.search",
    "bench_train": "benchmarks.train.__main__",
    "bench_decode": "benchmarks.decode.__main__",
    "bench_kernels": "benchmarks.kernels.__main__",
    "bench_posthoc_decode": "benchmarks.posthoc_decode",
    "bench_posthoc_methods": "benchmarks.posthoc_methods",
    "bench_posthoc_variants": "benchmarks.posthoc_variants",
    "half_cache": "experiments.half_cache.__main__",
    "half_cache_scratch": "experiments.half_cache.scratch",
    "methods_picture": "experiments.methods_picture",
    "random_sources": "experiments.random_sources",
}
"""For each file of `bad_inputs`, its command: a file, or a module of a package."""
LONGEST = 450
"""Characters of a line, the entry's own folder counted as one."""
TEXT = "the plan says where keys and values come from and every layer reads what an owner wrote before it"


def entries() -> Iterator[tuple[str, dict[str, Any]]]:
    for file in sorted(FOLDER.glob("*.yaml")):
        for entry in yaml.safe_load(file.read_text(encoding="utf-8")):
            yield file.stem, entry


def _parameter(command: str, entry: dict[str, Any]) -> Any:
    marks = []
    if "needs" in entry:
        marks.append(pytest.mark.xfail(run=False, reason=f"needs the branch {entry['needs']}"))
    if entry.get("unless") == "gpu":
        marks.append(pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU"))
    return pytest.param(command, entry, marks=marks, id=f"{command}: {entry['name']}")


@pytest.fixture(scope="module")
def commands(load_file: Callable[[Path], ModuleType]) -> Callable[[str], Callable[..., int]]:
    """`commands("train")`: the main function of a command."""
    loaded: dict[str, ModuleType] = {}

    def get(name: str) -> Callable[..., int]:
        if name not in loaded:
            command = COMMANDS[name]
            loaded[name] = load_file(ROOT / command) if command.endswith(".py") else import_module(command)
        return loaded[name].main

    return get


@pytest.fixture(scope="module")
def world(
    prepare_texts: Callable[..., Path],
    commands: Callable[[str], Callable[..., int]],
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Path]:
    """Prepared data, a finished run, its export, and a Llama checkpoint: what a user could name."""
    folder = tmp_path_factory.mktemp("world")
    draw = random.Random(0)
    texts = [" ".join(draw.choices(TEXT.split(), k=draw.randint(5, 40))) for _ in range(60)]
    data = prepare_texts(folder, texts, 0.2)
    settings = {
        "name": "tiny",
        "model": {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "max_seq_len": 32, "kv": {"preset": "cla"}},
        "data": {"path": str(data), "seq_len": 16, "num_workers": 0, "validation_sequences": 2},
        "optim": {"warmup_steps": 1},
        "train": {
            **{"steps": 2, "global_batch": 2, "micro_batch": 2, "log_every": 1, "checkpoint_every": 1},
            **{"validate_every": 2, "accelerator": "cpu", "compile": False},
        },
    }
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(settings))
    (folder / "here").mkdir()
    assert commands("train")(["--config", str(config), "--runs_dir", str(folder / "runs")]) == 0
    run, export = folder / "runs" / "tiny", folder / "export"
    assert commands("convert")(["export", str(run), str(export)]) == 0
    recipe = folder / "recipe.yaml"
    source = {"kind": "files", "paths": [str(folder / "text")]}
    tokenizer = {"train": {"vocab_size": 270}}
    content = {"name": "other", "out": "out", "source": source, "tokenizer": tokenizer, "workers": 1}
    content["validation"] = {"fraction": 0.2}
    recipe.write_text(yaml.safe_dump(content))
    assert commands("prepare")(["--config", str(recipe), "--out", str(folder / "other")]) == 0
    found = {"data": data, "config": config, "recipe": recipe, "run": run, "export": export, "other": folder / "other"}
    return found | {"llama": _llama(folder / "llama", data / "tokenizer"), "text": folder / "text" / "0.txt"}


def _llama(folder: Path, tokenizer: Path) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 320, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**shape, **heads, eos_token_id=0)).save_pretrained(folder)
    for file in tokenizer.iterdir():
        shutil.copy(file, folder)
    return folder


def prepare_files(entry: dict[str, Any], folder: Path, fill_in: Callable[[str], str], world: dict[str, Path]) -> None:
    """Make the files of an entry below `folder`; paths in the entry are relative to it."""
    for name in entry.get("copy", []):
        shutil.copytree(world[name], folder / f"my_{name}")
    for path in entry.get("folders", []):
        (folder / path).mkdir(parents=True)
    for path, text in entry.get("write", {}).items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        content = bytes(text) if isinstance(text, list) else fill_in(text).encode()
        (folder / path).write_bytes(content)
    for path in entry.get("delete", []):
        target = folder / path
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    for path, size in entry.get("truncate", {}).items():
        os.truncate(folder / path, size)
    for path, byte in entry.get("fill", {}).items():  # the same size, every byte the same
        (folder / path).write_bytes(bytes([byte]) * (folder / path).stat().st_size)
    for path, target in entry.get("link", {}).items():
        (folder / path).symlink_to(fill_in(target))
    for path, changes in entry.get("json", {}).items():  # top-level keys of a JSON or YAML mapping
        content = yaml.safe_load((folder / path).read_text(encoding="utf-8")) | changes
        (folder / path).write_text(json.dumps(content), encoding="utf-8")
    for path, keys in entry.get("drop", {}).items():
        content = yaml.safe_load((folder / path).read_text(encoding="utf-8"))
        kept = {key: value for key, value in content.items() if key not in keys}
        (folder / path).write_text(json.dumps(kept), encoding="utf-8")


def listing(*folders: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of everything under `folders`, links not followed."""
    found = {}
    for folder in folders:
        for path in [folder, *folder.rglob("*")]:
            state = path.lstat()
            size, changed = (0, 0) if path.is_dir() else (state.st_size, state.st_mtime_ns)
            found[str(path)] = size, changed
    return found


@pytest.mark.parametrize(("command", "entry"), [_parameter(*found) for found in entries()])
def test_bad_input(
    command: str,
    entry: dict[str, Any],
    world: dict[str, Path],
    commands: Callable[[str], Callable[..., int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {
        **world,
        "tmp": tmp_path,
        "long": "a" * 300,
        "deep": "[" * 100_000,
        **{f"my_{name}": tmp_path / f"my_{name}" for name in world},
    }

    def fill_in(text: str) -> str:
        for name, value in places.items():
            text = text.replace(f"{{{name}}}", str(value))
        return text

    (tmp_path / "here").mkdir()
    prepare_files(entry, tmp_path, fill_in, world)
    monkeypatch.chdir(tmp_path / "here")
    main, words = commands(command), [fill_in(word) for word in shlex.split(entry.get("words", ""))]
    before = listing(tmp_path, world["config"].parent)
    with _no_progress():
        capsys.readouterr()
        status = main(words)
    after = listing(tmp_path, world["config"].parent)

    lines = capsys.readouterr().err.splitlines()
    assert status == entry.get("status", 2), lines
    begins = "left out: " if status == 1 else "error: "
    if status == 1:
        lines = [line for line in lines if not line.startswith("table and figure go to ")]
    errors = [line for line in lines if line.startswith(begins)]
    assert lines[-1:] == errors, lines
    line = errors[0].replace(str(tmp_path), "T").replace(str(world["config"].parent), "W")
    assert len(line) <= LONGEST, f"{len(line)} characters: {line}"
    for text in entry.get("says", []):
        assert fill_in(text) in errors[0], errors[0]
    assert "Traceback" not in errors[0]
    changed = {path for path in before | after if before.get(path) != after.get(path)}
    allowed = [fill_in(pattern) for pattern in entry.get("writes", [])]
    assert not {path for path in changed if not any(fnmatch.fnmatch(path, pattern) for pattern in allowed)}


@contextlib.contextmanager
def _no_progress() -> Iterator[None]:
    """Nothing below a warning is logged meanwhile: progress is no part of what a mistake prints."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def test_there_are_as_many_bad_inputs_as_promised_each_with_a_name_of_its_own() -> None:
    found = [(command, entry["name"]) for command, entry in entries()]
    assert len(found) >= 150
    assert len(set(found)) == len(found)
    assert all(entry.get("says") for _, entry in entries())
