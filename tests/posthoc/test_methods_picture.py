"""experiments.methods_picture: a table and a picture of what compressions cost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.methods_picture import Point, main

HEAD = "method,bf16_ratio,increase_percent\n"


def test_tables_and_records_become_one_table_and_a_picture(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(HEAD + '"xkv:group=5,ratio=2,svd=power",2.0,0.5\nint8,1.97,0\n')
    (tmp_path / "b.csv").write_text(
        HEAD + '"xkv:group=5,ratio=4,svd=power",4.0,2.5\n"snapkv:ratio=2+kivi:bits=4",6,9\n'
    )
    record = {"suite": "copying", "run": "m", "task": "all", "spec": "int8", "ratio_to_own": 1.97, "accuracy": 33.0}
    (tmp_path / "records.json").write_text(json.dumps({"rows": [record, record | {"run": "other"}]}))
    later = [record | {"accuracy": 44.0}, record | {"spec": "xkv:group=5,ratio=4,svd=power", "ratio_to_own": 4.1}]
    (tmp_path / "later.json").write_text(json.dumps({"rows": later}))
    words = [str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--out", str(tmp_path / "picture.png")]
    files = [str(tmp_path / name) for name in ("records.json", "later.json")]
    assert main([*words, "--copying", *files, "--run", "m"]) == 0
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "picture.md").read_text().splitlines()[2:] == [
        "| `int8` | 1.97 | +0.00 % | 33.0 |",
        "| `xkv:group=5,ratio=2,svd=power` | 2.00 | +0.50 % | |",
        "| `xkv:group=5,ratio=4,svd=power` | 4.00 | +2.50 % | 33.0 |",
        "| `snapkv:ratio=2+kivi:bits=4` | 6.00 | +9.00 % | |",
    ]


def test_records_of_evaluations_are_a_table_too(tmp_path: Path) -> None:
    lost = {"run": "m", "spec": "xkv:ratio=8", "increase_percent": 2.0, "own_bf16_bytes_per_token": 80.0}
    rows = [lost | {"bf16_bytes_per_token": 20.0}, lost | {"spec": "none", "bf16_bytes_per_token": 80.0}]
    rows.append(lost | {"spec": "svd:ratio=8", "bf16_bytes_per_token": 10.0, "increase_percent": 3.0})
    copied = {"suite": "copying", "run": "m", "task": "all", "ratio_to_own": 8.1, "accuracy": 33.0}
    rows += [copied | {"spec": spec} for spec in ("none", "svd:ratio=8", "xkv:ratio=8")]
    (tmp_path / "m.json").write_text(json.dumps({"rows": rows}))
    words = [str(tmp_path / "m.json"), "--copying", str(tmp_path / "m.json"), "--run", "m"]
    assert main([*words, "--out", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.md").read_text().splitlines()[2:] == [
        "| `xkv:ratio=8` | 4.00 | +2.00 % | |",
        "| `svd:ratio=8` | 8.00 | +3.00 % | 33.0 |",
        "| `xkv:ratio=8` | 8.10 | | 33.0 |",
    ]


def test_the_first_table_that_has_a_compression_counts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(HEAD + "h2o:ratio=4,4.0,2.5\nkvtc:ratio=4,2.0,0.5\n")
    (tmp_path / "b.csv").write_text(HEAD + "h2o:ratio=4,4.1,9.9\nkvtc:ratio=4,4.0,0.7\nint8,1.97,0.1\n")
    assert main([str(tmp_path / "a.csv"), str(tmp_path / "b.csv"), "--out", str(tmp_path / "picture.png")]) == 0
    assert (tmp_path / "picture.md").read_text().splitlines()[2:] == [
        "| `int8` | 1.97 | +0.10 % |",
        "| `kvtc:ratio=4` | 2.00 | +0.50 % |",
        "| `h2o:ratio=4` | 4.00 | +2.50 % |",
        "| `kvtc:ratio=4` | 4.00 | +0.70 % |",
    ]


def test_a_picture_is_of_one_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "two.json", tmp_path / "picture.png"
    row = {"spec": "int8", "increase_percent": 2.0, "own_bf16_bytes_per_token": 80.0, "bf16_bytes_per_token": 40.0}
    file.write_text(json.dumps({"rows": [row | {"run": "a"}, row | {"run": "b", "increase_percent": 7.0}]}))
    assert main([str(file), "--run", "b", "--out", str(out)]) == 0
    assert out.with_suffix(".md").read_text().splitlines()[2:] == ["| `int8` | 2.00 | +7.00 % |"]
    assert main([str(file), "--out", str(tmp_path / "other.png")]) == 2
    assert f"error: {file}: has records of a, b; select one with --run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "has no records; needed: a JSON object with a list of objects in `rows`"),
        ('{"rows": [3]}', "has no records"),
        ("{", "Expecting"),
        ('{"rows": [{"increase_percent": 1}]}', "a record has no 'own_bf16_bytes_per_token'"),
    ],
)
def test_records_that_cannot_be_read(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(text)
    assert main([str(tmp_path / "a.json"), "--out", str(tmp_path / "p.png")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Error(" not in error


def test_a_line_joins_compressions_that_differ_in_size_alone() -> None:
    specs = ["xkv:group=5,ratio=2", "xkv:ratio=8,svd=power", "xkv:ratio=8,codes=mixed", "snapkv:ratio=2+kivi:bits=4"]
    assert [Point(spec, 1.0, 0.0).series for spec in specs] == ["xkv", "xkv", "xkv codes=mixed", "snapkv+kivi"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method,ratio\nx,1\n", "has no column 'bf16_ratio'"),
        (HEAD + "x,much,1\n", "could not convert"),
        (HEAD + "x,0,1\n", "x: the ratio of bytes is 0.0; allowed: a positive number"),
        (HEAD + "x,2,nan\n", "x: the increase or share is nan; allowed: a finite number"),
        (HEAD + ",2,1\n", "a spec is ''"),
        (HEAD, "no rows"),
    ],
)
def test_tables_that_cannot_be_read(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.csv").write_text(text)
    assert main([str(tmp_path / "a.csv"), "--out", str(tmp_path / "p.png")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "p.png").exists()
