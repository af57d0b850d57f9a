"""cllm: decoder language models whose layers declare where their keys and values come from.

After `import cllm`, transformers' `AutoConfig` and `AutoModelForCausalLM` know the checkpoints of this package.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

_AUTO = "transformers.models.auto.configuration_auto"
_ENTRY = "cllm.hub.config"
"""Makes the entry in transformers' table of models when it is imported."""


class _AfterAuto(importlib.abc.MetaPathFinder):
    """Imports `_ENTRY` as soon as somebody imports `_AUTO`: doing so from here would cost every command seconds."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _AUTO:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for finder in others if (s := finder.find_spec(name, path, target)) is not None), None)
        loader = None if spec is None else spec.loader
        if loader is None:
            return None
        run = loader.exec_module

        def run_then_ours(module: ModuleType) -> None:
            run(module)
            importlib.import_module(_ENTRY)

        loader.exec_module = run_then_ours  # type: ignore[method-assign]
        return spec


if _AUTO in sys.modules:
    importlib.import_module(_ENTRY)
else:
    sys.meta_path.insert(0, _AfterAuto())
