"""Hashes of the code that decides a result, and of a config, so that a table mixes no versions."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import cllm

_ROOT = Path(cllm.__file__).resolve().parent
TRAINING = ("plan", "config", "kernels", "cache", "model", "data", "runs", "train", "uptrain")
"""Packages that decide what a training run computes."""
EVALUATION = (*TRAINING, "hub", "posthoc", "evaluate")
"""Packages that decide what an evaluation computes."""
_LENGTH = 12


@functools.lru_cache(maxsize=4096)
def _file_hash(path: str, changed_ns: int, size: int) -> str:
    """The hash of a module without its comments, docstrings and layout."""
    tree = ast.parse(Path(path).read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def code_version(packages: tuple[str, ...] = TRAINING) -> str:
    """Twelve hex digits that change with the code of these packages of cllm, and not with comments or docstrings."""
    total = hashlib.sha256(cllm.__version__.encode())
    for file in sorted(file for package in packages for file in (_ROOT / package).rglob("*.py")):
        state = file.stat()
        total.update(f"{file.relative_to(_ROOT)} {_file_hash(str(file), state.st_mtime_ns, state.st_size)}\n".encode())
    return total.hexdigest()[:_LENGTH]


def data_hash(data: Any) -> str:
    """Twelve hex digits that identify plain data."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:_LENGTH]


def config_hash(config: dict[str, Any]) -> str:
    """`data_hash` of a config without what does not change a result: its name, folders and loader processes."""
    kept = {key: value for key, value in config.items() if key not in ("name", "runs_dir")}
    dropped = ("path", "validation", "num_workers", "verify")
    kept["data"] = {key: value for key, value in (config.get("data") or {}).items() if key not in dropped}
    return data_hash(kept)
