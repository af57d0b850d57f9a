"""PEFT's tables of models: which modules an adapter changes where its config names none, and which embed tokens.

Imported after PEFT's own tables (see `cllm/__init__.py`). Modules have the names of Llama's, but for those in `_NAMES`.
"""

from __future__ import annotations

import sys
from typing import Any

_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "embed_tokens": "embed",
    "lm_head": "head",
}

_LIKE = "llama"


def register(tables: Any, model_type: str = "cllm") -> None:
    """Add `model_type` to every table of `tables`, a module, that knows Llama."""
    for name, table in vars(tables).items():
        targets = table.get(_LIKE) if name.endswith("_MODULES_MAPPING") and isinstance(table, dict) else None
        if isinstance(targets, list):
            table.setdefault(model_type, [_NAMES.get(target, target) for target in targets])
    embeddings: list[str] = getattr(tables, "EMBEDDING_LAYER_NAMES", [])
    embeddings.extend(_NAMES[name] for name in ("embed_tokens", "lm_head") if _NAMES[name] not in embeddings)


if (_tables := sys.modules.get("peft.utils.constants")) is not None:  # PEFT is optional
    register(_tables)
