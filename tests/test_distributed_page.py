"""The numbers of docs/distributed.md and of its table in docs/benchmarks.md: by files, formulas and the dry run."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cuts
from benchmarks.scaling.cases import Cases, cases_of, load_case
from cllm.config import Config
from cllm.config.load import validate
from cllm.model.sizes import count_parameters, meta_decoder
from cllm.train.dryrun import memory_estimate
from cllm.train.launch import Launch
from cllm.uptrain.complete import load_config
from cllm.yaml_text import read_yaml

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
PAGE = " ".join((ROOT / "docs" / "distributed.md").read_text(encoding="utf-8").split())
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
FILES = [str(ROOT / "configs" / file) for file in ("model/4b.yaml", "kv/fusedkv.yaml")]
LONG = ("--data.seq_len", "32768", "--model.max_seq_len", "32768", "--train.global_batch", "64")
GIB = 2**30


def said(*phrases: str) -> None:
    for phrase in phrases:
        assert phrase in PAGE, phrase


def rows_of(file: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))["rows"]


def memory(config: Config) -> dict[str, float]:
    model = meta_decoder(config.model)
    return memory_estimate(model, config, Launch.planned(config))


NODE = rows_of("2026-11-26-node-x4-h200.json")


def node(group: str, strategy: str, devices: int) -> dict[str, Any]:
    which = (group, strategy, devices)
    return next(row for row in NODE if (row["group"], row["strategy"], row["devices"]) == which)


def speedup(group: str, strategy: str, devices: int, one: str) -> str:
    return f"{node(group, strategy, devices)['tokens_per_s'] / node(group, one, 1)['tokens_per_s']:.3f}"


def test_the_table_of_strategies() -> None:
    table = BENCHMARKS.split("| model, per GPU and step |")[1].split("\n\n")[0].splitlines()[2:]
    models = {"1364 M": "1364m", "374 M": "374m", "4b, FusedKV, 8": "4b-fusedkv", "4b, FusedKV, 2": ""}
    models["4b, FusedKV, 2"] = "4b-fusedkv-checkpointed"
    group, one = "", ""
    for line in table:
        name, strategy, gpus, speed, factor, mfu, peak, share, exposed = (
            cell.strip(" *") for cell in line.split("|")[1:-1]
        )
        if name:
            group = next(group for prefix, group in models.items() if name.startswith(prefix))
            one = strategy
        row = node(group, strategy, int(gpus))
        assert speed == f"{row['tokens_per_s']:,.0f}", line
        if int(gpus) > 1 and factor:
            assert factor == speedup(group, strategy, int(gpus), one), line
        assert (mfu, peak) == (f"{100 * row['mfu']:.1f} %", f"{row['peak_gib']:.1f}"), line
        if share:
            profile = row["profile_ms"]
            shares = [100 * profile[key] / profile["step"] for key in ("communication", "exposed")]
            assert [share, exposed] == [f"{value:.1f} %" for value in shares], line


def test_the_figures_of_speed() -> None:
    two = speedup("374m", "zero1", 2, "single")
    alone = {row["devices"]: row["tokens_per_s"] for row in rows_of("2026-11-26-scaling-374m-h200.json")}
    said(
        f"ZeRO-1 at 1364 M trains {speedup('1364m', 'zero1', 2, 'zero1')} times as fast on two H200 as on one, and "
        f"{speedup('1364m', 'zero1', 4, 'zero1')} times on four",
        f"at 374 M two GPUs reach {alone[2] / alone[1]:.2f} with one micro-batch and {float(two):.2f} with two",
        f"runs at {100 * node('4b-fusedkv', 'zero1', 4)['mfu']:.1f} % MFU on four H200",
        f"{speedup('1364m', 'zero1', 4, 'zero1')} was measured on four",
        f"{speedup('1364m', 'zero2', 4, 'zero1')} times one GPU was measured on four",
        f"{speedup('374m', 'zero1', 4, 'single')} times one GPU was measured on four",
        f"{100 * node('4b-fusedkv-checkpointed', 'zero3', 4)['mfu']:.1f} % MFU was measured on four",
        f"(measured on four: {node('4b-fusedkv', 'zero1', 4)['peak_gib']:.1f}, predicted: ",
    )


def test_the_losses_of_equal_steps() -> None:
    rows = rows_of("2026-11-27-same-steps-x4-h200.json")
    first = rows[0]["losses"]
    apart = {row["name"]: max(abs(row["losses"][step] - first[step]) for step in first) for row in rows[1:]}
    micro_batches, *others = apart.values()
    said(
        f"differences were at most {max(others):.3f} nats on four, {micro_batches:.3f} between two micro-batches on one"
    )


def test_the_predicted_peaks_of_eight_gpus() -> None:
    cases = cases_of(validate(Cases, read_yaml(ROOT / "benchmarks" / "scaling" / "node.yaml")).groups, 8)
    found = {}
    for case in cases:
        config = load_case(case, [], runs_dir=Path("runs"), data=Path("data"), profiled=2)
        accelerated = config.train.model_copy(update={"accelerator": "gpu"})
        key = case.group.name, config.train.strategy, case.devices
        if case.devices == 8 or key in (("1364m", "zero1", 1), ("4b-fusedkv", "zero1", 4)):
            found[key] = f"{memory(config.model_copy(update={'train': accelerated}))['total']:.1f}"
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    table = [line.split("|") for line in text.splitlines() if line.startswith("| `")]
    peaks = {cells[1].strip(" `"): re.findall(r"\d+\.\d", cells[4]) for cells in table if len(cells) == 6}
    expected = {
        "1364m": [found["1364m", "zero1", 8], found["1364m", "zero1", 1]],
        "4b-fusedkv": [
            found["4b-fusedkv", "zero1", 8],
            f"{node('4b-fusedkv', 'zero1', 4)['peak_gib']:.1f}",
            found["4b-fusedkv", "zero1", 4],
        ],
        "1364m-zero2": [found["1364m-zero2", "zero2", 8]],
        "374m": [found["374m", "ddp", 8], found["374m", "zero1", 8]],
        "4b-fusedkv-checkpointed": [found["4b-fusedkv-checkpointed", "zero3", 8]],
    }
    assert {name: peaks.get(name) for name in expected} == expected


def test_the_predicted_peaks_of_64_gpus() -> None:
    cluster = ("--train.strategy", "zero1", "--train.devices", "8", "--train.num_nodes", "8")

    def of(length: str, checkpointing: str) -> dict[str, float]:
        words = ["--data.seq_len", length, "--model.max_seq_len", length, "--train.global_batch", "64"]
        return memory(load_config(FILES, [*words, *cluster, "--train.gradient_checkpointing", checkpointing]))

    short, without, long = of("32768", "true"), of("32768", "false"), of("131072", "true")
    said(
        f"a peak of {short['total']:.1f} GiB under ZeRO-1 with gradient checkpointing, including "
        f"{short['activations']:.1f} of activations; without checkpointing {without['total']:.1f}",
        f"and {long['total']:.1f} GiB for a context of 128k with checkpointing",
    )


def test_the_arithmetic_of_64_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    """Formulas of the page by hand; the command that it names prints the same."""
    config = load_config(FILES, LONG)
    p = count_parameters(meta_decoder(config.model))
    n, layers, tokens, d = 64, config.model.n_layers, 32768, config.model.d_model
    inside, between = 450e9, 50e9
    states = {"ZeRO-1": 4 + 12 / n, "ZeRO-2": 2 + 14 / n, "ZeRO-3, FSDP2": 16 / n}
    sent = {"ZeRO-1": 4, "ZeRO-2": 2 + 2, "ZeRO-3, FSDP2": 6}
    for name, bytes_each in states.items():
        row = re.search(rf"\| {name} \| [^|]+ \| ([\d.]+) \| [^|]+ \| ([\d.]+) \| ([\d.]+) \|", PAGE)
        assert row is not None
        traffic = sent[name] * p * (n - 1) / n
        assert [float(cell) for cell in row.groups()] == pytest.approx(
            [bytes_each * p / GIB, traffic / GIB, traffic / between], abs=0.0501
        ), name
        assert float(row[3]) == pytest.approx(traffic / between, abs=5.1e-3)
    reduced = 4 * layers * 2 * tokens * d * 2 * 7 / 8
    cache = 2 * 2 * layers * d  # mha, bf16
    mha = 2 * 7 / 8 * tokens * cache
    said(
        f"{reduced / GIB:.1f} GiB or {reduced / inside:.2f} s",
        f"That is {mha / GIB:.1f} GiB for mha and {mha / 2 / GIB:.1f} for FusedKV, or {mha / inside:.2f} and "
        f"{mha / 2 / inside:.2f} s",
        f"a residual stream of {2 * d / 1024:g} KiB",
        f"960 MiB take only {960 * 2**20 / between:.2f} s between machines",
    )
    assert cuts.main([*itertools.chain(*(("--config", file) for file in FILES)), "--gpus", "64", *LONG]) == 0
    printed = capsys.readouterr().out
    seconds = re.search(r"takes ([\d.]+) s on one GPU, ([\d.]+) s on 8", printed)
    assert seconds is not None
    said(f"A micro-batch of one sequence takes {seconds[1]} s on one GPU", f"of the {seconds[2]} s that 8 GPUs compute")
