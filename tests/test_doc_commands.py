"""Every command in a ```bash block of the README and of the pages in docs/, run in a small project or checked.

A command of cllm runs as written, with settings at its end that make it short. If it needs what a small project lacks
(data that are not there, GPUs, a network, an hour), it is only parsed, and its config is loaded. Other programs must
exist. A command that no rule covers fails, so a new program on a page needs a rule here.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import functools
import glob
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cllm.arguments import Parser
from cllm.commands.cli import COMMANDS
from cllm.config import Config
from cllm.config.load import ConfigParser, load_settings
from cllm.data.prepare.recipe import Recipe
from cllm.errors import UserError
from cllm.study.schema import load_study
from cllm.uptrain.complete import load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKED = ["cllm", "configs", "data", "scripts", "benchmarks", "experiments", "tests", "docs", "train.py", "evaluate.py",
          "README.md", "pyproject.toml", "constraints.txt"]  # fmt: skip
PLACES = {"PATH": "some-llama", "CONFIG": "configs/uptrain/llama_to_fusedkv.yaml", "RECIPE": "recipe.yaml",
          "data/prepared/NAME": "data/prepared/stdlib", "~/checkpoints/some-llama": "some-llama",
          "SmolLM2-135M-Instruct": "some-llama"}  # fmt: skip
"""What stands for a reader's own file, and the file of the small project that takes its place."""
SHORTER = {
    "prepare": ["--max_bytes", "300000", "--tokenizer.train.vocab_size", "300", "--validation.fraction", "0.2",
                "--workers", "1"],
    "train": ["--train.steps", "2", "--train.global_batch", "2", "--train.micro_batch", "1", "--train.log_every", "1",
              "--train.accelerator", "cpu", "--data.validation_sequences", "1", "--data.num_workers", "0",
              "--data.seq_len", "64", "--optim.warmup_steps", "1"],
    "evaluate": ["--max-tokens", "300", "--window", "128", "--device", "cpu"],
    "sweep": ["--max-tokens", "300", "--window", "128", "--prefix", "96", "--spec", "kivi:bits=4,group=32,residual=0"],
    "analyze": ["--sequences", "1", "--length", "64"],
    "search": ["--owners", "4", "--init.calibration_sequences", "1", "--data.seq_len", "64"],
    **{name: [] for name in ("compare", "convert", "configs")},
}  # fmt: skip
"""Commands that run, and what makes them short; all others are parsed."""
MORE = {
    "--prefix": ("evaluate", ["--prefix", "96"]),
    "--init.from": ("train", ["--init.calibration_sequences", "1"]),
}
"""Further ones, of commands that have an option."""
NAMES = {
    "train.py": "train",
    "evaluate.py": "evaluate",
    "data/prepare.py": "prepare",
    "experiments.sweep_posthoc": "sweep",
    "experiments.tradeoff": "tradeoff",
    "cllm.uptrain.search": "search",
}
ELSEWHERE = {"--suite", "--score", "--heatmap", "--push"}
"""Options that need a package, a network, or runs measured by suites."""


class Broken(Exception):
    """A command that does not do what the page promises."""


@dataclass(frozen=True)
class Line:
    """A command on a page."""

    place: str
    words: list[str]

    def __str__(self) -> str:
        return f"{self.place}: {shlex.join(self.words)}"


# ---- commands on a page ----------------------------------------------------------------------------------------------


def commands(text: str, page: str) -> Iterator[Line]:
    """The commands of every bash block; of a loop, its commands for the first value; of a pipe, each of them."""
    for block in re.finditer(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        number, variables, pending = text[: block.start()].count("\n") + 1, dict[str, str](), ""
        for row in block[1].splitlines():
            number += 1
            pending += row.removesuffix("\\")
            if row.endswith("\\"):
                continue
            for name, value in variables.items():
                pending = pending.replace(f"${name}", value)
            lexer = shlex.shlex(pending, posix=True, punctuation_chars="|")
            lexer.whitespace_split = True
            all_words, pending = list(lexer), ""
            parts = itertools.groupby(all_words, lambda word: set(word) == {"|"})
            piped = [list(part) for is_pipe, part in parts if not is_pipe]
            words = piped[0] if piped else []
            words = words[: words.index(">")] if ">" in words else words
            if loop := re.fullmatch(r"for (\w+) in (\S+).*; do", " ".join(words)):
                variables[loop[1]] = loop[2]
            elif words and words != ["done"]:
                yield Line(f"{page}:{number}", words)
            yield from (Line(f"{page}:{number}", part) for part in piped[1:])


# ---- parsing only ----------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """Raised instead of a return by the outermost call of a parser."""

    def __init__(self, parser: argparse.ArgumentParser, result: Any):
        self.parser = parser
        self.options, self.rest = result if isinstance(result, tuple) else (result, [])


@contextlib.contextmanager
def parsing_only() -> Iterator[None]:
    """Programs end with `Parsed` as soon as their arguments are accepted."""
    depth = 0

    def watched(parse: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(parse)
        def wrapper(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                result = parse(self, *args, **kwargs)
            finally:
                depth -= 1
            if depth == 0:
                raise Parsed(self, result)
            return result

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        for cls in (argparse.ArgumentParser, Parser, ConfigParser):
            for name in ("parse_args", "parse_known_args", "parse_with_settings", "parse_settings"):
                if name in vars(cls):
                    patch.setattr(cls, name, watched(vars(cls)[name]))
        yield


# ---- rules -----------------------------------------------------------------------------------------------------------


def call(program: str, words: list[str], *, parse: bool = False) -> None:
    """Call a script, a module or `cllm` in this process. With `parse` it stops after its arguments, and the settings
    among them are loaded.

    Raises:
        Broken: if it ends with another status than 0.
    """
    out = io.StringIO()
    status: Any = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(out), contextlib.redirect_stdout(out):
        patch.setattr(sys, "argv", [program, *words])
        try:
            with parsing_only() if parse else contextlib.nullcontext():
                if program.endswith(".py"):
                    runpy.run_path(program, run_name="__main__")
                else:
                    runpy.run_module(program, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code or 0
        except Parsed as parsed:
            if isinstance(parsed.parser, ConfigParser):
                status = load(parsed)
        except Exception:
            status = traceback.format_exc()
    if status:
        raise Broken(f"{status}\n{out.getvalue()}")


def load(parsed: Parsed) -> str | None:
    """Load the settings of a program that was only parsed; returns the mistake."""
    assert isinstance(parsed.parser, ConfigParser)
    try:
        if hasattr(parsed.options, "study"):
            load_study(parsed.options.study, parsed.rest)
        elif not parsed.options.config:
            return None
        elif parsed.parser.schema is Config:
            load_config(parsed.options.config, parsed.rest)
        else:
            load_settings(parsed.parser.schema, parsed.options.config, parsed.rest)
    except UserError as error:
        return str(error)
    return None


def of_cllm(program: str, words: list[str]) -> str | None:
    """A command of cllm: run shortened, or parsed if the project lacks what it needs. Returns its name if it ran."""
    name = NAMES.get(program, Path(program).stem)
    if program == "cllm":
        name = words[0] if words and not words[0].startswith("-") else "--help"
        if name not in {*COMMANDS, "--help"}:
            raise Broken(f"{name} is no command of cllm")
    if {"--help", "--dry-run", "--print-config", "--list-posthoc"} & {name, *words}:
        call(program, words)
        return None
    if name not in SHORTER or ELSEWHERE & set(words) or not is_here(name, words):
        call(program, words, parse=True)
        return None
    more = SHORTER[name] + [word for key in MORE.keys() & {*words} if MORE[key][0] == name for word in MORE[key][1]]
    for option, value in zip(more[::2], more[1::2], strict=True):
        if not any(option.startswith(f"{given}.") for given in words):  # --tokenizer.train null
            words = [*words, option, value]
    call(program, [*words, "--overwrite"] if name == "train" and "--resume" not in words else words)
    return name


def is_here(name: str, words: list[str]) -> bool:
    """Whether the data of a run, or the corpus of a recipe, are in the project."""
    pairs = list(itertools.pairwise(words))
    files = [value for word, value in pairs if word == "--config"]
    settings = [text for pair in pairs if pair[0].startswith("--") and "." in pair[0] for text in pair]
    try:
        if name == "train":
            return all(Path(folder).exists() for folder in load_config(files, settings).data.weights)
        if name == "prepare" and files:
            source = load_settings(Recipe, files, settings).source
            return source.kind == "stdlib" or (source.kind == "files" and all(map(glob.glob, source.paths)))
    except UserError:
        pass  # the command itself reports it
    return True


def launched(words: list[str]) -> None:
    """torchrun and sbatch: the launcher's options, and the arguments of train.py."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        options = get_args_parser().parse_args(words[1:])
        return call(options.training_script, options.training_script_args, parse=True)  # or a module
    script = next((n for n, word in enumerate(words) if word.endswith(".sbatch")), None)
    if script is None:
        raise Broken("submits no job script")
    shell_script(words[script])
    return call("train.py", words[script + 1 :], parse=True)


def shell_script(path: str) -> None:
    """A shell script of the project: it exists and bash can read it."""
    if not path.endswith(".sbatch") and not os.access(path, os.X_OK):
        raise Broken(f"{path} cannot be executed")
    done = subprocess.run(["bash", "-n", path], capture_output=True, text=True)
    if done.returncode:
        raise Broken(done.stderr)


def pip(words: list[str]) -> None:
    """The files that pip reads, and the extras of this project."""
    extras = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    if missing := [f for option, f in itertools.pairwise(words) if option in ("-c", "-r") and not Path(f).exists()]:
        raise Broken(f"{missing} does not exist")
    for word in words:
        wanted = re.fullmatch(r"\.\[(.*)\]", word)
        if wanted and (unknown := set(wanted[1].split(",")) - extras.keys()):
            raise Broken(f"{unknown} is no extra of pyproject.toml")


def python(words: list[str]) -> str | None:
    """python FILE, python -m MODULE, python -c CODE. Returns the name of the command of cllm that ran."""
    first, *rest = words
    if first == "-c":
        for node in ast.walk(ast.parse(rest[0])):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if missing := [name for name in names if importlib.util.find_spec(name.partition(".")[0]) is None]:
                raise Broken(f"{missing} is not installed")
    elif first == "-m" and rest[0] == "pytest":
        if missing := [path for path in rest[1:] if not path.startswith("-") and not Path(path).exists()]:
            raise Broken(f"{missing} does not exist")
    elif first == "-m" and rest[0] not in NAMES:
        call(rest[0], rest[1:], parse=True)
    elif first == "-m":
        return of_cllm(rest[0], rest[1:])
    elif not Path(first).exists():
        raise Broken(f"{first} does not exist")
    else:
        return of_cllm(first, rest)
    return None


def curl(words: list[str]) -> None:
    """A request whose data are JSON."""
    for option, value in itertools.pairwise(words):
        if option == "-d":
            json.loads(value)


def check(words: list[str]) -> str | None:
    """Run or check a command. Returns the name of the command of cllm that ran, if one did.

    Raises:
        Broken: if it fails, or no rule covers it.
    """
    while re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    words = [PLACES.get(word, word) for word in words]
    program, *rest = [path for word in words for path in (sorted(glob.glob(word)) or [word])]
    installed = {point.name for point in importlib.metadata.entry_points(group="console_scripts")}
    if program == "python":
        return python(rest)
    if program == "cllm":
        return of_cllm(program, rest)
    if program in ("torchrun", "sbatch"):
        launched([program, *rest])
    elif program == "pip":
        pip(rest)
    elif program == "curl":
        curl(rest)
    elif program.startswith("scripts/"):
        shell_script(program)
    elif program.removeprefix(".venv/bin/") not in installed and [program, *rest] != [".", ".venv/bin/activate"]:
        raise Broken("no rule of tests/test_doc_commands.py covers this program")
    return None


# ---- the small project -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The working directory: the repository's files, and those that pages call a reader's own."""
    folder = tmp_path_factory.mktemp("project")
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").unlink()
    (folder / "data").mkdir()
    for name in ("prepare.py", "recipes"):
        (folder / "data" / name).symlink_to(ROOT / "data" / name)
    shutil.copy(ROOT / "README.md", folder / "notes.md")
    recipe = {"name": "mine", "source": {"kind": "files", "paths": ["notes.md", "papers.jsonl"]}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    for name in ("papers.jsonl", "novels.jsonl"):
        lines = (json.dumps({"text": f"Text {n} about {n * 7919 % 1009} caches and layers."}) for n in range(50))
        (folder / name).write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


def make_llama(folder: Path, tokenizer: Path) -> None:
    """A checkpoint of another family with the tokenizer of the prepared text."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=0, **sizes)).save_pretrained(folder)
    words.save_pretrained(folder)


def test_every_command_on_every_page_works(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    failures, ran = [], set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for line in commands(text, str(page.relative_to(ROOT))):
            try:
                ran.add(check(line.words))
            except Broken as error:
                failures.append(f"{line}\n{error}")
            if not (project / "some-llama").exists() and (project / "data/prepared/stdlib").exists():
                make_llama(project / "some-llama", project / "data/prepared/stdlib/tokenizer")
        if page.name == "README.md":
            for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
                try:
                    exec(compile(block, str(page), "exec"), {})
                except Exception as error:
                    failures.append(f"README.md:\n{block}\n{error}")
            assert failures or "KVCache(growing" in capsys.readouterr().out
    assert not failures, "\n\n".join(failures)
    assert ran == {*SHORTER, None}, "each of these is on a page, and can run"


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("python train.py --config configs/missing.yaml", "no such config file"),
        ("python train.py --config configs/model/332m.yaml --data.path nowhere --optim.lrr 1", "optim.lrr"),
        ("python data/prepare.py --config data/recipes/fineweb_edu.yaml --sorce.kind hub", "sorce"),
        ("torchrun --nnodes 2 train.py --config configs/quickstart.yaml --train.strategy zero9", "zero9"),
        ("sbatch scripts/slurm/other.sbatch --config configs/quickstart.yaml", "other.sbatch"),
        ("python -m benchmarks.train --config configs/bench/374m.yaml --roundz 3", "--roundz"),
        ("python -m experiments.tradeoff --config configs/tradeoff/98m.yaml --ratio -1", "--ratio"),
        ("python evaluate.py --run runs/missing", "runs/missing"),
        ("cllm fly", "no command"),
        ("pip install -e '.[fly]'", "no extra"),
        ("scripts/fly", "cannot be executed"),
        ("python -c 'import no_such_package'", "not installed"),
        ("fly --high", "no rule"),
    ],
)
def test_a_broken_command_is_found(project: Path, command: str, reason: str) -> None:
    (line,) = commands(f"```bash\n{command}\n```\n", "page.md")
    with pytest.raises(Broken, match=reason):
        check(line.words)


def test_a_bar_without_quotes_is_a_pipe_and_what_follows_a_command() -> None:
    found = commands("```bash\npython evaluate.py --suite 'a:b=1|2' --suite a:b=1|2,c=3  # one | two\n```\n", "page.md")
    assert [line.words[-1] for line in found] == ["a:b=1", "2,c=3"]
