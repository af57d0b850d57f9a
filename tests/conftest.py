"""Tiny models, and the hand-written reference of `reference.py`, as fixtures."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cllm import environment
from cllm.config import ModelConfig
from cllm.model.decoder import Decoder
from cllm.plan import picture
from cllm.plugins import plugins
from tests import warm

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)

# With PYTHONDONTWRITEBYTECODE, as in many containers, every process rewrites the assertions of all tests: ten seconds.
# pytest has no other switch for them, so later imports of this process are cached, too; processes of tests are not.
sys.dont_write_bytecode = False

# As a terminal starts commands. A background job ignores SIGINT, nohup ignores SIGHUP; what is ignored here is also
# ignored in every process that a test starts.
for _number, _handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(_number, _handler)

# No test cuts the power. On a busy disk a sync takes half a second, and the suite makes 14,000 of them. Tests of the
# order of syncs and renames record the calls.
os.fsync = os.fstat  # type: ignore[assignment]

# Every run draws its plan and asks git for the commit. Many of these plans are equal, and the commit is the same.
picture.plan_png = functools.lru_cache(maxsize=256)(picture.plan_png)
environment._git = functools.cache(environment._git)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def pytest_collection_finish() -> None:
    """Leave the millions of objects of imports and collection out of every garbage collection that follows.

    With the usual thresholds these took 7 % of the CPU time of `tests/cache` and a few others, most of it for objects
    that live as long as the process. With the thresholds here it is 3 %.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 50)


@pytest.fixture(scope="module", autouse=True)
def _garbage() -> None:
    """Leave also what earlier modules made out of collections, once it is much: most of it is the compiler's.

    Benchmarks and servers collect garbage often, which took 0.3 s each time after the tests of compiled models.
    """
    if len(gc.get_objects()) > 50_000:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """No test leaves a handler to the next."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    now = {number: signal.getsignal(number) for number in _SIGNALS}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert now == before, "whoever had the signals has them again"


def _load(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"cllm_tests_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def load_file() -> Callable[[Path], ModuleType]:
    """A Python file outside of any package, a script or another test, as a module."""
    return _load


@pytest.fixture
def install_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """`install_package("name", {"module": source}, {"cllm.posthoc": {"key": "module:Class"}})`: a package outside of
    cllm, version 1.0, importable until the test ends, and its entry points."""
    modules = list[str]()
    plugins.cache_clear()

    def install(name: str, sources: dict[str, str], points: dict[str, dict[str, str]]) -> Path:
        folder = tmp_path / "site-packages" / name
        metadata = folder / f"{name.replace('-', '_')}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        groups = (f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for group, of in points.items())
        (metadata / "entry_points.txt").write_text("\n".join(groups))
        for module, source in sources.items():
            (folder / f"{module}.py").write_text(source)
        modules.extend(sources)
        monkeypatch.syspath_prepend(folder)
        return folder

    yield install
    plugins.cache_clear()
    for module in modules:
        sys.modules.pop(module, None)


@pytest.fixture
def eager_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled modules are graphs with their backward, which torch runs: no code is written for them."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, *, dynamic, options=None: compile_module(module, dynamic=dynamic, backend="aot_eager"),
    )


@pytest.fixture(scope="session")
def warm_executable() -> Iterator[Path]:
    """A Python whose processes start with the training stack imported, see `warm.py`."""
    with warm.warm_executable() as file:
        yield file


@pytest.fixture
def warm_python(warm_executable: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`sys.executable`, until the test ends, is `warm_executable`."""
    monkeypatch.setattr(sys, "executable", str(warm_executable))
    return warm_executable


@pytest.fixture(scope="session")
def prepare_texts() -> Callable[..., Path]:
    """`prepare_texts(folder, texts, 0.1)` prepares texts, a tenth of them for validation, and gives the folder made.

    Its tokenizer has 280 tokens.
    """
    from cllm.data.prepare.build import prepare
    from cllm.data.prepare.recipe import Recipe

    def build(folder: Path, texts: Iterable[str], validation: float) -> Path:
        (folder / "text").mkdir()
        for n, text in enumerate(texts):
            (folder / "text" / f"{n}.txt").write_text(text, encoding="utf-8")
        recipe = {
            "name": "tiny",
            "out": str(folder / "prepared"),
            "source": {"kind": "files", "paths": [str(folder / "text")]},
            "tokenizer": {"train": {"vocab_size": 280}},
            "validation": {"fraction": validation},
            "workers": 1,
        }
        return prepare(Recipe.model_validate(recipe)).folder

    return build


@pytest.fixture(scope="session")
def reference() -> ModuleType:
    """The papers' tables and equations, see `reference.py`."""
    return _load(Path(__file__).with_name("reference.py"))


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """`tiny_config(n_layers=4, kv={"preset": "cla"})`: a model small enough to loop over."""

    def build(**model: Any) -> ModelConfig:
        tiny = {"vocab_size": 32, "d_model": 24, "n_layers": 8, "n_heads": 4, "head_dim": 8, "d_ff": 32}
        return ModelConfig(**{**tiny, "max_seq_len": 64, **model})

    return build


@pytest.fixture(scope="session")
def preset_config(reference: ModuleType, tiny_config: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
    """`preset_config("yoco", qk_norm=True)`: a tiny model with the options that `reference.py` gives a preset."""

    def build(name: str, **model: Any) -> ModelConfig:
        options = {"preset": name, **reference.PRESETS[name][0]} if name in reference.PRESETS else None
        return tiny_config(kv=options or reference.VARIANTS[name][0], **model)

    return build


@pytest.fixture(scope="session")
def random_model() -> Callable[..., Decoder]:
    """A decoder whose every weight matters: projections keep the size of what they project, norms are away from 1 and
    fusion weights from 0."""

    def build(config: ModelConfig, seed: int = 0) -> Decoder:
        model = Decoder(config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if name.endswith("norm.weight"):
                    parameter.copy_(1 + 0.3 * noise)
                elif ".mixed_" in name:  # weights that are multiplied by 35
                    parameter.copy_(noise / 35)
                elif parameter.ndim == 2 and "embed" not in name:
                    parameter.copy_(noise / parameter.shape[1] ** 0.5)
                else:
                    parameter.copy_(noise)
        return model

    return build
