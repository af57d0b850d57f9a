"""The house: imports go downwards, late and typing imports included, and no two files import each other."""

from __future__ import annotations

import ast
import functools
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "cllm"
FLOORS = [
    {
        *("errors", "faults", "signals", "processes", "lock", "files", "rows", "yaml_text", "arguments", "trust"),
        *("counts", "key_values", "plugins", "progress", "statistics", "version", "workers"),
    },
    {"section", "environment", "tables"},
    {"plan"},
    {"config"},
    {"kernels"},
    {"cache"},
    {"model"},
    {"data"},
    {"runs"},
    {"hub"},
    {"uptrain", "posthoc"},
    {"prefix"},
    {"train"},
    {"evaluate"},
    {"study", "api", "serve", "planner"},
    {"commands"},
    {"__main__"},
]
"""A package imports those on floors above it in this list, and itself; on the first floor, each other."""
FILES = {".".join(("cllm", *file.relative_to(PACKAGE).with_suffix("").parts)): file for file in PACKAGE.rglob("*.py")}
MODULES = {name.removesuffix(".__init__"): file for name, file in FILES.items()}
TORCH_FREE = {"plan", "config", "section", "errors", "files"}


@functools.cache
def imports(module: str) -> set[str]:
    """Modules of this package that a module names: in any import, and in strings, as for `import_module`."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return (found & MODULES.keys()) - {module, "cllm"}


def floor(module: str) -> int:
    unit = module.split(".")[1]
    return next(n for n, units in enumerate(FLOORS) if unit in units)


def test_every_import_goes_downwards() -> None:
    inside = [module for module in MODULES if module != "cllm"]
    found = [(module, other) for module in inside for other in imports(module)]
    upwards = [f"{a} imports {b}" for a, b in found if floor(b) >= floor(a) > 0 and a.split(".")[1] != b.split(".")[1]]
    assert not upwards


def test_no_modules_import_each_other_in_a_circle() -> None:
    # A package's sign re-exports its modules; they do not import their own sign.
    graph = {module: imports(module) for module in MODULES if module != "cllm"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize("package", sorted({file.parent for file in MODULES.values()} - {PACKAGE}))
def test_a_package_has_a_sign_that_names_every_module_and_what_it_imports(package: Path) -> None:
    sign = ast.get_docstring(ast.parse((package / "__init__.py").read_text(encoding="utf-8"))) or ""
    modules = {file.name for file in package.glob("*.py")} - {"__init__.py"}
    modules |= {f"{file.parent.name}/" for file in package.glob("*/__init__.py")}
    assert not {name for name in modules if name not in sign}, "one line a module"
    assert "Imports " in sign, "what it may import"


# ---- benchmarks and experiments --------------------------------------------------------------------------------------

OUTSIDE = ("benchmarks", "experiments")
PACKAGES = sorted(file.parent for name in OUTSIDE for file in (PACKAGE.parent / name).rglob("__init__.py"))


def names_of_imports(file: Path) -> set[str]:
    """First parts of the modules that a file imports or names in a string, as `cllm` of `cllm.config`."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(("package", "forbidden"), [("cllm", set(OUTSIDE)), ("benchmarks", {"experiments"})])
def test_packages_import_neither_benchmarks_nor_experiments_above_them(package: str, forbidden: set[str]) -> None:
    files = (PACKAGE.parent / package).rglob("*.py")
    assert not [file for file in files if names_of_imports(file) & forbidden]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_a_package_of_benchmarks_or_experiments_has_a_sign(package: Path) -> None:
    test_a_package_has_a_sign_that_names_every_module_and_what_it_imports(package)


def test_a_module_has_at_most_400_lines() -> None:
    files = [file for name in ("cllm", *OUTSIDE) for file in (PACKAGE.parent / name).rglob("*.py")]
    lengths = {str(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files}
    assert not {file: length for file, length in lengths.items() if length > 400}, "split it along an idea"
