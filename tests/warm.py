"""A Python whose processes start with the training stack imported, for tests of commands that start commands.

Importing the stack takes seconds, and what most of these commands then do takes a fraction of one. Here a server
imports it once. `executable` is a program with Python's command line (`FILE ...`, `-m MODULE ...`, `-c CODE ...`) whose
work is done in a fork of the server: with the output, working directory, environment and exit status of a usual
process. SIGINT, SIGTERM, SIGHUP and SIGUSR1 are passed on. If the program is killed, so is its fork.

Processes that a fork starts with `sys.executable` are forks, too. The fork's command line in /proc is that of the
server. Tests that look for processes there need the usual Python.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PRELOADED = ("cllm.train.run", "cllm.hub.export", "cllm.evaluate.suites.jobs", "cllm.uptrain.student", "yaml")
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextmanager
def warm_executable(modules: Sequence[str] = PRELOADED, **variables: str) -> Iterator[Path]:
    """The executable of a server that runs meanwhile. It has imported `modules`, with these environment variables."""
    with tempfile.TemporaryDirectory(prefix="cllm-warm-") as folder:  # a socket's path is short
        file = write_executable(Path(folder))
        command = [sys.executable, __file__, "serve", folder, *modules]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            yield file
            server.communicate()


def write_executable(folder: Path) -> Path:
    """The program that runs its arguments in a fork of the server whose socket is in `folder`."""
    file = folder / "python"
    file.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "{__file__}" client "{folder}/socket" "$@"\n')
    file.chmod(0o755)
    return file


def client(address: str, words: list[str]) -> int:
    """Run a command in a fork of the server, and return its exit status, -N if signal N killed it."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(address)
        for number in PASSED_ON:
            signal.signal(number, lambda number, _: server.sendall(bytes([number])))
        request = json.dumps({"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
        socket.send_fds(server, [struct.pack("i", len(request))], [0, 1, 2])
        server.sendall(request)
        answer = server.recv(4)
        return struct.unpack("i", answer)[0] if answer else 70


def serve(folder: Path, modules: Sequence[str]) -> None:
    """Import modules and fork for each client, until stdin is closed."""
    import gc
    import importlib

    for name in modules:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    os.fsync = os.fstat  # type: ignore[assignment]  # as in conftest.py
    gc.collect()
    gc.freeze()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "socket"))
    listener.listen(64)
    sys.executable = str(folder / "python")
    print("ready", flush=True)
    running: dict[socket.socket, int] = {}
    left: set[int] = set()  # whose client was killed
    while True:
        ready, _, _ = select.select([sys.stdin, listener, *running], [], [], 0.02 if running or left else None)
        if sys.stdin in ready:
            return
        if listener in ready:
            connection, _ = listener.accept()
            running[connection] = _fork(connection, listener)
            continue
        for connection in [one for one in running if one in ready]:
            numbers = connection.recv(16)
            for number in numbers or [signal.SIGKILL]:
                os.kill(running[connection], number)
            if not numbers:
                left.add(running.pop(connection))
                connection.close()
        left = {child for child in left if not os.waitpid(child, os.WNOHANG)[0]}
        for connection, child in list(running.items()):
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                del running[connection]
                with connection:
                    connection.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))


def _fork(connection: socket.socket, listener: socket.socket) -> int:
    """The id of a new process that does what a client asks for."""
    head, descriptors, _, _ = socket.recv_fds(connection, 4, 3)
    request, length = b"", struct.unpack("i", head)[0]
    while len(request) < length:
        request += connection.recv(length - len(request))
    if child := os.fork():
        for descriptor in descriptors:
            os.close(descriptor)
        return child
    status = 70
    try:
        listener.close()
        connection.close()
        os.setsid()
        for n, descriptor in enumerate(descriptors):
            os.dup2(descriptor, n)
            os.close(descriptor)
        status = _run(**json.loads(request))
    finally:
        os._exit(status)


def _run(words: list[str], folder: str, environment: dict[str, str]) -> int:
    """Be a Python with these arguments; returns its exit status."""
    import random
    import runpy
    import traceback

    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if "LOCAL_RANK" in environment:  # Lightning reads it when it is imported
        from lightning.fabric.utilities.rank_zero import rank_zero_only

        rank_zero_only.rank = int(environment["LOCAL_RANK"])  # type: ignore[attr-defined]
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    status = 0
    try:
        if words[0] == "-m":
            sys.path.insert(0, folder)
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *words[2:]]
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except KeyboardInterrupt:
        traceback.print_exc()
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    if sys.argv[1] == "client":
        result = client(sys.argv[2], sys.argv[3:])
        if result < 0:
            if result != -signal.SIGKILL:
                signal.signal(-result, signal.SIG_DFL)
            os.kill(os.getpid(), -result)
        os._exit(result)
    serve(Path(sys.argv[2]), sys.argv[3:])
