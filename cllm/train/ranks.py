"""The watch over the ranks of a run: if one ends early, all others end within seconds and name it.

Without it, a rank whose peer was killed waits in a collective operation: under NCCL for half an hour, and Lightning's
observer of processes kills the others without a message. Under gloo it gets a socket error with a traceback.

Every rank keeps one TCP connection to rank 0. The kernel closes it when its process ends, for whatever reason, and
keep-alive probes detect a lost machine within a minute. So nothing is polled, a slow rank is not taken for a dead one,
and training is not slowed down. The protocol is lines of text:

    rank k to rank 0: `hello TOKEN K HOST`, then `failed` (an exception ends this rank) or `bye` (the run is over)
    rank 0 to all:    `lost NAME`, the first rank that failed or whose connection ended without a `bye`; or `bye`

A rank that is alive but makes no progress is not detected here; torch's timeout of collectives (30 minutes) ends it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from cllm.errors import EXIT_MISTAKE, UserError
from cllm.train.lightning_internals import stop_process_observer

log = logging.getLogger(__name__)

GRACE = 3.0
"""Seconds in which the main thread may end with its own error after a rank was lost."""
_CONNECT = 60.0
"""Seconds within which all ranks must have connected."""
_KEEP_ALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 4}
"""A machine that does not answer is given up after 20 + 4 x 10 seconds."""

_sockets: weakref.WeakSet[socket.socket] = weakref.WeakSet()
"""Connections of this process. A forked child, such as a data loader, closes them, so that they end with their rank."""


def _close_in_child() -> None:
    for connection in list(_sockets):
        connection.close()


os.register_at_fork(after_in_child=_close_in_child)


class RankWatch(Callback):
    """Ends this process if another rank of the run has ended early. With one process it does nothing.

    Args:
        remains: returns the end of the error message, such as the newest checkpoint.
    """

    def __init__(self, remains: Callable[[], str]):
        self.remains = remains
        self._lost: str | None = None
        self._news = threading.Event()
        """Set when a rank was lost."""
        self._over = threading.Event()
        """Set when this process has ended training, with or without an error."""
        self._peers: dict[socket.socket, str] = {}
        """Open connections, and the name of the rank at the other end."""

    # ---- hooks ------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1 or self._peers:
            return
        try:
            self._connect(trainer)
        except OSError as error:
            self._end("bye")
            self._peers.clear()
            log.warning("rank %d is not watched, nor does it watch others: %s", trainer.global_rank, error)
            return
        stop_process_observer()
        threading.Thread(target=self._watch, name="rank watch", daemon=True).start()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if not is_lost_connection(exception):  # an effect of a lost rank, not its cause
            self._end("failed" if trainer.global_rank else f"lost rank 0 ({socket.gethostname()})")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end("bye")

    @contextlib.contextmanager
    def explained(self) -> Iterator[None]:
        """Replace the error of a collective operation by the name of the lost rank that caused it.

        Raises:
            UserError: if a rank was lost.
        """
        try:
            yield
        except RuntimeError as error:
            if not self._peers or not is_lost_connection(error) or not self._news.wait(2 * GRACE):
                raise
            raise UserError(self._line()) from error
        finally:
            self._over.set()

    # ---- connections ------------------------------------------------------------------------------------------------

    def _connect(self, trainer: Trainer) -> None:
        """Connect rank 0 with every other one. Collective."""
        if trainer.global_rank == 0:
            server = socket.create_server(("", 0), family=_family(), backlog=trainer.world_size)
            token = secrets.token_hex(16)
            trainer.strategy.broadcast((server.getsockname()[1], token))
            self._accept(server, token, trainer.world_size - 1)
        else:
            address: Any = trainer.strategy.broadcast(None)
            port, token = address
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=_CONNECT)
            self._add(connection, "rank 0")
            self._send(connection, f"hello {token} {trainer.global_rank} {socket.gethostname()}")

    def _accept(self, server: socket.socket, token: str, ranks: int) -> None:
        """Wait for all other ranks; close connections of any other process."""
        deadline = time.monotonic() + _CONNECT
        with server:
            while len(self._peers) < ranks:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                connection, _ = server.accept()
                connection.settimeout(max(deadline - time.monotonic(), 0.001))
                words = _receive(connection).split()
                if words[:2] == ["hello", token]:
                    self._add(connection, f"rank {words[2]} ({words[3]})")
                else:
                    connection.close()

    def _add(self, connection: socket.socket, name: str) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, seconds in _KEEP_ALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
        _sockets.add(connection)
        self._peers[connection] = name

    @staticmethod
    def _send(connection: socket.socket, line: str) -> None:
        with contextlib.suppress(OSError):  # the reader detects a connection that has ended
            connection.sendall(f"{line}\n".encode())

    def _end(self, line: str) -> None:
        """Stop watching, and send all connected ranks the reason."""
        self._over.set()
        for connection in list(self._peers):
            self._send(connection, line)

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        with selectors.DefaultSelector() as selector:
            for connection in self._peers:
                selector.register(connection, selectors.EVENT_READ)
            while selector.get_map():
                for key, _ in selector.select():
                    assert isinstance(key.fileobj, socket.socket)
                    line = _receive(key.fileobj)
                    selector.unregister(key.fileobj)  # a rank sends one line
                    if line != "bye":
                        self._lose(line.removeprefix("lost ") if line.startswith("lost ") else self._peers[key.fileobj])
                        return

    def _lose(self, name: str) -> None:
        """Forward the loss, and end this process unless its main thread ends by itself."""
        self._lost = name
        self._news.set()
        for connection in self._peers:
            self._send(connection, f"lost {name}")
        if self._over.wait(GRACE):
            return
        print(f"error: {self._line()}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(EXIT_MISTAKE)

    def _line(self) -> str:
        return f"{self._lost} ended before the run did; its own output may say why; {self.remains()}"


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective operation failed because another process did not take part in it."""
    return isinstance(error, RuntimeError) and (isinstance(error, torch.distributed.DistError) or "gloo" in str(error))


def _receive(connection: socket.socket) -> str:
    """The next line that arrives; empty if the connection has ended."""
    text = b""
    try:
        while not text.endswith(b"\n") and len(text) < 1000:
            if not (more := connection.recv(1)):
                return ""
            text += more
    except OSError:
        return ""
    return text.decode(errors="replace").strip()


def _family() -> socket.AddressFamily:
    """The family of the first rank's address."""
    return socket.getaddrinfo(os.environ["MASTER_ADDR"], None, type=socket.SOCK_STREAM)[0][0]
