"""cllm: decoder language models whose layers declare where their keys and values come from.

The functions that this package offers are listed in `cllm/api/`, and docs/python.md shows them at work. A function is
imported when it is first used, so `import cllm` loads neither torch nor transformers. `cllm.train` and `cllm.plan` are
packages too: their modules are imported as usual, and calling the package calls the function of that name.

After `import cllm`, transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know the checkpoints of this
package, and PEFT knows which of their modules adapters change where none are named.
"""

from __future__ import annotations

import importlib
import importlib.abc
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cllm.errors import UserError

if TYPE_CHECKING:
    from cllm.api.models import build, export, load, load_tokenizer
    from cllm.api.plans import plan
    from cllm.api.prefixes import PrefixStore, load_prefix, save_prefix
    from cllm.api.runs import compare, lightning_modules, prepare, train
    from cllm.api.scores import compress, score

__version__ = "0.1.0"
__all__ = [
    "PrefixStore",
    "UserError",
    "build",
    "compare",
    "compress",
    "export",
    "lightning_modules",
    "load",
    "load_prefix",
    "load_tokenizer",
    "plan",
    "prepare",
    "save_prefix",
    "score",
    "train",
]

# ---- functions, imported when they are first used --------------------------------------------------------------------

_FUNCTIONS = {
    **dict.fromkeys(("build", "export", "load", "load_tokenizer"), "cllm.api.models"),
    "plan": "cllm.api.plans",
    **dict.fromkeys(("PrefixStore", "load_prefix", "save_prefix"), "cllm.api.prefixes"),
    **dict.fromkeys(("compare", "lightning_modules", "prepare", "train"), "cllm.api.runs"),
    **dict.fromkeys(("compress", "score"), "cllm.api.scores"),
}
"""The functions and their modules."""
_PACKAGES = ("plan", "train")
"""Functions with the name of a package."""


def _function(name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(_FUNCTIONS[name]), name)


class _CallablePackage(ModuleType):
    """A package that can be called: `cllm.train(...)` is the function `train`, `cllm.train.run` a module."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Call the function with the package's name, see docs/python.md."""
        return _function(self.__name__.rpartition(".")[2])(*arguments, **options)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_function(self.__name__.rpartition(".")[2]))


class _Package(ModuleType):
    """This package. Python sets a package's attribute when it has imported a package inside of it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _PACKAGES and isinstance(value, ModuleType):
            value.__class__ = _CallablePackage
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"cllm.{name}")
    if name in _FUNCTIONS:
        return _function(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# ---- classes of transformers, registered when its tables are imported ------------------------------------------------

_PARTS = ("transformers.modeling_layers", "cllm.hub.base")
"""Without tables, but what our model is made of: whichever of them is what imports a table comes first."""
_ENTRIES = {
    "transformers.models.auto.configuration_auto": "cllm.hub.config",
    "transformers.models.auto.modeling_auto": "cllm.hub.model",
    **dict.fromkeys(_PARTS, "cllm.hub.model"),
    "peft.utils.constants": "cllm.hub.peft",
    "transformers.cli.serving.server": "cllm.hub.serving",
}
"""Modules with tables of models, and ours that make an entry there when they are imported."""


def _is_loading(name: str) -> bool:
    """Whether a module is in the midst of being imported."""
    return getattr(getattr(sys.modules.get(name), "__spec__", None), "_initializing", False)


class _AfterTables(importlib.abc.MetaPathFinder):
    """Imports ours as soon as somebody imports a table: doing so from here would cost every command seconds."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        entry = _ENTRIES.get(name)
        if entry is None:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for finder in others if (s := finder.find_spec(name, path, target)) is not None), None)
        loader = None if spec is None else spec.loader
        if loader is None:
            return None
        run = loader.exec_module

        def run_then_ours(module: ModuleType) -> None:
            run(module)
            if not any(map(_is_loading, set(_PARTS) - {name})):
                importlib.import_module(entry)

        loader.exec_module = run_then_ours  # type: ignore[method-assign]
        return spec


for _table, _entry in _ENTRIES.items():
    if _table in sys.modules:
        importlib.import_module(_entry)
if not sys.modules.keys() >= _ENTRIES.keys():
    sys.meta_path.insert(0, _AfterTables())
