"""`cllm plan`: bytes and times by hand, losses only where measured, the front, and mistakes in options."""

from __future__ import annotations

import csv
import json
import math

import pytest

from cllm.commands.cli import main
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.plan.presets import preset_names
from cllm.planner.candidates import Candidate, Request, candidates, default_heads, designs, mark_front
from cllm.planner.collect import read_losses, sweep_changes
from cllm.planner.conditions import choose_conditions
from cllm.planner.gpus import GPU, find_gpu
from cllm.planner.keys import config_key
from cllm.planner.measured import Estimate, Measurements
from cllm.planner.report import NEAR, choose, notes
from cllm.planner.table import DecodeStep, LossChange, Table, shipped_table
from cllm.posthoc.registry import parse

MODEL = ModelConfig(vocab_size=100, d_model=64, n_layers=4, n_heads=4, d_ff=128, max_seq_len=1000)
"""Weights: 2 x 100 x 64, and a layer of 4 x 64 x 64 + 3 x 64 x 128 + 2 x 64, and a norm of 64."""
MHA_PARAMETERS = 2 * 6400 + 4 * (4 * 4096 + 3 * 8192 + 128) + 64
CLA = {"preset": "cla"}


def request_on(memory: float = 1e7, **changes: object) -> Request:
    return Request(**{"gpu": GPU("x", memory, 1e9, "-", ("NVIDIA H200",)), "context": 10, "concurrency": 3, **changes})


def change(kv: dict, value: float, *, heads: int | None = 1, **more: object) -> LossChange:
    return LossChange(kv=kv, query_heads_per_kv_head=heads, loss_change=value, **more)


def measured(*losses: LossChange, decode: tuple[DecodeStep, ...] = ()) -> Measurements:
    return Measurements([Table(losses=list(losses), decode=list(decode))], choose_conditions([losses]))


def made(
    words: list[str], table: Measurements, request: Request | None = None
) -> dict[tuple[str, str | None], Candidate]:
    found = candidates(designs(MODEL, words=words, heads=[4], own=False), request or request_on(), table)
    return {(c.design, c.spec): c for c in mark_front(list(found))}


def test_bytes_and_times_of_two_designs_by_hand():
    step = DecodeStep(
        kv={"preset": "mha"}, query_heads_per_kv_head=1, gpu="NVIDIA H200", bytes_read=4.8e9, step_s=0.0015
    )
    found = made(["mha", "cla"], measured(decode=(step,)))
    mha, cla = found["mha", None], found["cla", None]
    token = 2 * 4 * 64 * 2  # K and V of 4 layers, 64 channels, 2 bytes
    assert mha.parameters == MHA_PARAMETERS
    assert (
        cla.parameters == MHA_PARAMETERS - 2 * 2 * 4096 + 2 * 64
    )  # two layers own nothing, two have a norm for K and V
    assert mha.cache_bytes == 3 * 10 * token
    assert cla.cache_bytes == 3 * 10 * token // 2
    assert cla.cache_vs_mha == 0.5
    for c in (mha, cla):  # sharing saves no reads; the embedding is a lookup of one row a sequence
        assert c.read_bytes == 2 * (c.parameters - 6400 + 3 * 64) + 3 * 10 * token
        assert c.bound_s == c.read_bytes / 1e9
        assert c.step_s == pytest.approx(1.5 * c.bound_s)  # 1.5 ms where 4.8 GB at 4.8 TB/s take 1 ms
    assert (mha.factor_is_of_this_plan, cla.factor_is_of_this_plan) == (True, False)
    assert mha.most_sequences == int((1e7 * 0.95 - 2 * MHA_PARAMETERS) // (10 * token))


def test_only_measured_designs_have_a_loss_and_a_compression():
    table = measured(
        change(CLA, 0.25, standard_error=0.01),
        change({"preset": "mha"}, 0.5, spec="kivi:bits=4", ratio=4.0),
        change({"preset": "mha"}, 9.0, spec="svd:ratio=2"),  # its bytes are not known
        change({"preset": "gqa"}, 0.125, heads=2),
    )
    found = made(["mha", "cla", "gqa:n_kv_heads=2", "mqa", "fusedkv"], table)
    losses = {name: c.loss_change for name, c in found.items()}
    assert losses == {
        ("mha", None): 0, ("mha", "kivi:bits=4"): 0.5, ("cla", None): 0.25, ("gqa:n_kv_heads=2", None): 0.125,
        ("fusedkv", None): None,
    }  # fmt: skip
    assert found["cla", None].loss_range == pytest.approx((0.23, 0.27))
    assert found["gqa:n_kv_heads=2", None].loss_range is None, "one measurement has no uncertainty"
    assert found["mha", "kivi:bits=4"].cache_bytes == found["mha", None].cache_bytes // 4
    assert found["mha", "kivi:bits=4"].step_s is None, "no measured step reads a compressed cache"


def test_a_design_is_recognised_at_another_depth_but_not_with_other_kv_heads():
    kv = {"preset": "gqa", "n_kv_heads": 2}
    wide = ModelConfig(d_model=512, n_layers=7, n_heads=8, kv={**kv, "n_kv_heads": 4})
    assert config_key(ModelConfig(d_model=256, n_layers=4, n_heads=4, kv=kv)) == config_key(wide)
    other = ModelConfig(d_model=256, n_layers=4, n_heads=4, kv={"preset": "mha", "n_kv_heads": 2})
    assert config_key(other) == config_key(wide), "the same plan by another name"
    assert config_key(wide.model_copy(update={"kv": wide.kv.model_copy(update={"n_kv_heads": 2})})) != config_key(wide)


def test_a_default_that_is_written_out_is_the_default_at_any_depth():
    def key(n_layers: int, **kv: object) -> str | None:
        return config_key(ModelConfig(d_model=256, n_layers=n_layers, n_heads=4, kv={"preset": "swiftkv", **kv}))

    assert key(12, n_lower=6) == key(8, n_lower=4) == key(8)
    assert key(12, n_lower=4) != key(12)


def test_the_front_of_a_table_made_by_hand():
    one = next(iter(made(["mha"], measured()).values()))

    def point(n_bytes: int, loss: float | None, *, fits: bool = True) -> Candidate:
        values = {name: getattr(one, name) for name in Candidate.__dataclass_fields__}
        loss_of = None if loss is None else Estimate(value=loss, low=None, high=None, measurements=[])
        return Candidate(
            **{**values, "cache_bytes": n_bytes, "design_loss": loss_of, "is_reference": False, "fits": fits}
        )

    points = [
        (1, None, True),
        (2, 0.1, False),
        (3, 0.9, True),
        (4, 0.5, True),
        (4, 0.6, True),
        (5, 0.5, True),
        (6, 0.2, True),
    ]
    front = [(c.cache_bytes, c.loss_change) for c in mark_front([point(b, x, fits=f) for b, x, f in points]) if c.front]
    assert front == [(3, 0.9), (4, 0.5), (6, 0.2)]


def test_designs_loop_over_the_registry():
    assert default_heads(12) == [12, 6, 3, 1]
    found = designs(MODEL)
    assert {word.partition(":")[0] for word in found} <= {*preset_names(), "config"}
    plans = [repr(config.plan()) for config in found.values()]
    assert len(set(plans)) == len(plans)
    assert {"mha", "gqa", "mqa", "mha:n_kv_heads=1"} & found.keys() == {"mha", "gqa", "mqa"}, "each plan once"


def test_a_study_and_a_sweep_as_losses(tmp_path):
    def point(name: str, kv: dict, seed: int, loss: float, tokens: int = 5, *, search: bool = False) -> None:
        model = MODEL.model_dump(mode="json") | {"kv": kv}
        record = {"config": {"model": model}, "loss": loss, "seed": seed, "tokens": tokens, "data": "d"}
        record |= {"search": search, "summary": {"parameters": 7}}
        (tmp_path / f"{name}{seed}-{tokens}.json").write_text(json.dumps(record))

    for seed, (base, other) in enumerate([(3.0, 2.9), (3.2, 3.0)]):
        point("mha", {"preset": "mha"}, seed, base)
        point("cla", CLA, seed, other)
        point("mha", {"preset": "mha"}, seed, 5.0, 1, search=True)
        point("cla", CLA, seed, 4.0, 1, search=True)  # of the search for rates: not a change that the study compares
    (found,) = read_losses(tmp_path).losses
    assert found.loss_change == pytest.approx(-0.15)
    assert (found.standard_error, found.seeds) == (pytest.approx(0.05), 2)
    assert found.reach == pytest.approx(12.706 * 0.05, rel=1e-4), "as the study's own interval of two seeds"
    sweep = tmp_path / "posthoc.csv"
    head = "run,design,spec,ratio_to_own,ratio_to_mha,perplexity\n"
    sweep.write_text(head + "a,gqa,as trained,1,4,20\na,gqa,kivi,3,12,22\n")
    (found,) = read_losses(sweep).losses
    assert (found.query_heads_per_kv_head, found.ratio) == (4, 3)
    assert found.loss_change == pytest.approx(math.log(1.1))
    sweep.write_text(head + "a,gqa,as trained,1,4,20\na,gqa,kivi,3,4.5,22\n")
    with pytest.raises(UserError, match=r"mha.s cache is 1\.5 times"):
        read_losses(sweep)


@pytest.mark.parametrize(("key", "value"), [("parameters", "many"), ("context", 10**400)], ids=["word", "digits"])
def test_a_table_with_a_wrong_number_is_refused(tmp_path, key, value):
    entry = {"kv": {"preset": "cla"}, "loss_change": 0.1, "parameters": 1e6, "context": 64} | {key: value}
    (tmp_path / "t.json").write_text(json.dumps({"losses": [entry]}))
    with pytest.raises(UserError, match=r"--losses .*t\.json"):
        read_losses(tmp_path / "t.json")


def test_records_of_an_evaluation_as_losses(tmp_path):
    """Ratios are those of 16-bit caches; records of suites and of no compression are passed over."""
    one = {"spec": "int8", "run": "a", "design": "gqa", "window": 512, "perplexity": 22, "uncompressed_perplexity": 20,
           "bf16_bytes_per_token": 10.0, "own_bf16_bytes_per_token": 20.0, "mha_bf16_bytes_per_token": 60.0,
           "ratio_to_own": 4.0}  # fmt: skip
    suite = {**one, "suite": "language"}
    path = tmp_path / "records.json"
    path.write_text(json.dumps({"rows": [one, suite, {**one, "spec": "none"}, {"suite": "copying", "accuracy": 3}]}))
    (change,) = read_losses(path).losses
    assert (change.spec, change.ratio, change.context, change.query_heads_per_kv_head) == ("int8", 2.0, 512, 3)
    assert change.loss_change == pytest.approx(math.log(1.1))
    assert change.key == config_key(
        ModelConfig(d_model=96, n_layers=2, n_heads=6, kv={"preset": "gqa", "n_kv_heads": 2})
    )
    path.write_text(json.dumps({"rows": [{**one, "bf16_bytes_per_token": 0}]}))
    with pytest.raises(UserError, match="bytes of a record must be positive"):
        read_losses(path)
    del one["own_bf16_bytes_per_token"]
    path.write_text(json.dumps({"rows": [one]}))
    with pytest.raises(UserError, match="a record has no own_bf16_bytes_per_token"):
        read_losses(path)


def test_the_window_of_a_row_comes_before_what_is_said_about_all_rows(tmp_path):
    sweep = tmp_path / "posthoc.csv"
    head = "run,design,spec,ratio_to_own,ratio_to_mha,perplexity,window\n"
    sweep.write_text(head + "a,mha,as trained,1,1,20,\na,mha,kivi,3,3,22,1024\na,mha,int8,2,2,21,\n")
    assert [m.context for m in sweep_changes(sweep, {"context": 4096})] == [1024, 4096]


def test_records_and_sweeps_say_the_age_and_the_size_of_the_model(tmp_path):
    row = {"spec": "int8", "run": "a", "design": "gqa", "window": 512, "perplexity": 22, "uncompressed_perplexity": 20,
           "bf16_bytes_per_token": 10.0, "own_bf16_bytes_per_token": 20.0, "mha_bf16_bytes_per_token": 60.0,
           "trained_tokens": 5 * 10**8, "parameters": 7}  # fmt: skip
    records = tmp_path / "records.json"
    records.write_text(json.dumps({"rows": [row, {**row, "trained_tokens": None}]}))
    assert [(m.tokens, m.parameters, m.context) for m in read_losses(records).losses] == [(5e8, 7, 512), (None, 7, 512)]


def test_of_equal_measurements_the_first_counts_and_the_range_is_that_of_all():
    def of(value, ratio=2.0):
        return change({"preset": "mha"}, value, spec="int8", ratio=ratio)

    other = of(0.9, 3.0)  # of an fp32 cache, for example
    table = measured(of(0.2), of(0.1), other, of(0.4))
    found = table.compressions(other.key)["int8"]
    assert (found.value, found.low, found.high) == (0.2, 0.1, 0.4)


def test_a_short_list_has_the_front_and_the_nearest_of_other_methods():
    specs = {"svd:ratio=4": (0.2, 4), "svd:ratio=8": (0.3, 8), "int8": (0.25, 2), "fp8": (0.26, 2), "kivi": (0.6, 5),
             "kivi:bits=4": (0.21, 3), "svd:ratio=4+kivi": (0.9, 3.5)}  # fmt: skip
    table = measured(*(change({"preset": "mha"}, x, spec=spec, ratio=r) for spec, (x, r) in specs.items()))
    found = list(made(["mha"], table).values())
    assert {c.spec for c in found if c.front} == {None, "svd:ratio=4", "svd:ratio=8"}

    def listed(compressions):
        return [c.spec for c in choose(found, compressions=compressions, heads=False)]

    assert listed("front") == ["svd:ratio=8", "svd:ratio=4", None]
    assert listed("near") == ["svd:ratio=8", "svd:ratio=4", "svd:ratio=4+kivi", "kivi:bits=4", "fp8", "int8", None]
    assert len(listed("all")) == len(specs) + 1


def test_a_design_that_was_asked_for_is_listed_without_a_loss_too(tmp_path, capsys):
    config = tmp_path / "shape.yaml"
    config.write_text("model: {vocab_size: 100, d_model: 64, n_layers: 4, n_heads: 4}\ndata: {path: x}\n")
    words = f"plan --config {config} --gpu L4 --compression none --no-shipped --designs mha gqa:n_kv_heads=1".split()
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "\n   gqa:n_kv_heads=1  " in text
    assert "losses       none were measured on these designs" in text


def test_the_csv_has_the_conditions_of_each_loss(tmp_path, capsys):
    config = tmp_path / "shape.yaml"
    config.write_text("model: {vocab_size: 100, d_model: 64, n_layers: 4, n_heads: 4}\ndata: {path: x}\n")
    assert main(f"plan --config {config} --gpu L4 --designs mha cla pizza_top --kv-heads 4 --csv".split()) == 0
    for row in csv.DictReader(capsys.readouterr().out.splitlines()):
        known = row["measured_tokens"], row["measured_context"]
        assert known == (("490000000.0", "4096") if row["loss_change"] else ("", ""))


def test_with_a_run_the_table_is_short_and_all_lists_everything(tmp_path, capsys):
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30,
             "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152,
             "max_position_embeddings": 8192, "tie_word_embeddings": True}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(llama))
    words = ["plan", "--run", str(tmp_path), "--gpu", "L4", "--context", "4096"]

    def rows(*more):
        assert main([*words, *more]) == 0
        text = capsys.readouterr().out
        table = text.partition("design")[2].partition("\n\n")[0].splitlines()[1:]
        return [row.split() for row in table], text

    everything, _ = rows("--all")
    short, text = rows()
    assert len(everything) > 60
    front = [row for row in everything if row[0] == "*"]
    assert front == [row for row in short if row[0] == "*"]
    assert len(short) <= len(front) + NEAR + 1
    assert "compressions without *" in text
    assert f"{len(everything)} candidates, of which 0 do not fit; {len(everything) - len(short)} are not listed" in text
    svd, text = rows("--compression", "svd*")
    assert len(svd) == 1 + sum(any(word.startswith("svd:") for word in row) for row in everything)
    assert "compressions without *" not in text


def test_the_shipped_table_names_methods_and_plans_that_exist():
    table = shipped_table()
    for spec in {change.spec for change in table.losses if change.spec}:
        parse(spec)
    assert all(entry.key for entry in [*table.losses, *table.decode])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpu", "H101"], "--gpu is 'H101'; did you mean"),
        ([], "--gpu: missing"),
        (["--memory", "80"], "--memory is '80'; allowed: a positive number with a unit"),
        (["--memory", "80GB"], "--bandwidth: missing"),
        (["--gpu", "H100", "--gpus", "2"], "--gpus: unknown option"),
        (["--gpu", "H100", "--designs", "mga"], "--designs mga: unknown preset; did you mean"),
        (["--gpu", "H100", "--kv-heads", "3"], "--kv-heads is 3; allowed: divisors of model.n_heads 4"),
        (
            ["--gpu", "H100", "--compression", "zip*"],
            '--compression "zip*": no spec that was measured on models of',
        ),
        (["--gpu", "H100", "--tokens", "many"], "--tokens is 'many'; allowed: a number of tokens such as 300k"),
        (
            ["--gpu", "H100", "--tokens", "7M"],
            "--tokens is 7M; losses of these designs: 100M (",
        ),
        (["--gpu", "H100", "--tokens", "128M", "--window", "9"], "--window is 9; losses of these designs: 4,096 ("),
        (["--gpu", "H100", "--losses", "no.json"], "--losses no.json: cannot be read as JSON"),
        (["--gpu", "H100", "--json", "--csv"], "--csv: not allowed beside --json"),
    ],
)
def test_mistakes_name_the_option(tmp_path, capsys, options, message):
    config = tmp_path / "shape.yaml"
    config.write_text("model: {vocab_size: 100, d_model: 64, n_layers: 4, n_heads: 4}\ndata: {path: x}\n")
    assert main(["plan", "--config", str(config), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_command_prints_json_and_draws(tmp_path, capsys):
    config = tmp_path / "shape.yaml"
    config.write_text("model: {vocab_size: 100, d_model: 64, n_layers: 4, n_heads: 4}\ndata: {path: x}\n")
    words = ["plan", "--config", str(config), "--gpu", "L4", "--designs", "mha", "cla", "--kv-heads", "4", "1"]
    assert main([*words, "--json", "--picture", str(tmp_path / "a.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    cla = next(c for c in found["candidates"] if c["design"] == "cla" and c["spec"] is None)
    assert cla["loss_change"] == pytest.approx(cla["measurements"][0]["loss_change"])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--view", "heads"]) == 0
    out = capsys.readouterr().out
    assert "4 KV heads 1 KV heads" in " ".join(out.split())
    assert "extrapolated to" in out


def test_units():
    assert find_gpu(None, "75GiB", "2 TB/s").memory == 75 * 2**30
    assert find_gpu("h100", bandwidth="1TB/s").bandwidth == 1e12


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("rtx 4090", "RTX4090"),
        ("nvidia l4", "L4"),
    ],
)
def test_a_gpu_is_known_by_the_name_of_its_driver(name, gpu):
    assert find_gpu(name).name == gpu


def test_part_of_a_name_is_answered_with_the_gpus_that_begin_so():
    with pytest.raises(UserError, match="--gpu is 'a100'; allowed: A100-40GB or A100-80GB; or give --memory"):
        find_gpu("a100")
    with pytest.raises(UserError, match=r"--gpu is 'NVIDIA T4'; .*allowed"):
        find_gpu("NVIDIA T4")


@pytest.mark.parametrize(
    ("parameters", "context", "beyond"),
    [
        (1, 64, "160,960 parameters, any number of training tokens and 10 tokens of context"),
        (160960, 64, "any number of training tokens and 10 tokens of context"),
        (160960, 10, "any number of training tokens"),
    ],
)
def test_notes_name_what_is_extrapolated_and_designs_that_do_not_fit(parameters, context, beyond):
    table = measured(change(CLA, 0.1, tokens=5, context=context, parameters=parameters, source="t.json"))
    cla = made(["cla"], table)["cla", None]
    request = request_on(memory=cla.total_bytes / 0.95 + 1)
    found = list(made(["mha", "cla"], table, request).values())
    lines = notes(found, [c for c in found if c.fits], MODEL, request, table)
    size = next(c.total_bytes for c in found if not c.fits)
    assert f"do not fit without compression: mha ({size / 1e9:,.4g} GB)." in lines
    assert "losses from t.json." in lines
    assert f"losses are extrapolated to {beyond}." in lines


def test_methods_measured_on_other_designs_only_are_named():
    table = measured(change(CLA, 0.1, spec="kivi", ratio=2.0), change({"preset": "mha"}, 0.1, spec="int8", ratio=2.0))
    found = [c for c in made(["cla"], table).values() if c.spec is None]
    (line,) = (line for line in notes(found, found, MODEL, request_on(), table) if "post-hoc methods" in line)
    names = line.partition("methods ")[2].partition(":")[0].split(", ")
    assert "int8" in names
    assert "kivi" not in names
