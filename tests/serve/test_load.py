"""`python -m benchmarks.serve`: the load test of transformers' engine with a cache that binds."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import serve, serve_batching
from cllm.errors import UserError


def test_half_the_cache_holds_twice_the_tokens(tmp_path: Path, capsys) -> None:
    words = "--engine transformers --designs mha fusedkv --requests 13 --concurrency 12 --prompt 120 --new 8"
    sizes = "--cache-mib 1 --d-model 64 --layers 4 --heads 2 --vocab 256 --chunk 256"
    assert serve.main([*f"{words} {sizes}".split(), "--out", str(tmp_path / "load.json")]) == 0
    mha, fusedkv = json.loads((tmp_path / "load.json").read_text())["rows"]
    assert mha["cached"] == 2**20 // (2 * 4 * 64 * 4)
    assert fusedkv["cached"] == 2 * mha["cached"]
    assert mha["nbytes"] == mha["predicted"] == 2 * fusedkv["predicted"] == 2 * fusedkv["nbytes"]
    assert mha["most"]["requests"] == 4, "four requests of 128 tokens fit 512"
    assert fusedkv["most"]["tokens"] >= 1.9 * mha["most"]["tokens"]
    assert abs(fusedkv["parameters"] / mha["parameters"] - 1) < 0.02
    table = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[8] for line in table[2:]] == ["1.00", "2.00"]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "no token came for 300 seconds"),
        (SimpleNamespace(error="out of pages"), "a request failed: out of pages"),
    ],
)
def test_a_request_without_an_answer_is_an_error(output, message) -> None:
    with pytest.raises(UserError, match=message):
        serve_batching._next(SimpleNamespace(get_result=lambda timeout: output))
