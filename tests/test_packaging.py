"""The sdist and the wheel: what they contain, and that an unpacked wheel finds its configs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from configparser import ConfigParser
from email.parser import Parser as Headers
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

import cllm
from cllm.config.shipped import shipped_configs

ROOT = Path(__file__).resolve().parents[1]
BUILD = """
import sys
from setuptools import build_meta
print(getattr(build_meta, f"build_{sys.argv[1]}")(sys.argv[2]))
"""


def build(kind: str, source: Path, out: Path) -> Path:
    """An `sdist` or a `wheel`, as pip builds it from the project in `source`."""
    command = [sys.executable, "-c", BUILD, kind, str(out)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of the project; building leaves files behind."""
    project = tmp_path_factory.mktemp("project")
    for name in ("cllm", "configs", "data", "scripts", "tests", "experiments", "benchmarks", "notebooks"):
        copytree(ROOT / name, project / name, ignore=ignore_patterns("prepared", "__pycache__", "bad_inputs"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "train.py", "evaluate.py"):
        copy(ROOT / name, project)
    return build("sdist", project, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the unpacked sdist."""
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):  # from Python 3.11.4 on
            archive.extraction_filter = tarfile.data_filter
        archive.extractall(folder)
    return build("wheel", next(folder.iterdir()), tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the wheel, as in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def files(folder: Path, pattern: str = "*") -> dict[str, bytes]:
    """Contents of the files below `folder` by their paths in it."""
    found = (file for file in folder.rglob(pattern) if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in found}


def test_the_wheel_has_every_module_config_and_recipe(installed: Path) -> None:
    assert files(installed / "cllm", "*.py") == files(ROOT / "cllm", "*.py")
    assert files(installed / "cllm" / "shipped" / "configs") == files(ROOT / "configs")
    assert files(installed / "cllm" / "shipped" / "recipes") == files(ROOT / "data" / "recipes")
    assert files(installed / "cllm" / "shipped" / "notebooks") == files(ROOT / "notebooks")
    assert (installed / "cllm" / "py.typed").exists()


def test_the_wheel_installs_the_package_and_nothing_beside_it(installed: Path) -> None:
    metadata = f"cllm-{cllm.__version__}.dist-info"
    assert {path.name for path in installed.iterdir()} == {"cllm", metadata}
    assert {Path(name).suffix for name in files(installed / "cllm")} == {
        ".py",
        ".yaml",
        ".ipynb",
        ".typed",
        ".json",
        ".txt",
    }


def test_the_metadata_names_version_license_command_and_readme(installed: Path) -> None:
    folder = installed / f"cllm-{cllm.__version__}.dist-info"
    headers = Headers().parsestr((folder / "METADATA").read_text(encoding="utf-8"))
    assert (headers["Name"], headers["Version"]) == ("cllm", cllm.__version__)
    assert headers["License-Expression"] == "Apache-2.0"
    assert headers.get_payload() == (ROOT / "README.md").read_text(encoding="utf-8")
    assert (folder / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    points = ConfigParser()
    points.read(folder / "entry_points.txt", encoding="utf-8")
    assert dict(points["console_scripts"]) == {"cllm": "cllm.commands.cli:main"}


def test_the_installed_package_finds_its_configs(installed: Path, tmp_path: Path) -> None:
    code = (
        "from cllm.config.shipped import shipped_configs as s; print(*(f'{n} {p}' for n, p in s().items()), sep='\\n')"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", code]
    printed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout
    found = dict(line.split(" ", 1) for line in printed.splitlines())
    assert found.keys() == shipped_configs().keys()
    assert all(Path(path).is_relative_to(installed) for path in found.values())


def test_the_sdist_has_what_the_wheel_is_built_from_and_no_tests(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert names >= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "configs/kv/cla.yaml"}
    assert not [name for name in names if name.startswith("tests")]
