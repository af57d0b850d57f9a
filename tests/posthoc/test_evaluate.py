"""evaluate.py --posthoc: the score depends on the compression, and reported bytes are those stored."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from cllm.cache.cache import KVCache
from cllm.data.store import TokenStore
from cllm.evaluate.posthoc import Measurement, _Reference, _score, _Scored, _Tally, _warm
from cllm.evaluate.result_folders import results_of_checkpoint
from cllm.posthoc import compress
from cllm.posthoc.cache import compress_cache
from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import parse


def _scored(specs):
    return [_Scored(spec, parse(spec)) for spec in specs]


def _record(run, spec, *, prefix=24, window=48, **more):
    point = Measurement(set_name="validation", spec=spec, prefix=prefix, window=window, **more)
    return json.loads(point.path(run.path / "evaluation").read_text())


def test_the_file_of_a_record_names_all_settings(tmp_path):
    point = Measurement(set_name="books", spec="xkv:group=4,ratio=2+kivi:bits=4", prefix=24, window=48)
    folder, name = tmp_path / "posthoc" / "books", "xkv-group=4-ratio=2+kivi-bits=4-p24-w48"
    assert point.path(tmp_path) == folder / f"{name}.json"
    point = dataclasses.replace(point, max_tokens=100, generate=8, checkpoint="step-00000020.ckpt")
    assert point.path(tmp_path) == folder / f"{name}-n100-g8-step-00000020.json"


@pytest.fixture
def scored(evaluate, run):
    """Records of a run by spec."""

    def score(*specs, kv=None, data=None):
        made, model = run(kv=kv, data=data)
        words = [word for spec in specs for word in ("--posthoc", spec)]
        assert evaluate("--run", made.path, "--device", "cpu", *words) == 0
        return {spec: _record(made, spec) for spec in specs}, made, model

    return score


def test_the_score_sees_the_compression(scored, capsys):
    full_rank = "xkv:group=4,rank_k=24,rank_v=24"
    specs = ("none", "xkv:group=4,ratio=1", full_rank, "xkv:energy=1.0,recompress=8", "xkv:rank_k=1,rank_v=1")
    records, _, _ = scored(*specs, "recompute:every=8")
    none, one, full, again, ruined, joined = records.values()
    assert joined["loss"] == pytest.approx(none["loss"], abs=1e-4)
    assert joined["end_ratio_to_own"] > 1.5
    assert none["loss"] == none["uncompressed_loss"] == one["loss"]
    assert none["errors"]["0"] == {"k": 0.0, "v": 0.0}
    assert full["loss"] == pytest.approx(none["loss"], abs=1e-4)
    assert again["loss"] == pytest.approx(none["loss"], abs=1e-4)
    assert again["end_ratio_to_own"] != full["end_ratio_to_own"]
    gram = {"svd": "gram", "products": "fp32"}
    assert [r["facts"] for r in records.values()] == [{}, {}, gram, gram, gram, {}]
    assert abs(ruined["increase_percent"]) > 1
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["run", "method", "set", "prefix/window"]
    assert first.split()[:4] == ["a", "none", "validation", "24/48"]


def test_errors_and_bytes_do_not_depend_on_the_batch(evaluate, run):
    made, _ = run()
    specs, found = ("xkv:group=4,rank_k=3,rank_v=3", "streaming:ratio=2", "kivi:bits=2,group=4,residual=0"), []
    words = [word for spec in specs for word in ("--posthoc", spec)]
    for batch in (1, 2, 5):
        assert evaluate("--run", made.path, "--device", "cpu", "--max-tokens", 49 * 7, "--batch", batch, *words) == 0
        found.append([_record(made, spec, max_tokens=49 * 7) for spec in specs])
    for one, *others in zip(*found, strict=True):
        assert one["windows"] == 7
        for other in others:
            assert other["bytes_per_token"] == one["bytes_per_token"]
            for slot, errors in one["errors"].items():
                assert other["errors"][slot] == pytest.approx(errors, rel=1e-4)


def test_rank_one_ruins_the_score_of_text_that_the_model_expects(decoder, tokens):
    """Text drawn from the model itself, which a random model predicts far better than any other."""
    model, ids = decoder(), tokens(2, 24)
    model.head.weight.mul_(6)  # expect something
    draw = torch.Generator().manual_seed(0)
    while ids.shape[1] < 49:
        ids = torch.cat((ids, torch.multinomial(model(ids)[:, -1].softmax(-1), 1, generator=draw)), dim=1)
    specs = ["none", "xkv:group=4,rank_k=24,rank_v=24", "xkv:group=4,rank_k=1,rank_v=1"]
    scored, reference = _scored(specs), _Reference()
    _score(engine_of(model), scored, ids, 24, reference)
    tallies = [each.tally for each in scored]
    none, full, ruined = (tally.nll / tally.tokens for tally in tallies)
    assert none == reference.tally.nll / reference.tally.tokens
    assert full == pytest.approx(none, abs=1e-4)
    assert ruined > 2 * none


def test_the_score_sees_which_tokens_are_chosen(scored):
    """Passes of several tokens read all of a slot, so that a score of such passes would be that of all tokens."""
    full = "xkv:group=4,rank_k=24,rank_v=24"
    specs = (full, *(f"{full},select={n},chunk=4,outliers=0,local=1" for n in (24, 4)))
    records, _, _ = scored(*specs)
    every, enough, few = (record["loss"] for record in records.values())
    assert enough == pytest.approx(every, abs=1e-4)
    assert abs(few - every) > 1e-3


def test_continuations_are_compared_with_those_after_an_exact_prefix(decoder, tokens):
    model, ids, n = decoder(), tokens(2, 49), 10
    specs = ["none", "xkv:group=4,rank_k=24,rank_v=24", "xkv:group=4,rank_k=1,rank_v=1"]
    scored, reference = _scored(specs), _Reference()
    _score(engine_of(model), scored, ids, 24, reference, generate=n)
    tallies = [each.tally for each in scored]
    none, full, ruined = (tally.written.figures() for tally in tallies)
    wanted = {"generated_tokens": 2 * n, "generated_same_percent": 100, "generated_same_until": n}
    assert none == full == wanted
    texts = []
    for compressed in (False, True):
        cache = KVCache(model.config)
        model(ids[:, :24], cache=cache)
        cache = compress_cache(cache, parse(specs[2])) if compressed else cache
        text = ids[:, 24:25]
        for _ in range(n):
            text = torch.cat((text, model(text[:, -1:], cache=cache).argmax(-1)), dim=1)
        texts.append(text[:, 1:].tolist())
    pairs = [list(zip(*rows, strict=True)) for rows in zip(*texts, strict=True)]
    until = [next((i for i, (a, b) in enumerate(row) if a != b), n) for row in pairs]
    assert ruined["generated_same_percent"] == 100 * sum(a == b for row in pairs for a, b in row) / (2 * n) < 100
    assert ruined["generated_same_until"] == sum(until) / 2


def test_generation_from_the_command_line(evaluate, run, capsys):
    made, _ = run()
    words = ["--run", made.path, "--device", "cpu", "--posthoc", "none", "--generate", 6]
    assert evaluate(*words) == 0
    record = _record(made, "none", generate=6)
    assert record["generated_tokens"] == 6 * record["windows"]
    assert record["generated_same_percent"] == 100
    assert capsys.readouterr().out.splitlines()[1].split()[-2:] == ["100", "%"]
    assert evaluate(*words[:-1], 41) == 2
    assert "--generate is 41; allowed after a prefix of 24 tokens: 0 to 40" in capsys.readouterr().err


def test_time_is_that_of_every_compression(decoder, tokens, monkeypatch):
    model, clock = decoder(), iter(range(10**6))
    monkeypatch.setattr(compress, "_now", lambda filled: next(clock))
    scored = _scored(["xkv:group=4,rank_k=9,rank_v=9", "xkv:group=4,rank_k=9,rank_v=9,recompress=8"])
    _score(engine_of(model), scored, tokens(2, 49), 24, _Reference())
    assert [each.tally.seconds for each in scored] == [[1], [1 + 24 // 8]]


def test_what_a_method_chose_is_in_the_record(scored):
    records, _, _ = scored("kvsharer:threshold=-1.0,share=1")
    (record,) = records.values()
    ((slot, source),) = record["facts"]["reads"].items()
    assert int(slot) > source >= 0


def test_methods_that_watch_do_not_see_each_other(decoder, tokens):
    """Two of them in one measurement score what each scores alone."""
    engine, specs = (
        engine_of(decoder(qk_norm=False)),
        [f"commonkv:recent=4,merge={m},weights=equal" for m in (0.2, 0.6)],
    )

    def losses(specs):
        _score(engine, scored := _scored(specs), tokens(2, 49), 32, _Reference())
        return [each.tally.nll for each in scored]

    assert losses(specs) == [losses([spec])[0] for spec in specs]


def test_times_leave_out_the_first_batch_and_what_a_method_watches(decoder, tokens, monkeypatch):
    """CommonKV sees projections in a prefill of its own, which is not the one that is timed."""
    model, prefills = decoder(qk_norm=False), []
    engine = engine_of(model)
    plain = engine.hidden

    def counted(ids, cache):
        prefills.append(ids.shape[1])
        return plain(ids, cache)

    monkeypatch.setattr(engine, "hidden", counted)
    reference, scored = _Reference(), _scored(["commonkv:group=2,recent=0,weights=equal"])
    for _ in range(2):
        _score(engine, scored, tokens(2, 49), 24, reference)
    tally = scored[0].tally
    assert prefills.count(24) == 2 * 4, "a timed one, one that is seen, and twice the 24 tokens that are scored"
    assert (len(tally.seconds), len(reference.seconds)) == (2, 2)
    assert _warm([5.0, 1.0, 2.0]) == 3
    assert _warm([5.0]) == 5


@pytest.mark.parametrize(
    "spec",
    [
        "xkv:ratio=1.5,svd=power",
        "svd:ratio=1.2+kivi:bits=4,group=8,residual=0",
        "minicache",
        "minicache_xkv+kivi:bits=4,group=8,residual=0",
        "commonkv:group=2,recent=4,weights=equal",
        "commonkv:group=2,recent=4,weights=equal,rank=16",
        "kivi:bits=4,group=8,residual=8",
        "xquant:bits=2,group=8,residual=8",
        "kvsharer:threshold=-1.0,share=1",
    ],
)
def test_every_method_under_autocast(spec, decoder, tokens):
    """As evaluate.py scores on a GPU: caches in bf16, weights in fp32."""
    model = decoder(qk_norm=False)
    engine, method, (tally, reference) = engine_of(model), parse(spec), (_Tally(), _Reference())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        method.prepare(engine, tokens(2, 32))
        _score(engine, [_Scored(spec, method, tally)], tokens(2, 49), 32, reference)
    assert tally.nll == pytest.approx(reference.tally.nll, rel=0.1)


def test_the_reference_is_the_loss_of_a_plain_forward_after_the_prefix(scored, prepared):
    records, _, model = scored("none")
    store = TokenStore(prepared(300), "validation")
    eos = store.manifest.eos_id
    stream = torch.cat((torch.tensor([eos]), torch.from_numpy(store.read(0, len(store)))))
    nll, count = 0.0, 0
    for start in range(0, len(stream) - 48, 49):
        window = stream[start : start + 49]
        logits = model(window[None, :-1])[0, 24:]
        nll += F.cross_entropy(logits, window[25:], reduction="sum").item()
        count += 24
    assert records["none"]["tokens_scored"] == count
    assert records["none"]["loss"] == pytest.approx(nll / count, abs=1e-5)


def test_bytes_are_those_of_the_caches(scored):
    records, _, _ = scored("none", "xkv:group=4,rank_k=3,rank_v=5,sinks=2", kv={"preset": "cla"})
    none, xkv = records.values()
    # cla of 4 layers owns 2 slots of 2 heads of 8 channels, mha 4, in fp32
    assert none["own_bytes_per_token"] == none["bytes_per_token"] == 2 * 2 * 16 * 4
    assert none["mha_bytes_per_token"] == 4 * 2 * 16 * 4
    factors = (22 + 2 * 16) * (3 + 5) * 4 + 2 * 2 * 16 * 2 * 4  # and 2 sinks
    assert xkv["bytes_per_token"] == pytest.approx(factors / 24)
    assert none["read_flops_per_token"] == 0
    assert xkv["read_flops_per_token"] == pytest.approx(2 * 2 * 22 * (3 + 5) * 16 / 24)
    assert xkv["ratio_to_own"] == pytest.approx(2 * 2 * 16 * 4 * 24 / factors)
    assert xkv["ratio_to_mha"] == 2 * xkv["ratio_to_own"]
    exact = 2 * 2 * 16 * 24 * 4  # the 24 tokens read after the prefix
    assert xkv["end_ratio_to_own"] == pytest.approx(2 * exact / (factors + exact))
    assert set(xkv["errors"]) == {"0", "2"}


def test_hugging_face_folders(evaluate, tmp_path, prepared, texts, monkeypatch):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=320, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    monkeypatch.chdir(tmp_path)
    folder, text = tmp_path / "llama", tmp_path / "text.txt"
    LlamaForCausalLM(config).save_pretrained(folder)
    for file in (prepared(300) / "tokenizer").iterdir():
        shutil.copy(file, folder / file.name)
    text.write_text(" ".join(texts), encoding="utf-8")
    specs = ["none", "xkv:energy=1.0", "kivi:bits=8,group=8,residual=0", "kvsharer:threshold=-1.0"]
    words = [word for spec in specs for word in ("--posthoc", spec)]
    assert evaluate("--run", folder, "--data", text, "--device", "cpu", "--window", 48, *words) == 0
    path = results_of_checkpoint(folder) / "posthoc" / "text"
    none, xkv, kivi, shared = (json.loads(next(path.glob(f"{spec[:3]}*")).read_text()) for spec in specs)
    assert none["loss"] == none["uncompressed_loss"]
    assert xkv["loss"] == pytest.approx(none["loss"], abs=1e-4)
    assert 0 < abs(kivi["loss"] - none["loss"]) < 0.01
    assert none["own_bytes_per_token"] == 4 * 2 * 2 * 4 * 4
    assert none["ratio_to_mha"] == 2
    assert shared["ratio_to_own"] == pytest.approx(4 / 3)
    assert none["text"] == xkv["text"]
    for name, content, equal in (("a", text.read_text(), True), ("b", text.read_text() + " more", False)):
        (tmp_path / name).mkdir()
        copy = tmp_path / name / text.name
        copy.write_text(content)
        assert evaluate("--run", folder, "--data", copy, "--device", "cpu", "--window", 48, "--posthoc", "none") == 0
        again = json.loads(next(path.glob("non*")).read_text())
        assert (again["text"] == none["text"]) is equal, "the name of a text depends on its content alone"
        assert again["text"].startswith("text.txt ")


def test_windows_stay_inside_documents_where_documents_are_masked(evaluate, run, capsys):
    made, _ = run("masked", data={"document_mask": True})
    assert evaluate("--run", made.path, "--device", "cpu", "--posthoc", "none", "--window", 8, "--prefix", 4) == 0
    record = _record(made, "none", prefix=4, window=8)
    assert 0 < record["windows"] < record["tokens_scored"]
    assert evaluate("--run", made.path, "--device", "cpu", "--posthoc", "none", "--window", 64) == 2
    assert "it has no 65 tokens inside of one document; lower --window" in capsys.readouterr().err


def test_a_run_without_full_attention_is_refused(evaluate, run, capsys):
    made, _ = run(kv={"layers": [{"layers": "0-3", "own": {}, "window": 8}]})
    assert evaluate("--run", made.path, "--device", "cpu", "--posthoc", "none") == 2
    assert "nothing to compress: all slots have a window" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prefix", 4], "--prefix 4: needs --posthoc"),
        (["--generate", 4], "--generate 4: needs --posthoc"),
        (["--posthoc", "none", "--prefix", 48], "--prefix is 48; allowed: 1 to 47"),
        (
            ["--posthoc", "none", "--window", 32, "--max-tokens", 32],
            "--max-tokens is 32; allowed with --posthoc and a window of 32: 33 or more",
        ),
        (["--posthoc", "none", "--stride", 8], "--stride is 8; with --posthoc windows do not overlap"),
        (["--posthoc", "xvk:group=4"], 'unknown method "xvk"; did you mean "xkv"?'),
        (
            ["--posthoc", "xkv:gruop=4"],
            'unknown option "gruop" of xkv; allowed: batched, chunk, codes, energy, every',
        ),
        (["--posthoc", "xkv:group=0,ratio=2"], "group: Input should be greater than or equal to 1 got 0"),
        (["--posthoc", "xkv:group=2"], "give exactly one of ranks (rank_k, rank_v), ratio and energy"),
        (["--posthoc", "xkv:ratio=2,svd=random,energy=0.9"], "give exactly one of"),
        (["--posthoc", "xkv:energy=0.9,svd=random"], "energy needs all singular values"),
        (["--posthoc", "xkv:rank_k=25,rank_v=3"], "rank_k=25: 4 slots of 16 channels have 24 tokens; allowed: 1 to 24"),
        (["--posthoc", "xkv:rank_k=3"], "give rank_k and rank_v, one is missing"),
        (["--posthoc", "xkv:group=4,ratio=20,sinks=0"], "at 24 tokens the bases of 4 slots alone exceed it"),
        (["--posthoc", "xkv:ratio=2,sinks=-1"], "sinks: Input should be greater than or equal to 0 got -1"),
        (["--posthoc", "none:sinks=4"], "sinks=4: every token is stored exactly; allowed: leave it out"),
        (
            ["--posthoc", "xkv:ratio=2+kivi:sinks=4"],
            "sinks is no option of kivi after +; allowed: bits, group, residual",
        ),
        (["--posthoc", "none+none"], "or svd or vfold or xkv, then kivi or xquant"),
    ],
)
def test_bad_input_is_told_in_a_line(evaluate, run, capsys, words, message):
    made, _ = run()
    assert evaluate("--run", made.path, "--device", "cpu", *words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
