"""Bytes of a sweep are stated in bf16, so that they do not depend on the dtype of the measurement."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from cllm.evaluate.comparison import compare, find_runs
from cllm.evaluate.pareto import TRAINED
from cllm.evaluate.posthoc import _bf16_nbytes
from cllm.posthoc.registry import parse
from cllm.train.summary import summarise

SPECS = [
    "none", "xkv:group=2,rank_k=3,rank_v=5", "svd:rank_k=3,rank_v=3", "minicache:start=0", "kvsharer:threshold=-1.0",
    "kivi:bits=4,group=8,residual=8", "xquant:bits=2,group=8,residual=8", "commonkv:group=2,rank=4",
    "int8", "fp8", "turboquant:bits=3,sketch=true", "kvquant:bits=3,outliers=0.05",
    "xkv:group=2,rank_k=8,rank_v=8+kivi:bits=4,group=8,residual=0",
]  # fmt: skip


def _compressed(model, ids, spec, filled):
    engine, cache = filled(model, ids)
    method = parse(spec)
    method.prepare(engine, ids)
    with method.watch(engine):
        again = engine.new_cache()
        engine.hidden(ids, again)
    return engine, engine.compress(again if method.watches else cache, method)


@pytest.mark.parametrize("kind", ["decoder", "llama"])
@pytest.mark.parametrize("spec", SPECS)
def test_stated_bytes_are_those_of_the_same_cache_in_bf16(spec, kind, decoder, llama, tokens, filled) -> None:
    model, ids = decoder() if kind == "decoder" else llama(), tokens(2, 24)
    engine, wide = _compressed(model, ids, spec, filled)
    stated = _bf16_nbytes(engine, wide, narrow=True)
    engine, narrow = _compressed(model.bfloat16(), ids, spec, filled)
    assert stated == engine.nbytes(narrow) == _bf16_nbytes(engine, narrow, narrow=False)
    assert stated < engine.nbytes(wide)


def test_recurrent_states_stay_fp32(design, tokens, filled, decoder) -> None:
    model = decoder(kv={"preset": "yoco", "lower": "retention"})
    engine, wide = filled(model, tokens(2, 24))
    stated = _bf16_nbytes(engine, wide, narrow=True)
    engine, narrow = filled(model.bfloat16(), tokens(2, 24))
    assert stated == engine.nbytes(narrow)
    assert {t.dtype for store in narrow.stores.values() for t in store.tensors().values()} == {
        torch.float32,
        torch.bfloat16,
    }


@pytest.mark.parametrize("preset", ["mha", "cla", "fusedkv", "mla"])
def test_a_comparison_and_a_sweep_state_the_same_bytes(preset, run, sweep, tmp_path, capsys) -> None:
    made, model = run(preset, kv={"preset": preset})
    config = made.config()
    made.summary_file.write_text(json.dumps(summarise(config, model)))
    made.metrics_file.write_text(json.dumps({"step": 20, "tokens": 960, "time": 1.0, "val/loss": 5.0}) + "\n")
    words = ["--device", "cpu", "--spec", "kivi:bits=8,group=8,residual=0", "--out", tmp_path / "out"]
    assert sweep(made.path, *words) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "posthoc.csv").open()))
    (row,) = compare(find_runs([made.path])).rows
    (trained,) = [float(found["bytes_per_token"]) for found in rows if found["spec"] == TRAINED]
    assert trained == row.kv_resident
    (share,) = [1 / float(found["ratio_to_mha"]) for found in rows if found["spec"] == TRAINED]
    assert share == pytest.approx(row.kv_resident_vs_mha)
    assert "| bytes/token, bf16 |" in capsys.readouterr().out
