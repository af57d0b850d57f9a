"""Files and folders survive a crash at any point, and nothing of anybody else's is deleted."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from cllm import files
from cllm.errors import UserError
from cllm.files import (
    DELETING,
    MARK,
    check_replaceable,
    is_being_deleted,
    is_empty,
    mark,
    marked_as,
    new_folder,
    partial_path,
    remove,
    remove_leftovers,
    replace,
    sync_tree,
    write_atomic,
)
from cllm.lock import locked


class Crash(BaseException):
    """Stands for a process that is killed: nothing cleans up after it."""


def content(folder: Path) -> dict[str, str | None]:
    """Every path under a folder but marks and locks: a file's text, None for a folder."""
    found = {str(p.relative_to(folder)): p.read_text() if p.is_file() else None for p in folder.rglob("*")}
    return {name: text for name, text in found.items() if Path(name).name not in (MARK, DELETING)}


def made(folder: Path, kind: str = "run", text: str = "old") -> Path:
    mark(folder, kind)
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text(text)
    return folder


# ---- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["naïve\n", b"\x00\xff"])
def test_a_file_is_written_with_its_folder(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "a" / "b" / "file"
    write_atomic(path, "before")
    write_atomic(path, text)
    assert path.read_bytes() == (text.encode() if isinstance(text, str) else text)
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_file_that_cannot_be_written_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file"
    write_atomic(path, "before")

    def fail(*_: object) -> None:
        assert path.read_text() == "before", "until the new content is on the disk"
        raise OSError(28, "No space left on device")

    owner, name = (os, "fsync") if call == "fsync" else (Path, "replace")
    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(path, "after")
    assert content(tmp_path) == {"file": "before"}


def test_content_and_names_are_synced_before_and_after_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, rename = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        order.append("folder" if _is_folder(descriptor) else "file")
        fsync(descriptor)

    def renamed(path: Path, other: Path) -> Path:
        order.append("rename")
        return rename(path, other)

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomic(tmp_path / "file", "x")
    assert order == ["file", "rename", "folder"]
    order.clear()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link").symlink_to("/etc/passwd")
    (tmp_path / "sub" / "dangling").symlink_to("nowhere")
    sync_tree(tmp_path)
    assert sorted(order) == ["file", "folder", "folder"], "links are not followed"


def _is_folder(descriptor: int) -> bool:
    return Path(f"/proc/self/fd/{descriptor}").resolve().is_dir()


# ---- marks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", '"run"', '{"kind": 1}', "{}", pytest.param("\udcff", id="not UTF-8")])
def test_a_file_of_that_name_with_other_content_is_no_mark(tmp_path: Path, text: str) -> None:
    (tmp_path / MARK).write_bytes(text.encode(errors="surrogateescape"))
    assert marked_as(tmp_path) is None
    with pytest.raises(UserError, match="cllm deletes only what it made"):
        remove(tmp_path, "run")


def thesis(path: Path) -> None:
    path.mkdir()
    (path / "thesis").touch()


def link_to_empty_folder(path: Path) -> None:
    path.with_name("e").mkdir()
    path.symlink_to("e")


OTHERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder": (thesis, f"is left alone: it has no file {re.escape(MARK)}, and cllm deletes only what it made"),
    "of another kind": (lambda path: made(path, "data"), "it was made as 'data', not as 'run'"),
    "a file": (Path.touch, "is a file, not a folder"),
    "a link to a run": (lambda path: path.symlink_to(made(path.with_name("far"))), "is a symbolic link"),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is a symbolic link"),
    "a link to an empty folder": (link_to_empty_folder, "is a symbolic link"),
}


def deletes_with_new_folder(path: Path) -> None:
    with new_folder(path, "run"):
        pytest.fail("it was to refuse before anything is written")


DELETES: dict[str, Callable[[Path], None]] = {
    "check": lambda path: check_replaceable(path, "run"),
    "remove": lambda path: remove(path, "run"),
    "replace": lambda path: replace(path.with_name("partial"), path, "run"),
    "new_folder": deletes_with_new_folder,
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("how", DELETES)
def test_what_cllm_did_not_make_is_refused_and_left_alone(tmp_path: Path, other: str, how: str) -> None:
    make, message = OTHERS[other]
    path = tmp_path / "out"
    make(path)
    made(tmp_path / "partial")
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"{path}: .*{message}.*; choose another name"):
        DELETES[how](path)
    assert content(tmp_path) == before


def test_what_is_missing_or_empty_or_marked_may_be_deleted(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    thesis(outside)
    for make in (lambda path: None, Path.mkdir, made):
        path = tmp_path / "out"
        make(path)
        if path.exists():
            assert is_empty(path) == (make is Path.mkdir)
        if make is made:
            (path / "link").symlink_to(outside)
        check_replaceable(path, "run")
        remove(path, "run")
        assert not path.exists()
    assert (outside / "thesis").exists(), "a link inside is deleted, and not what it leads to"


@pytest.mark.parametrize("crash", range(4))
def test_an_interrupted_deletion_can_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, crash: int) -> None:
    folder = made(tmp_path / "out")
    for name in ("a", "b"):
        (folder / name).touch()
    calls = iter(range(9))
    real = {"rmtree": shutil.rmtree, "unlink": Path.unlink}

    def counted(name: str) -> Callable[..., None]:
        def call(*arguments: object, **options: object) -> None:
            if next(calls) == crash:
                raise Crash
            real[name](*arguments, **options)

        return call

    monkeypatch.setattr(files.shutil, "rmtree", counted("rmtree"))
    monkeypatch.setattr(Path, "unlink", counted("unlink"))
    with pytest.raises(Crash):
        remove(folder, "run")
    monkeypatch.undo()
    assert is_being_deleted(folder)
    assert marked_as(folder) == "run", "until nothing else is left"
    remove(folder, "run")
    assert not folder.exists()


# ---- replacing ------------------------------------------------------------------------------------------------------


def killed_at(point: str) -> None:
    """Ends this process, without cleaning up, before it does what `point` names."""

    def die(*_: object) -> NoReturn:
        os._exit(9)

    patch = pytest.MonkeyPatch()
    rename, names = Path.rename, iter(["old to its temporary name", "new to its name"])
    if point == "nothing deleted":
        patch.setattr(files, "remove", die)
    elif point == "half deleted":
        patch.setattr(files.shutil, "rmtree", die)
    else:
        patch.setattr(Path, "rename", lambda self, to: die() if next(names) == point else rename(self, to))


@pytest.mark.parametrize(
    ("point", "left"),
    {
        "old to its temporary name": "old",
        "new to its name": "old",
        "nothing deleted": "new",
        "half deleted": "new",
    }.items(),
)
def test_a_kill_while_a_folder_is_replaced_leaves_the_old_or_the_new_one(tmp_path: Path, point: str, left: str) -> None:
    folder = made(tmp_path / "out")
    if (pid := os.fork()) == 0:
        with new_folder(folder, "run") as partial:
            made(partial, text="new")
            killed_at(point)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    with locked(folder):
        remove_leftovers(folder, "run")
    assert content(tmp_path) == {"out": None, "out/sub": None, "out/sub/file": left}


def test_a_new_folder_replaces_an_old_one_when_it_is_complete(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "out"
    for text in ("first", "second"):
        with new_folder(folder, "export") as partial:
            assert marked_as(partial) == "export"
            assert not folder.exists() or (folder / "file").read_text() == "first"
            (partial / "file").write_text(text)
        assert content(folder.parent) == {"out": None, "out/file": text}
    with pytest.raises(UserError, match=f"{folder}: exists; give another name, or --force"):  # noqa: SIM117
        with new_folder(folder, "export", force=False):
            pytest.fail("it was to refuse before anything is written")


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = made(tmp_path / "out")
    before = content(tmp_path)
    with pytest.raises(ZeroDivisionError), new_folder(folder, "run") as partial:
        made(partial / "more", text=f"{1 / 0}")
    assert content(tmp_path) == before
    rename = Path.rename

    def fail(self: Path, to: Path) -> Path:
        if "partial" in self.name:
            raise OSError(5, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"), new_folder(folder, "run"):
        pass
    assert content(tmp_path) == before, "the old one has its name back"
    monkeypatch.setattr(files, "write_atomic", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"), new_folder(folder, "run"):
        pass
    assert content(tmp_path) == before, "of a folder that got no mark nothing is left either"


def test_leftovers_of_any_process_go_and_lookalikes_stay(tmp_path: Path) -> None:
    """Whoever has the lock is the only process that writes, so every leftover is a dead one's."""
    mine = partial_path(tmp_path / "out").name
    for name in (mine, ".out.partial-node-7.lab-4711", ".out.old-host-1"):
        made(tmp_path / name)
    (tmp_path / ".out.partial-host-2").mkdir()  # killed before it had a mark
    others = [
        ".out.partial-host",
        ".out.partial-host-2x",
        ".outer.partial-host-2",
        ".out2.partial-host-2",
        "out.partial",
    ]
    for name in others:
        made(tmp_path / name)
    made(tmp_path / ".out.partial-host-3", "data")
    thesis(tmp_path / ".out.partial-host-4")
    (tmp_path / "out").mkdir()
    remove_leftovers(tmp_path / "out", "run")
    kept = {*others, ".out.partial-host-3", ".out.partial-host-4", "out"}
    assert {path.name for path in tmp_path.iterdir()} == kept
    remove_leftovers(tmp_path / "missing" / "out", "run")


def test_a_folder_whose_marking_was_interrupted_counts_as_empty(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / f".{MARK}.partial-host-12").write_text("{", encoding="utf-8")
    assert is_empty(folder)
    check_replaceable(folder, "export")
    mark(folder, "export")
    assert [path.name for path in folder.iterdir()] == [MARK]
