"""Two processes store, find and evict prefixes in one folder at the same time."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cllm.prefix.disk import DiskTier
from cllm.prefix.file import Header, write_prefix
from cllm.prefix.pack import Packed

NAMES = [hashlib.sha256(bytes([n])).hexdigest() for n in range(5)]
SIZE = 1 << 14
"""Numbers in a stored tensor."""
BUDGET = 5 * SIZE * 4 // 2
"""Two files, and half of a third."""
ROUNDS = 50


def _child(work: Callable[[], None]) -> int:
    """The id of a forked process that does `work` and exits with 1 if it raises."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    os._exit(status)


def _prefix(n: int, value: int) -> tuple[Packed, torch.Tensor, Header]:
    """The prefix `n`. Its tensor is full of `value`, since the same prefix may differ in rounding."""
    packed = Packed({"seen": 1}, {"a": torch.full((SIZE,), float(value))})
    return packed, torch.tensor([n]), Header("model", "design", "salt", {1: NAMES[n]}, {}, {})


def _work(folder: Path, worker: int, start: int) -> None:
    logged: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cllm").addHandler(handler)
    os.fsync = lambda fd: None  # slow, and no power fails here
    draw, found = random.Random(worker), []
    os.read(start, 1)  # both begin at once, without the folder
    tier = DiskTier(folder, BUDGET)
    for _ in range(ROUNDS):
        n = draw.randrange(len(NAMES))
        if draw.random() < 0.5:
            tier.put(NAMES[n], *_prefix(n, worker))
        elif NAMES[n] in tier.headers() and (read := tier.get(NAMES[n])) is not None:
            found.append((n, *read))
    assert len(found) > ROUNDS / 16, "prefixes are found"
    for n, packed, tokens in found:  # views of files that are long deleted
        assert tokens.tolist() == [n]
        assert packed.tensors["a"].unique().tolist() in ([0.0], [1.0])
    assert not logged


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    folder, (start, go) = tmp_path / "prefixes", os.pipe()
    children = [_child(lambda worker=worker: _work(folder, worker, start)) for worker in range(2)]  # type: ignore[misc]
    os.write(go, b"gg")
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0]
    left = {path.name for path in folder.iterdir()}
    assert left <= {".cllm", *(f"{name}.safetensors" for name in NAMES)}, "no unfinished files"
    tier = DiskTier(folder, BUDGET)
    assert len(tier.headers()) == 2
    assert 0 < tier.nbytes <= BUDGET


def test_a_prefix_that_another_process_stores_again_is_read_with_its_new_header(tmp_path: Path, caplog) -> None:
    reader, writer = (DiskTier(tmp_path / "prefixes", BUDGET) for _ in range(2))
    writer.put(NAMES[0], *_prefix(0, 0))
    assert set(reader.headers()) == {NAMES[0]}
    (tmp_path / "prefixes" / f"{NAMES[0]}.safetensors").unlink()
    assert reader.get(NAMES[0]) is None
    writer.headers()
    assert writer.put(NAMES[0], *_prefix(0, 1))
    for _ in range(2):
        found = reader.get(NAMES[0])
        assert found is not None
        assert found[0].tensors["a"].unique().tolist() == [1.0]
    assert not caplog.messages


def test_two_evictions_at_once_delete_no_more_than_one(tmp_path: Path, monkeypatch) -> None:
    """Each keeps its own prefix. If both counted both files, each would delete the other's."""
    tiers = [DiskTier(tmp_path / "prefixes", SIZE * 6) for _ in range(2)]  # room for one file
    for n in range(2):
        write_prefix(tiers[0]._path(NAMES[n]), *_prefix(n, 0))
    counted, count = threading.Barrier(2), DiskTier._files

    def files(tier: DiskTier) -> list[tuple[int, int, Path]]:
        found = count(tier)
        with contextlib.suppress(threading.BrokenBarrierError):
            counted.wait(0.2)
        return found

    monkeypatch.setattr(DiskTier, "_files", files)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda n: tiers[n]._evict(keep=NAMES[n]), range(2)))
    assert sum(NAMES[n] in tiers[0] for n in range(2)) == 1


def test_a_prefix_that_is_larger_than_the_budget_with_its_header_leaves_the_others(tmp_path: Path) -> None:
    tier = DiskTier(tmp_path / "prefixes", SIZE * 4)
    packed, tokens, header = _prefix(0, 0)
    small = Packed(packed.layout, {"a": torch.zeros(8)})
    assert tier.put(NAMES[0], small, tokens, header)
    assert not tier.put(NAMES[1], *_prefix(1, 0))
    assert NAMES[0] in tier


def test_nothing_is_deleted_in_a_folder_that_has_lost_its_mark(tmp_path: Path, caplog) -> None:
    tier = DiskTier(tmp_path / "prefixes", SIZE * 6)  # room for one file
    tier.put(NAMES[0], *_prefix(0, 0))
    (tmp_path / "prefixes" / ".cllm").unlink()
    tier.put(NAMES[1], *_prefix(1, 0))
    assert NAMES[0] in tier
    assert "has lost its file .cllm" in caplog.text
