"""Atomic writes, safe joins of paths, and deletion of folders that cllm made.

Writing: to a temporary file next to the target, synced to the disk, then renamed. After a crash the old or the new
content is there, never a part.

Names in files: `inside` joins a folder and a name from a file's content, and refuses names that leave the folder.

Deleting: a folder that cllm makes has a small file, `.cllm`, with the folder's kind. Only such a folder is ever removed
or replaced; any other is refused with one line, whatever its name.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cllm.errors import UserError
from cllm.lock import locked

MARK = ".cllm"
"""The file that marks a folder as made by cllm: JSON, {"kind": "run"}."""
_UNFINISHED_MARK = f".{MARK}.partial-*"
"""Left by a process that was killed while it marked a folder, before it wrote anything else."""
RESULTS = "results"
"""The kind of folders for tables and figures."""
DELETING = ".cllm-deleting"
"""The mark's name once the folder's deletion has begun."""


def inside(folder: Path, name: str, *, written_in: Path | str, to_write: bool = False) -> Path:
    """`folder / name` for a relative name from a file's content or a command line.

    A path whose last part is a symbolic link may be read, wherever the link points: the folders of the Hugging Face
    cache consist of such links. Links in the other parts must not lead out of the folder; with `to_write`, neither must
    the last one.

    Args:
        folder: any folder; it may itself be reached through links.
        name: relative, with `/` between its parts.
        written_in: the file, key or option that has the name, for the message.
        to_write: whether the path, or something below it, will be written to.

    Raises:
        UserError: for a name that is empty, absolute, has `..` in it, or leads outside `folder` through a link.
    """
    parts = name.split("/") if isinstance(name, str) else [""]
    if any(part in ("", ".", "..") or "\0" in part or "\\" in part for part in parts):
        raise UserError(f"{written_in}: names {shorten(repr(name))}; allowed: names of files in {folder}")
    path = folder.joinpath(*parts)
    checked = path if to_write else path.parent
    if target_outside(folder, checked) is not None:
        raise UserError(f"{checked}: leads out of {folder} through a symbolic link; cllm does not follow it")
    return path


def target_outside(folder: Path, path: Path) -> Path | None:
    """The target of `path`, if symbolic links in it lead out of `folder`; None if it stays inside.

    Raises:
        OSError: for a link that cannot be followed, such as a link to itself.
    """
    try:
        target = path.resolve()
    except RuntimeError:  # as Python before 3.13 reports a loop
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None
    return None if target.is_relative_to(folder.resolve()) else target


def json_files(folder: Path) -> list[Path]:
    """The JSON files in a folder and its subfolders, in order. A subfolder's name may end in .json too."""
    return sorted(file for file in folder.rglob("*.json") if file.is_file())


def shorten(text: str, limit: int = 80) -> str:
    """`text`, or its beginning and an ellipsis if it is longer than `limit` characters."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def sync_folder(folder: Path) -> None:
    """Sync a folder's entries (names, not content) to the disk, so that a rename in it survives a power cut."""
    _sync(folder)


def sync_file(file: Path) -> None:
    """Sync a file's content to the disk."""
    _sync(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync every file and folder under `folder` to the disk. Symbolic links are not followed."""
    for parent, _, files in os.walk(folder):
        for name in files:
            if not (path := Path(parent, name)).is_symlink():
                sync_file(path)
        sync_folder(Path(parent))


def usual_permissions(folder: Path, pattern: str = "*.safetensors") -> None:
    """Give the files of a folder the permissions of new files. safetensors 0.8 lets only their owner read them."""
    mask = os.umask(0o077)
    os.umask(mask)
    for file in folder.glob(pattern):
        file.chmod(0o666 & ~mask)


def partial_path(path: Path) -> Path:
    """The temporary file or folder next to `path` for this process; its name has the machine and the process id."""
    return path.with_name(f".{path.name}.partial-{_host()}-{os.getpid()}")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file atomically, as UTF-8 if `content` is a string. A missing folder is created.

    Raises:
        OSError: if it cannot be written. The old content is then unchanged, and no temporary file is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def check_writable(folder: Path) -> None:
    """Raise `OSError` if a folder cannot be written to. It may be missing; nothing is left in it or above it."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    with tempfile.TemporaryFile(dir=existing):
        pass


def mark(folder: Path, kind: str) -> None:
    """Mark a folder as made by cllm, with a `kind` such as `run` or `export`. A missing folder is created."""
    write_atomic(folder / MARK, json.dumps({"kind": kind}) + "\n")
    for path in folder.glob(_UNFINISHED_MARK):
        path.unlink(missing_ok=True)


def mark_new(folder: Path, kind: str) -> None:
    """Mark a folder if it is missing or empty; any other is not changed."""
    if not os.path.lexists(folder) or is_empty(folder):
        mark(folder, kind)


def marked_as(folder: Path) -> str | None:
    """The kind that a folder is marked with; None if it has no mark, or is a symbolic link."""
    return _kind(folder / MARK) or _kind(folder / DELETING)


def is_being_deleted(folder: Path) -> bool:
    """Whether `remove` was interrupted in this folder: parts of it are gone."""
    return _kind(folder / MARK) is None and _kind(folder / DELETING) is not None


def _kind(file: Path) -> str | None:
    if file.parent.is_symlink():
        return None
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    kind = content.get("kind") if isinstance(content, dict) else None
    return kind if isinstance(kind, str) else None


def is_empty(folder: Path) -> bool:
    """Whether `folder` is a folder, no symbolic link, with at most unfinished marks in it."""
    if not folder.is_dir() or folder.is_symlink():
        return False
    return all(path.match(_UNFINISHED_MARK) for path in folder.iterdir())


def check_replaceable(folder: Path, kind: str) -> None:
    """Refuse to replace or delete a folder that is not missing, empty, or marked with `kind`.

    Raises:
        UserError: naming the path and the reason.
    """
    if not os.path.lexists(folder) or is_empty(folder):
        return
    if folder.is_symlink():
        raise UserError(f"{folder}: is a symbolic link; cllm replaces only folders that it made; choose another name")
    if not folder.is_dir():
        raise UserError(f"{folder}: is a file, not a folder; choose another name")
    found = marked_as(folder)
    if found != kind:
        what = f"has no file {MARK}" if found is None else f"was made as {found!r}, not as {kind!r}"
        raise UserError(f"{folder}: is left alone: it {what}, and cllm deletes only what it made; choose another name")


def remove(folder: Path, kind: str) -> None:
    """Delete a folder that is marked with `kind` or empty. A missing folder is no error.

    The mark is deleted last, so that an interrupted deletion can be finished by calling this again
    (`is_being_deleted`).

    Raises:
        UserError: if the folder is not marked so; it is then unchanged.
    """
    check_replaceable(folder, kind)
    if not folder.exists():
        return
    if (folder / MARK).exists():
        (folder / MARK).replace(folder / DELETING)
    for path in folder.iterdir():
        if path.name != DELETING:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    shutil.rmtree(folder)


def remove_files(folder: Path, kind: str, pattern: str) -> None:
    """Delete the files that match a glob pattern in a folder marked with `kind`; in any other folder, none."""
    if marked_as(folder) == kind:
        for file in folder.glob(pattern):
            file.unlink()


def replace(partial: Path, folder: Path, kind: str) -> None:
    """Rename `partial` to `folder`, which may be a folder marked with `kind`.

    After a crash the complete old or new folder is there, under its name or `.NAME.old-HOST-PID`.

    Raises:
        UserError: if another folder has the name; both are then unchanged.
    """
    check_replaceable(folder, kind)
    sync_tree(partial)
    old = None
    if folder.exists():
        old = folder.with_name(f".{folder.name}.old-{_host()}-{os.getpid()}")
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        if old is not None:
            old.rename(folder)
        raise
    sync_folder(folder.parent)
    if old is not None:
        remove(old, kind)


@contextmanager
def new_folder(folder: Path, kind: str, *, force: bool = True) -> Iterator[Path]:
    """Yield a marked temporary folder, which is renamed to `folder` if the block ends without an exception.

    `folder` is locked meanwhile, and leftovers of killed processes are removed first. After an exception the temporary
    folder is removed.

    Args:
        force: replace a `folder` marked with `kind`; if False, any that is not empty is refused.

    Raises:
        UserError: if `folder` may not be replaced, or another process is writing to it. Nothing was written then.
    """
    with locked(folder):
        remove_leftovers(folder, kind)
        if not force and os.path.lexists(folder) and not is_empty(folder):
            raise UserError(f"{folder}: exists; give another name, or --force to replace it")
        check_replaceable(folder, kind)
        partial = partial_path(folder)
        try:
            mark(partial, kind)
            yield partial
            replace(partial, folder, kind)
        except BaseException:
            if marked_as(partial) == kind or is_empty(partial):
                remove(partial, kind)
            raise


def remove_leftovers(folder: Path, kind: str) -> None:
    """Delete partial and old versions of `folder` that killed processes left. The caller holds the lock of `folder`.

    If `folder` is missing, an old version is renamed to it instead.
    """
    if not folder.parent.is_dir():
        return
    name = re.compile(rf"\.{re.escape(folder.name)}\.(partial|old)-[A-Za-z0-9.-]+-\d+")
    for path in sorted(folder.parent.iterdir()):  # old before partial
        match = name.fullmatch(path.name)
        if match is None or not (marked_as(path) == kind or is_empty(path)):
            continue
        if match[1] == "old" and not os.path.lexists(folder) and not is_being_deleted(path):
            path.rename(folder)
        else:
            remove(path, kind)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", socket.gethostname())[:64] or "localhost"
