"""`python -m experiments.random_sources` with a tiny model: its runs, its results, how it resumes, and its table."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from cllm.runs import RunFolder
from experiments import random_sources
from experiments.random_sources import METHODS, main, table

WORDS = "the plan says where keys and values come from and every layer reads what an owner wrote"


def losses(folder: Path) -> list[float]:
    return [row["val/loss"] for row in RunFolder(folder).metrics() if "val/loss" in row]


def test_runs_results_and_another_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = random.Random(0)
    texts = (" ".join(draw.choices(WORDS.split(), k=100)) for _ in range(100))
    file, out = tmp_path / "text.jsonl", tmp_path / "out"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    command = ["--tiny", "--corpus", str(file), "--out", str(out), "--seeds", "1"]
    assert main(command) == 0
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))["results"]
    assert [(row["method"], row["cache_percent"]) for row in results] == [
        (m, c) for m in METHODS for c in (100, 50, 25)
    ]
    for row in results:
        measured = losses(out / f"{row['method']}-s0-{row['cache_percent']}")
        assert [row["loss"], row["adapted_loss"]] == measured
        if row["cache_percent"] == 100:
            assert row["loss"] == pytest.approx(losses(out / f"{row['method']}-s0")[-1], abs=1e-6), "no slot is lost"
    configs = {name: RunFolder(out / name).config() for name in ("plain-s0", "all-s0", "owners-s0", "scratch-s0")}
    drawn = {name: (c.uptrain.random_sources, c.uptrain.random_sources_from) for name, c in configs.items()}
    assert drawn == {"plain-s0": (0.0, "owners"), "all-s0": (0.6, "all"), "owners-s0": (0.6, "owners"),
                     "scratch-s0": (0.5, "all")}  # fmt: skip
    assert len({configs[name].train.seed for name in ("plain-s0", "all-s0", "owners-s0")}) == 1, "the same text"
    assert configs["scratch-s0"].train == RunFolder(out / "none-s0").config().train
    assert losses(out / "scratch-s0")[0] == pytest.approx(losses(out / "none-s0")[0], abs=1e-6), "the same weights"
    for cache, sources in ((100, [0, 1, 2, 3]), (50, [0, 0, 2, 2]), (25, [0, 0, 0, 0])):
        plan = RunFolder(out / f"none-s0-{cache}").config().model.plan()
        assert [plan.reads(i) for i in range(4)] == [(source,) for source in sources]

    capsys.readouterr()
    monkeypatch.setattr(random_sources, "train", None)
    assert main(command) == 0
    assert "| scratch | 25 | 1 |" in capsys.readouterr().out
    assert main([*command, "--percent", "50"]) == 2
    assert "plain-s0.yaml: has train.steps" in capsys.readouterr().err


def test_the_table_compares_each_model_with_itself() -> None:
    def row(seed: int, cache: int, loss: float, adapted: float) -> dict[str, Any]:
        return {"method": "all", "seed": seed, "cache_percent": cache, "loss": loss, "adapted_loss": adapted}

    rows = [row(0, 100, 2.0, 1.9), row(1, 100, 3.0, 2.9), row(0, 50, 2.1, 1.95), row(1, 50, 3.3, 2.95)]
    last = [cell.strip() for cell in table(rows).splitlines()[-1].strip("|").split("|")]
    assert last == ["all", "50", "2", "2.700 (2.100 to 3.300)", "0.200 (0.100 to 0.300)", "2.450 (1.950 to 2.950)",
                    "0.050 (0.050 to 0.050)"]  # fmt: skip
