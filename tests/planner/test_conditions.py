"""Losses that `cllm plan` compares: those of models of one age and size, in windows of one length."""

from __future__ import annotations

import json

import pytest

from cllm.commands.cli import main
from cllm.errors import UserError
from cllm.planner.conditions import Conditions, choose_conditions
from cllm.planner.measured import Measurements
from cllm.planner.table import LossChange, Table, shipped_table

MHA, CLA = {"preset": "mha"}, {"preset": "cla"}


def loss(value, **about):
    return LossChange(**{"kv": CLA, "query_heads_per_kv_head": 1, "loss_change": value, **about})


def old(value, **about):
    return loss(value, **{"tokens": 490e6, "context": 4096, "parameters": 47e6, **about})


def test_the_conditions_are_those_of_most_measurements_and_of_equally_many_the_largest():
    young = [old(0.1, tokens=100e6), old(0.1, tokens=99e6), old(0.1, tokens=100e6)]
    assert choose_conditions([[old(1), *young]]).tokens == 100e6
    assert choose_conditions([[old(1), young[0]]]).tokens == 490e6
    windows = [old(1, context=1024), old(1, context=1024), old(1), *[old(1, tokens=1e6)] * 2]
    assert choose_conditions([windows]) == Conditions(tokens=490e6, context=1024, parameters=47e6)
    sizes = [old(1, parameters=40e6), old(1), old(1, parameters=332e6)]
    assert choose_conditions([sizes]).parameters == 47e6
    assert choose_conditions([[old(1)] * 9, []]) == choose_conditions([[], [old(1)]])
    assert choose_conditions([]) == Conditions()


def test_own_measurements_decide_and_those_that_say_nothing_leave_it_to_the_others():
    assert choose_conditions([[old(1, tokens=2e9)], [old(1)] * 9]).tokens == 2e9
    assert choose_conditions([[loss(1)], [old(1)]]) == Conditions(tokens=490e6, context=4096, parameters=47e6)


def test_given_conditions_are_taken_or_refused_with_those_that_are_measured():
    table = [old(1), old(1), old(1, tokens=128e6, context=1024)]
    assert choose_conditions([table], tokens=128e6).context == 1024
    with pytest.raises(UserError, match=r"--tokens is 1B; losses of these designs: 128M \(1\), 490M \(2\)"):
        choose_conditions([table], tokens=1e9)
    with pytest.raises(UserError, match=r"--window is 1,024; losses of these designs: 4,096 \(2\)"):
        choose_conditions([table], context=1024)


@pytest.mark.parametrize("other", [{"tokens": 128e6}, {"context": 1024}, {"parameters": 332e6}])
def test_a_loss_under_other_conditions_gives_no_value_no_range_and_no_sum(other):
    spec = {"spec": "int8", "ratio": 2.0}
    changes = [old(0.3, **other), old(-0.1, standard_error=0.01), old(0.5, **other, **spec), old(0.0, kv=MHA, **spec)]
    conditions = choose_conditions([[old(-0.1)] * 9])
    found = Measurements([Table(losses=changes)], conditions)
    key = changes[0].key
    design = found.design(key)
    assert (design.value, design.low, design.high) == pytest.approx((-0.1, -0.12, -0.08))
    assert found.compressions(key) == {}
    assert found.others({key}) == [changes[0], changes[2]]


def test_every_loss_of_a_table_is_of_one_age_and_the_others_are_named(tmp_path, capsys):
    """With the shipped measurements, some of which are of models after 100 M, 128 M and 490 M tokens."""
    config = tmp_path / "shape.yaml"
    config.write_text("model: {vocab_size: 100, d_model: 64, n_layers: 4, n_heads: 4}\ndata: {path: x}\n")
    words = f"plan --config {config} --gpu L4 --kv-heads 4 --designs mha cla fusedkv_lite".split()
    ages = {m.tokens for m in shipped_table().losses if m.kv.get("preset") in ("mha", "cla", "fusedkv_lite")}
    assert len(ages) == 3
    for chosen, more in ((490e6, []), (128e6, ["--tokens", "128M"]), (100e6, ["--tokens", "100M"])):
        assert main([*words, *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["conditions"]["tokens"] == chosen
        assert {m["tokens"] for c in found["candidates"] for m in c["measurements"]} == {chosen}
        (note,) = (line for line in found["notes"] if line.startswith("not compared with these"))
        assert all(f"(--tokens {age / 1e6:.0f}M)" in note for age in ages - {chosen})
    assert main([*words, "--tokens", "128M"]) == 0
    out = capsys.readouterr().out
    assert "\nlosses       models of 46.9 M parameters after 128 M training tokens, windows of 4,096 tokens\n" in out


def test_a_table_that_does_not_say_its_age_is_compared_and_named(tmp_path, capsys):
    config, table = tmp_path / "shape.yaml", tmp_path / "t.json"
    config.write_text("model: {vocab_size: 100, d_model: 64, n_layers: 4, n_heads: 4}\ndata: {path: x}\n")
    table.write_text(Table(losses=[loss(-0.5, source="t")]).model_dump_json())
    words = [
        "plan",
        "--config",
        str(config),
        "--gpu",
        "L4",
        "--designs",
        "mha",
        "cla",
        "--losses",
        str(table),
        "--json",
    ]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert next(c for c in found["candidates"] if c["design"] == "cla")["loss_change"] == -0.5
    assert found["conditions"]["tokens"] == 490e6
    says = "t does not say {} its losses were measured; they are compared as if alike."
    for what in ("after how many training tokens", "with which windows"):
        assert says.format(what) in found["notes"]
