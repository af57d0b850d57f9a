"""`python -m benchmarks.posthoc_decode` at sizes for a CPU: everything is timed, bounded, printed and written."""

from __future__ import annotations

import json

import pytest

from benchmarks.posthoc_decode import main

SIZES = {
    "tokens": 128, "tail": 4, "heads": 4, "kv-heads": 2, "dim": 16, "d-ff": 32, "layers": 2, "group": 2, "groups": 1,
    "rank-k": 12, "rank-v": 20, "select": 32, "outliers": 2, "local": 1, "prompt": 96,
}  # fmt: skip


@pytest.fixture
def bench():
    return lambda *words: main(["--device", "cpu", *map(str, words)])


def test_everything_is_timed_and_written(bench, tmp_path, capsys):
    out = tmp_path / "out.json"
    sizes = [word for name, value in SIZES.items() for word in (f"--{name}", value)]
    assert bench(*sizes, "--errors", "--out", out) == 0
    found = json.loads(out.read_text())
    assert found["settings"]["rank_k"] == 12
    assert {"torch", "commit"} <= set(found["environment"])
    decode = {row["name"]: row for row in found["rows"] if row["what"] == "decode"}
    exact = "32 tokens chosen, uncompressed values"
    assert list(decode) == ["uncompressed", "all tokens of the factors", "32 tokens chosen",
                            f"{exact} on the device", f"{exact} in host memory"]  # fmt: skip
    host = decode[f"{exact} in host memory"]
    values = 2 * (32 + 3 * 8) * 2 * 16  # chosen tokens and those always read, of 2 heads of 16 channels, 2 bytes each
    assert host["host_bound_ms"] == pytest.approx(1000 * values / host["host_copy_bytes_per_s"])
    assert host["read_bound_ms"] == decode[f"{exact} on the device"]["read_bound_ms"]
    assert host["times_bound"] == pytest.approx(
        host["ms"] / max(host[f"{what}_bound_ms"] for what in ("arithmetic", "read", "host"))
    )
    assert decode["all tokens of the factors"]["relative_error"] < 0.05, "bf16 beside the same keys and values made"
    compress = [row for row in found["rows"] if row["what"] == "compress"]
    assert compress[0]["name"].startswith("prefill of 2 layers")
    assert len({row["name"] for row in compress[1:]}) == 8
    assert all(row["share_of_prefill"] > 0 and 0 < row["largest_error"] < 1 for row in compress[1:])
    read = 2 * (128 * (12 + 20) + 32 * (12 + 20) + 2 * 4 * 32)  # A, both Bs and the tail, 2 bytes each
    read_ms = 1000 * read / found["copy_bytes_per_s"]
    assert decode["all tokens of the factors"]["read_bound_ms"] == pytest.approx(read_ms)
    assert "32 tokens chosen" in capsys.readouterr().out


def test_bad_sizes(bench, capsys):
    assert bench("--tokens", 0) == 2
    assert "--tokens is 0; allowed: 1 or more" in capsys.readouterr().err
