"""Checkpoints: synced to the disk when written, and verified before they are used.

A checkpoint is a file of `torch.save`, a zip archive with a CRC-32 for each record. Under ZeRO it is a folder, with the
SHA-256 of its files in `checksums.json`. torch checks neither when it loads.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cllm.errors import UserError
from cllm.faults import naming
from cllm.files import sync_file, write_atomic
from cllm.model.misfit import misfit
from cllm.runs.names import TIED, WEIGHTS_FILE, is_named, step_of

CHECKSUMS_FILE = "checksums.json"
"""In a checkpoint folder: {file: {"size": bytes, "sha256": hex}}."""
_PREFIX = "model."
_CHUNK = 1 << 22
# Errors of zipfile for damaged records and directories.
_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError, EOFError, OverflowError)


def save_file(state: Mapping[str, Any], file: Path) -> None:
    """Write a checkpoint directly to `file`, tensor by tensor, and sync it to the disk.

    Raises:
        OSError: naming the file, if it cannot be written, such as on a full disk. A partial file is deleted.
    """
    try:
        with naming(str(file)), file.open("wb") as stream:  # torch's own writer hides why a write failed
            torch.save(state, stream)
        sync_file(file)
    except BaseException:
        file.unlink(missing_ok=True)
        raise


def write_checksums(folder: Path) -> None:
    """Write `checksums.json` for all files of a checkpoint folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != CHECKSUMS_FILE)
    with ThreadPoolExecutor(_threads()) as pool:
        hashes = list(pool.map(_sha256, files))
    sums = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": digest}
        for path, digest in zip(files, hashes, strict=True)
    }
    write_atomic(folder / CHECKSUMS_FILE, json.dumps(sums, indent=2) + "\n")


def verify(checkpoint: Path, files: Iterable[str] | None = None) -> None:
    """Read a checkpoint and compare its checksums; `files` limits the check of a folder to these names.

    A folder of an older version, without `checksums.json`, is accepted.

    Raises:
        UserError: naming the file that is missing, truncated, damaged or not in the checksums, and if possible the
            record.
    """
    try:
        if checkpoint.is_dir():
            _verify_folder(checkpoint, files)
        else:
            _verify_archive(checkpoint)
    except FileNotFoundError as error:
        raise UserError(f"{checkpoint}: no such checkpoint: {error.filename} is missing") from None
    except OSError as error:
        raise UserError(f"{checkpoint}: cannot be read: {_first_line(error)}") from None


def _verify_archive(file: Path) -> None:
    record = ""
    try:
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                record = f"record {entry.filename}: "
                with archive.open(entry) as stream:
                    while stream.read(_CHUNK):
                        pass
    except _ZIP_ERRORS as error:
        raise UserError(f"{file}: damaged, or not a readable checkpoint: {record}{_first_line(error)}") from None


def _verify_folder(folder: Path, files: Iterable[str] | None) -> None:
    sums_file = folder / CHECKSUMS_FILE
    if not sums_file.exists():
        return
    try:
        sums = {name: (int(entry["size"]), str(entry["sha256"])) for name, entry in _json(sums_file).items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{sums_file}: damaged: {error!r}") from None
    if files is None:
        # DeepSpeed reads every shard that it finds, and unpickles it.
        pickles = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.pt"))
        if added := [name for name in pickles if name not in sums]:
            raise UserError(f"{folder / added[0]}: not part of the checkpoint: {CHECKSUMS_FILE} does not list it")
    wanted = sorted(sums if files is None else sums.keys() & set(files))
    for name in wanted:
        if (size := (folder / name).stat().st_size) != sums[name][0]:
            raise UserError(f"{folder / name}: damaged: it has {size} bytes, {CHECKSUMS_FILE} says {sums[name][0]}")
    with ThreadPoolExecutor(_threads()) as pool:
        for name, digest in zip(wanted, pool.map(_sha256, [folder / name for name in wanted]), strict=True):
            if digest != sums[name][1]:
                raise UserError(f"{folder / name}: damaged: its SHA-256 is not the one in {CHECKSUMS_FILE}")


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The decoder's tensors in a training checkpoint, a file or ZeRO's folder, on the CPU, verified.

    Only tensors and plain data are unpickled. In a folder only the safetensors file is read.

    Raises:
        UserError: for a checkpoint that is missing or damaged, and for other files.
    """
    verify(checkpoint, [WEIGHTS_FILE])
    if checkpoint.is_dir():
        return _read_safetensors(checkpoint / WEIGHTS_FILE)
    return _weights_of(_read_archive(checkpoint))


def check_resumable_file(checkpoint: Path) -> dict[str, Tensor]:
    """Verify all of a checkpoint before training resumes from it; returns the decoder's tensors.

    Raises:
        UserError: as `read_weights` does, for a checkpoint without training state, and for a step unlike its name's.
    """
    verify(checkpoint)
    if checkpoint.is_dir():
        return _read_safetensors(checkpoint / WEIGHTS_FILE)
    state = _read_archive(checkpoint)
    for key in ("global_step", "loops", "optimizer_states", "lr_schedulers"):
        if key not in state:
            raise UserError(f"{checkpoint}: not a checkpoint of a training run: it has no {key}")
    return _weights_of(state)


def _read_archive(file: Path) -> dict[str, Any]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # weights_only refuses content with errors of many types
        raise UserError(f"{file}: not a readable checkpoint: {_first_line(error)}") from None
    weights = state.get("state_dict") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{file}: not a checkpoint of a training run: it has no state_dict of tensors")
    if is_named(file) and state.get("global_step", step_of(file)) != step_of(file):
        raise UserError(f"{file}: holds step {state['global_step']}, its name says {step_of(file)}")
    return state


def _weights_of(state: Mapping[str, Any]) -> dict[str, Tensor]:
    weights = state["state_dict"]
    return {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items() if name.startswith(_PREFIX)}


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt", device="cpu") as stored:
            weights = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
            tied = json.loads((stored.metadata() or {}).get(TIED, "{}"))
        return weights | {name: weights[other] for name, other in tied.items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{file}: not readable: {_first_line(error)}") from None


def check_fits(weights: Mapping[str, Tensor], model: Mapping[str, Tensor], checkpoint: Path, config_file: Path) -> None:
    """Refuse `weights` with other names or shapes than the state dict of the config's `model`.

    Raises:
        UserError: naming the first tensors that differ, and their number.
    """
    if fault := misfit(weights, model):
        raise UserError(f"{checkpoint}: does not fit {config_file}: {fault}")


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_bytes())


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
