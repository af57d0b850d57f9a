"""Locks of folders, so that one process at a time writes to a folder.

The lock of `runs/NAME` is the file `runs/.NAME.lock`, next to the folder, so that it survives when the folder is
replaced. Two things decide who owns it:

- The kernel's lock on the file (`flock`), which ends with the process. It decides between processes of one machine, and
  between machines on file systems that share locks (NFS 4, GPFS, Lustre with `flock`).
- The record in the file: machine, process, start. If the record is from another machine and the kernel's lock is free,
  the file system may not share locks. An owner touches the file every `BEAT` seconds; one that has not touched it for
  `PATIENCE` seconds is dead. No clocks are compared.

The file is deleted when the lock is released.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cllm.errors import UserError

log = logging.getLogger(__name__)

BEAT = 5.0
"""Seconds between two touches of the file by its owner."""
PATIENCE = 60.0
"""Seconds without a touch after which an owner on another machine counts as dead."""

_open: set[int] = set()
"""Descriptors of this process's locks. A forked child closes them, so that it does not keep its parent's locks."""


def lock_file(folder: Path) -> Path:
    """The lock file of a folder, next to it. A link to a folder has the lock of that folder."""
    folder = Path(os.path.realpath(folder))
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Own `folder`, which may be missing, while the block runs.

    Raises:
        UserError: if another process owns it, naming its machine, its pid and its start; if the lock cannot be written;
            if `folder` is a file. It does not wait for the other process to end.
    """
    file = lock_file(folder)
    try:
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: cannot be written: it is a file, not a folder; choose another name")
        made, descriptor = _acquire(file, folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be locked: {file}: {error.strerror or error}") from None
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(descriptor, stop), name=f"lock of {folder.name}", daemon=True)
    beat.start()
    try:
        yield
    finally:
        if descriptor in _open:  # not in a forked child
            stop.set()
            beat.join()
            with contextlib.suppress(OSError):
                file.unlink()  # while it is still locked, so that no other process owns it
            _open.discard(descriptor)
            os.close(descriptor)
            for parent in made:
                with contextlib.suppress(OSError):
                    parent.rmdir()  # succeeds only if nothing was written


def discard_dead(folder: Path) -> None:
    """Delete the lock file of `folder` if a killed process of this machine left it. Never raises."""
    file = lock_file(folder)
    with contextlib.suppress(OSError):
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            record = _read(descriptor)
            ours = record is not None and record.get("boot") == _here()["boot"]
            if ours and _flock(descriptor) and _is_at(descriptor, file):
                file.unlink()
        finally:
            os.close(descriptor)


def _make_parents(folder: Path) -> list[Path]:
    """Create a folder. Returns those that were missing, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _acquire(file: Path, folder: Path) -> tuple[list[Path], int]:
    """The parents that were created, and a descriptor of the locked file, which has this process's record."""
    made: list[Path] = []
    tries = 0
    while True:
        made = _make_parents(file.parent) or made
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another process may just have deleted the parent that it had created
            if (tries := tries + 1) > 10:
                raise
            continue
        try:
            free = _flock(descriptor)
            record = _read(descriptor)
            if free is False or (record and _is_alive(record, file, decided=free is True)):
                raise UserError(f"{folder}: is in use by {_owner(record)}; stop that first, or choose another name")
            # Its last owner may have deleted it after it was opened here.
            if _is_at(descriptor, file):
                _write(descriptor, {**_here(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S %z")})
                _open.add(descriptor)
                return made, descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _flock(descriptor: int) -> bool | None:
    """Whether this process got the kernel's lock. None: the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
            raise
        log.warning("this file system has no locks (%s); a record and its time stamp take their place", error.strerror)
        return None
    return True


def _is_alive(record: dict[str, Any], file: Path, *, decided: bool) -> bool:
    """Whether the owner of a record still runs.

    Args:
        decided: the kernel's lock was free, so an owner on this machine has ended.
    """
    if decided and record.get("boot") == _here()["boot"]:
        return False
    log.warning("%s: was left by %s; waiting up to %.0f s for a sign of life", file, _owner(record), PATIENCE)
    before, deadline = _touched(file), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        time.sleep(min(BEAT, PATIENCE) / 5)
        if (now := _touched(file)) != before:
            return now is not None
    return False


def _touched(file: Path) -> int | None:
    """Time of the last touch; None: the file is gone. Opening the file gets the newest time from a file server."""
    try:
        with file.open("rb") as opened:
            return os.fstat(opened.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None


def _is_at(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False


def _read(descriptor: int) -> dict[str, Any] | None:
    """The record; None if its owner has not written it yet."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _write(descriptor: int, record: dict[str, Any]) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(record).encode() + b"\n", 0)
    os.fsync(descriptor)


def _owner(record: dict[str, Any] | None) -> str:
    if record is None:
        return "another process"
    return f"process {record.get('pid')} on {record.get('host')}, since {record.get('since')}"


def _here() -> dict[str, str]:
    """This machine: its name, and an id that changes with each boot."""
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = host
    return {"host": host, "boot": boot}


def _beat(descriptor: int, stop: threading.Event) -> None:
    while not stop.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _close_in_child() -> None:
    for descriptor in _open:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _open.clear()


os.register_at_fork(after_in_child=_close_in_child)
