"""How long each device trained or evaluated while a study ran, one file a session.

A device is busy while a run on it takes training steps or validates, or while an evaluation computes. The start of
Python, imports, the reading of data, compilation, and the end of a process are not busy. Times are those of the runs
themselves: a training is busy from the start of its first step to its last row of metrics, an evaluation in the
`seconds` of its records. Where two runs share a device, common seconds count once.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.errors import UserError
from cllm.files import json_files, write_atomic
from cllm.rows import rows_backwards
from cllm.runs import RunFolder
from cllm.trust import read_object

QUEUED = 4
"""Number of waiting trainings from which the share of a busy device is also counted separately."""
Interval = tuple[float, float]
"""Begin and end, seconds since the epoch."""


class Intervals:
    """A set of moments, as intervals that do not touch."""

    def __init__(self, parts: Iterable[Interval] = ()):
        self.parts: list[Interval] = []
        for part in parts:
            self.add(*part)

    def add(self, begin: float, end: float) -> None:
        """Add the moments from `begin` to `end`; nothing if `end` is not later."""
        if end <= begin:
            return
        apart = [part for part in self.parts if part[1] < begin or part[0] > end]
        joined = [part for part in self.parts if part not in apart]
        begin, end = min([begin, *(b for b, _ in joined)]), max([end, *(e for _, e in joined)])
        self.parts = sorted([*apart, (begin, end)])

    @property
    def seconds(self) -> float:
        return sum(end - begin for begin, end in self.parts)

    def common(self, other: Intervals) -> Intervals:
        """The moments that both have."""
        pairs = ((max(a, c), min(b, d)) for a, b in self.parts for c, d in other.parts)
        return Intervals(pair for pair in pairs if pair[0] < pair[1])


@dataclass
class Stepping:
    """The steps of one training process, by the rows of its run."""

    run: RunFolder
    started: float
    """When the process started."""
    begin: float | None = None
    """When its first step began; None until two rows show it."""

    def look(self) -> Interval | None:
        """From the start of the first step to the newest row; None until the process has logged two rows.

        The first row's time includes compilation. So its steps count with the speed of the second one.
        """
        newest = next(rows_backwards(self.run.metrics_file), None)
        if newest is None or newest[1].get("time", 0.0) < self.started:
            return None
        if self.begin is None:
            self.begin = self._first_step()
        return None if self.begin is None else (self.begin, newest[1]["time"])

    def _first_step(self) -> float | None:
        rows, before = [], 0
        for _, row in rows_backwards(self.run.metrics_file):
            if row.get("time", 0.0) < self.started:  # of the process before this one
                before = row["tokens"]
                break
            if row.get("throughput/tokens_per_s"):
                rows.append(row)
        if len(rows) < 2:
            return None
        second, first = rows[-2:]
        return max(self.started, first["time"] - (first["tokens"] - before) / second["throughput/tokens_per_s"])


class Session:
    """One run of `cllm study`: the time of its devices, written to a file while it goes on.

    Args:
        folder: of sessions.
        devices: when each device was busy, by its name; added to meanwhile.
        code: version of the code that trains.
    """

    EVERY = 10.0
    """Seconds between two writes of the file."""

    def __init__(self, folder: Path, devices: Mapping[str, Intervals], code: str):
        self.begin = time.time()
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self.begin))
        self.file = folder / f"{stamp}-{socket.gethostname()}-{os.getpid()}.json"
        self.devices = devices
        self.queued = Intervals()
        self._code, self._written, self._turn = code, self.begin, self.begin

    def turn(self, waiting: int) -> None:
        """Note that until now `waiting` trainings waited; write the file if it is time."""
        before, self._turn = self._turn, time.time()
        if waiting >= QUEUED:
            self.queued.add(before, self._turn)
        if self._turn - self._written > self.EVERY:
            self.write()

    def data(self) -> dict[str, Any]:
        """The session as plain data."""
        now = self._written = time.time()
        return {
            "began": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.begin)),
            "code": self._code,
            "seconds": round(now - self.begin, 2),
            "queued_seconds": round(self.queued.seconds, 2),
            "devices": [self._device(name, now) for name in self.devices],
        }

    def _device(self, name: str, now: float) -> dict[str, Any]:
        """Seconds of one device, those outside of the session left out."""
        busy = self.devices[name].common(Intervals([(self.begin, now)]))
        queued = busy.common(self.queued)
        return {"device": name, "busy": round(busy.seconds, 2), "busy_queued": round(queued.seconds, 2)}

    def write(self) -> None:
        """Write the file."""
        write_atomic(self.file, json.dumps(self.data(), indent=1) + "\n")


# ---- all sessions of a study


@dataclass(frozen=True, slots=True)
class BusyShare:
    """Seconds of devices over sessions."""

    device: str
    sessions: int
    seconds: float
    """In which a session ran."""
    busy: float
    queued: float
    """In which at least `QUEUED` trainings waited."""
    busy_queued: float

    @property
    def text(self) -> str:
        """`93 % of 1,240 s, 97 % of the 900 s with 4 or more runs waiting`."""
        words = f"{_percent(self.busy, self.seconds)} of {self.seconds:,.0f} s"
        if not self.queued:
            return words
        part = (
            f"{_percent(self.busy_queued, self.queued)} of the {self.queued:,.0f} s with {QUEUED} or more runs waiting"
        )
        return f"{words}, {part}"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f} %" if whole > 0 else "0 %"


def read_sessions(folder: Path, code: str | None = None) -> list[dict[str, Any]]:
    """The sessions in a folder by the time of their start, of one version of the code or all.

    Files that are no sessions are left out.
    """
    found = []
    for file in json_files(folder):
        try:
            data = read_object(file)
        except UserError:
            continue
        if _is_session(data) and code in (None, data["code"]):
            found.append(data)
    return found


def _is_session(data: dict[str, Any]) -> bool:
    numbers = [data.get("seconds"), data.get("queued_seconds")]
    for device in data["devices"] if isinstance(data.get("devices"), list) else [{}]:
        numbers += [device.get("busy"), device.get("busy_queued")] if isinstance(device, dict) else [None]
        numbers += [0 if isinstance(device, dict) and isinstance(device.get("device"), str) else None]
    return "code" in data and all(isinstance(number, int | float) for number in numbers)


def busy_shares(sessions: Sequence[dict[str, Any]]) -> list[BusyShare]:
    """The time of each device over sessions, then of all together; empty without sessions."""
    by_device: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    for session in sessions:
        for device in session["devices"]:
            by_device.setdefault(device["device"], []).append((session, device))
    shares = [_sum(name, parts) for name, parts in sorted(by_device.items())]
    every = [part for parts in by_device.values() for part in parts]
    return [*shares, _sum("all devices", every)] if shares else []


def _sum(name: str, parts: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> BusyShare:
    return BusyShare(
        device=name,
        sessions=len({id(session) for session, _ in parts}),
        seconds=sum(session["seconds"] for session, _ in parts),
        busy=sum(device["busy"] for _, device in parts),
        queued=sum(session["queued_seconds"] for session, _ in parts),
        busy_queued=sum(device["busy_queued"] for _, device in parts),
    )


def busy_lines(shares: Sequence[BusyShare]) -> list[str]:
    """A line for each device and one for all."""
    return [f"{share.device}: busy {share.text}" for share in (shares if len(shares) > 2 else shares[:1])]
