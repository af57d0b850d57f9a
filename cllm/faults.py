"""Faults of the machine that are not bugs, each as one line.

A full disk, a missing permission, a folder in place of a file, exhausted memory: Python, torch and Rust libraries raise
exceptions for these. `explain` turns such an exception into a line for `cllm.errors.one_line`. Every other exception is
a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import sys
from collections.abc import Iterator
from typing import TypeGuard

_WRITING = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
"""Errors that only occur in writing."""
_OF_FILES = _WRITING | {
    *(errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR),
    *(errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP, errno.ESTALE, errno.ENODEV, errno.ENOLCK),
}
"""Errors of a file system, even if the exception does not name a file."""
_HINTS = {errno.EMFILE: "raise the limit with `ulimit -n`", errno.ENFILE: "the machine has too many files open"}

_RUST = re.compile(r"\(os error (\d+)\)")
_WORKER = re.compile(r"^Caught \w+ in [^\n]*\nOriginal Traceback ", re.DOTALL)
_WORKER_ERRNO = re.compile(r"\[Errno (\d+)\] [^\n:]*(?:: '([^\n]*?)')?\s*$")
_CPU_MEMORY = re.compile(r"DefaultCPUAllocator: (?:can't allocate|not enough) memory(?:: you tried to allocate (\d+))?")
_GPU_MEMORY = ("CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_SHARED_MEMORY = "insufficient shared memory"
_LOST_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? [\d, ]+\) (?:exited unexpectedly|is killed by signal)")


def explain(error: BaseException) -> str | None:
    """A line about the fault of the machine or its files; None if `error` may be a bug."""
    if is_out_of_memory(error):
        return f"out of memory: {_first_line(error) or 'the machine has no more'}"
    if isinstance(error, OSError):
        return _explain_os_error(error)
    text = str(error)
    if isinstance(error, ValueError) and text.startswith("embedded null "):
        return "a path holds a NUL character, which no file system allows"
    if isinstance(error, RuntimeError) and _SHARED_MEMORY in text:
        return "out of shared memory in a data loader process; enlarge /dev/shm, or set data.num_workers 0"
    if isinstance(error, RuntimeError) and (match := _LOST_WORKER.match(text)):
        return f"{match[0]}: the machine ended a data loader process, mostly for memory; lower data.num_workers"
    if (number := _rust_errno(error)) is not None:
        return _sentence(None, number)
    # After a failed write, torch's archive writer fails again and hides the first error.
    hidden = next((found for found in _chain(error) if is_write_error(found)), None)
    return None if hidden is None else _explain_os_error(hidden)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy or torch failed to allocate memory, on a GPU or the host."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (any(t in text for t in _GPU_MEMORY) or bool(_CPU_MEMORY.search(text)))


def is_write_error(error: BaseException) -> TypeGuard[OSError]:
    """Whether a file system refused to store data: full, over quota, read-only, or a file too large."""
    return isinstance(error, OSError) and error.errno in _WRITING


def from_worker(error: BaseException) -> str | None:
    """The message of an exception in a data loader process, which torch wraps into a traceback; else None."""
    text = str(error)
    if not _WORKER.match(text):
        return None
    name = f"{type(error).__name__}: "
    last = re.split(rf"^(?:[\w.]+\.)?{re.escape(name)}", text, flags=re.MULTILINE)[-1]
    return last.strip()


def is_broken_pipe(error: BaseException) -> bool:
    """Whether `error` comes from writing to a standard stream that is no longer read, as in `command | head`."""
    return isinstance(error, BrokenPipeError) and any(_reader_has_gone(stream) for stream in (sys.stdout, sys.stderr))


def silence_output() -> None:
    """Discard further output, so that Python does not report a broken pipe at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _reader_has_gone(stream):
            os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


@contextlib.contextmanager
def naming(what: str) -> Iterator[None]:
    """Add the file name `what` to file errors in the block that have none, such as those of a write.

    Raises:
        OSError: also in place of other exceptions by which Rust libraries report file errors.
    """
    try:
        yield
    except Exception as error:
        if (number := _rust_errno(error)) is not None:
            raise OSError(number, os.strerror(number), what) from error
        for found in _chain(error):
            if isinstance(found, OSError) and found.errno is not None and found.filename is None:
                found.filename = what
        raise


def _chain(error: BaseException) -> Iterator[BaseException]:
    """`error`, then the exceptions that led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _rust_errno(error: BaseException) -> int | None:
    """The errno of a file error from a Rust library (safetensors, tokenizers), else None."""
    named = type(error) is Exception or type(error).__module__.startswith("safetensors")
    match = _RUST.search(str(error)) if named else None
    return int(match[1]) if match else None


def _explain_os_error(error: OSError) -> str | None:
    number, file = error.errno, error.filename2 or error.filename
    if number is None and (text := from_worker(error)) is not None and (match := _WORKER_ERRNO.search(text)):
        number, file = int(match[1]), match[2]
    file = os.fsdecode(file) if isinstance(file, str | bytes | os.PathLike) else None
    if number is None or (file is None and number not in _OF_FILES):
        return None
    return _sentence(file, number)


def _sentence(file: str | None, number: int) -> str:
    why = os.strerror(number) + (f" ({_HINTS[number]})" if number in _HINTS else "")
    verb = "written" if number in _WRITING else "used"
    return f"{file or 'a file'}: cannot be {verb}: {why}"


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    if match := _CPU_MEMORY.search(text):
        return f"{int(match[1]):,} bytes were asked for at once" if match[1] else ""
    # torch's message continues with advice about its allocator.
    return text.splitlines()[0].split(". Of the allocated memory")[0][:200] if text else ""


def _reader_has_gone(stream: object) -> bool:
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)  # type: ignore[attr-defined] # an object without `fileno` raises, and is no pipe
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):
        return False
