"""SHA-256 of an exported folder's weight files, written by the export and checked whenever cllm loads the folder."""

from __future__ import annotations

import json
from pathlib import Path

from cllm.data.manifest import sha256_of
from cllm.errors import UserError
from cllm.files import inside, shorten, write_atomic
from cllm.trust import read_object

CHECKSUMS = "weights.sha256.json"
"""`{"model.safetensors": {"bytes": 123, "sha256": "..."}}`, an entry for each weight file."""
_HINT = f"where the weights were changed on purpose, delete {CHECKSUMS}"


def write_checksums(folder: Path) -> None:
    """Write the size and hash of every `*.safetensors` file in `folder`."""
    files = sorted(folder.glob("*.safetensors"))
    content = {file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in files}
    write_atomic(folder / CHECKSUMS, json.dumps(content, indent=2) + "\n")


def check_checksums(folder: Path) -> None:
    """Compare sizes, then hashes, of the weight files in `folder` with its checksums, if it has any.

    Each weight file is read once, at 1 to 2 GB/s on one core.

    Raises:
        UserError: naming the first file that is missing, additional or different.
    """
    file = folder / CHECKSUMS
    if not file.exists():
        return
    content = read_object(file)
    for name, entry in content.items():
        path = inside(folder, name, written_in=file)
        size, sha256 = (entry.get(key) for key in ("bytes", "sha256")) if isinstance(entry, dict) else (None, None)
        if not isinstance(size, int) or not isinstance(sha256, str):
            raise UserError(f"{file}: {name} has {shorten(json.dumps(entry))}; allowed: its bytes and sha256")
        if not path.is_file():
            raise UserError(f"{path}: missing; {file.name} lists it; {_HINT}")
        if (found := path.stat().st_size) != size:
            raise UserError(f"{path}: damaged: {found} bytes, {file.name} says {size}; {_HINT}")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in content:
            raise UserError(f"{path}: is not in {file.name}; {_HINT}")
        if sha256_of(path) != content[path.name]["sha256"]:
            raise UserError(f"{path}: damaged: its sha256 is not that in {file.name}; {_HINT}")
