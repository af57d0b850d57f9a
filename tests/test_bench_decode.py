"""`python -m benchmarks.decode` on a CPU: the same path as on a GPU, without CUDA graphs and compiling."""

from __future__ import annotations

import functools
import json
import operator
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from benchmarks.decode import benchmark, capacity, measure, peers
from benchmarks.decode.__main__ import main
from benchmarks.decode.designs import Point, parse_design, parse_points
from cllm.cache.accounting import cache_bytes
from cllm.cache.cache import KVCache
from cllm.cache.stores import FP8
from cllm.model.sizes import count_parameters

CPU = torch.device("cpu")
TINY = {
    "model": {"vocab_size": 50, "d_model": 32, "n_layers": 4, "n_heads": 4, "d_ff": 48, "max_seq_len": 64},
    "data": {"seq_len": 64},
}
QUICK = ("--device", "cpu", "--copy-gib", "0.001", "--repeat", "2")
PNG = b"\x89PNG"


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(TINY), encoding="utf-8")
    return str(file)


@pytest.fixture
def bench(tiny: str) -> Callable[..., int]:
    """Runs it on a tiny model and gives its exit status."""
    return lambda *arguments: main(["--config", tiny, *QUICK, *arguments])


@pytest.fixture
def design(tiny: str) -> Callable[..., Any]:
    """`design("fusedkv", "--model.n_layers", "2")`, at a point of 32 tokens."""
    points = (Point(32, 2),)
    return lambda word, *overrides: parse_design(word, [tiny], overrides, points)


def read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def test_everything_is_measured_printed_written_and_drawn(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, plots = tmp_path / "results" / "decode.json", tmp_path / "plots"
    designs = ["mha", "gqa:n_kv_heads=2@32x4", "fusedkv", "yoco:lower=retention", "mla:factor=2,storage=fp8"]
    status = bench(
        *("--designs", *designs, "--points", "32x2", "16x1", "--peers", "32x2", "--capacity", "0.001"),
        *("--capacity-context", "32", "--out", str(out), "--plots", str(plots), "--model.d_ff", "40"),
    )
    printed = capsys.readouterr()
    assert status == 0, printed.out
    found = read(out)
    assert found["environment"]["torch"]
    assert found["configs"]["mha"]["model"]["d_ff"] == 40, "settings reach every design"
    rows = {(row["design"], row["context"], row["batch"]): row for row in found["rows"]}
    labels = [word.partition("@")[0] for word in designs]
    expected = {(label, *point) for label in labels for point in ((16, 1), (32, 2))}
    expected -= {(labels[1], 16, 1), (labels[1], 32, 2)}
    expected |= {(labels[1], 32, 4), *((f"HF {kind}, eager (mha)", 32, 2) for kind in ("static", "dynamic"))}
    assert set(rows) == expected
    own = [row for row in found["rows"] if row["peer_of"] is None]
    for row in own:
        assert row["check"]["cosine"] > 0.999
        assert row["early_exit_cosine"] > 0.999
        assert row["ttft_ms"] > 0
        assert row["ttft_without_exit_ms"] > 0
        assert row["tokens_per_s"] == pytest.approx(1000 * row["batch"] / row["step_ms"])
        assert row["bound_ms"] == pytest.approx(1000 * row["bytes_read"] / found["copy_bytes_per_s"])
        assert row["step_vs_bound"] == pytest.approx(row["step_ms"] / row["bound_ms"])
    # 4 layers x 2 tensors x 32 channels x 2 bytes a token; fusedkv: 2 owners, read 2 x 1 + 2 x 2 times
    mha, fused = rows["mha", 32, 2], rows["fusedkv", 32, 2]
    assert (mha["cache_bytes"], mha["kv_read_per_token"]) == (512 * 64, 512)
    assert (fused["kv_resident_per_token"], fused["kv_written_per_token"], fused["kv_read_per_token"]) == (
        256,
        256,
        768,
    )
    assert fused["ttft_vs_baseline"] == pytest.approx(fused["ttft_ms"] / mha["ttft_ms"])
    assert rows["gqa:n_kv_heads=2", 32, 4]["step_vs_baseline"] is None, "no baseline at that point"
    for kind in ("static", "dynamic"):
        peer = rows[f"HF {kind}, eager (mha)", 32, 2]
        assert peer["step_vs_design"] == pytest.approx(peer["step_ms"] / mha["step_ms"])
        assert (peer["bytes_read"], peer["cache_bytes"]) == (mha["bytes_read"], mha["cache_bytes"])
    largest = {row["design"]: row for row in found["capacity"]}
    assert largest["fusedkv"]["batch_vs_baseline"] > 1.9
    assert largest["fusedkv"]["batch"]["tokens_per_s"] > 0
    assert not found["not_measured"]
    for line in ("fusedkv 32x2: cosine", "HF static, eager (mha) against mha at 32x2", "batches at 32 tokens"):
        assert line in printed.out
    assert "mla:factor=2,storage=fp8 16x1 time to first token" in printed.err
    for folder in (out.parent, plots):
        for name in ("decode-memory.png", "decode-tokens.png"):
            assert (folder / name).read_bytes()[:4] == PNG


def test_generate_is_timed_as_users_call_it(bench: Callable[..., int], tmp_path: Path, capsys) -> None:
    """At a context beyond the config's, for designs and the peer of those that are a Llama."""
    out = tmp_path / "out.json"
    common = ("--points", "80x2", "--no-ttft", "--generate", "12", "--out", str(out))
    assert bench("--designs", "mha", "fusedkv", *common, "--peers") == 0
    found = {row["design"]: row for row in read(out)["generated"]}
    assert list(found) == ["generate (mha)", "HF generate (mha)", "generate (fusedkv)"]
    for row in found.values():
        low, high = row["generate_ms_range"]
        assert 0 < low <= row["generate_ms"] <= high
        assert row["generate_tokens_per_s"] == pytest.approx(2000 / row["generate_ms"])
        assert row["generate_settled_after_ms"] > low
    assert found["HF generate (mha)"]["peer_of"] == "mha"
    assert "generate (fusedkv)" in capsys.readouterr().out
    for few in ("8", "80"):
        assert bench("--designs", "mha", "--points", "80x2", "--generate", few) == 2
        assert f"--generate is {few}; allowed: 9 to 79" in capsys.readouterr().err


def test_files_of_several_runs_become_one_table_and_one_figure(
    bench: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One has the baseline and a design with it, the other a third and the second again."""
    a, b, both = (tmp_path / name for name in ("a.json", "b.json", "both.json"))
    common = ("--points", "16x1", "--no-ttft", "--capacity", "0.001", "--capacity-context", "32")
    assert bench("--designs", "cla", "fusedkv", *common, "--out", str(b)) == 0
    assert bench("--designs", "mha", "cla", *common, "--out", str(a)) == 0
    capsys.readouterr()
    assert bench("--merge", str(a), str(b), "--out", str(both)) == 0
    found, first, second = read(both), read(a), read(b)
    assert [row["design"] for row in found["rows"]] == ["mha", "cla", "fusedkv"]
    assert [row["design"] for row in found["capacity"]] == ["mha", "cla", "fusedkv"]
    assert found["rows"][1]["step_ms"] == first["rows"][1]["step_ms"], "what comes again is taken once"
    fused = found["rows"][2]
    assert fused["bound_ms"] == second["rows"][1]["bound_ms"], "beside its own copy"
    assert second["rows"][1]["step_vs_baseline"] is None
    assert fused["step_vs_baseline"] == pytest.approx(fused["step_ms"] / found["rows"][0]["step_ms"])
    assert found["capacity"][2]["batch_vs_baseline"] > 1.9
    assert found["copies"] == {"a.json": first["copy_bytes_per_s"], "b.json": second["copy_bytes_per_s"]}
    assert set(found["configs"]) == {"mha", "cla", "fusedkv"}
    assert both.with_name("both-memory.png").read_bytes().startswith(PNG)
    assert "fusedkv" in capsys.readouterr().out

    second["settings"]["repeat"] = 99
    b.write_text(json.dumps(second), encoding="utf-8")
    assert bench("--merge", str(a), str(b)) == 2
    assert "settings is" in capsys.readouterr().err
    b.write_text("[]", encoding="utf-8")
    assert bench("--merge", str(a), str(b)) == 2
    assert "b.json: not a file that benchmarks.decode --out wrote" in capsys.readouterr().err


def test_a_contender_that_fails_is_a_row_and_the_others_go_on(
    bench: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = benchmark.measure_point

    def fails(decoder, design, *rest):
        if design.label == "cla":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried")
        return step(decoder, design, *rest)

    monkeypatch.setattr(benchmark, "measure_point", fails)
    out = tmp_path / "out.json"
    assert bench("--designs", "cla", "mha", "--points", "16x1", "--no-ttft", "--out", str(out)) == 1
    cla, mha = read(out)["rows"]
    assert cla["error"] == "OutOfMemoryError: CUDA out of memory. Tried"
    assert "step_ms" not in cla
    assert mha["step_ms"] > 0
    assert "cla 16x1 step failed: OutOfMemoryError" in capsys.readouterr().out


def test_after_the_time_limit_nothing_new_starts_and_what_there_is_is_written(
    bench: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that moves by a second each time it is read: the first measurement starts before the limit."""
    seconds = iter(range(1000))
    monkeypatch.setattr(time, "monotonic", lambda: next(seconds))
    out = tmp_path / "out.json"
    status = bench("--designs", "mha", "--points", "16x1", "32x1", "--time-limit", "2", "--out", str(out))
    found = read(out)
    assert status == 1
    first, second = found["rows"]
    assert first["step_ms"] > 0
    assert second["error"] == "not measured: the time limit of 2 s"
    steps = ["mha 32x1 step", "mha 16x1 time to first token", "mha 32x1 time to first token"]
    assert found["not_measured"] == steps
    assert (tmp_path / "out-tokens.png").read_bytes()[:4] == PNG


@pytest.mark.parametrize("word", ["mha", "cla", "yoco:window=20", "fusedkv", "fusedkv_lite", "mla", "mha:storage=fp8"])
def test_the_check_of_decoding_sees_one_wrong_slot(
    design: Callable[..., Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys or the values of any one owner with the wrong sign; weights as large as a width of 1024 makes them."""
    asked = design(word, "--model.init.std", "0.11")
    decoder = measure.build(asked.config, CPU)

    def check() -> dict[str, Any]:
        cache = KVCache(asked.model, max_len=32, storage=asked.storage)
        return measure.check_decoding(decoder, cache, 2)["check"]

    assert check()["cosine"] > 0.999
    eager, plan = measure.eager_step, asked.model.plan()
    for owner in plan.owners:
        parts = ["k"] if any(owner in plan.keys(i).layers for i in range(4)) else []
        parts += ["v"] if any(owner in plan.values(i).layers for i in range(4)) else []
        for part in parts:

            def broken(decoder, cache, owner=owner, part=part):
                def step(tokens):
                    tensor = getattr(cache.stores[owner].slot, part)
                    tensor.copy_(-tensor.float())
                    return eager(decoder, cache)(tokens)

                return step

            monkeypatch.setattr(measure, "make_step", broken)
            with pytest.raises(RuntimeError, match="decoding is not right"):
                check()


def test_every_timed_step_is_at_the_last_place_of_the_context(design: Callable[..., Any]) -> None:
    asked = design("yoco:window=8")
    decoder = measure.build(asked.config, CPU)
    cache = KVCache(asked.model, max_len=32)
    measure.fill(decoder, cache, 2)
    places = []
    decoder.blocks[0].register_forward_pre_hook(lambda _, args: places.append(args[1].positions.tolist()))
    row = measure.measure_step(decoder, cache, 5)
    assert len(places) > 5
    assert all(place == [[31]] for place in places)
    assert row["step_ms_range"][0] <= row["step_ms"] <= row["step_ms_range"][1]


def test_a_cache_of_another_size_than_accounting_says_is_refused(
    design: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = design("mha")
    decoder, cache = measure.build(asked.config, CPU), KVCache(asked.model, max_len=32)
    measure.fill(decoder, cache, 2)
    monkeypatch.setattr(measure, "cache_bytes", lambda *args, **kwargs: cache_bytes(*args, **kwargs) + 1)
    with pytest.raises(RuntimeError, match=r"the cache has 32768 bytes, and accounting\.cache_bytes says 32769"):
        measure.measure_step(decoder, cache, 1)


@pytest.mark.parametrize("word", ["fusedkv", "mla", "yoco:window=8", "yoco:lower=retention", "mha:storage=fp8"])
def test_a_filled_cache_holds_drawn_numbers_everywhere(
    design: Callable[..., Any], word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_PIECE", 100)
    asked = design(word)
    decoder = measure.build(asked.config, CPU)
    cache = KVCache(asked.model, max_len=32, storage=asked.storage)
    measure.fill(decoder, cache, 2)
    assert cache.column is not None
    assert (cache.seen, cache.column.tolist()) == (31, [31])
    for store in cache.stores.values():
        for name, tensor in store.tensors().items():
            numbers = tensor.float()
            assert numbers.isfinite().all()
            assert (numbers != 0).float().mean() > 0.97, "one in 127 is 0 in fp8"
            assert numbers.flatten()[-8:].unique().numel() > 1
            if name.endswith("_scale"):
                assert numbers.min() > 0
            else:
                assert -0.2 < (numbers > 0).float().mean() - 0.5 < 0.2
            if tensor.dtype == FP8:
                assert numbers.abs().max() > 256


def test_fusion_weights_stay_in_fp32_and_every_source_counts(design: Callable[..., Any]) -> None:
    decoder = measure.build(design("fusedkv").config, CPU)
    fused = [p for name, p in decoder.named_parameters() if ".keys." in name or ".values." in name]
    assert len(fused) == 4
    assert all(p.dtype == torch.float32 and bool((p != 0).all()) for p in fused)
    assert all(p.dtype == torch.bfloat16 for p in decoder.parameters() if all(p is not f for f in fused))


@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_step_reads_every_weight_but_embeddings_of_other_tokens(design: Callable[..., Any], tied: str) -> None:
    """50 x 32 rows of embedding and head in bf16; 3 sequences look up a row each."""
    asked = design("mha", "--model.tie_embeddings", tied)
    decoder = measure.build(asked.config, CPU)
    layers = 4 * (4 * 32 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    rows = 50 + (0 if tied == "true" else 3)
    point = Point(16, 3)
    read = measure.bytes_read(decoder, decoder.embed, decoder.head, 512.0, point)
    assert read == 2 * (layers + rows * 32) + 512 * 16 * 3


def test_a_long_prefill_is_timed_once(design: Callable[..., Any]) -> None:
    asked = design("fusedkv")
    decoder = measure.build(asked.config, CPU)
    point = asked.points[0]
    once = measure.measure_first_token(decoder, asked, point, chunk=8, limit=0)
    assert (once["ttft_cold"], once["chunk"]) == (True, 4)
    often = measure.measure_first_token(decoder, asked, point, chunk=1000, limit=1000)
    assert (often["ttft_cold"], often["ttft_without_exit_cold"]) == (False, False)


def test_early_exit_that_changes_the_result_is_an_error(
    design: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = design("fusedkv")
    decoder = measure.build(asked.config, CPU)
    prefill = decoder.prefill
    monkeypatch.setattr(decoder, "prefill", lambda ids, cache, chunk: prefill(ids[:, :-1], cache, chunk=chunk))
    with pytest.raises(RuntimeError, match="early exit is not exact"):
        measure.measure_first_token(decoder, asked, asked.points[0], chunk=8)


# ---- capacity --------------------------------------------------------------------------------------------------------


def test_the_largest_is_the_largest() -> None:
    for limit in (1, 2, 7, 8, 40):
        for most in range(limit + 3):
            assert capacity.largest(functools.partial(operator.ge, most), limit) == min(most, limit)


def search(asked: Any, room: int, measured: dict[int, int]) -> Any:
    """A search whose budget leaves `room` bytes beside the weights."""
    decoder = measure.build(asked.config, CPU)
    weights = measure.weight_bytes(decoder)
    return capacity.Search(asked, decoder, weights + room, measured, 1)


def test_capacity_is_as_much_as_fits_and_no_more(design: Callable[..., Any]) -> None:
    """512 bytes a token: 1000 tokens are 15 times 64 and a rest, and 31 sequences of 32."""
    found = search(design("mha"), 512 * 1000, {})
    assert found.context()["context"] == 15 * 64
    batch = found.batch(32)
    assert (batch["batch"], batch["context"]) == (31, 32)
    assert batch["used_bytes"] == found.weights + 512 * 31 * 32
    assert len(batch["tried"]) == 1


def test_what_a_step_needs_is_expected_from_other_points_and_corrected_by_the_run(
    design: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step that needs 1000 bytes a sequence: 17,384 with its 32 tokens of 512 bytes, 5 of them in 100,000."""
    asked = design("mha")
    for measured in ({}, {1: 500}, {2: 2000}, {1: 40000}):
        found = search(asked, 100_000, measured)

        def run(point, eager, found=found):
            return {"used_bytes": found.weights + found.cache(point.context, point.batch) + 1000 * point.batch}

        monkeypatch.setattr(found, "_run", run)
        result = found.batch(32)
        assert result["batch"] == 5, measured
        assert result["used_bytes"] <= found.budget


def test_a_size_that_did_not_fit_is_not_tried_again(
    design: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 5 sequences on a step needs 30,000 bytes more: 6 fit by size, 4 fit, 5 do not."""
    found = search(design("mha"), 100_000, {})

    def run(point, eager):
        extra = 30_000 if point.batch > 4 else 0
        return {"used_bytes": found.weights + found.cache(point.context, point.batch) + extra}

    monkeypatch.setattr(found, "_run", run)
    result = found.batch(32)
    assert result["batch"] == 4
    assert [tried["point"] for tried in result["tried"]] == ["32x6", "32x4", "32x5"]


def test_a_budget_within_a_page_of_what_is_allocated_is_met(
    design: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page is ten times 64 tokens of 512 bytes: the last ten sizes below 1000 pages all need the last one."""
    page = 10 * 64 * 512
    found = search(design("mha"), 1000 * page - 1000, {})

    def run(point, eager):
        return {"used_bytes": found.weights + -(-found.cache(point.context, point.batch) // page) * page}

    monkeypatch.setattr(found, "_run", run)
    result = found.context()
    assert [tried["used_bytes"] > found.budget for tried in result["tried"][:2]] == [True, True]
    assert 9970 * 64 < result["context"] <= 9990 * 64
    assert result["used_bytes"] <= found.budget


def test_overhead_is_what_a_peak_leaves_of_weights_and_cache() -> None:
    rows = [
        {"batch": 1, "peak_bytes": 115, "weight_bytes": 100, "cache_bytes": 10},
        {"batch": 1, "peak_bytes": 129, "weight_bytes": 100, "cache_bytes": 20},
        {"batch": 4, "peak_bytes": 220, "weight_bytes": 100, "cache_bytes": 80},
        {"batch": 8, "error": "failed"},
        {"batch": 8, "peak_bytes": None},
    ]
    measured = capacity.overhead(rows)
    assert measured == {1: 9, 4: 40}
    assert capacity.expected_overhead(measured, 2) == 40
    assert capacity.expected_overhead(measured, 16) == 160
    assert capacity.expected_overhead({}, 16) == 0


def test_a_budget_below_the_weights_and_a_cache_that_does_not_grow_are_told(design: Callable[..., Any]) -> None:
    with pytest.raises(RuntimeError, match="nothing fits"):
        search(design("mha"), -1, {}).context()
    assert "unbounded" in search(design("mha:window=16"), 512 * 20, {}).context()


# ---- peers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "heads"),
    [
        *(("mha", 4), ("gqa", 2), ("gqa:n_kv_heads=1", 1), ("mqa", 1)),
        *((word, None) for word in ("mha:window=8", "mha:kv_norm=true", "cla", "fusedkv_lite", "yoco", "mla")),
    ],
)
def test_only_plans_that_a_llama_has_get_a_peer_of_the_same_size(
    design: Callable[..., Any], word: str, heads: int | None
) -> None:
    asked = design(word)
    assert peers.llama_heads(asked.model) == heads
    assert peers.llama_heads(asked.model.model_copy(update={"scale_embeddings": True})) is None
    if heads is not None:
        llama = peers.build_llama(asked.model, heads, 32, CPU)
        assert count_parameters(llama) == count_parameters(measure.build(asked.config, CPU))
        assert all(p.dtype == torch.bfloat16 for p in llama.parameters())


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_peers_decode_what_a_forward_over_all_tokens_gives(design: Callable[..., Any], kind: str) -> None:
    """A cache that is rewound before the last token holds the tokens before it, and nothing else."""
    asked = design("gqa")
    model = peers.build_llama(asked.model, 2, 32, CPU)
    point = Point(20, 2)
    cache, rewind = getattr(peers, f"_{kind}")(model, point, CPU)
    ids = torch.randint(50, (2, 20))
    with torch.no_grad():
        expected = model(input_ids=ids).logits[:, -1]
        for layer in cache.layers:
            if kind == "static":
                layer.cumulative_length.zero_()
            else:
                layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]
        model(input_ids=ids[:, :19], past_key_values=cache, use_cache=True)
        for _ in range(3):
            rewind()
            assert int(cache.get_seq_length()) == 19
            out = model(input_ids=ids[:, 19:], past_key_values=cache, use_cache=True).logits[:, -1]
        assert int(cache.get_seq_length()) == 20
    cosine = torch.nn.functional.cosine_similarity(out.float(), expected.float(), dim=-1)
    assert cosine.min() > 0.999


# ---- what is asked ---------------------------------------------------------------------------------------------------


def test_designs_carry_settings_and_points_of_their_own(tiny: str) -> None:
    parse, point = parse_design, Point
    everybody = parse_points(["64x4", "32x1", "64x1", "32x1"], "--points")
    assert everybody == (point(32, 1), point(64, 1), point(64, 4)), "each once, fewest tokens first"
    found = parse("fusedkv:n_storage=3,sources=[1, 2],storage=fp8@128x2,16x1", [tiny], [], everybody)
    assert (found.label, found.storage) == ("fusedkv:n_storage=3,sources=[1, 2],storage=fp8", "fp8")
    assert found.model.plan().owners == (0, 1, 2)
    assert found.model.plan().reads(3) == (1, 2)
    assert found.points == (point(16, 1), point(128, 2))
    assert parse("gqa", [tiny], [], everybody).points == everybody
    baselines = ["mha", "gqa:n_kv_heads=4", "mha:storage=fp8", "gqa", "cla"]
    assert [parse(word, [tiny], [], everybody).is_baseline for word in baselines] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--designs", "fusedvk"], '--designs fusedvk: configs/kv/ has no fusedvk.yaml; did you mean "fusedkv"?'),
        (["--designs", "gqa:n_kv_heads"], '--designs gqa:n_kv_heads: "n_kv_heads" is not of the form KEY=VALUE'),
        (["--designs", "gqa:heads=2"], "model.kv.heads: unknown key"),
        (["--designs", "mha:storage=int4"], "--designs mha:storage=int4: storage is int4; allowed: model, fp8"),
        (["--designs", "mha@1k"], "--designs mha@1k: '1k' is not of the form CONTEXTxBATCH"),
        (["--designs", "mha", "mha@16x1"], "--designs names mha twice"),
        (["--points", "15x1"], "--points: the context of 15x1 is 15; allowed: 16 or more"),
        (["--peers", "16"], "--peers: '16' is not of the form CONTEXTxBATCH"),
        (["--capacity", "0"], "--capacity is 0.0; allowed: more than 0"),
        (["--model.vocab_size", "null"], "model.vocab_size is null"),
        (["--model.nosuch", "1"], "model.nosuch: unknown key"),
    ],
)
def test_mistakes_are_told_in_a_line_before_anything_is_measured(
    bench: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "out.json"
    assert bench(*arguments, "--out", str(out)) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert not out.exists()


def test_a_gpu_is_asked_for_unless_the_cpu_is(
    tiny: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--config", tiny]) == 2
    assert "times a GPU, and torch sees none here; --device cpu" in capsys.readouterr().err
