"""Commands that start others: signals reach the child once, and none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cllm import processes
from cllm.processes import has_ended, reap, run, send, start
from cllm.signals import Interrupted

CHILD = """
import os, signal, sys, time
got = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda n, _: got.append(signal.Signals(n).name))
print(os.getpid(), os.getsid(0), flush=True)
while not got:
    time.sleep(0.01)
time.sleep(0.2)  # saves, and would hear of a second signal
print(*got, flush=True)
sys.exit(3)
"""


def soon(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_passed_on_once_and_the_child_may_save(tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    before = signal.getsignal(number)

    def stop() -> None:
        soon(lambda: out.read_text().endswith("\n"))
        os.kill(os.getpid(), number)

    with out.open("w") as file:
        thread = threading.Thread(target=stop)
        thread.start()
        with pytest.raises(Interrupted, match=signal.Signals(number).name):
            run([sys.executable, "-c", CHILD], stdout=file)
        thread.join()
    first, second = out.read_text().splitlines()
    assert second == signal.Signals(number).name
    assert len(set(first.split())) == 1, "a session of its own: the terminal's Ctrl-C does not reach it as well"
    assert signal.getsignal(number) == before


def test_a_signal_between_start_and_wait_is_passed_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, started = tmp_path / "out", processes.start

    def start_slowly(*arguments: object, **options: object) -> subprocess.Popen:
        process = started(*arguments, **options)
        soon(lambda: out.read_text().endswith("\n"))
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(processes, "start", start_slowly)
    with out.open("w") as file, pytest.raises(Interrupted):
        run([sys.executable, "-c", CHILD], stdout=file)
    assert out.read_text().endswith("SIGTERM\n")


def test_an_ignored_hangup_stays_ignored(tmp_path: Path) -> None:
    def hang_up() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        (tmp_path / "sent").touch()

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        threading.Timer(0.1, hang_up).start()
        wait = f"while [ ! -e '{tmp_path / 'sent'}' ]; do sleep 0.05; done; exit 5"
        assert run(["sh", "-c", wait]) == 5
    finally:
        signal.signal(signal.SIGHUP, before)


def test_out_of_time_a_child_is_asked_to_save_and_then_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, monotonic = tmp_path / "out", time.monotonic
    # Time is up as soon as the child has said that it is ready.
    monkeypatch.setattr(processes.time, "monotonic", lambda: monotonic() + 7200 * out.read_text().endswith("\n"))
    with out.open("w") as file:
        assert run([sys.executable, "-c", CHILD], seconds=3600, stdout=file) == 3
    assert out.read_text().endswith("SIGTERM\n")
    deaf = ["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"]
    with out.open("w") as file:
        assert run(deaf, seconds=3600, grace=0.1, stdout=file) == -signal.SIGKILL


def test_what_a_child_leaves_running_ends_with_it(tmp_path: Path) -> None:
    assert run(["sh", "-c", f"sleep 600 & echo $! > {tmp_path / 'pid'}; exit 1"]) == 1
    pid = int((tmp_path / "pid").read_text())
    soon(lambda: not is_alive(pid))


def test_a_child_that_was_reaped_gets_no_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its id may be another process's by then."""
    process = start(["true"])
    soon(lambda: has_ended(process))
    assert process.returncode is None, "looking does not reap it"
    assert reap(process) == 0
    monkeypatch.setattr(processes.os, "kill", lambda *_: pytest.fail("a signal"))
    monkeypatch.setattr(processes.os, "killpg", lambda *_: pytest.fail("a signal"))
    send(process, signal.SIGTERM)
    assert reap(process) == 0
    assert has_ended(process)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's death signal")
def test_a_child_is_asked_to_save_when_its_parent_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    if (pid := os.fork()) == 0:
        with out.open("w") as file:
            run([sys.executable, "-c", CHILD], stdout=file)
        os._exit(0)
    soon(lambda: out.exists() and out.read_text().endswith("\n"))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    soon(lambda: out.read_text().endswith("SIGTERM\n"))


CHILDREN = """
import multiprocessing, os, signal, sys, threading, time
from cllm import processes

def child(name, answers):
    processes.END_GRACE = 0.1
    if answers:
        processes.end_with_parent()
    else:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(name, "w") as file:
        file.write(f"{os.getpid()}\\n")
    time.sleep(600)

if __name__ == "__main__":
    method, folder = sys.argv[1:]
    processes.END_GRACE = 0.1
    processes.end_with_parent()
    context = multiprocessing.get_context(method)
    for n in range(2):
        process = context.Process(target=child, args=(f"{folder}/{n}", method == "spawn"))
        thread = threading.Thread(target=process.start)  # a thread that ends long before the parent
        thread.start()
        thread.join()
    open(f"{folder}/started", "w").close()
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_processes_end_with_their_killed_parent_and_not_before(tmp_path: Path, method: str) -> None:
    """Forked ones do so because their parent would, and are killed if they ignore SIGTERM."""
    program = tmp_path / "program.py"
    program.write_text(CHILDREN)
    path = os.pathsep.join(filter(None, (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": path}
    parent = subprocess.Popen([sys.executable, str(program), method, str(tmp_path)], env=environment)
    try:
        files = [tmp_path / "0", tmp_path / "1"]
        soon(lambda: all(file.exists() and file.read_text().endswith("\n") for file in files))
        pids = [int(file.read_text()) for file in files]
        soon((tmp_path / "started").exists)
        assert all(map(is_alive, pids)), "the threads that started them have ended"
        parent.kill()
        parent.wait()
        for pid in pids:
            soon(lambda pid=pid: not is_alive(pid))  # type: ignore[misc]
    finally:
        parent.kill()
        parent.wait()


def test_a_process_without_such_a_parent_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", "from cllm.processes import end_with_parent as f; f(); print('on')"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout == "on\n"
