"""Faults of the machine as one line; bugs are no faults."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
from numpy._core._exceptions import _ArrayMemoryError
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from cllm import faults
from cllm.errors import DataError


@pytest.mark.parametrize(
    ("number", "line"),
    [
        (errno.ENOSPC, "x/y: cannot be written: No space left on device"),
        (errno.EROFS, "x/y: cannot be written: Read-only file system"),
        (errno.EFBIG, "x/y: cannot be written: File too large"),
        (errno.EACCES, "x/y: cannot be used: Permission denied"),
        (errno.ENAMETOOLONG, "x/y: cannot be used: File name too long"),
        (errno.EISDIR, "x/y: cannot be used: Is a directory"),
        (errno.EMFILE, "x/y: cannot be used: Too many open files (raise the limit with `ulimit -n`)"),
    ],
)
def test_an_error_of_files_names_the_file_and_the_reason(number, line):
    assert faults.explain(OSError(number, os.strerror(number), "x/y")) == line
    assert faults.explain(OSError(number, os.strerror(number), Path("x/y"))) == line
    assert faults.explain(OSError(number, os.strerror(number), b"x/y")) == line
    assert faults.explain(OSError(number, os.strerror(number))) == line.replace("x/y", "a file")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        KeyError("x"),
        RuntimeError("a bug"),
        OSError("no number"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        ChildProcessError(errno.ECHILD, "No child processes"),
        Exception("a bug (os error)"),
    ],
)
def test_other_exceptions_are_left_to_their_traceback(error):
    assert faults.explain(error) is None


def test_a_path_that_cannot_be_one_is_no_bug():
    with pytest.raises(ValueError, match="embedded null") as error:
        Path("a\0b").mkdir()
    assert faults.explain(error.value) == "a path holds a NUL character, which no file system allows"


def test_a_failed_write_behind_a_second_failure_is_found():
    second = RuntimeError("unexpected pos 64 vs 0")  # torch's writer of archives raises it over the first
    second.__context__ = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a.ckpt")
    assert faults.explain(second) == "a.ckpt: cannot be written: No space left on device"


def test_errors_of_rust_libraries_get_the_name_of_the_file(tmp_path):
    (tmp_path / "file").touch()
    target = tmp_path / "file" / "model.safetensors"
    with pytest.raises(NotADirectoryError) as error, faults.naming(str(target)):
        save_file({"a": torch.zeros(2)}, target)
    assert faults.explain(error.value) == f"{target}: cannot be used: Not a directory"
    with pytest.raises(NotADirectoryError) as error, faults.naming(str(target)):
        tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(target))
    assert faults.explain(error.value) == f"{target}: cannot be used: Not a directory"


@pytest.mark.parametrize(
    ("error", "name"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "inner"), "inner"),
        (OSError(errno.ENOSPC, "No space left on device"), "outer"),
        (OSError("a message alone"), None),
    ],
)
def test_naming_names_what_has_no_name(error, name):
    with pytest.raises(OSError, match=r"No space|alone") as raised, faults.naming("outer"):
        raise error
    assert raised.value.filename == name


OF_NUMPY = _ArrayMemoryError((10**6,), np.dtype("f8"))
OF_A_GPU = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2 GiB. Of the allocated memory 3 GiB is reserved"
)
OF_A_CPU = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "out of memory: the machine has no more"),
        (OF_NUMPY, "out of memory: Unable to allocate 7.63 MiB"),
        (OF_A_GPU, "out of memory: CUDA out of memory. Tried to allocate 2 GiB"),
        (OF_A_CPU, "out of memory: 4,000 bytes were asked for at once"),
        (RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), "out of memory: CUDA error"),
    ],
)
def test_exhausted_memory_is_known_in_every_library(error, line):
    assert faults.is_out_of_memory(error)
    assert (faults.explain(error) or "").startswith(line)


def test_torch_on_a_cpu_says_so_when_memory_runs_out():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert faults.is_out_of_memory(error.value)


class Broken(Dataset):
    """Raises what it is asked for."""

    def __init__(self, error: Exception | None, path: Path | None = None):
        self.error, self.path = error, path

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        if self.error is not None:
            raise self.error
        assert self.path is not None
        self.path.read_bytes()
        return 0


def test_an_exception_of_a_loader_process_keeps_its_own_message(tmp_path):
    with pytest.raises(DataError) as error:
        list(DataLoader(Broken(DataError("shard.bin: damaged: 5 bytes")), num_workers=1))
    assert str(error.value).startswith("Caught DataError in DataLoader worker")  # what torch makes of it
    assert faults.from_worker(error.value) == "shard.bin: damaged: 5 bytes"
    missing = tmp_path / "shard.bin"
    with pytest.raises(FileNotFoundError) as lost:
        list(DataLoader(Broken(None, missing), num_workers=1))
    assert faults.explain(lost.value) == f"{missing}: cannot be used: No such file or directory"
    assert faults.from_worker(DataError("shard.bin: damaged")) is None


def test_a_reader_that_has_gone_is_told_from_other_broken_pipes(monkeypatch):
    read, write = os.pipe()
    with os.fdopen(write, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        assert not faults.is_broken_pipe(BrokenPipeError())  # of something else: this reader is there
        os.close(read)
        assert faults.is_broken_pipe(BrokenPipeError())
        assert not faults.is_broken_pipe(ValueError())
        faults.silence_output()
        print("nobody reads this", flush=True)
