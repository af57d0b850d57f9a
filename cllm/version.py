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
    """The hash of a module without its comments, docstrings and layout; the same in every version of Python."""
    tree = ast.parse(Path(path).read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return hashlib.sha256(_dump(tree).encode()).hexdigest()


def _dump(value: Any) -> str:
    """A text of a syntax tree without empty fields: versions of Python differ in them, as in `type_params`."""
    if isinstance(value, ast.AST):
        fields = [(name, inner) for name, inner in ast.iter_fields(value) if inner is not None and inner != []]
        if isinstance(value, ast.JoinedStr):  # Python 3.12 splits its texts at doubled braces, and adds empty ones
            fields = [("values", _joined(value.values))]
        return f"{type(value).__name__}({', '.join(f'{name}={_dump(inner)}' for name, inner in fields)})"
    return f"[{', '.join(map(_dump, value))}]" if isinstance(value, list) else repr(value)


def _joined(parts: list[ast.expr]) -> list[ast.expr]:
    """The parts of an f-string, with texts that follow each other in one, and without empty ones."""
    found: list[ast.expr] = []
    for part in parts:
        before = found[-1] if found else None
        if isinstance(part, ast.Constant) and isinstance(before, ast.Constant):
            found[-1] = ast.Constant(str(before.value) + str(part.value))
        elif not isinstance(part, ast.Constant) or part.value:
            found.append(part)
    return found


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
