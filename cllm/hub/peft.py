"""PEFT's tables of models: the modules that adapters change by default, and those that embed tokens.

It is imported after PEFT's tables (see `cllm/__init__.py`). Modules have Llama's names, except those in `_NAMES`.
"""

from __future__ import annotations

import sys
from typing import Any

from cllm.hub.kind import MODEL_TYPE

_NAMES = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "mlp_norm",
    "embed_tokens": "embed",
    "lm_head": "head",
}

_LIKE = "llama"


def register(tables: Any, model_type: str = MODEL_TYPE) -> None:
    """Add `model_type` to every table of the module `tables` that has an entry for Llama."""
    for name, table in vars(tables).items():
        targets = table.get(_LIKE) if name.endswith("_MODULES_MAPPING") and isinstance(table, dict) else None
        if isinstance(targets, list):
            table.setdefault(model_type, [_NAMES.get(target, target) for target in targets])
    embeddings: list[str] = getattr(tables, "EMBEDDING_LAYER_NAMES", [])
    embeddings.extend(_NAMES[name] for name in ("embed_tokens", "lm_head") if _NAMES[name] not in embeddings)


if (_tables := sys.modules.get("peft.utils.constants")) is not None:  # PEFT is optional
    register(_tables)
