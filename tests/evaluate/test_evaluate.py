"""evaluate.py: runs, checkpoints and Hugging Face folders; what is written; what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cllm.evaluate import perplexity as perplexity_module
from cllm.evaluate.result_folders import results_of_checkpoint
from cllm.runs import RunFolder


@pytest.fixture
def llama(tmp_path, prepared):
    """A tiny random Llama checkpoint folder with the tokenizer of `prepared(300)`, and its model."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.3,
    )
    model = LlamaForCausalLM(config).eval()
    folder = tmp_path / "llama"
    model.save_pretrained(folder)
    for file in (prepared(300) / "tokenizer").iterdir():
        shutil.copy(file, folder / file.name)
    return folder, model


def _record(folder: Path, name: str) -> dict:
    return json.loads((folder / "evaluation" / f"{name}.json").read_text())


def _refused(capsys, status: int) -> str:
    """The one line on stderr."""
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("more", [(), ("--suite", "copying:distances=4,samples=1"), ("--posthoc", "none")])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    evaluate, make_run, capsys, tmp_path, monkeypatch, more
) -> None:
    run, _ = make_run("a")
    (tmp_path / "file").write_text("mine")
    for name in ("perplexity.measure", "posthoc.measure", "tasks.run.run_samples"):
        monkeypatch.setattr(f"cllm.evaluate.{name}", lambda *_, **__: pytest.fail("measured"))
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert f"{out}: cannot be written" in _refused(capsys, evaluate("--run", run.path, "--out", out, *more))


def test_a_run_is_scored_on_its_own_validation_set(evaluate, make_run, capsys) -> None:
    run, _ = make_run(steps=(10, 20))
    assert evaluate("--run", run.path, "--device", "cpu") == 0
    record = _record(run.path, "validation")
    assert (record["run"], record["step"], record["design"], record["split"]) == ("a", 20, "cla", "validation")
    assert record["data"] == run.config().data.path
    assert record["tokens_scored"] == record["tokens"] > 100
    assert record["loss"] == pytest.approx(record["nll"] / record["tokens"])
    assert record["versions"]["torch"] == torch.__version__
    assert "command" not in record["versions"]
    assert record["hardware"]
    head, row, written = capsys.readouterr().out.splitlines()
    words = "run step set tokens loss perplexity bits/byte ar loss window/stride"
    assert head.split() == words.split()
    assert row.split()[:3] == ["a", "20", "validation"]
    assert written == f"written: {run.path / 'evaluation' / 'validation.json'}"
    events = EventAccumulator(str(run.tensorboard_folder)).Reload()
    tags = ("loss", "bits_per_byte", "ar_loss", "other_loss", "ar_loss_1_63")
    for tag, key in (("ppl", "perplexity"), *((tag, tag) for tag in tags)):
        (event,) = events.Scalars(f"eval-validation/{tag}")
        assert event.step == 20
        assert event.value == pytest.approx(record[key])


def test_several_validation_sets_and_runs(evaluate, make_run, prepared, capsys) -> None:
    sets = {"first": str(prepared(300)), "second": str(prepared(300))}
    runs = [make_run(name, data={"validation": sets})[0] for name in ("a", "b")]
    assert evaluate("--run", runs[0].path, "--run", runs[1].path, "--max-tokens", 40) == 0
    for run in runs:
        assert [_record(run.path, name)["set"] for name in sets] == ["first", "second"]
        assert _record(run.path, "first")["tokens_scored"] == 40
    assert len(capsys.readouterr().out.splitlines()) == 1 + 4 + 4


def test_an_older_checkpoint_leaves_the_result_of_the_run_alone(evaluate, make_run) -> None:
    run, _ = make_run(steps=(10, 20))
    assert evaluate("--run", run.checkpoint_path(20), "--max-tokens", 20) == 0
    assert evaluate("--run", run.checkpoint_path(10), "--max-tokens", 20) == 0
    assert _record(run.path, "validation")["step"] == 20
    assert _record(run.path, "validation-step-00000010")["step"] == 10


def test_text_files_and_names(evaluate, make_run, tmp_path) -> None:
    run, _ = make_run()
    (tmp_path / "my notes.md").write_text("alpha beta\n", encoding="utf-8")
    (tmp_path / "lines.jsonl").write_text('{"text": "alpha"}\n{"text": " "}\n{"text": "日本"}\n', encoding="utf-8")
    assert evaluate("--run", run.path, "--data", tmp_path / "my notes.md", tmp_path / "lines.jsonl") == 0
    assert _record(run.path, "my-notes")["documents"] == 1
    lines = _record(run.path, "lines")
    assert (lines["documents"], lines["bytes"], lines["split"]) == (2, 5 + 6, None)
    assert evaluate("--run", run.path, "--data", tmp_path / "lines.jsonl", "--name", "x") == 0
    assert _record(run.path, "x")["nll"] == lines["nll"]
    assert evaluate("--run", run.path, "--data", run.config().data.path, "--split", "train", "--max-tokens", 9) == 0
    assert _record(run.path, "small-300-train")["split"] == "train"


def test_the_stream_of_a_text_is_eos_text_eos(evaluate, make_run, tmp_path) -> None:
    """A special token spelt out in the text is text; EOS ends each document and stands before the first."""
    run, _ = make_run(vocab_size=257)  # a token a byte
    (tmp_path / "t.txt").write_text("a<|endoftext|>b", encoding="utf-8")
    assert evaluate("--run", run.path, "--data", tmp_path / "t.txt") == 0
    record = _record(run.path, "t")
    assert (record["bytes"], record["tokens_scored"]) == (15, 16)


def test_invalid_utf8_is_replaced_counted_and_told(evaluate, make_run, tmp_path, capsys, caplog) -> None:
    run, _ = make_run()
    (tmp_path / "bad.txt").write_bytes(b"alpha \xff beta \xfe\xfd!")
    assert evaluate("--run", run.path, "--data", tmp_path / "bad.txt") == 0
    record = _record(run.path, "bad")
    assert record["replaced_sequences"] == 3
    assert record["bytes"] == len("alpha \ufffd beta \ufffd\ufffd!".encode())
    assert "bad.txt: 3 byte sequences are not UTF-8" in caplog.text


def test_a_hugging_face_folder_gives_the_loss_of_the_model_itself(
    evaluate, llama, tmp_path, monkeypatch, capsys
) -> None:
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    folder, model = llama
    before = sorted(folder.rglob("*"))
    text = "alpha beta naïve 日本"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    assert evaluate("--run", folder, "--data", tmp_path / "t.txt") == 0
    results = results_of_checkpoint(folder)
    assert results.parent == Path("runs/evaluation")
    assert f"results of {folder} go to {results}" in capsys.readouterr().err
    record = json.loads((results / "t.json").read_text())
    assert sorted(folder.rglob("*")) == before, "nothing is written into somebody's checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text).input_ids, tokenizer.eos_token_id]])
    assert ids.shape[1] <= 64
    with torch.no_grad():
        expected = model(input_ids=ids, labels=ids).loss.item()
    assert record["loss"] == pytest.approx(expected, rel=1e-5)
    assert record["perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert (record["kind"], record["design"], record["step"]) == ("huggingface", "llama", None)
    assert (record["window"], record["stride"]) == (64, 32)
    assert not list(Path("runs").rglob("events.*"))


def test_a_hugging_face_folder_scores_prepared_data_of_its_own_tokenizer(evaluate, llama, prepared, tmp_path) -> None:
    folder, _ = llama
    assert evaluate("--run", folder, "--data", prepared(300), "--out", tmp_path / "out", "--max-tokens", 50) == 0
    assert json.loads((tmp_path / "out" / "small-300.json").read_text())["tokens_scored"] == 50
    assert not (folder / "evaluation").exists()


def test_a_tokenizer_that_transformers_rewrites_is_the_folders_own(evaluate, llama, tmp_path, caplog) -> None:
    """The class named in tokenizer_config.json has rules of its own, which are in no file until it is saved."""
    from cllm.data.prepare.build import prepare
    from cllm.data.prepare.recipe import Recipe
    from cllm.data.vocabulary import tokenizer_sha256

    folder, _ = llama
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "Qwen2Tokenizer"}))
    (tmp_path / "t.txt").write_text("alpha beta 1234 naïve 日本\n\n don't", encoding="utf-8")
    recipe = {
        "name": "t",
        "out": str(tmp_path / "data"),
        "source": {"kind": "files", "paths": [str(tmp_path / "t.txt")]},
        "tokenizer": {"load": str(folder)},
        "validation": {"fraction": 1.0},
        "workers": 1,
    }
    data = prepare(Recipe.model_validate(recipe))
    assert data.tokenizer_sha256 != tokenizer_sha256(folder)
    assert evaluate("--run", folder, "--data", data.folder, tmp_path / "t.txt", "--out", tmp_path / "out") == 0
    text, prepared = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("t", "data"))
    assert text["nll"] == prepared["nll"]
    assert text["tokenizer_sha256"] == prepared["tokenizer_sha256"] == data.tokenizer_sha256


def test_tokens_that_the_embedding_lacks_are_refused(evaluate, llama, make_run, prepared, tmp_path, capsys) -> None:
    folder, _ = llama
    data = shutil.copytree(prepared(300), tmp_path / "data")
    content = json.loads((folder / "tokenizer.json").read_text())
    flags = {**content["added_tokens"][0], "special": False}
    content["added_tokens"] += [{**flags, "id": i, "content": f"word{i}"} for i in range(300, 330)]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "in.txt").write_text("alpha word319", encoding="utf-8")
    (tmp_path / "beyond.txt").write_text("alpha word320", encoding="utf-8")
    assert evaluate("--run", folder, "--data", tmp_path / "in.txt") == 0
    said = "holds token 320, but the embedding of llama has tokens 0 to 319"
    for more in ([], ["--posthoc", "none", "--prefix", "2", "--window", "4"]):
        capsys.readouterr()
        message = _refused(capsys, evaluate("--run", folder, "--data", tmp_path / "beyond.txt", *more))
        assert f"beyond.txt: {said}" in message
    # Prepared data whose manifest and tokens say more than the run's embedding has.
    run, _ = make_run()
    manifest = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps(manifest | {"vocab_size": 400, "checksums": None}))
    shard = manifest["splits"]["validation"]["shards"][1]["file"]
    raw = bytearray((data / shard).read_bytes())
    raw[:2] = (310).to_bytes(2, "little")
    (data / shard).write_bytes(raw)
    message = _refused(capsys, evaluate("--run", run.path, "--data", data))
    assert f"{shard}: holds token 310, but the embedding of a has tokens 0 to 299" in message


def test_data_prepared_anew_is_refused(evaluate, make_run, prepared, tmp_path, capsys) -> None:
    from cllm.data.manifest import Manifest
    from cllm.runs import DataDigests

    (tmp_path / "t.txt").write_text("alpha", encoding="utf-8")
    other = shutil.copytree(prepared(300), tmp_path / "other")
    run, _ = make_run(data={"validation": {"mine": str(other)}})
    digest = Manifest.load(other).digest()
    run.write_data_digests(DataDigests(train=digest, validation={"mine": digest}))
    assert evaluate("--run", run.path, "--max-tokens", 20) == 0
    shutil.rmtree(other)
    shutil.copytree(prepared(257), other)  # another tokenizer
    capsys.readouterr()
    said = f"{other}: holds other tokens, or another tokenizer, than when the run in {run.path} was started"
    assert said in _refused(capsys, evaluate("--run", run.path))
    shutil.rmtree(other)
    record = json.loads((shutil.copytree(prepared(300), other) / "manifest.json").read_text())
    shards = record["splits"]["validation"]["shards"]
    for key in ("tokens", "documents", "bytes"):
        record["splits"]["validation"][key] -= shards[-1][key]
    shards.pop()  # the same tokenizer, fewer tokens
    (other / "manifest.json").write_text(json.dumps(record | {"checksums": None}))
    assert said in _refused(capsys, evaluate("--run", run.path))
    assert evaluate("--run", run.path, "--data", other) == 0, "asked for by name, it is as good as any"
    # The tokenizer of a run lies in its training data.
    run.write_data_digests(DataDigests(train="0", validation={}))
    capsys.readouterr()
    message = _refused(capsys, evaluate("--run", run.path, "--data", tmp_path / "t.txt"))
    assert f"{prepared(300)}: holds other tokens, or another tokenizer" in message


def test_files_that_are_no_text_are_refused(evaluate, make_run, tmp_path, capsys) -> None:
    run, _ = make_run()
    for name, raw, said in (
        ("zip.txt", b"PK\x03\x04\x14\x00\x08 some text after it", "is no text file: it has a byte 0 at character 5"),
        ("utf16.md", "alpha beta".encode("utf-16"), "is no text file: it has a byte 0"),
        ("noise.txt", bytes(range(1, 256)) * 8, "is no text in UTF-8: "),
        ("cp1251.txt", "Русский текст".encode("cp1251"), "is no text in UTF-8: "),
    ):
        (tmp_path / name).write_bytes(raw)
        for more in ([], ["--posthoc", "none"]):
            message = _refused(capsys, evaluate("--run", run.path, "--data", tmp_path / name, *more))
            assert f"{tmp_path / name}: {said}" in message
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "alpha \\u0000 beta"}\n')
    assert evaluate("--run", run.path, "--data", tmp_path / "t.jsonl") == 0
    assert _record(run.path, "t")["bytes"] == len("alpha \0 beta")


def test_hugging_face_folders_that_are_refused(evaluate, llama, prepared, tmp_path, capsys) -> None:
    folder, _ = llama
    prepared(257)
    capsys.readouterr()
    assert "say what to evaluate on with --data" in _refused(capsys, evaluate("--run", folder))
    assert "another tokenizer" in _refused(capsys, evaluate("--run", folder, "--data", prepared(257)))
    (tmp_path / "t.txt").write_text("alpha", encoding="utf-8")
    message = _refused(capsys, evaluate("--run", folder, "--data", tmp_path / "t.txt", "--window", 65))
    assert "--window is 65; allowed: up to the context of llama, 64" in message
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    message = _refused(capsys, evaluate("--run", folder, "--data", tmp_path / "t.txt"))
    assert "has no .safetensors weights" in message


def test_runs_that_are_refused(evaluate, make_run, tmp_path, capsys) -> None:
    run, _ = make_run()
    (tmp_path / "empty").mkdir()
    assert "give --run" in _refused(capsys, evaluate())
    assert "no such run" in _refused(capsys, evaluate("--run", tmp_path / "nothing"))
    assert "neither a run" in _refused(capsys, evaluate("--run", tmp_path / "empty"))
    run.checkpoint_path(20).unlink()
    assert "holds no checkpoint yet" in _refused(capsys, evaluate("--run", run.path))
    run.checkpoint_path(20).write_bytes(b"not a checkpoint")
    assert "not a readable checkpoint" in _refused(capsys, evaluate("--run", run.path))


def test_data_that_is_refused(evaluate, make_run, prepared, tmp_path, capsys) -> None:
    run, _ = make_run()

    def refused(*data: str | Path) -> str:
        return _refused(capsys, evaluate("--run", run.path, "--data", *data))

    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    (tmp_path / "t.docx").write_text("x", encoding="utf-8")
    (tmp_path / "t.jsonl").write_text('{"body": "x"}\n', encoding="utf-8")
    prepared(257)
    capsys.readouterr()
    message = refused(prepared(257))
    assert "another tokenizer than that of a" in message
    assert "text file (.txt .md .jsonl)" in message
    assert "no such file or folder" in refused(tmp_path / "missing.txt")
    assert "has no manifest.json" in refused(tmp_path)
    assert "holds no text" in refused(tmp_path / "empty.txt")
    assert "unsupported file type" in refused(tmp_path / "t.docx")
    assert "has no field `text`" in refused(tmp_path / "t.jsonl")
    assert "has no test split" in refused(prepared(300), "--split", "test")
    assert "two sets would be called t;" in refused(tmp_path / "t.docx", tmp_path / "t.jsonl")
    assert "names one set" in refused(tmp_path / "t.docx", tmp_path / "t.jsonl", "--name", "x")
    assert "--name ../x" in refused(tmp_path / "t.docx", "--name", "../x")


def test_settings_that_are_refused(evaluate, make_run, tmp_path, capsys) -> None:
    run, _ = make_run()

    def refused(*words: object) -> str:
        return _refused(capsys, evaluate("--run", run.path, *words))

    assert "--stride is 17; allowed: up to the window, 16" in refused("--stride", 17)
    assert "--window is 33; allowed: up to the context of a, 32" in refused("--window", 33)
    assert "--window is 0; allowed: 1 or more" in refused("--window", 0)
    assert "--max-tokens is -1; allowed: 1 or more" in refused("--max-tokens", -1)
    assert "takes the results of one run" in refused("--run", run.path, "--out", tmp_path)
    if not torch.cuda.is_available():
        assert "there is no usable GPU" in refused("--device", "cuda")


def test_what_was_measured_before_a_mistake_is_told(evaluate, make_run, tmp_path, capsys) -> None:
    run, _ = make_run()
    assert evaluate("--run", run.path, "--run", tmp_path / "nothing", "--max-tokens", 20) == 1
    captured = capsys.readouterr()
    assert "validation" in captured.out
    assert "no such run" in captured.err
    assert RunFolder(run.path).evaluation_folder.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_in_one_line_and_what_was_measured_is_shown(
    evaluate, make_run, capsys, monkeypatch, number
) -> None:
    (first, _), (second, _) = make_run("a"), make_run("b")
    measure = perplexity_module.measure

    def interrupted(subject, *rest):
        if subject.name == "b":
            os.kill(os.getpid(), number)
        return measure(subject, *rest)

    monkeypatch.setattr(perplexity_module, "measure", interrupted)
    assert evaluate("--run", first.path, "--run", second.path, "--max-tokens", 20) == 128 + number
    out, err = capsys.readouterr()
    assert err.splitlines()[-1] == f"interrupted by {signal.Signals(number).name}"
    assert "Traceback" not in err
    assert [line.split()[0] for line in out.splitlines()] == ["run", "a", "written:"]


def test_specs_that_a_plan_refuses_are_errors_or_are_listed(evaluate, make_run, capsys) -> None:
    run, _ = make_run(preset="kv_tie")
    lossy = "kivi:bits=4,group=4,residual=0"
    words = ["--run", run.path, "--window", 8, "--max-tokens", 60, "--posthoc", "none", "--posthoc", lossy]
    assert "K = V, which no post-hoc method compresses" in _refused(capsys, evaluate(*words))
    assert evaluate(*words, "--skip-refused") == 0
    assert f"a on posthoc: {lossy} is refused: " in capsys.readouterr().err
    refused = _record(run.path, "posthoc/refused")["refused"]
    assert list(refused) == [lossy]
    assert "K = V" in refused[lossy]
    (none,) = (json.loads(f.read_text()) for f in (run.path / "evaluation/posthoc").rglob("none*.json"))
    assert none["loss"] == none["uncompressed_loss"] > 0, "`none` is the uncompressed cache, which every plan has"
    assert (none["ratio_to_own"], none["ratio_to_mha"]) == (1, 2)
    suite = ["--run", run.path, "--suite", "copying:distances=4,samples=1", "--posthoc", lossy, "--skip-refused"]
    assert evaluate(*suite) == 0
    assert list(_record(run.path, "copying/refused")["refused"]) == [lossy]


def test_methods_that_cannot_watch_a_model_are_refused_like_others(evaluate, make_run, capsys) -> None:
    run, _ = make_run(preset="mla")
    refused = ["h2o:ratio=2", "xkv:ratio=2,weight=queries", "palu:keep=0.5"]
    specs = [word for spec in [*refused, "int8:sinks=0"] for word in ("--posthoc", spec)]
    posthoc, copying = ["--window", 8, "--max-tokens", 9], ["--suite", "copying:distances=4,samples=1"]
    for name, words in (("posthoc", posthoc), ("copying", copying)):
        assert evaluate("--run", run.path, *words, *specs, "--skip-refused") == 0
        capsys.readouterr()
        reasons = _record(run.path, f"{name}/refused")["refused"]
        assert sorted(reasons) == sorted(refused)
        assert all(reason.startswith(spec.partition(":")[0]) for spec, reason in reasons.items()), "the method is named"
        assert list((run.path / "evaluation" / name).rglob("*int8*"))
