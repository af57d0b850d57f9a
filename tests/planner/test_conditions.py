"""Losses that `cllm plan` compares: those of models of one age and size, in windows of one length."""

from __future__ import annotations

import json

import pytest

from cllm.commands.cli import main
from cllm.errors import UserError
from cllm.planner.collect import read_losses, sweep_changes
from cllm.planner.conditions import Conditions, choose_conditions
from cllm.planner.measured import Measurements
from cllm.planner.table import LossChange, Table, shipped_table

MHA, CLA = {"preset": "mha"}, {"preset": "cla"}


def loss(value, **about):
    return LossChange(**{"kv": CLA, "query_heads_per_kv_head": 1, "loss_change": value, **about})


def old(value, **about):
    return loss(value, **{"tokens": 490e6, "context": 4096, "parameters": 47e6, "text": "novel", **about})


def test_the_conditions_are_those_of_most_measurements_and_of_equally_many_the_largest():
    young = [old(0.1, tokens=100e6), old(0.1, tokens=99e6), old(0.1, tokens=100e6)]
    assert choose_conditions([[old(1), *young]]).tokens == 100e6
    assert choose_conditions([[old(1), young[0]]]).tokens == 490e6
    windows = [old(1, context=1024), old(1, context=1024), old(1), *[old(1, tokens=1e6)] * 2]
    assert choose_conditions([windows]) == Conditions(
        tokens=490e6, context=1024, parameters=47e6, text="novel", base_model=""
    )
    sizes = [old(1, parameters=40e6), old(1), old(1, parameters=332e6)]
    assert choose_conditions([sizes]).parameters == 47e6
    assert choose_conditions([[old(1)] * 9, []]) == choose_conditions([[], [old(1)]])
    assert choose_conditions([]) == Conditions()


def test_own_measurements_decide_and_those_that_say_nothing_leave_it_to_the_others():
    assert choose_conditions([[old(1, tokens=2e9)], [old(1)] * 9]).tokens == 2e9
    assert choose_conditions([[old(1, context=None)], [old(1)]]).context == 4096


def test_given_conditions_are_taken_or_refused_with_those_that_are_measured():
    table = [old(1), old(1), old(1, tokens=128e6, context=1024)]
    assert choose_conditions([table], tokens=128e6).context == 1024
    with pytest.raises(UserError, match=r"--tokens is 1B; losses of these designs: 128M \(1\), 490M \(2\)"):
        choose_conditions([table], tokens=1e9)
    table.append(old(1, text="manuals", context=64))
    assert choose_conditions([table], context=64).text == "manuals", "the text of most losses with that window"
    with pytest.raises(UserError, match=r"--window is 1,024; losses of these designs: 64 \(1\), 4,096 \(2\)"):
        choose_conditions([table], context=1024)


@pytest.mark.parametrize(
    "other",
    [
        {"tokens": 128e6},
        {"context": 1024},
        {"parameters": 332e6},
        {"text": "manuals"},
        {"text": None},
        {"tokens": None},
        {"tokens": None, "base_model": "SmolLM2"},
        {"base_model": "SmolLM2"},
    ],
)
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
    """With the shipped measurements, some of which are of models after 100 M, 128 M, 250 M and 490 M tokens."""
    config = tmp_path / "shape.yaml"
    config.write_text("model: {vocab_size: 100, d_model: 64, n_layers: 4, n_heads: 4}\ndata: {path: x}\n")
    words = f"plan --config {config} --gpu L4 --kv-heads 4 --designs mha cla fusedkv_lite".split()
    ages = {m.tokens for m in shipped_table().losses if m.kv.get("preset") in ("mha", "cla", "fusedkv_lite")}
    assert len(ages) == 4
    for chosen, more in ((490e6, []), (128e6, ["--tokens", "128M"]), (100e6, ["--tokens", "100M"])):
        assert main([*words, *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["conditions"]["tokens"] == chosen
        assert {m["tokens"] for c in found["candidates"] for m in c["measurements"]} == {chosen}
        (note,) = (line for line in found["notes"] if line.startswith("not compared with these"))
        assert all(f"(--tokens {age / 1e6:.0f}M)" in note for age in ages - {chosen})
    assert main([*words, "--tokens", "128M"]) == 0
    out = capsys.readouterr().out
    assert (
        "\nlosses       models of 46.9 M parameters after 128 M training tokens, windows of 4,096 tokens, text " in out
    )


@pytest.fixture
def plan(tmp_path, capsys):
    """The JSON of `cllm plan` for a small shape, designs mha and cla, with losses of a table and of files."""

    def command(losses=(), *options, paths=()):
        config, table = tmp_path / "shape.yaml", tmp_path / "own.json"
        config.write_text("model: {vocab_size: 100, d_model: 64, n_layers: 4, n_heads: 4}\ndata: {path: x}\n")
        table.write_text(Table(losses=list(losses)).model_dump_json())
        words = ["plan", "--config", str(config), "--gpu", "L4", "--designs", "mha", "cla", "--kv-heads", "4"]
        own = [*map(str, paths), *([str(table)] if losses else [])]
        assert main([*words, "--losses", *own, *options, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return command


def changes_of(found):
    """The change of the loss of each candidate that has one, without the reference."""
    rows = {(c["design"], c["spec"]): c["loss_change"] for c in found["candidates"]}
    return {name: value for name, value in rows.items() if value is not None and name != ("mha", None)}


def test_a_table_that_says_neither_age_nor_text_is_compared_with_itself_only_and_named(plan):
    found = plan([loss(-0.5, source="t"), loss(0.25, source="t", spec="int8", ratio=2.0, kv=MHA)])
    assert changes_of(found) == {("cla", None): -0.5, ("mha", "int8"): 0.25}, "no shipped loss"
    assert found["conditions"]["tokens"] is None
    assert found["conditions"]["base_model"] == "models of t"
    says = "t does not say {} its losses were measured; they are compared with one another only."
    for what in ("after how many training tokens", "on which text"):
        assert says.format(what) in found["notes"]


def test_losses_on_two_texts_are_neither_ranked_nor_added_and_the_other_text_is_named(plan):
    """The best compression of one text says nothing beside a design's loss on another."""
    spec = {"spec": "int8", "ratio": 2.0}
    table = [old(-0.5), old(0.1, kv=MHA, **spec), old(-0.2, **spec, text="manuals"), old(9, text="manuals")]
    found = plan(table, "--no-shipped")
    assert changes_of(found) == {("cla", None): -0.5, ("mha", "int8"): 0.1}
    assert found["conditions"]["text"] == "novel"
    (note,) = (line for line in found["notes"] if line.startswith("not compared"))
    assert note == (
        'not compared with these: 2 losses of the same designs, 2 on other texts (--text NAME): "manuals" (2).'
    )
    found = plan(table, "--no-shipped", "--text", "manuals")
    assert changes_of(found) == {("cla", None): 9, ("cla", "int8"): 8.8}
    with pytest.raises(UserError, match=r'--text is "web"; losses of these designs: "manuals" \(2\), "novel" \(2\)'):
        choose_conditions([table], text="web")


def test_a_shipped_loss_is_not_added_to_an_own_one_on_another_text(plan):
    kept = {"kv": CLA, "tokens": 490e6, "context": 4096, "parameters": 47e6}
    found = plan([loss(-0.5, **kept, text="my text")])
    assert changes_of(found) == {("cla", None): -0.5}
    assert any('on other texts (--text NAME): "validation 592c6512044d" (' in line for line in found["notes"])


def record(**about):
    """A record of `evaluate --posthoc` on a model of Hugging Face."""
    return {"spec": "int8", "run": "Llama-A", "kind": "huggingface", "design": "mha", "window": 4096, "perplexity": 22,
            "uncompressed_perplexity": 20, "bf16_bytes_per_token": 10.0, "own_bf16_bytes_per_token": 20.0,
            "mha_bf16_bytes_per_token": 20.0, "set": "novels", "data_files": "a1", "trained_tokens": None,
            "parameters": 47_000_000, **about}  # fmt: skip


def test_a_model_without_training_tokens_is_compared_with_the_same_base_model_only(plan, tmp_path):
    path = tmp_path / "records.json"
    rows = [record(), record(spec="int4"), record(spec="fp8", parameters=48_000_000)]
    rows.append(record(spec="int4", run="Llama-B", perplexity=30))
    path.write_text(json.dumps({"rows": rows}))
    found = plan(paths=[path])
    of_a = pytest.approx(0.0953, abs=1e-4)
    assert changes_of(found) == {("mha", "int8"): of_a, ("mha", "int4"): of_a}, "neither Llama-B nor a shipped loss"
    assert found["conditions"]["base_model"] == "Llama-A"
    (note,) = (line for line in found["notes"] if line.startswith("not compared"))
    assert '1 of Llama-B (--base-model "Llama-B")' in note
    assert "1 of models of another size" in note, "a namesake with other parameters"
    assert "after 490 M training tokens (--tokens 490M)" in note
    assert changes_of(plan([], "--base-model", "Llama-B", paths=[path])).keys() == {("mha", "int4")}
    assert ("mha", "int8") not in changes_of(plan([], "--tokens", "128M", paths=[path]))
    with pytest.raises(UserError, match=r'--base-model is "C"; losses of these designs: "Llama-A" \(3\), "Llama-B"'):
        choose_conditions([read_losses(path).losses], base_model="C")


def test_records_say_their_text_and_older_ones_the_hash_of_its_files(tmp_path):
    path = tmp_path / "records.json"
    rows = [record(text="novels 0123"), record(), record(data_files=None), record(kind="run", trained_tokens=5)]
    path.write_text(json.dumps({"rows": rows}))
    found = read_losses(path).losses
    assert [m.text_name for m in found] == ["novels 0123", "novels, files a1", f"text of {path}", "novels, files a1"]
    assert [m.model_name for m in found] == ["Llama-A"] * 3 + [""]
    (of_row,) = sweep_changes(_file(path, record(novel=4)), {"text": "novel {novel}", "tokens": 7})
    assert (of_row.text, of_row.base_model) == ("novel 4", None)


def _file(path, row):
    path.write_text(json.dumps({"rows": [row]}))
    return path


def test_a_sweep_on_two_texts_compares_each_row_with_the_uncompressed_cache_on_its_text(tmp_path):
    path = tmp_path / "posthoc.csv"
    rows = ["as trained,1,1,20,a", "kivi,3,3,22,a", "as trained,1,1,40,b", "kivi,3,3,44,b"]
    head = "run,design,trained_tokens,spec,ratio_to_own,ratio_to_mha,perplexity,text\n"
    path.write_text(head + "".join(f"m,mha,,{row}\n" for row in rows))
    found = read_losses(path).losses
    assert [m.loss_change for m in found] == pytest.approx([0.0953, 0.0953], abs=1e-4)
    assert [(m.text, m.base_model) for m in found] == [("a", "m"), ("b", "m")]


def test_points_of_a_study_are_compared_with_mha_on_the_same_text(tmp_path):
    def point(name, loss, text, **data):
        model = {"vocab_size": 100, "d_model": 64, "n_layers": 4, "n_heads": 4, "kv": {"preset": name}}
        content = {"config": {"model": model, "data": data}, "loss": loss, "seed": 0, "tokens": 5}
        content |= {"data": "0123456789abcdef", "summary": {"parameters": 7}, **({"text": text} if text else {})}
        (tmp_path / f"{name}-{text and text[-1]}.json").write_text(json.dumps(content))

    for text, base in (("validation a", 3.0), ("validation b", 5.0)):
        point("mha", base, text)
        point("cla", base - 0.5, text)
    assert [(m.text, m.loss_change) for m in read_losses(tmp_path).losses] == [
        ("validation a", -0.5),
        ("validation b", -0.5),
    ]
    for path in tmp_path.iterdir():
        path.unlink()
    for name, loss in (("mha", 3.0), ("cla", 2.5)):
        point(name, loss, None)
    assert [m.text for m in read_losses(tmp_path).losses] == ["validation 0123456789ab"], "the validation of that data"
    for name, loss in (("mha", 3.0), ("cla", 2.5)):
        point(name, loss, None, validation={"books": "x"})
    assert [m.text for m in read_losses(tmp_path).losses] == [None], "a set of its own, with a digest that is not known"


def test_shipped_losses_have_a_text_and_models_of_others_their_name():
    for m in shipped_table().losses:
        assert m.text or m.source, "its text has a name"
        assert m.base_model == (None if m.tokens < 1e12 else "SmolLM2-135M-Instruct")
