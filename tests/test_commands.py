"""`cllm COMMAND`: the list of commands, calls, shipped configs by name, and completion."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

import cllm
from cllm.commands.cli import COMMANDS, main
from cllm.commands.configs import first_comment
from cllm.config.load import load_settings
from cllm.config.shipped import find_config, shipped_configs, shipped_notebooks
from cllm.data.prepare.recipe import Recipe
from cllm.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CLONE = {
    "train": "train.py",
    "evaluate": "evaluate.py",
    "prepare": "data/prepare.py",
    "compare": "scripts/compare.py",
    "convert": "scripts/convert.py",
    "analyze": "scripts/analyze.py",
    "tradeoff": "experiments/tradeoff.py",
    "sweep": "experiments/sweep_posthoc.py",
}
"""The file in the repository that runs the same code as a command."""


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- commands --------------------------------------------------------------------------------------------------------


def test_help_lists_every_command_in_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [[*line.split(maxsplit=1)] for line in lines[-len(COMMANDS) :]] == [[*pair] for pair in COMMANDS.items()]


def test_every_command_has_a_module_and_all_but_configs_a_file_in_the_repository(load_file) -> None:
    assert COMMANDS.keys() == CLONE.keys() | {"configs", "plan", "serve", "study"}
    for name, file in CLONE.items():
        command = importlib.import_module(f"cllm.commands.{name}").main
        assert load_file(ROOT / file).main.func is command


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_names_it_as_it_was_called(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: cllm {name} ")
    assert f"\n    cllm {name}" in printed, "an example"


def test_the_file_in_the_repository_names_itself() -> None:
    done = subprocess.run([sys.executable, "scripts/convert.py"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stderr == "error: COMMAND: missing; for example: python scripts/convert.py export runs/NAME OUT\n"


def test_the_version_is_that_of_the_package(empty: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "cllm", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout == f"cllm {cllm.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "COMMAND: missing; for example: cllm train --config quickstart"),
        (["trian"], "COMMAND is 'trian'; did you mean \"train\"?"),
        (["--verison"], "COMMAND: missing; for example: cllm train --config quickstart"),
        (["train", "--dryrun"], '--dryrun: unknown option; did you mean "--dry-run"?'),
        (["sweep"], "RUN: missing; for example: cllm sweep runs/*"),
        (["configs", "model/33m"], 'model/33m: no such shipped config; did you mean "model/332m"?'),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


# ---- shipped configs -------------------------------------------------------------------------------------------------


def test_configs_lists_every_file_with_its_comment_and_prints_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    files = {*(ROOT / "configs").rglob("*.yaml"), *(ROOT / "data" / "recipes").glob("*.yaml")}
    assert {line.split()[0] for line in lines} == shipped_configs().keys() | shipped_notebooks().keys()
    assert lines[-1].split() == ["notebooks/first_steps.ipynb", "First", "steps"]
    assert set(shipped_configs().values()) == files
    assert all(len(line.split()) > 1 for line in lines), "every shipped file has a comment"
    assert main(["configs", "kv/mqa"]) == 0
    text = (ROOT / "configs" / "kv" / "mqa.yaml").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert first_comment(ROOT / "configs" / "kv" / "mqa.yaml") == text.splitlines()[0].removeprefix("# ")


def test_a_name_finds_the_shipped_config_and_a_file_wins(empty: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_config("model/332m") == ROOT / "configs" / "model" / "332m.yaml"
    assert load_settings(Recipe, ["recipes/stdlib"]).name == "stdlib"
    (empty / "quickstart").mkdir()
    assert main(["train", "--config", "quickstart", "--config", "kv/cla", "--print-config"]) == 0
    assert "preset: cla" in capsys.readouterr().out, "a folder is not a config"
    (empty / "model").mkdir()
    (empty / "model" / "332m").write_text("name: mine\n")
    assert find_config("model/332m") == Path("model/332m")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("configs/model/332m.yaml", 'no such config file; did you mean the shipped "model/332m"?'),
        ("configs/data/stdlib.yaml", 'no such config file; did you mean the shipped "data/stdlib"?'),
        ("data/recipes/stdlib.yaml", 'no such config file; did you mean the shipped "recipes/stdlib"?'),
        ("modle/332m", 'no such config file; did you mean the shipped "model/332m"?'),
        ("nosuch.yaml", "no such config file"),
    ],
)
def test_a_config_that_is_missing(name: str, hint: str, empty: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_settings(Recipe, [name])
    assert str(refused.value) == f"{name}: {hint}"


# ---- completion ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "completions"),
    [
        ("cllm tr", {"train", "tradeoff"}),
        ("cllm train --config model/1", {"model/1.5b"}),
        ("cllm train --config mine", {"mine.yaml"}),
        ("cllm train --optim.lr", {"--optim.lr"}),
        ("cllm train --model.kv.preset fusedkv_lite_", {"fusedkv_lite_learnable", "fusedkv_lite_reversed"}),
        ("cllm configs recipes/s", {"recipes/slimpajama", "recipes/slimpajama_500gb", "recipes/stdlib"}),
        ("cllm convert export --dt", {"--dtype"}),
    ],
)
def test_the_shell_completes(line: str, completions: set[str], empty: Path) -> None:
    pytest.importorskip("argcomplete")
    (empty / "mine.yaml").touch()
    answer = empty / "answer"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_SHELL": "bash", "_ARGCOMPLETE_IFS": "\n", "COMP_TYPE": "9"}
    asked |= {"COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_STDOUT_FILENAME": str(answer)}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "cllm"]
    subprocess.run(command, env={**os.environ, **asked, "PYTHONPATH": path}, check=True, timeout=300)
    assert {word.strip() for word in answer.read_text().splitlines()} == completions


def test_completion_without_argcomplete_prints_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "argcomplete", None)
    monkeypatch.setenv("_ARGCOMPLETE", "1")
    monkeypatch.setenv("COMP_LINE", "cllm tr")
    assert main([]) == 1
    assert capsys.readouterr() == ("", "")
