#!/usr/bin/env python
"""Import every module and every command line, with the optional packages hidden.

This shows that the base dependencies are enough to import everything: an optional package may be used if it is present,
but never required at import.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

OPTIONAL = {
    "argcomplete",
    "deepspeed",
    "fla",
    "flash_attn",
    "flash_attn_interface",
    "liger_kernel",
    "peft",
    "lm_eval",
    "rouge_score",
    "torchao",
    "vllm",
}
NEED_OPTIONAL = {"cllm.serve.vllm.attention", "cllm.serve.vllm.model"}
"""Modules that only vLLM imports."""


class Absent:
    """A finder that hides packages, also from code that only checks whether they are installed."""

    def __init__(self, finder: Any):
        self.finder = finder

    def find_spec(self, name: str, *args: Any) -> Any:
        return None if name.partition(".")[0] in OPTIONAL else self.finder.find_spec(name, *args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.meta_path[:] = [Absent(finder) for finder in sys.meta_path]
    import benchmarks
    import cllm
    import experiments

    packages = (cllm, benchmarks, experiments)
    names = [found.name for p in packages for found in pkgutil.walk_packages(p.__path__, f"{p.__name__}.")]
    names = [name for name in names if name not in NEED_OPTIONAL]
    for name in [*names, "train", "evaluate"]:
        importlib.import_module(name)
    print(f"imported {len(names) + 2} modules without {', '.join(sorted(OPTIONAL))}")


if __name__ == "__main__":
    main()
