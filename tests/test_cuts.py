"""What pipeline cuts and other ways to spread a model over many GPUs carry, against values written by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cuts as command
from cllm.cache.accounting import cuts
from cllm.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
K = V = 4 * 8 * 2
"""Bytes of a token's keys in one slot of the tiny model: 4 heads of 8 numbers of 2 bytes; values have as many."""


@pytest.mark.parametrize(
    ("kv", "up"),
    [
        ({"preset": "mha"}, [0] * 7),
        ({"preset": "cla", "factor": 2}, [K + V, 0, K + V, 0, K + V, 0, K + V]),
        # Layer 4 owns the slot that layers 5 to 7 read.
        ({"preset": "yoco", "window": 16}, [0, 0, 0, 0, K + V, K + V, K + V]),
        # Layers 4 to 7 read both tensors of layers 0 and 3.
        ({"preset": "fusedkv"}, [K + V] * 3 + [2 * (K + V)] * 4),
        # Layers 4 to 7 read the values of layer 0 and the keys of layer 3.
        ({"preset": "fusedkv_lite"}, [V] * 3 + [K + V] * 4),
        ({"preset": "svformer"}, [V] * 7),
        # Layers 1 to 3 mix the slot of layer 0; layers 4 to 7 read layer 3.
        ({"preset": "yoco_pp"}, [K + V] * 7),
        # Layers 4 to 7 project the output of layer 3, 24 numbers, which is the residual stream above layer 3.
        ({"preset": "swiftkv"}, [0, 0, 0, 0, 24 * 2, 24 * 2, 24 * 2]),
        # Layer 4 projects the output of layer 3; layers 5 to 7 read that slot, and windows that they alone read.
        ({"preset": "ced", "group": 4, "window": 4}, [0, 0, 0, 0, K + V, K + V, K + V]),
        ({"preset": "fusedkv", "n_kv_heads": 1}, [(K + V) / 4] * 3 + [(K + V) / 2] * 4),
    ],
    ids=lambda value: value.get("preset") if isinstance(value, dict) else None,
)
def test_a_cut_carries_the_residual_stream_and_the_tensors_that_are_read_above(
    tiny_config: Callable[..., ModelConfig], kv: dict[str, Any], up: list[int]
) -> None:
    found = cuts(tiny_config(kv=kv))
    assert [cut.after for cut in found] == [0, 1, 2, 3, 4, 5, 6]
    assert {cut.residual for cut in found} == {24 * 2}, "d_model numbers of 2 bytes"
    assert [cut.up for cut in found] == up
    assert not any(cut.down or cut.cyclic for cut in found)


def test_a_cyclic_plan_carries_slots_downwards(tiny_config: Callable[..., ModelConfig]) -> None:
    """Layers 0 and 1 read layer 2, which is computed together with them."""
    top = {"share": 2}
    layers = [{"layers": "0-1", "keys": top, "values": top}, {"layers": "2-3", "own": {}}]
    config = tiny_config(n_layers=4, kv={"layers": layers, "iterations": {"forward": 2, "backward": 2}})
    found = cuts(config)
    assert [(cut.up, cut.down, cut.cyclic) for cut in found] == [(0, K + V, True), (0, K + V, True), (0, 0, False)]
    best, worst = command.best_and_worst(found) or (None, None)
    assert best == worst == found[2]
    assert command.best_and_worst(found[:2]) is None


def test_the_best_cut_is_the_cheapest_and_nearest_to_the_middle(tiny_config: Callable[..., ModelConfig]) -> None:
    best, worst = command.best_and_worst(cuts(tiny_config(kv={"preset": "fusedkv_lite"}))) or (None, None)
    assert best is not None
    assert worst is not None
    assert (best.after, worst.after) == (2, 3)
    assert (best.total, worst.total) == (48 + V, 48 + K + V)


def test_memory_and_traffic_of_data_parallelism() -> None:
    """2**30 parameters on 4 GPUs: 1 GiB for each byte of a parameter."""
    one = command.traffic(2**30, 4, 1)
    assert one["zero1"] == (2 + 2 + 12 / 4, (2 + 2) * 3 / 4)
    assert one["zero2"] == (2 + 14 / 4, (2 + 2) * 3 / 4)
    assert one["zero3, FSDP2"] == (16 / 4, 3 * 2 * 3 / 4)
    three = command.traffic(2**30, 4, 3)
    assert three["zero1"] == (2 + 4 + 12 / 4, (2 + 2) * 3 / 4), "reduced once a step"
    assert three["zero2"] == (2 + 16 / 4, (3 * 2 + 2) * 3 / 4), "reduced in every micro-batch"
    assert three["zero3, FSDP2"] == (18 / 4, 3 * 3 * 2 * 3 / 4)


def test_context_parallelism_sends_what_is_cached(tiny_config: Callable[..., ModelConfig]) -> None:
    mha = command.split_traffic(tiny_config(), 1000)
    half = command.split_traffic(tiny_config(kv={"preset": "cla"}), 1000)
    assert mha["context parallel"] == 2 * 8 * (K + V) * 1000 * 7 / 8 / 2**30
    assert half["context parallel"] == mha["context parallel"] / 2
    assert mha["tensor parallel"] == half["tensor parallel"] == 4 * 8 * 24 * 2 * 1000 * 2 * 7 / 8 / 2**30


def test_the_command_prints_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the 4B model: 16 heads of 192 numbers, so 12 KiB a slot, and a residual stream of 6 KiB."""
    files = ["--config", str(ROOT / "configs/model/4b.yaml"), "--config", str(ROOT / "configs/kv/fusedkv.yaml")]
    assert command.main([*files, "--gpus", "64", "--train.global_batch", "64"]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert lines["fusedkv"] == ["30.00", "18.00", "(14)", "30.00", "(15)", "24.19", "240"]
    assert lines["lckv"][0] == "cyclic:"
    assert command.main([*files, "--gpus", "7"]) == 2
    assert "--gpus is 7; allowed: 8 or more" in capsys.readouterr().err
