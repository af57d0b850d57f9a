"""A tier on disk: one file for each prefix in a folder that any number of processes may read and write.

A file's name is that of its longest prefix (`keys.py`), so that two processes that store the same prefix write the same
file. Files appear complete or not at all (`write_atomic`), and a reader keeps a file that another process deletes until
it closes its map. The time of last use is the file's modification time, for all processes alike.

The folder has the mark `.cllm`. In it, only files that carry our header are deleted, and what a killed writer left.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from cllm.errors import UserError
from cllm.files import MARK, is_empty, mark_new, marked_as
from cllm.prefix.file import Header, PrefixFile, read_header, write_prefix
from cllm.prefix.pack import Packed
from cllm.trust import reason

log = logging.getLogger(__name__)
_writing = threading.Lock()
"""Threads of one process would write to the same unfinished file."""

KIND = "prefixes"
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.safetensors\.partial-(?P<host>.+)-(?P<pid>[0-9]+)")
_ABANDONED = 24 * 3600.0
"""Seconds after which an unfinished file of another machine counts as left by a killed writer."""


class DiskTier:
    """Prefixes in `folder`, with a budget in bytes for all processes that have the same one.

    A folder that cannot be read, such as one that somebody deletes, counts as empty, with a warning.

    Raises:
        UserError: for a folder that is neither missing, empty, nor one of stored prefixes, and one that cannot be made.
    """

    def __init__(self, folder: Path, budget: int):
        self.folder, self.budget = folder, budget
        self._readable = True
        try:
            # In this order: another process marks the folder before it writes to it.
            if os.path.lexists(folder) and not is_empty(folder) and marked_as(folder) != KIND:
                raise UserError(
                    f"{folder}: is no folder of stored prefixes; allowed: a new or empty folder, or one that is"
                )
            self._mark()
        except UserError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a path that no folder can have
            raise UserError(f"{folder}: cannot be made a folder of stored prefixes: {reason(error)}") from None
        self._headers: dict[str, Header | None] = {}
        """Of every file that was seen; None: it is not ours, or damaged."""
        self._checked: set[tuple[int, str]] = set()
        """Identities of the files whose hashes this process has checked."""
        self._remove_unfinished()

    def _mark(self) -> None:
        try:
            mark_new(self.folder, KIND)
        except FileNotFoundError:  # another process has just marked it, and removed this one's unfinished mark
            if marked_as(self.folder) != KIND:
                raise

    def headers(self) -> dict[str, Header]:
        """The headers of all files now in the folder, by name. Those of new files are read."""
        names = [path.stem for path in self._paths() if _NAME.fullmatch(path.name)]
        self._headers = {name: self._headers[name] for name in names if name in self._headers}
        for name in names:
            if name not in self._headers:
                with contextlib.suppress(FileNotFoundError):  # another process has deleted it
                    self._headers[name] = self._header(self._path(name))
        return {name: header for name, header in self._headers.items() if header is not None}

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    @property
    def nbytes(self) -> int:
        """Bytes of all files of stored prefixes."""
        return sum(size for _, size, _ in self._files())

    def get(self, name: str) -> tuple[Packed, Tensor] | None:
        """A cache, as views of the mapped file, and its tokens, used now; None if it is gone or damaged."""
        try:
            with PrefixFile(self._path(name)) as file:
                found = file.read(check=file.identity not in self._checked)
                file.touch()
        except FileNotFoundError:  # another process has deleted it
            self._headers.pop(name, None)
            return None
        except (OSError, UserError) as error:
            log.warning("a stored prefix is not used: %s", error)
            self.refuse(name)
            return None
        self._headers[name] = file.header  # another process may have stored it again
        self._checked.add(file.identity)
        return found

    def refuse(self, name: str) -> None:
        """Do not read a file again. `put` replaces it."""
        self._headers[name] = None

    def put(self, name: str, packed: Packed, tokens: Tensor, header: Header) -> bool:
        """Write a file, unless it is there; then make room. Returns whether the prefix is stored.

        Raises:
            UserError: naming the file, if it cannot be written.
        """
        path = self._path(name)
        if packed.nbytes > self.budget:
            return False
        if self._headers.get(name, header) is not None:
            try:
                os.utime(path)
                return True
            except FileNotFoundError:
                pass
            except OSError:  # a file of another user, or a folder that is read-only: its time of use stays
                return True
        self._headers.pop(name, None)
        with _writing:
            if not os.path.lexists(self.folder):  # somebody has deleted it
                with contextlib.suppress(OSError):
                    self._mark()
            write_prefix(path, packed, tokens, header)
        self._evict(keep=name)
        return path.exists()

    def _evict(self, keep: str) -> None:
        """Delete the least recently used files beyond the budget; `keep` last, unless it is larger by itself.

        One process at a time: two that count the same files would delete more than they have to. Nothing is deleted if
        the folder's mark is gone.
        """
        if marked_as(self.folder) != KIND:
            log.warning("%s: has lost its file %s, so nothing in it is deleted to make room", self.folder, MARK)
            return
        with _alone(self.folder / MARK):
            files = sorted(self._files(), key=lambda file: (file[2].name == f"{keep}.safetensors", file[0]))
            total = sum(size for _, size, _ in files)
            if files and files[-1][1] > self.budget:
                files = files[-1:]
            for _, size, path in files:
                if total <= self.budget:
                    break
                if self._is_ours(path):
                    with contextlib.suppress(PermissionError):  # a file of another user
                        path.unlink(missing_ok=True)
                        total -= size
            self._remove_unfinished()

    def _files(self) -> list[tuple[int, int, Path]]:
        """Time of last use in ns, bytes and path of every file with a name of ours."""
        found = []
        for path in self._paths():
            if _NAME.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    status = path.stat()
                    found.append((status.st_mtime_ns, status.st_size, path))
        return found

    def _remove_unfinished(self) -> None:
        """Delete what writers that were killed have left."""
        host = re.sub(r"[^A-Za-z0-9.]+", "-", socket.gethostname())[:64] or "localhost"
        for path in self._paths():
            if (match := _PARTIAL.fullmatch(path.name)) is None:
                continue
            with contextlib.suppress(OSError):  # another process has deleted it, or this one may not
                old = time.time() - path.stat().st_mtime > _ABANDONED
                if old or (match["host"] == host and not _is_running(int(match["pid"]))):
                    path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        """Everything in the folder."""
        try:
            found = list(self.folder.iterdir())
        except OSError as error:
            if self._readable:
                log.warning("%s: no stored prefix is found: %s", self.folder, reason(error))
            self._readable = False
            return []
        self._readable = True
        return found

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def _header(self, path: Path) -> Header | None:
        try:
            return read_header(path)
        except FileNotFoundError:
            raise
        except (OSError, UserError) as error:
            log.warning("a file is no stored prefix and is left alone: %s", error)
            return None

    def _is_ours(self, path: Path) -> bool:
        try:
            return self._header(path) is not None
        except FileNotFoundError:
            return False


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Wait for the kernel's lock of `file`, if its file system has locks."""
    try:
        descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)
    except OSError:  # of another user; network file systems may then have no lock
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
