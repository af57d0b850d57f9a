"""scripts/compare.py: rows, baseline, warnings, and the files it writes; the runs are made here, file by file."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm.errors import UserError
from cllm.evaluate.comparison import Comparison, Row, find_runs
from cllm.evaluate.comparison import compare as compare_runs
from cllm.evaluate.report import figure, markdown_table, seeds_table
from cllm.evaluate.seeds import group_name
from cllm.files import MARK
from cllm.lock import locked
from cllm.runs import RunFolder

MHA = 98304
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def synthetic(tmp_path) -> Callable[..., Path]:
    """`synthetic("cla", 0.5, 1.0, loss=2.5, evaluated=2.4)`: a run folder with a cache of half of mha's."""

    def build(
        name: str,
        resident: float = 1.0,
        read: float = 1.0,
        *,
        loss: float | None = 2.0,
        evaluated: float | None = None,
        steps: int = 100,
        data: dict[str, Any] | None = None,
        vocab_size: int = 320,
        record: dict[str, Any] | None = None,
    ) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        config = {
            "name": name,
            "model": {"vocab_size": vocab_size, "d_model": 16, "n_layers": 2, "n_heads": 2},
            "data": {"path": "data/prepared/none", **(data or {})},
        }
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        summary = {
            "name": name,
            "design": f"design of {name}",
            "parameters": 1_230_000,
            "parameters_without_embeddings": 1_000_000,
            "vocab_size": vocab_size,
            "context": 512,
            "kv_bytes_per_token": {"resident": resident * MHA, "written": resident * MHA, "read": read * MHA},
            "kv_vs_mha": {"resident": resident, "read": read},
            "training_flops_per_token": 1e7,
            "steps": steps,
            "tokens_per_step": 1000,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
        rows: list[dict[str, Any]] = [{"step": 0, "tokens": 0, "time": 1.0, "val/loss": 6.0, "val/bits_per_byte": 3.0}]
        for step, rate in ((20, 10.0), (40, 1000.0), (60, 1200.0), (80, None), (steps, 1100.0)):
            rows.append({"step": step, "tokens": step * 1000, "time": 2.0, "throughput/tokens_per_s": rate})
        if loss is not None:
            rows.append(
                {"step": steps, "tokens": steps * 1000, "time": 3.0, "val/loss": loss, "val/bits_per_byte": 1.0}
            )
            rows[-1] |= {"val-other/loss": loss + 1, "val-other/bits_per_byte": 1.5}
        else:
            rows.pop(0)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if evaluated is not None:
            measured = {
                "loss": evaluated,
                "perplexity": 2.718281828459045**evaluated,
                "bits_per_byte": 0.9,
                "step": steps,
                "data": "data/prepared/none",
                "tokens_scored": 5000,
                "window": 512,
                "stride": 256,
                "precision": "fp32",
                "tokenizer_sha256": "aa",
            }
            (folder / "evaluation").mkdir()
            (folder / "evaluation" / "validation.json").write_text(json.dumps(measured | (record or {})))
        return folder

    return build


def _compared(*paths: Path, **options: Any) -> Comparison:
    return compare_runs(find_runs(paths), **options)


def test_rows_are_sorted_by_cache_and_compared_with_the_largest(synthetic) -> None:
    paths = [
        synthetic("lite", 0.5, 1.0, loss=2.1),
        synthetic("fused", 0.5, 1.5, loss=2.0),
        synthetic("full", loss=2.05),
    ]
    comparison = _compared(*paths)
    assert [row.run for row in comparison.rows] == ["full", "fused", "lite"]
    assert comparison.baseline.run == "full"
    full, fused, lite = comparison.rows
    assert full.perplexity_vs_baseline == 0
    assert fused.perplexity_vs_baseline == pytest.approx(100 * (2.718281828459045**-0.05 - 1))
    assert lite.perplexity_vs_baseline == pytest.approx(100 * (2.718281828459045**0.05 - 1))
    assert (fused.kv_resident, fused.kv_resident_vs_mha, fused.kv_read_vs_mha) == (MHA / 2, 0.5, 1.5)
    assert (fused.design, fused.parameters, fused.tokens) == ("design of fused", 1_230_000, 100_000)
    assert fused.tokens_per_s == 1100  # the median of 1000, 1200 and 1100, not of the first; a null is no measurement
    assert comparison.warnings == []
    other = _compared(*paths, baseline="lite")
    assert other.baseline.run == "lite"
    assert other.rows[0].perplexity_vs_baseline == pytest.approx(100 * (2.718281828459045**-0.05 - 1))


def test_an_evaluation_is_preferred_and_mixing_is_told(synthetic) -> None:
    comparison = _compared(synthetic("a", loss=2.2, evaluated=2.1), synthetic("b", 0.5, loss=2.3))
    a, b = comparison.rows
    assert (a.loss, a.bits_per_byte, a.source) == (2.1, 0.9, "evaluate")
    assert (b.loss, b.bits_per_byte, b.source) == (2.3, 1.0, "training")
    assert comparison.warnings == ["losses come from different places: evaluate: a; training: b"]


def test_another_set_is_read_from_its_own_tags(synthetic) -> None:
    comparison = _compared(synthetic("a", evaluated=2.1), set_name="other")
    assert (comparison.rows[0].loss, comparison.rows[0].source) == (3.0, "training")


def test_a_set_that_no_run_has_is_refused_and_the_known_ones_are_named(synthetic) -> None:
    paths = [synthetic("a", evaluated=2.1, data={"validation": {"code": "x", "other": "y"}}), synthetic("b")]
    with pytest.raises(UserError, match=r'--set oter: no run has a loss on it; did you mean "other"\?'):
        _compared(*paths, set_name="oter")
    with pytest.raises(UserError, match=r"--set zzz: .*; allowed: code, other, validation"):
        _compared(*paths, set_name="zzz")


def test_the_main_set_is_the_first_that_the_config_names(synthetic) -> None:
    path = synthetic("a", evaluated=2.1, data={"validation": {"code": "x", "other": "y"}})
    assert _compared(path).rows[0].source == "training"
    (path / "evaluation" / "validation.json").rename(path / "evaluation" / "code.json")
    assert _compared(path).rows[0].source == "evaluate"
    assert _compared(path, set_name="other").rows[0].loss == 3.0


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"steps": 200}, "trained on different numbers of tokens: 100,000: a; 200,000: b"),
        ({"data": {"path": "elsewhere"}}, "trained on different data: data/prepared/none: a; elsewhere: b"),
        ({"data": {"seq_len": 256}}, "trained at different lengths: 512: a; 256: b"),
        ({"data": {"document_mask": True}}, "documents hidden from each other in some runs: False: a; True: b"),
        (
            {"record": {"tokenizer_sha256": "bb"}},
            "tokenizers differ (sha256): aa: a; bb: b; perplexities do not compare, bits per byte do",
        ),
        ({"record": {"tokens_scored": 400}}, "evaluated on different numbers of tokens: 5000: a; 400: b"),
        ({"record": {"data": "else"}}, "evaluated on different data: data/prepared/none: a; else: b"),
        ({"record": {"window": 256}}, "evaluated with different windows: 512: a; 256: b"),
        ({"record": {"stride": 512}}, "evaluated with different strides: 256: a; 512: b"),
        ({"record": {"precision": "bf16"}}, "evaluated in different precisions: fp32: a; bf16: b"),
        ({"record": {"step": 50}}, "b: was evaluated at step 50 and trained to 100 since"),
    ],
)
def test_what_makes_runs_unequal_is_told(synthetic, changes, warning) -> None:
    comparison = _compared(synthetic("a", evaluated=2.0), synthetic("b", 0.5, evaluated=2.1, **changes))
    assert comparison.warnings == [warning]


def test_vocabularies_are_compared_where_no_tokenizer_is_known(synthetic) -> None:
    (warning,) = _compared(synthetic("a"), synthetic("b", 0.5, vocab_size=640)).warnings
    assert warning.startswith("vocabularies differ: 320: a; 640: b; perplexities do not compare")


def test_a_run_without_a_loss_stays_in_the_table(synthetic) -> None:
    comparison = _compared(synthetic("a", loss=None), synthetic("b", 0.5))
    assert (
        comparison.warnings
        == [
            "losses come from different places: training: b",
            "a: has no loss on this set",
            "the baseline a has no loss: no differences are shown",
        ][1:]
    )
    assert comparison.rows[1].perplexity_vs_baseline is None
    assert figure(comparison)


def test_the_command_writes_a_table_a_csv_a_figure_and_events(synthetic, compare, tmp_path, capsys, caplog) -> None:
    paths = [synthetic("full", evaluated=2.0), synthetic("half", 0.5, evaluated=2.02, steps=50)]
    (tmp_path / "runs" / "comparison").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("")
    for _ in range(2):  # the second replaces the first
        assert compare(*sorted((tmp_path / "runs").iterdir())) == 0
    out = capsys.readouterr().out
    assert "warning: trained on different numbers of tokens: 100,000: full; 50,000: half" in out
    assert "comparison: skipped: not a run folder (it has no config.yaml and no summary.json)" in caplog.text
    assert "notes.txt: skipped" in caplog.text
    folder = tmp_path / "runs" / "comparison"
    with (folder / "comparison.csv").open() as file:
        full, half = csv.DictReader(file)
    assert (half["run"], half["kv_resident"], half["source"], half["step"]) == ("half", "49152.0", "evaluate", "50")
    assert float(half["perplexity_vs_baseline"]) == pytest.approx(2.0201, abs=1e-3)
    assert full["perplexity_vs_baseline"] == "0.0"
    text = (folder / "comparison.md").read_text()
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if "| half" in line).split("|")[1:-1]]
    assert cells == [
        *("half", "design of half", "1.23 M", "49,152", "0.50", "98,304", "1.00", "50 k"),
        *("2.0200", "7.538", "+2.0 %", "0.9000", "1,100", "evaluate"),
    ]
    assert "- **Warning**: trained on different numbers of tokens" in text
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")
    events = EventAccumulator(str(folder)).Reload()
    assert len(events.Images("comparison")) == 1
    assert len(events.Tensors("comparison/text_summary")) == 1
    found = sorted(path.suffix for path in folder.iterdir() if path.name != MARK)
    assert found == [".comparison", ".csv", ".md", ".png"]
    assert compare(*paths, "--out", tmp_path / "elsewhere") == 0
    assert (tmp_path / "elsewhere" / "comparison.csv").exists()


def test_what_is_refused(synthetic, compare, tmp_path, capsys) -> None:
    run = synthetic("full")

    def refused(*words: object) -> str:
        status, captured = compare(*words), capsys.readouterr()
        assert (status, captured.out, captured.err.count("\n")) == (2, "", 1)
        return captured.err

    assert "no run to compare" in refused()
    assert "no run to compare" in refused(tmp_path)
    assert '--baseline ful: not among the runs; did you mean "full"?' in refused(run, "--baseline", "ful")
    shutil.copytree(run, tmp_path / "again" / "full")
    assert "two runs are called full" in refused(run, tmp_path / "again" / "full")
    (run / "summary.json").write_text('{"design": "x"}')
    assert "summary.json: parameters is null or missing; allowed: a number" in refused(run)
    (run / "summary.json").write_text("{")
    assert "summary.json: cannot be read" in refused(run)


def _row(name: str, resident: float, perplexity: float) -> Row:
    return Row(
        run=name,
        design=name,
        parameters=10,
        kv_resident=resident,
        kv_resident_vs_mha=resident / MHA,
        kv_read=resident,
        kv_read_vs_mha=1.0,
        tokens=10,
        loss=1.0,
        perplexity=perplexity,
        source="evaluate",
    )


def test_labels_cover_neither_each_other_nor_a_point_nor_the_baseline() -> None:
    crowd = [_row(f"design-number-{i}", MHA / 2, 12 + 0.02 * i) for i in range(6)]
    rows = [_row("mha", MHA, 12.0), *crowd, _row("mqa", MHA / 16, 13.5), _row("trailing_layers", MHA / 16, 13.51)]
    drawing = figure(Comparison(rows=rows, baseline=rows[0], set_name=None, warnings=[]))
    renderer = FigureCanvasAgg(drawing).get_renderer()
    axes = drawing.axes[0]
    boxes = {t.get_text(): Text.get_window_extent(t, renderer) for t in axes.texts if t.get_text()}
    assert set(boxes) == {row.run for row in rows}
    frame = axes.get_window_extent(renderer)
    _, baseline = axes.transData.transform((MHA, 12.0))
    for name, box in boxes.items():
        assert not box.y0 < baseline < box.y1
        assert frame.x0 <= box.x0 < box.x1 <= frame.x1
        assert not any(box.overlaps(other) for label, other in boxes.items() if label != name)
        assert not any(box.contains(*axes.transData.transform((row.kv_resident, row.perplexity))) for row in rows)


def test_the_table_is_aligned() -> None:
    rows = [_row("mha", MHA, 12.0), _row("a-much-longer-name", MHA / 3, 123456.7)]
    lines = markdown_table(Comparison(rows=rows, baseline=rows[0], set_name=None, warnings=[])).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "baseline" in lines[2]
    assert "1.23e+05" in lines[3]


def test_runs_in_different_folders_leave_nothing_in_the_folder_above_them(
    synthetic, compare, tmp_path, capsys, monkeypatch
) -> None:
    one, other = synthetic("full", evaluated=2.0), synthetic("half", 0.5, evaluated=2.02)
    (tmp_path / "others").mkdir()
    other = other.rename(tmp_path / "others" / "half")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "work"))
    assert compare(one, other) == 0
    assert "table and figure go to runs/comparison\n" in capsys.readouterr().err
    assert (tmp_path / "work" / "runs" / "comparison" / "comparison.csv").exists()
    assert sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "work")) == before


def test_in_a_folder_of_others_nothing_is_deleted(synthetic, compare, tmp_path) -> None:
    runs, out = [synthetic("full", evaluated=2.0)], tmp_path / "notes"
    out.mkdir()
    theirs = out / "events.out.tfevents.1.comparison"
    theirs.write_text("not ours")
    for _ in range(2):
        assert compare(*runs, "--out", out) == 0
    assert theirs.read_text() == "not ours"
    assert not (out / MARK).exists()


def test_two_comparisons_do_not_write_one_folder(synthetic, compare, tmp_path, capsys) -> None:
    runs, out = [synthetic("full", evaluated=2.0)], tmp_path / "out"
    with locked(out):
        assert compare(*runs, "--out", out) == 2
        assert f"{out}: is in use by process" in capsys.readouterr().err
        assert not out.exists()
    assert compare(*runs, "--out", out) == 0


# ---- steps that differ -----------------------------------------------------------------------------------------------


def _append(path: Path, **row: Any) -> None:
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def test_an_older_validation_is_never_shown_without_its_step(synthetic) -> None:
    """As after a kill in a validation: the run has trained on since the loss that the table shows."""
    stopped, other = synthetic("stopped", loss=2.2), synthetic("other", 0.5, loss=2.3)
    _append(stopped, step=120, tokens=120_000, time=4.0)
    comparison = _compared(stopped, other)
    row = comparison.rows[0]
    assert (row.loss, row.step, row.last_step, row.tokens) == (2.2, 100, 120, 120_000)
    assert "stopped: was last validated at step 100 and trained to 120 since" in comparison.warnings
    assert "training, step 100 of 120" in markdown_table(comparison)
    assert "| training " in markdown_table(comparison)


def test_a_run_that_is_not_finished_is_named(synthetic) -> None:
    path = synthetic("a")
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"steps": 300}))
    assert _compared(path, synthetic("b", 0.5)).warnings == ["a: is not finished: its last row is of step 100 of 300"]


def test_comparing_reads_metrics_as_a_stream(synthetic, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than the newest row and the newest validation are kept of a million rows."""
    alive: list[weakref.ref] = []
    most = 0

    class Tracked(dict):
        pass

    def stream(self: RunFolder) -> Any:
        nonlocal most
        for step in range(1, 500):
            row = Tracked({"step": step, "tokens": step, "time": 0.0, "throughput/tokens_per_s": float(step)})
            alive.append(weakref.ref(row))
            most = max(most, sum(ref() is not None for ref in alive))
            yield row

    monkeypatch.setattr(RunFolder, "metrics", stream)
    assert _compared(synthetic("a")).rows[0].tokens_per_s == 250.5  # of 2 to 499
    assert most <= 3


def test_comparing_does_without_torch(synthetic, tmp_path: Path) -> None:
    code = "import sys, runpy; compare = runpy.run_path('scripts/compare.py')['main']; "
    code += "sys.exit(compare(sys.argv[1:]) or 'torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(synthetic("a")), "--out", str(tmp_path / "out")]
    assert subprocess.run(command, cwd=ROOT, timeout=300).returncode == 0


@pytest.fixture
def seeded(synthetic) -> Callable[..., Path]:
    """`seeded("cla-s1", 1, loss=2.5)`: a run of the design `cla`, with this seed."""

    def build(name: str, seed: int, *, design: str = "cla", lr: float = 1e-3, **options: Any) -> Path:
        path = synthetic(name, **options)
        config = yaml.safe_load((path / "config.yaml").read_text())
        config |= {"train": {"seed": seed}, "optim": {"lr": lr}}
        (path / "config.yaml").write_text(yaml.safe_dump(config))
        summary = json.loads((path / "summary.json").read_text())
        (path / "summary.json").write_text(json.dumps(summary | {"design": design}))
        return path

    return build


def test_runs_that_differ_in_their_seed_only_are_a_group(seeded) -> None:
    losses = {"cla-s1": 2.1, "cla-s2": 2.2, "cla-s10": 2.4}
    paths = [seeded(name, seed, loss=loss, resident=0.5) for seed, (name, loss) in enumerate(losses.items())]
    paths += [seeded("cla-fast", 0, loss=2.0, resident=0.5, lr=2e-3), seeded("mha", 0, design="mha", loss=2.3)]
    comparison = _compared(*paths)
    assert [row.run for row in comparison.rows] == ["mha", "cla-fast", "cla-s1", "cla-s10", "cla-s2"]
    groups = {group.name: group for group in comparison.groups}
    assert {name: set(group.runs) for name, group in groups.items()} == {
        "mha": {"mha"}, "cla-fast": {"cla-fast"}, "cla": set(losses)
    }  # fmt: skip
    cla, mha = groups["cla"], groups["mha"]
    perplexities = np.exp(list(losses.values()))
    assert cla.mean("loss") == pytest.approx(np.mean(list(losses.values())))
    assert cla.mean("perplexity") == pytest.approx(np.mean(perplexities))
    assert cla.deviation("perplexity") == pytest.approx(np.std(perplexities, ddof=1))
    assert cla.vs_baseline == pytest.approx(100 * (np.mean(perplexities) / np.exp(2.3) - 1))
    assert (mha.mean("loss"), mha.deviation("loss"), mha.vs_baseline) == (2.3, None, 0)


def test_the_baseline_of_groups_is_a_mean_too(seeded) -> None:
    paths = [seeded(f"mha-{seed}", seed, design="mha", loss=2.0 + seed / 10) for seed in range(2)]
    comparison = _compared(*paths, seeded("cla", 0, resident=0.5, loss=2.0))
    mean = np.mean(np.exp([2.0, 2.1]))
    assert [group.vs_baseline for group in comparison.groups] == pytest.approx([0, 100 * (np.exp(2.0) / mean - 1)])
    assert comparison.rows[0].perplexity_vs_baseline == 0, "single runs compare with one run"
    assert "baseline" in seeds_table(comparison).splitlines()[2]


def test_a_run_without_a_loss_leaves_its_group_without_a_mean(seeded) -> None:
    paths = [seeded("cla-s1", 1, loss=2.0), seeded("cla-s2", 2, loss=None)]
    (group,) = _compared(*paths).groups
    assert (group.mean("perplexity"), group.deviation("perplexity"), group.mean("tokens")) == (None, None, 100_000)
    assert figure(_compared(*paths))


@pytest.mark.parametrize(
    ("runs", "name"),
    [
        (["mha-seed1", "mha-seed2"], "mha"),
        (["mha_s10", "mha_s11"], "mha"),
        (["cla2-0", "cla2-1"], "cla2"),
        (["cla", "cla-again"], "cla"),
        (["mhas-1", "mhas-2"], "mhas"),
        (["seed1", "seed2"], "seed1, seed2"),
        (["a", "b"], "a, b"),
        (["mha-seed1"], "mha-seed1"),
    ],
)
def test_names_of_groups(runs, name) -> None:
    assert group_name(runs) == name


def test_groups_are_written_beside_the_single_runs(seeded, compare, tmp_path, capsys) -> None:
    paths = [seeded("mha", 0, design="mha", loss=2.3)]
    paths += [seeded(f"cla-s{seed}", seed, loss=2.0 + seed / 10, resident=0.5) for seed in range(3)]
    assert compare(*paths) == 0
    out = capsys.readouterr().out
    assert "| seeds |" in out
    assert "| KV resident, bf16 |" in out
    assert out.count("| cla-s1 ") == 1, "single runs stay in the table"
    folder = tmp_path / "runs" / "comparison"
    with (folder / "comparison-seeds.csv").open() as file:
        mha, cla = csv.DictReader(file)
    assert (cla["run"], cla["seeds"], cla["runs"], cla["kv_resident"]) == (
        "cla",
        "3",
        "cla-s0 cla-s1 cla-s2",
        "49152.0",
    )
    assert float(cla["loss"]) == pytest.approx(2.1)
    assert float(cla["loss_std"]) == pytest.approx(0.1)
    assert (mha["seeds"], mha["loss_std"]) == ("1", "")
    with (folder / "comparison.csv").open() as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["mha", "cla-s0", "cla-s1", "cla-s2"]
    (line,) = [line for line in (folder / "comparison.md").read_text().splitlines() if line.startswith("| cla ")]
    cells = [cell.strip() for cell in line.split("|")[1:-1]]
    assert cells[1] == "3"
    assert "2.1000 ± 0.1000" in cells
    assert compare(*paths[:2]) == 0
    assert not (folder / "comparison-seeds.csv").exists(), "no groups any more"
    assert "| seeds |" not in (folder / "comparison.md").read_text()


def test_a_group_is_one_labelled_point_with_a_bar(seeded) -> None:
    paths = [seeded("mha", 0, design="mha", loss=2.3)]
    paths += [seeded(f"cla-s{seed}", seed, loss=2.0 + seed / 10, resident=0.5) for seed in range(3)]
    comparison = _compared(*paths)
    drawing = figure(comparison)
    renderer = FigureCanvasAgg(drawing).get_renderer()
    (axes,) = drawing.axes
    boxes = {t.get_text(): Text.get_window_extent(t, renderer) for t in axes.texts if t.get_text()}
    assert set(boxes) == {"mha", "cla"}
    for row in comparison.rows:
        at = axes.transData.transform((row.kv_resident, row.perplexity))
        assert not any(box.contains(*at) for box in boxes.values())
    perplexities = np.exp([2.0, 2.1, 2.2])
    mean, deviation = np.mean(perplexities), np.std(perplexities, ddof=1)
    bars = [segment for lines in axes.collections for segment in cast(Any, lines).get_segments()]
    assert any(np.allclose(bar[:, 1], [mean - deviation, mean + deviation]) for bar in bars)
