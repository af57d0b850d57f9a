"""One process owns a folder, whatever becomes of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cllm import lock
from cllm.errors import UserError
from cllm.lock import lock_file, locked

OWN = """
import os, sys, time
from pathlib import Path
from cllm.lock import locked
with locked(Path(sys.argv[1])):
    read, write = os.pipe()
    if "fork" in sys.argv:
        if os.fork() == 0:
            os.write(write, b".")  # now this process has closed the lock, as forked children do
            os.close(write)
            os.closerange(0, 3)  # like the loaders' processes of a run
            time.sleep(600)
        os.read(read, 1)
    print(os.getpid(), flush=True)
    time.sleep(600)
"""


@contextmanager
def owner(folder: Path, *words: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has `folder` locked, in a group of its own."""
    command = [sys.executable, "-c", OWN, str(folder), *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) == process.pid
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def foreign(folder: Path, **changes: object) -> Path:
    """The lock of a process on another machine, with which this one shares the file system."""
    file = lock_file(folder)
    record = {"host": "node7", "boot": "another", "pid": 4711, "since": "2025-01-01 12:00:00 +0000", **changes}
    file.write_text(json.dumps(record), encoding="utf-8")
    return file


def test_a_second_owner_is_refused_and_gets_to_know_the_first(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "a"
    with locked(folder):
        name = re.escape(f"{folder}: is in use by process {os.getpid()} on {socket.gethostname()}, since 20")
        with pytest.raises(UserError, match=name), locked(folder):
            pytest.fail("two owners")
        with locked(folder.with_name("b")):
            assert lock_file(folder).exists(), "another folder is another matter"
    with locked(folder):
        pass
    assert list(tmp_path.iterdir()) == [], "nothing is left where nothing was written"


def test_a_lock_is_given_back_after_an_error_and_survives_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "a"

    def block() -> None:
        with locked(folder):
            folder.mkdir()
            folder.rmdir()
            folder.mkdir()
            with pytest.raises(UserError, match="in use"), locked(folder):
                pass
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        block()
    with locked(folder):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_link_to_a_folder_has_its_lock(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with locked(tmp_path / "link"), pytest.raises(UserError, match="in use"), locked(tmp_path / "disk"):
        pass


@pytest.mark.parametrize("words", [(), ("fork",)])
def test_a_killed_process_owns_nothing_even_while_its_children_live(tmp_path: Path, words: tuple[str, ...]) -> None:
    folder = tmp_path / "a"
    with owner(folder, *words) as process:
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on "), locked(folder):
            pass
        process.kill()
        process.wait()
        assert lock_file(folder).exists()
        with locked(folder):
            pass


@pytest.mark.parametrize("alive", [True, False])
@pytest.mark.parametrize("decided", [True, False])
def test_an_owner_on_another_machine_is_known_by_its_signs_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alive: bool, decided: bool
) -> None:
    """`decided` False: the file system has no locks at all, so that this machine's processes too are known so."""
    folder = tmp_path / "a"
    file = foreign(folder) if decided else foreign(folder, **lock._here())
    monkeypatch.setattr(lock, "PATIENCE", 600 if alive else 0.3)
    if not decided:

        def no_locks(*_: object) -> None:
            raise OSError(38, "Function not implemented")

        monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    stop = threading.Event()

    def touch() -> None:
        n = 0
        while not stop.wait(0.01):
            os.utime(file, ns=(n := n + 1, n))

    thread = threading.Thread(target=touch)
    if alive:
        thread.start()
    try:
        if alive:
            with (
                pytest.raises(UserError, match=r"in use by process 4711 on .*, since 2025-01-01"),
                locked(folder),
            ):
                pass
        else:
            with locked(folder):
                assert json.loads(file.read_text())["pid"] == os.getpid()
    finally:
        stop.set()
        if alive:
            thread.join()


def test_an_owner_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.01)
    touched = threading.Event()
    monkeypatch.setattr(lock.os, "utime", lambda *_: touched.set())
    with locked(tmp_path / "a"):
        assert touched.wait(300)


@pytest.mark.parametrize("content", ["", "{", "[]", "null"])
def test_a_record_that_was_never_finished_belongs_to_nobody(tmp_path: Path, content: str) -> None:
    lock_file(tmp_path / "a").write_text(content)
    with locked(tmp_path / "a"):
        pass


def test_a_lock_deleted_while_it_was_opened_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last owner deletes the file just when the next has opened it: a third would find another file free."""
    file, real = lock_file(tmp_path / "a"), os.open
    file.touch()

    def open_late(path: Path, *rest: int) -> int:
        descriptor = real(path, *rest)
        monkeypatch.setattr(lock.os, "open", real)
        file.unlink()
        return descriptor

    monkeypatch.setattr(lock.os, "open", open_late)
    with locked(tmp_path / "a"), pytest.raises(UserError, match="in use"), locked(tmp_path / "a"):
        pass


def test_where_no_lock_can_be_written_one_line_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "a", tmp_path / ("n" * 300), Path("/proc/a")):
        with pytest.raises(UserError, match=f"{folder}: cannot be locked: "), locked(folder):
            pass
    lock_file(tmp_path / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="cannot be locked"), locked(tmp_path / "a"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_a_lock_that_a_killed_process_left_is_discarded_and_a_living_one_kept(tmp_path: Path) -> None:
    folder = tmp_path / "a"
    with owner(folder) as process:
        lock.discard_dead(folder)
        assert lock_file(folder).exists(), "of a living process"
        process.kill()
        process.wait()
        lock.discard_dead(folder)
        assert not lock_file(folder).exists()
    lock.discard_dead(folder)
    kept = foreign(folder)
    lock.discard_dead(folder)
    assert kept.exists(), "of another machine"
