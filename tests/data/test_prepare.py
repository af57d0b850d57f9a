"""A prepared folder holds the corpus, whole and in order, however it came about."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from cllm.data.manifest import Manifest
from cllm.data.prepare import build, encode
from cllm.data.prepare.corpus import held_out
from cllm.data.store import TokenStore
from cllm.errors import EXIT_STOPPED, DataError
from cllm.files import MARK
from cllm.lock import locked

REPO = Path(__file__).resolve().parents[2]


def content(folder: Path) -> dict[str, str]:
    """The hash of every file under a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def decoded(folder: Path, split: str) -> list[str]:
    """A split's documents, as text again."""
    store = TokenStore(folder, split)
    tokens = store.read(0, len(store))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    pieces = np.split(tokens, np.flatnonzero(tokens == store.eos_id) + 1)
    assert len(pieces.pop()) == 0, "the last token is an EOS"
    return [tokenizer.decode(piece[:-1].tolist(), skip_special_tokens=False) for piece in pieces]


def test_every_document_comes_back(tmp_path, run, recipe, documents):
    # Some of them spell out <|endoftext|>, which must not become the token.
    texts = documents(300)
    status, out = run(
        recipe([write_jsonl(tmp_path / "a.jsonl", texts)], shard_tokens=3000, validation={"fraction": 0.1})
    )
    assert status == 0
    train, validation = ([t for t in texts if held_out(t.encode(), 0.1, 0) is held] for held in (False, True))
    assert decoded(out, "train") == train
    assert decoded(out, "validation") == validation
    manifest = Manifest.load(out)
    manifest.verify()
    assert len(manifest.splits["train"].shards) > 3
    assert manifest.splits["train"].bytes == sum(len(text.encode()) for text in train)
    assert manifest.splits["train"].documents == len(train)
    assert all(shard.tokens <= 3000 for shard in manifest.splits["train"].shards)


def test_index_tells_each_documents_tokens_and_bytes(tmp_path, run, recipe):
    texts = ["a", "ééé", "a longer one"]
    _, out = run(recipe([write_jsonl(tmp_path / "a.jsonl", texts)], tokenizer={"train": {"vocab_size": 257}}))
    ends = np.fromfile(out / "train-00000.idx", dtype="<i8").reshape(-1, 2)
    n_bytes = [len(text.encode()) for text in texts]
    # With 257 tokens a token is a byte.
    assert np.diff(ends, axis=0, prepend=0).tolist() == [[n + 1, n] for n in n_bytes]


def test_validation_split_is_a_function_of_the_text(tmp_path, run, recipe, documents):
    texts = documents(300)
    spec = recipe([tmp_path / "a.jsonl"], validation={"fraction": 0.2})
    write_jsonl(tmp_path / "a.jsonl", texts)
    _, out = run(spec)
    first = set(decoded(out, "validation"))
    write_jsonl(tmp_path / "a.jsonl", texts[::-1])
    run(spec, "--force")
    assert set(decoded(out, "validation")) == first
    assert 0.1 < len(first) / len(texts) < 0.3
    run(spec, "--force", "--seed", 1)
    assert set(decoded(out, "validation")) != first


def test_validation_files_of_their_own(tmp_path, run, recipe):
    held = write_jsonl(tmp_path / "held.jsonl", ["held out"])
    spec = recipe([write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])], validation={"paths": [str(held)]})
    status, out = run(spec, "--max_documents", 2)
    assert status == 0
    assert decoded(out, "train") == ["one", "two"]
    assert decoded(out, "validation") == ["held out"]


def test_limits_and_counts(tmp_path, run, recipe, capsys):
    (tmp_path / "a.txt").write_bytes(b"bad \xff byte \xfe\n")
    (tmp_path / "b.txt").write_bytes(b" \n\t ")
    (tmp_path / "c.txt").write_bytes(b"tiny")
    (tmp_path / "d.txt").write_bytes(b"long enough")
    (tmp_path / "e.txt").write_bytes(b"past the limit")
    status, out = run(recipe([tmp_path / f"{c}.txt" for c in "abcde"]), "--min_chars", 5, "--max_bytes", 20)
    assert status == 0
    assert decoded(out, "train") == ["bad \ufffd byte \ufffd\n", "long enough"]
    counts = Manifest.load(out).counts
    assert counts.model_dump() == {
        "invalid_utf8_documents": 1,
        "replaced_sequences": 2,
        "empty_documents": 1,
        "short_documents": 1,
    }
    assert "not UTF-8: 1 documents; 2 byte sequences" in capsys.readouterr().out


def test_any_number_of_workers_gives_the_same_bytes(tmp_path, run, recipe, documents, monkeypatch):
    texts = documents(1500)
    spec = recipe([write_jsonl(tmp_path / "a.jsonl", texts)], shard_tokens=9000, validation={"fraction": 0.1})
    monkeypatch.setattr(encode, "_BATCH_DOCUMENTS", 50)
    status, out = run(spec)
    assert status == 0
    one = content(out)
    status, out = run(spec, "--workers", 2, "--out", tmp_path / "two")
    assert status == 0
    assert content(tmp_path / "two") == one


def test_finished_folder_is_left_alone(tmp_path, run, recipe, capsys, caplog):
    spec = recipe([write_jsonl(tmp_path / "a.jsonl", ["one", "two"])])
    _, out = run(spec)
    before = (out / "train-00000.bin").stat().st_mtime_ns
    caplog.clear()
    assert run(spec)[0] == 0
    assert "already prepared" in caplog.text
    assert (out / "train-00000.bin").stat().st_mtime_ns == before
    capsys.readouterr()
    assert run(spec, "--min_chars", 1)[0] == 2
    assert "different recipe (min_chars differ)" in (error := capsys.readouterr().err)
    assert "--force" in error
    assert run(spec, "--min_chars", 1, "--force")[0] == 0
    assert Manifest.load(out).recipe["min_chars"] == 1
    write_jsonl(tmp_path / "a.jsonl", ["one", "two", "three"])
    run(spec, "--min_chars", 1)
    assert "the source has changed" in caplog.text


def test_a_folder_of_something_else_is_never_replaced(tmp_path, run, recipe, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    assert run(recipe([write_jsonl(tmp_path / "a.jsonl", ["one"])]), "--force")[0] == 2
    assert "is not a prepared folder" in capsys.readouterr().err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize(
    ("corpus", "words", "said"),
    [
        (None, [], "source.paths: "),
        ([], [], "holds no documents"),
        (["", "  "], [], "(2 empty, 0 shorter than min_chars)"),
        (["one"], ["--source.text_field", "body"], "a.jsonl:1: has no field `body`"),
        (["one"], ["--validation.fraction", "0.001"], "the validation split is empty"),
        (
            ["one"],
            ["--tokenizer", "{train: null, load: tests}"],
            "tokenizer.load: tests: its tokenizer cannot be ",
        ),
    ],
)
def test_refusals_leave_nothing_behind(tmp_path, run, recipe, capsys, monkeypatch, corpus, words, said):
    monkeypatch.chdir(REPO)  # so that `tests` is a folder, and the hub is not asked for it
    if corpus is not None:
        write_jsonl(tmp_path / "a.jsonl", corpus)
    status, out = run(recipe([tmp_path / "a.jsonl"]), *words)
    assert status == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert said in errors[0]
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


class Stop(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("batches", [0, 1, 7, 19])
def test_stopped_run_goes_on_to_the_same_bytes(tmp_path, run, recipe, documents, monkeypatch, caplog, batches):
    spec = recipe([write_jsonl(tmp_path / "a.jsonl", documents(1000))], shard_tokens=2500, validation={"fraction": 0.1})
    monkeypatch.setattr(encode, "_BATCH_DOCUMENTS", 50)
    run(spec, "--out", tmp_path / "whole")
    write_batch, seen = build._write_batch, []

    def stop_after(batch, writers):
        write_batch(batch, writers)
        seen.append(batch)
        if len(seen) > batches:
            raise Stop

    monkeypatch.setattr(build, "_write_batch", stop_after)
    with pytest.raises(Stop):
        run(spec)
    out = tmp_path / "out"
    assert not out.exists()
    with pytest.raises(DataError, match="only half prepared"):
        Manifest.load(out)
    monkeypatch.setattr(build, "_write_batch", write_batch)
    caplog.clear()
    assert run(spec)[0] == 0
    assert "resuming" in caplog.text
    assert content(out) == content(tmp_path / "whole")
    assert not out.with_name("out.partial").exists()


def test_another_recipe_starts_clean(tmp_path, run, recipe, documents, monkeypatch, caplog):
    spec = recipe([write_jsonl(tmp_path / "a.jsonl", documents(200))], shard_tokens=1000)
    monkeypatch.setattr(build, "replace", lambda *_: (_ for _ in ()).throw(Stop))
    with pytest.raises(Stop):
        run(spec)
    monkeypatch.undo()
    caplog.clear()
    assert run(spec, "--shard_tokens", 2000)[0] == 0
    assert "starting clean" in caplog.text
    run(spec, "--shard_tokens", 2000, "--out", tmp_path / "fresh")
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_killed_process_leaves_nothing_that_looks_finished(tmp_path, recipe, documents):
    corpus = write_jsonl(tmp_path / "a.jsonl", documents(10_000))
    tokenizer = {"train": {"vocab_size": 300, "sample_bytes": 100_000}}
    spec = recipe([corpus], shard_tokens=20_000, tokenizer=tokenizer)
    (tmp_path / "recipe.yaml").write_text(json.dumps(spec))
    words = [sys.executable, str(REPO / "data" / "prepare.py"), "--config", "recipe.yaml", "--workers", "2", "--out"]
    process = subprocess.Popen([*words, "out"], cwd=tmp_path, stderr=subprocess.DEVNULL, start_new_session=True)
    partial = tmp_path / "out.partial"
    deadline = time.monotonic() + 300
    while len(list(partial.glob("train-*.bin"))) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was still at work"
    assert partial.exists()
    assert not (tmp_path / "out").exists()
    assert not (partial / "manifest.json").exists()
    # Its workers notice and leave.
    deadline = time.monotonic() + 300
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid)
    again = subprocess.run([*words, "out"], cwd=tmp_path, capture_output=True, text=True)
    assert again.returncode == 0
    assert "resuming" in again.stderr
    subprocess.run([*words, "whole"], cwd=tmp_path, capture_output=True, check=True)
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_two_processes_do_not_write_one_folder(tmp_path, run, recipe, capsys):
    spec = recipe([write_jsonl(tmp_path / "a.jsonl", ["one"])])
    with locked(tmp_path / "out"):
        assert run(spec)[0] == 2
        assert f"{tmp_path / 'out'}: is in use by process {os.getpid()} on " in capsys.readouterr().err
    assert run(spec)[0] == 0
    with locked(tmp_path / "out"):
        assert run(spec)[0] == 0, "a finished folder is only read"


@pytest.mark.parametrize("name", ["out", "out.partial", "out.old"])
def test_folders_that_preparing_did_not_make_are_never_emptied(tmp_path, run, recipe, capsys, name):
    """Neither by their name, nor for a manifest.json and progress.json in them."""
    spec = recipe([write_jsonl(tmp_path / "a.jsonl", ["one", "two"])])
    run(spec, "--out", tmp_path / "theirs")
    theirs = (tmp_path / "theirs").rename(tmp_path / name)
    (theirs / MARK).unlink()
    (theirs / "thesis.tex").write_text("years of work")
    (theirs / "progress.json").write_text('{"key": "x"}')
    before = content(theirs)
    capsys.readouterr()
    status = run(spec, "--force", "--min_chars", 1)[0]
    assert content(theirs) == before
    if name == "out.old":
        assert status == 0
    else:
        assert status == 2
        assert f"error: {theirs}: is left alone: it has no file {MARK}" in capsys.readouterr().err


def test_what_killed_processes_left_goes_with_the_next_preparation(tmp_path, run, recipe):
    spec = recipe([write_jsonl(tmp_path / "a.jsonl", ["one"])])
    run(spec)
    shutil.copytree(tmp_path / "out", tmp_path / ".out.old-somewhere-7")
    assert run(spec, "--force")[0] == 0
    assert [path.name for path in tmp_path.iterdir() if "out" in path.name] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_is_one_line_and_status_3_and_the_same_command_goes_on(
    tmp_path, run, recipe, documents, monkeypatch, capsys, caplog, number
):
    spec = recipe([write_jsonl(tmp_path / "a.jsonl", documents(1000))], shard_tokens=2500)
    monkeypatch.setattr(encode, "_BATCH_DOCUMENTS", 50)
    write_batch, batches = build._write_batch, iter(range(99))

    def interrupted(batch, writers):
        if next(batches) == 9:
            os.kill(os.getpid(), number)
        write_batch(batch, writers)

    monkeypatch.setattr(build, "_write_batch", interrupted)
    status, out = run(spec)
    assert status == EXIT_STOPPED
    line = f"stopped by {signal.Signals(number).name}; the same command resumes after the last finished shard"
    assert capsys.readouterr().err.splitlines()[-1] == line
    assert not out.exists()
    assert run(spec)[0] == 0
    assert "resuming" in caplog.text


def test_a_signal_to_an_entire_group_is_not_taken_for_a_killed_worker(tmp_path, run, recipe, monkeypatch, capsys):
    def killed(pending):
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
        raise BrokenProcessPool

    monkeypatch.setattr(encode, "_finish", killed)
    monkeypatch.setattr(encode, "_SIGNAL_SECONDS", 60)
    assert run(recipe([write_jsonl(tmp_path / "a.jsonl", ["one"])]), "--workers", 2)[0] == EXIT_STOPPED
    assert "stopped by SIGTERM" in capsys.readouterr().err


def test_hub_source_streams(tmp_path, run, recipe, monkeypatch, capsys):
    asked: dict[str, object] = {}

    def load_dataset(name, config, **options):
        asked.update(options, name=name, config=config)
        return iter([{"body": "one"}, {"body": "two"}, {"body": None}, {"body": "half \ud800"}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    source = {"kind": "hub", "dataset": "some/thing", "config": "small", "text_field": "body", "revision": "abc"}
    status, out = run(recipe([], source=source))
    assert status == 0
    assert decoded(out, "train") == ["one", "two", "half \ufffd"]
    assert asked == {"name": "some/thing", "config": "small", "split": "train", "revision": "abc", "streaming": True}
    capsys.readouterr()
    assert run(recipe([], source=source | {"text_field": "text"}), "--force")[0] == 2
    assert "some/thing row 1: has no field `text` (source.text_field); it has body" in capsys.readouterr().err

    def fails(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("datasets.load_dataset", fails)
    assert run(recipe([], source=source), "--out", tmp_path / "other")[0] == 2
    error = capsys.readouterr().err
    assert "error: source.dataset some/thing: cannot be read: ConnectionError: no route to host\n" in error
