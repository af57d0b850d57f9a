"""The configs and recipes that come with cllm, by name: `model/332m`, `kv/cla`, `recipes/stdlib`; and the notebooks.

In the repository they are configs/, data/recipes/ and notebooks/. setup.py copies them into the wheel as cllm/shipped/.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from cllm.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED, _REPOSITORY = _PACKAGE / "shipped", _PACKAGE.parent
CONFIGS, RECIPES, NOTEBOOKS = (
    (_INSTALLED / "configs", _INSTALLED / "recipes", _INSTALLED / "notebooks")
    if _INSTALLED.is_dir()
    else (_REPOSITORY / "configs", _REPOSITORY / "data" / "recipes", _REPOSITORY / "notebooks")
)
"""Folders of the shipped configs, recipes and notebooks."""


def shipped_configs() -> dict[str, Path]:
    """The file of each shipped config and recipe by its name, in alphabetical order."""
    found = {}
    for folder, prefix in ((CONFIGS, ""), (RECIPES, "recipes/")):
        for file in folder.rglob("*.yaml"):
            found[prefix + file.relative_to(folder).as_posix().removesuffix(".yaml")] = file
    return dict(sorted(found.items()))


def shipped_notebooks() -> dict[str, Path]:
    """The file of each shipped notebook by its name, such as `notebooks/first_steps.ipynb`, in alphabetical order."""
    return {f"notebooks/{file.name}": file for file in sorted(NOTEBOOKS.glob("*.ipynb"))}


def find_config(name: str | Path) -> Path:
    """The file that `--config` names: the file at this path if there is one, else the shipped config of this name.

    Raises:
        UserError: if there is neither, and the name resembles that of a shipped config.
    """
    path = Path(name)
    if os.path.exists(path) and not path.is_dir():
        return path
    shipped = shipped_configs()
    if file := shipped.get(str(name)):
        return file
    if not os.path.lexists(path):
        plain = re.sub(r"^(configs/|data/(?=recipes/))|\.ya?ml$", "", str(name))
        if close := difflib.get_close_matches(plain, shipped, n=1, cutoff=0.8):
            raise UserError(f'{path}: no such config file; did you mean the shipped "{close[0]}"?')
    return path
