"""Run a test file in Triton's interpreter: `TRITON_INTERPRET=1 python tests/kernels/interpret.py FILE`.

For a kernel, the interpreter replaces the functions of `triton.language` by its own. It does the same again for each
call of a function in the kernel, where they are its own already. That takes half of the time of small kernels, so here
it is done once a kernel.
"""

from __future__ import annotations

import functools
import inspect
import runpy
import sys
from typing import Any

from triton.runtime import interpreter


@functools.cache
def _languages(function: Any) -> frozenset[str]:
    """The modules of Triton's language that the code of `function` names, of those that the interpreter changes."""
    modules = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)}
    return frozenset(modules & {"triton.language", "triton.language.core"})


def replace_language_once_a_kernel() -> None:
    """Let calls of functions in a kernel leave out modules whose functions were replaced for this kernel."""
    replace, run_kernel = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced = set[frozenset[str]]()

    def replace_once(function: Any) -> Any:
        if (languages := _languages(function)) in replaced:
            return None  # what is returned is used for kernels, and not for functions in them
        replaced.add(languages)
        return replace(function)

    def run_and_forget(self: Any, *arguments: Any, **options: Any) -> None:
        replaced.clear()
        run_kernel(self, *arguments, **options)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = replace_once, run_and_forget


if __name__ == "__main__":
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "GridExecutor"):  # else it is slower
        replace_language_once_a_kernel()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
