"""cllm: decoder language models whose layers declare where their keys and values come from.

After `import cllm`, transformers' `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` know the checkpoints of this
package, and PEFT knows which of their modules adapters change where none are named.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"

_PARTS = ("transformers.modeling_layers", "cllm.hub.base")
"""Without tables, but what our model is made of: whichever of them is what imports a table comes first."""
_ENTRIES = {
    "transformers.models.auto.configuration_auto": "cllm.hub.config",
    "transformers.models.auto.modeling_auto": "cllm.hub.model",
    **dict.fromkeys(_PARTS, "cllm.hub.model"),
    "peft.utils.constants": "cllm.hub.peft",
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
