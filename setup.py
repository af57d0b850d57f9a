"""Copies configs/, data/recipes/ and notebooks/ into the wheel, as cllm/shipped/; pyproject.toml has everything else.

`cllm/config/shipped.py` reads them. In an editable install it reads the repository's folders.
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = {
    "configs": "cllm/shipped/configs",
    "data/recipes": "cllm/shipped/recipes",
    "notebooks": "cllm/shipped/notebooks",
}
"""Folders of the repository, and of the wheel."""


class BuildWithShipped(build_py):
    """`build_py` that copies the shipped files too, and names them, so that an sdist contains them."""

    def shipped(self) -> dict[str, str]:
        """Files of the build by their sources."""
        pairs = SHIPPED.items()
        files = {
            file: Path(self.build_lib, to, file.relative_to(of))
            for of, to in pairs
            for file in Path(of).rglob("*")
            if file.suffix in (".yaml", ".ipynb", ".txt") and not file.parent.name.startswith(".")
        }
        return {file.as_posix(): target.as_posix() for file, target in sorted(files.items())}

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED.values():
            shutil.rmtree(Path(self.build_lib, folder), ignore_errors=True)  # of an earlier build
        for file, target in self.shipped().items():
            self.mkpath(str(Path(target).parent))
            self.copy_file(file, target)

    def get_source_files(self) -> list[str]:
        return [*super().get_source_files(), *self.shipped()]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), *([] if self.editable_mode else self.shipped().values())]


setup(cmdclass={"build_py": BuildWithShipped})
