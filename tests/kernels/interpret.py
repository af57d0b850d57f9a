"""Run a test file in Triton's interpreter: `TRITON_INTERPRET=1 python tests/kernels/interpret.py FILE`.

Three things take most of the time of small kernels, and are left out here:

- For a kernel, the interpreter replaces the functions of `triton.language` by its own. It does the same again for each
  call of a function in the kernel, where they are its own already. Here it is done once a kernel.
- Every sum of 32-bit integers is computed again in 64 bits, to see whether it overflows. A GPU does not do that either:
  it wraps, as numpy does here, and the test sees a wrong result.
- For each operation a table of numpy's types is built again.
"""

from __future__ import annotations

import functools
import inspect
import runpy
import sys
import warnings
from typing import Any

from triton.language.semantic import TritonSemantic
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


def leave_out_checks_of_overflow() -> None:
    """Let integers wrap."""
    TritonSemantic.binary_op_sanitize_overflow_impl = lambda *_: None


def remember_types() -> None:
    """Look up once which numpy type stands for a type of Triton."""
    look_up, found = interpreter._get_np_dtype, dict[Any, Any]()

    def remembered(dtype: Any) -> Any:
        element = getattr(dtype, "element_ty", dtype) if dtype.is_block() else dtype
        if element.is_ptr():
            return look_up(element)
        if element not in found:
            found[element] = look_up(element)
        return found[element]

    interpreter._get_np_dtype = remembered


if __name__ == "__main__":
    # These are private names of Triton. In a version without one of them the tests are slower.
    if hasattr(interpreter, "_patch_lang") and hasattr(interpreter, "GridExecutor"):
        replace_language_once_a_kernel()
    if hasattr(TritonSemantic, "binary_op_sanitize_overflow_impl"):
        leave_out_checks_of_overflow()
    if hasattr(interpreter, "_get_np_dtype"):
        remember_types()
    warnings.simplefilter("ignore")
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
