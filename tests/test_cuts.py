"""What pipeline cuts and other ways to spread a model over many GPUs carry, against values written by hand."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cuts as command
from cllm.cache.accounting import cuts
from cllm.config import Config, ModelConfig, TrainConfig
from cllm.model.sizes import count_parameters, meta_decoder
from cllm.plan.presets import PRESETS, preset_names
from cllm.train.dryrun import state_bytes
from cllm.train.launch import Launch
from cllm.uptrain.complete import load_config

ROOT = Path(__file__).resolve().parents[1]
K = V = 4 * 8 * 2
"""Bytes of a token's keys in one slot of the tiny model: 4 heads of 8 numbers of 2 bytes; values have as many."""
SHARE_3 = {"share": 3}


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
        # Layers 0 and 4 have full attention; each of the three above them reads their slot and a window of its own.
        ({"preset": "hysparse", "n_gated": 3, "window": 16}, [K + V] * 3 + [0] + [K + V] * 3),
        # Three turns of layers 0 and 1, then layer 6, which owns the slot that layer 7 reads.
        ({"preset": "yoco_u", "window": 16}, [0, 0, 0, 0, 0, 0, K + V]),
        ({"preset": "kv_tie"}, [0] * 7),
        # Keys and values of layer 3 are one tensor.
        (
            {
                "layers": [
                    {"layers": "0-3", "own": {"tie": "kv"}},
                    {"layers": "4-7", "keys": SHARE_3, "values": SHARE_3},
                ]
            },
            [0] * 3 + [K] * 4,
        ),
        # Layers 4 to 7 project keys of their own and read the values of layer 0.
        (
            {
                "layers": [
                    {"layers": "0-3", "own": {}},
                    {"layers": "4-7", "own": {"only": "keys"}, "values": {"share": 0}},
                ]
            },
            [V] * 7,
        ),
    ],
    ids=lambda value: str(value.get("preset", "layers")) if isinstance(value, dict) else None,
)
def test_a_cut_carries_the_residual_stream_and_the_tensors_that_are_read_above(
    tiny_config: Callable[..., ModelConfig], kv: dict[str, Any], up: list[int]
) -> None:
    found = cuts(tiny_config(kv=kv))
    assert [cut.after for cut in found] == [0, 1, 2, 3, 4, 5, 6]
    assert {cut.residual for cut in found} == {24 * 2}, "d_model numbers of 2 bytes"
    assert [cut.up for cut in found] == up
    assert not any(cut.down or cut.cyclic for cut in found)


def test_a_cut_within_a_loop_has_the_same_weights_on_both_sides(tiny_config: Callable[..., ModelConfig]) -> None:
    """Layers 0 and 1 are computed three times, as layers 0 to 5; cut 4 is the last one below a layer of the loop."""
    found = cuts(tiny_config(kv={"preset": "yoco_u", "window": 16}))
    assert [cut.looped for cut in found] == [True] * 5 + [False] * 2
    assert not any(cut.looped for cut in cuts(tiny_config(kv={"preset": "yoco", "window": 16})))


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
    assert three["zero1"] == (2 + 2 + 4 + 12 / 4, (2 + 2) * 3 / 4), "reduced once a step"
    assert three["zero2"] == (2 + 16 / 4, (3 * 2 + 2) * 3 / 4), "reduced in every micro-batch"
    assert three["zero3, FSDP2"] == (18 / 4, 3 * 3 * 2 * 3 / 4)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_memory_of_data_parallelism_is_that_of_the_dry_run(
    tiny_config: Callable[..., ModelConfig], strategy: str, micro_batches: int
) -> None:
    train = TrainConfig(strategy=strategy, devices=4, micro_batch=1, global_batch=4 * micro_batches)
    config = Config(model=tiny_config(max_seq_len=512), train=train)
    model = meta_decoder(config.model)
    parts = state_bytes(Launch.on(config, "gpu", 4), model, offload_optimizer=False)
    parts.pop("buffers")
    found = command.traffic(count_parameters(model), 4, micro_batches)
    ((memory, _),) = (value for name, value in found.items() if name.startswith(strategy))
    assert memory * 2**30 == pytest.approx(sum(parts.values()))


def test_context_parallelism_sends_what_is_cached(tiny_config: Callable[..., ModelConfig]) -> None:
    mha = command.split_traffic(tiny_config(), 1000)
    half = command.split_traffic(tiny_config(kv={"preset": "cla"}), 1000)
    assert mha["context parallel"] == 2 * 8 * (K + V) * 1000 * 7 / 8 / 2**30
    assert half["context parallel"] == mha["context parallel"] / 2
    assert mha["tensor parallel"] == half["tensor parallel"] == 4 * 8 * 24 * 2 * 1000 * 2 * 7 / 8 / 2**30


@pytest.mark.parametrize(("lower", "tokens_gathered"), [({"window": 16}, 4 * 16), ({"lower": "retention"}, 0)])
def test_context_parallelism_gathers_windows_and_no_recurrent_state(
    tiny_config: Callable[..., ModelConfig], lower: dict[str, Any], tokens_gathered: int
) -> None:
    """Layers 0 to 3 of yoco have a window or a state; all 875 tokens of other GPUs are gathered of layer 4's slot."""
    found = command.split_traffic(tiny_config(kv={"preset": "yoco", **lower}), 1000)
    assert found["context parallel"] == 2 * (tokens_gathered + 875) * (K + V) / 2**30


FILES = ["--config", str(ROOT / "configs/model/4b.yaml"), "--config", str(ROOT / "configs/kv/fusedkv.yaml")]


def test_the_command_prints_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    """Of the 4B model: 16 heads of 192 numbers, so 12 KiB a slot, and a residual stream of 6 KiB."""
    assert command.main([*FILES, "--gpus", "64", "--train.global_batch", "64"]) == 0
    lines = {line[:24].strip(): line[24:].split() for line in capsys.readouterr().out.splitlines() if line}
    assert lines["fusedkv"] == ["30.00", "18.00", "(14)", "30.00", "(15)", "24.19", "240"]
    assert lines["(this model)"] == lines["fusedkv"]
    assert lines["lckv"][0] == "cyclic:"
    assert [name for name in lines if lines[name][-1:] == ["loop"]] == ["yoco_u"]
    assert set(preset_names()) <= lines.keys()
    assert command.main([*FILES, "--gpus", "7"]) == 2
    assert "--gpus is 7; allowed: 8 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layers", "preset", "line"),
    [("3", "lckv", "not possible here: model.kv.warmup + 1 is 3"), ("1", "mha", "a single layer cannot be cut")],
)
def test_a_preset_that_the_model_cannot_have_does_not_end_the_command(
    capsys: pytest.CaptureFixture[str], layers: str, preset: str, line: str
) -> None:
    assert command.main([*FILES[:2], "--gpus", "8", "--model.n_layers", layers]) == 0
    assert f"{preset:<24} {line}" in capsys.readouterr().out


def test_the_page_has_the_cuts_of_every_preset() -> None:
    """The table of docs/distributed.md against the model whose command is above it, 4B with a context of 32,768."""
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| preset \|.*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)
    model = load_config([FILES[1]], ["--data.seq_len", "32768", "--model.max_seq_len", "32768"]).model
    seen = []
    for row in table.splitlines():
        names, *cells = [cell.strip() for cell in row.strip("|").split("|")]
        for name in names.split(", "):
            seen.append(name)
            values = command.cut_line(
                "", ModelConfig.model_validate(model.model_dump() | {"kv": {"preset": name}}), 32768
            )
            middle, best, at, worst, till, _, size, *_ = values.split() + [""] * 8
            if middle == "cyclic:":
                assert cells == ["inside the cycle, cannot be cut", "", "", ""], name
                continue
            wanted = [f"{float(n):g}" for n in (middle, best, worst)]
            flat = best == worst
            wanted = [
                wanted[0],
                f"{wanted[1]} {'(any)' if flat else at}",
                f"{wanted[2]} {'(any)' if flat else till}",
                size,
            ]
            assert cells == wanted, name
    assert sorted(seen) == sorted(name for name, cls in PRESETS.items() if cls.__module__.startswith("cllm."))
