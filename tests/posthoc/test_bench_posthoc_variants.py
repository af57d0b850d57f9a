"""`python -m benchmarks.posthoc_variants`: the search for the fastest variant, without a GPU."""

from __future__ import annotations

import time

import pytest
import torch

from benchmarks import variants as module
from benchmarks.posthoc_options import PrintedRecord
from benchmarks.variants import Variants
from cllm.kernels.lowrank_tiles import Weighing

OPTIONS = {"block_w": (64, 128), "warps": (8, 2), "stages": (4,)}


@pytest.fixture
def variants(tmp_path):
    return Variants(torch.device("cpu"), PrintedRecord({}, tmp_path / "out.json"), time.monotonic())


def test_what_is_faster_is_kept(variants, monkeypatch):
    """128 ranks and 8 warps take 1 ms less each; two warps fail."""
    monkeypatch.setattr(module, "layer_ms", lambda calls, device: calls[0]())

    def time_of(how, name):
        def ms():
            if how.warps == 2:
                raise RuntimeError("out of resources")
            return 9 - (how.block_w == 128) - (how.warps == 8)

        return variants.time("weigh", name, [ms])

    assert variants.search("weigh", Weighing(), OPTIONS, time_of, until=60) == Weighing(block_w=128, warps=8)
    assert [row["ms"] for row in variants.record.rows] == [9, 9, 8, 7, 7]


def test_nothing_is_measured_after_the_deadline(variants, monkeypatch):
    def time_of(how, name):
        return variants.time("weigh", name, [lambda: pytest.fail("measured")])

    variants.start -= module.SECONDS
    assert variants.search("weigh", Weighing(), OPTIONS, time_of, until=60) == Weighing()
    assert variants.record.rows == []
