"""`python -m benchmarks.posthoc_methods` at sizes for a CPU: every method has a row, and a failure ends nothing."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest

from benchmarks import posthoc_methods
from benchmarks.posthoc_methods import SHAPES, Bench, TooLong, limit, main, specs
from cllm.posthoc.registry import methods, parse

METHODS = [
    "int8", "hf_quantized", "streaming:ratio=4", "asvd:ratio=4", "recompute", "snapkv:ratio=4+kivi:bits=4,residual=0",
]  # fmt: skip


@pytest.fixture
def bench(tmp_path):
    """The rows of a run with some options, and its exit status."""

    def run(*words):
        out = tmp_path / "out.json"
        status = main(["--device", "cpu", "--shapes", "45M", *map(str, words), "--out", str(out)])
        return json.loads(out.read_text())["rows"], status

    return run


def test_rows_of_methods_that_calibrate_record_or_do_neither(bench):
    rows, status = bench("--methods", *METHODS, "--calibration", 64)
    assert status == 0
    found = {(row["what"], row["method"]): row for row in rows}
    shape = SHAPES["45M"].small()
    assert found["prefill", "none"]["bytes"] == 2 * 2 * shape.layers * shape.tokens * shape.kv_heads * shape.dim
    assert found["compress", "streaming:ratio=4"]["ratio"] == 4
    assert found["compress", "recompute"]["ratio"] == pytest.approx(2, rel=0.05), "half the bytes, and exact sinks"
    assert "recorded_prefill_ms" in found["compress", "recompute"]
    assert found["compress", "asvd:ratio=4"]["calibration_tokens"] == 64
    assert not {"calibration_ms", "recorded_prefill_ms"} & found["compress", "int8"].keys()
    assert "serves transformers models only" in found["compress", "hf_quantized"]["failed"]
    assert [what for what, method in found if method == "hf_quantized"] == ["compress"]
    prefill, exact = found["prefill", "none"]["ms"], found["decode", "int8"]["exact_ms"]
    for (what, _), row in found.items():
        if "failed" not in row and what != "prefill":
            name, whole = {"compress": ("share_of_prefill", prefill), "decode": ("of_exact", exact)}[what]
            assert row[name] == row["ms"] / whole


def test_every_registered_method_has_a_row_and_can_be_parsed(monkeypatch):
    names = [parse(spec).name for spec in specs()]
    assert set(names) == set(methods())
    known = methods()
    monkeypatch.setattr(posthoc_methods, "methods", lambda: known | {"brand_new": object})
    assert "brand_new:ratio=4" in specs()


def test_what_comes_after_the_time_limit_is_recorded_as_failed(bench, monkeypatch):
    """By a clock that is 40 s later whenever it is read, 150 s are over before the second method."""
    clock = SimpleNamespace(monotonic=iter(range(0, 10**6, 40)).__next__)
    monkeypatch.setattr(posthoc_methods, "time", clock)
    rows, status = bench("--methods", "int8", "none")
    assert status == 0
    assert rows[-1]["method"] == "none"
    assert rows[-1]["failed"] == "no time was left"


def test_an_error_inside_of_a_method_is_a_row(bench, monkeypatch):
    compress = Bench.compress

    def fail(self, spec, made):
        if spec == "int8":
            raise RuntimeError("out of\nmemory")
        return compress(self, spec, made)

    monkeypatch.setattr(Bench, "compress", fail)
    rows, _ = bench("--methods", "int8", "none")
    found = {row["method"]: row for row in rows if row["what"] == "compress"}
    assert found["int8"]["failed"] == "RuntimeError: out of memory"
    assert found["none"]["ratio"] == 1


def test_a_limit_stops_what_catches_exceptions():
    def never_ends():
        while True:
            with contextlib.suppress(Exception):
                sum(range(1000))

    with pytest.raises(TooLong, match=r"more than 0\.05 s"), limit(0.05):
        never_ends()
