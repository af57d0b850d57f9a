"""Every module imports with the base dependencies alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from cllm.commands.cli import COMMANDS

ROOT = Path(__file__).resolve().parents[1]


def test_every_module_imports_without_optional_packages() -> None:
    command = [sys.executable, "scripts/import_all.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_importing_the_config_does_not_load_the_training_stack() -> None:
    code = "import sys, cllm.config; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=300).returncode == 0


_LOAD = """
import sys
from cllm.config import Config
from cllm.config.load import load_settings
from cllm.errors import UserError
from cllm.uptrain.complete import load_config
file, *overrides = sys.argv[1:]
for load in (lambda: load_config([file], overrides), lambda: load_settings(Config, [file], overrides)):
    try:
        load()
    except UserError as error:
        print(error)
slow = {"torch", "transformers", "lightning"} & set(sys.modules)
assert not slow, slow
"""


def _run(*words: str | Path) -> str:
    done = subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_configs_are_read_and_refused_without_torch(tmp_path: Path) -> None:
    written = tmp_path / "config.yaml"
    written.write_text(_run("train.py", "--config", "configs/quickstart.yaml", "--print-config"))
    assert "from: null" in written.read_text(), "as in the config.yaml of a run"
    assert _run("-c", _LOAD, "configs/quickstart.yaml") == ""
    assert _run("-c", _LOAD, written) == ""
    assert _run("-c", _LOAD, written, "--model.n_layers", "many").count("model.n_layers") == 2


SCRIPTS = ("train", "evaluate", "data.prepare", "scripts.compare", "scripts.convert", "scripts.analyze",
           "experiments.sweep_posthoc", "experiments.tradeoff")  # fmt: skip
_HELP = """
import contextlib, importlib, io, sys
for name in sys.argv[1:]:
    module = importlib.import_module(name)
    for words, status in ((["--help"], 0), (["--nosuch"], 2)):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                found = module.main(words)
            except SystemExit as error:
                found = error.code or 0
        assert found == status, (name, words, found)
        assert (out if status == 0 else err).getvalue(), (name, words)
slow = {"torch", "transformers", "lightning"} & set(sys.modules)
assert not slow, slow
"""


def test_help_and_mistakes_in_arguments_are_answered_without_torch():
    done = subprocess.run(
        [sys.executable, "-c", _HELP, *SCRIPTS, *(f"cllm.commands.{name}" for name in COMMANDS)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
