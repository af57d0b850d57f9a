"""The measurement against loops and by hand: windows, documents, bytes."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cllm.data.manifest import Manifest
from cllm.data.packing import window
from cllm.data.store import TokenStore
from cllm.errors import UserError
from cllm.evaluate.perplexity import Settings, measure, open_sets, score
from cllm.evaluate.subjects import load_subject
from cllm.evaluate.texts import TextTokens, TokenBytes
from cllm.evaluate.windows import Stream, windows

CPU = torch.device("cpu")


@torch.no_grad()
def _naive(model, tokens: list[int], width: int, stride: int) -> list[float]:
    """The nll of tokens[1:], each from its own forward over the slice of context that it is entitled to."""
    losses = []
    for target in range(1, len(tokens)):
        turn = max(0, math.ceil((target - width) / stride))
        context = torch.tensor([tokens[turn * stride : target]])
        losses.append(F.cross_entropy(model(context)[0, -1], torch.tensor(tokens[target])).item())
    return losses


def _nll(subject, stream, **settings) -> np.ndarray:
    batches = score(subject, stream, device=CPU, **settings)
    return np.concatenate([np.where(b.counted, b.nll, np.nan).flatten() for b in batches])


@pytest.mark.parametrize(("width", "stride", "batch"), [(16, 8, 4), (16, 16, 3), (12, 5, 1), (7, 1, 64), (1, 1, 8)])
def test_strided_windows_equal_a_forward_for_each_token(make_run, width, stride, batch) -> None:
    run, model = make_run()
    store = TokenStore(run.config().data.path, "validation")
    subject = load_subject(run.path, CPU)
    tokens = [store.eos_id, *store.read(0, 100).tolist()]
    stream = Stream(store, start_id=subject.start_id, limit=100)
    found = _nll(subject, stream, window=width, stride=stride, batch=batch)
    assert len(found) == 100
    np.testing.assert_allclose(found, _naive(model, tokens, width, stride), rtol=1e-4, atol=1e-5)


def test_a_window_as_long_as_the_text_is_one_forward(make_run) -> None:
    run, model = make_run()
    store = TokenStore(run.config().data.path, "validation")
    subject = load_subject(run.path, CPU)
    with torch.no_grad():
        ids = torch.tensor([[store.eos_id, *store.read(0, 30).tolist()]])
        expected = F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:], reduction="sum").item()
    text = next(open_sets(subject))
    record = measure(subject, text, Settings(window=32, stride=16, max_tokens=30), CPU)
    assert record["tokens_scored"] == 30
    assert record["nll"] == pytest.approx(expected, rel=1e-6)
    assert record["perplexity"] == pytest.approx(math.exp(expected / 30), rel=1e-6)


def test_masked_documents_are_scored_alone_and_their_first_tokens_not(make_run) -> None:
    """With a window longer than every document, a masked stream is each document by itself, positions from 0."""
    run, model = make_run(data={"document_mask": True})
    store = TokenStore(run.config().data.path, "validation")
    tokens = store.read(0, len(store)).tolist()
    documents, start = [], 0
    for end in [i for i, token in enumerate(tokens) if token == store.eos_id]:
        documents.append(tokens[start : end + 1])
        start = end + 1
    subject = load_subject(run.path, CPU)
    whole = [d for d in documents if len(d) <= 16]
    assert len(whole) > 3
    total = 0.0
    for document in documents:
        total += sum(_naive(model, document, 10**6, 1))
    subject.context = None  # the longest document exceeds the tiny model's
    record = measure(subject, next(open_sets(subject)), Settings(window=len(tokens), stride=len(tokens)), CPU)
    assert record["tokens_scored"] == len(tokens) - len(documents)
    assert record["nll"] == pytest.approx(total, rel=1e-5)
    assert record["document_mask"] is True
    assert record["bytes_exact"] is True
    # Bytes: everything but the first tokens of the documents.
    table = TokenBytes(subject.tokenizer).lengths
    first = sum(int(table[document[0]]) for document in documents)
    assert record["bytes"] == Manifest.read(store.folder).split("validation").bytes - first


def test_masked_windows_are_fed_as_in_training(make_run, monkeypatch) -> None:
    """Document ids and positions reach the model; both restart with the window, positions at each document too."""
    run, _ = make_run(data={"document_mask": True})
    store = TokenStore(run.config().data.path, "validation")
    subject = load_subject(run.path, CPU)
    fed, logits = [], subject.logits

    def recorded(*tensors):
        fed.append(tensors)
        return logits(*tensors)

    monkeypatch.setattr(subject, "logits", recorded)
    measure(subject, next(open_sets(subject)), Settings(window=16, stride=16, batch=1), CPU)
    assert len(fed) > 10
    for k, (input_ids, positions, document_ids, _) in enumerate(fed):
        expected = window(store, 16 * k, input_ids.shape[1], document_mask=True)
        assert input_ids[0].equal(expected["input_ids"])
        assert positions[0].equal(expected["positions"])
        assert document_ids[0].equal(expected["document_ids"])


def test_bits_per_byte_by_hand(make_run, tmp_path) -> None:
    run, model = make_run()
    text = "日本 alpha"
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    subject = load_subject(run.path, CPU)
    tokenizer = subject.tokenizer
    ids = [tokenizer.eos_token_id, *tokenizer(text).input_ids, tokenizer.eos_token_id]
    assert len(ids) <= 16
    nll = sum(_naive(model, ids, 16, 8))
    record = measure(subject, next(open_sets(subject, [tmp_path / "t.txt"])), Settings(), CPU)
    assert record["bytes"] == 3 + 3 + 1 + 5
    assert record["tokens_scored"] == len(ids) - 1
    assert record["bits_per_byte"] == pytest.approx(nll / math.log(2) / 12, rel=1e-5)


def test_uniform_models_of_two_tokenizers_differ_by_their_tokens_alone(make_run, texts, tmp_path, monkeypatch) -> None:
    """A uniform model spends log2(V) bits on each token: over bytes that is 8.006 bits a byte plus the EOS."""
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    n_bytes = sum(len(text.encode()) for text in texts)
    found = {}
    for vocab_size in (257, 300):
        run, _ = make_run(f"v{vocab_size}", vocab_size=vocab_size)
        subject = load_subject(run.path, CPU)

        def uniform(ids, positions, documents, last, v=vocab_size):
            return torch.zeros(len(ids), last, v)

        monkeypatch.setattr(subject, "logits", uniform)
        found[vocab_size] = measure(subject, next(open_sets(subject, [tmp_path / "t.jsonl"])), Settings(), CPU)
    byte_level, bpe = found[257], found[300]
    assert byte_level["bytes"] == bpe["bytes"] == n_bytes
    assert byte_level["tokens_scored"] == n_bytes + len(texts)
    assert byte_level["bits_per_byte"] == pytest.approx(math.log2(257) * (n_bytes + len(texts)) / n_bytes)
    assert byte_level["perplexity"] == pytest.approx(257)
    assert bpe["tokens_scored"] < byte_level["tokens_scored"]
    ratio = math.log2(300) * bpe["tokens_scored"] / (math.log2(257) * byte_level["tokens_scored"])
    assert bpe["bits_per_byte"] / byte_level["bits_per_byte"] == pytest.approx(ratio)


def test_token_bytes_add_up_to_the_text(prepared) -> None:
    folder = prepared(300)
    manifest, store = Manifest.read(folder), TokenStore(folder, "validation")
    table = TokenBytes(manifest.tokenizer())
    assert table.exact
    assert table.lengths[store.read(0, len(store))].sum() == manifest.split("validation").bytes
    assert table.lengths[manifest.eos_id] == 0


def test_text_in_memory_knows_its_documents_as_a_store_does(prepared, texts) -> None:
    store = TokenStore(prepared(300), "train")
    assert len(store._shards) > 1
    tokenizer = store.manifest.tokenizer()
    everything = store.read(0, len(store))
    pieces = np.split(everything, np.flatnonzero(everything == store.eos_id) + 1)[:-1]
    memory = TextTokens([str(tokenizer.decode(piece[:-1])) for piece in pieces], tokenizer)
    assert memory.read(0, len(memory)).tolist() == everything.tolist()
    for start, stop in [(0, 50), (3, 200), (117, 118), (60, 60), (0, len(store))]:
        for ours, theirs in zip(memory.documents(start, stop), store.documents(start, stop), strict=True):
            assert ours.tolist() == theirs.tolist()


def test_the_result_depends_neither_on_the_batch_nor_on_how_the_text_comes(make_run, texts, tmp_path) -> None:
    run, _ = make_run()
    subject = load_subject(run.path, CPU)
    store = TokenStore(run.config().data.path, "validation")
    tokens = store.read(0, len(store))
    pieces = np.split(tokens, np.flatnonzero(tokens == store.eos_id) + 1)[:-1]
    lines = [json.dumps({"text": subject.tokenizer.decode(piece[:-1])}) + "\n" for piece in pieces]
    (tmp_path / "same.jsonl").write_text("".join(lines))
    first = measure(subject, next(open_sets(subject)), Settings(batch=1), CPU)
    again = measure(subject, next(open_sets(subject, [tmp_path / "same.jsonl"])), Settings(batch=50), CPU)
    assert again["nll"] == pytest.approx(first["nll"], rel=1e-6)
    for key in ("tokens", "tokens_scored", "bytes", "documents", "window", "stride"):
        assert again[key] == first[key]
    assert (first["window"], first["stride"]) == (16, 8)


def test_a_part_of_a_set_counts_the_bytes_of_that_part(make_run) -> None:
    run, _ = make_run(vocab_size=257)
    subject = load_subject(run.path, CPU)
    record = measure(subject, next(open_sets(subject)), Settings(max_tokens=25), CPU)
    ids = TokenStore(run.config().data.path, "validation").read(0, 25)
    assert record["bytes"] == 25 - int((ids == subject.start_id).sum())
    assert record["bytes_exact"] is True


def test_damaged_weights_are_named(make_run, monkeypatch) -> None:
    run, _ = make_run()
    subject = load_subject(run.path, CPU)
    monkeypatch.setattr(subject, "logits", lambda ids, p, d, last: torch.full((len(ids), last, 300), math.nan))
    with pytest.raises(UserError, match=r"its loss on .* is nan"):
        measure(subject, next(open_sets(subject)), Settings(), CPU)


@pytest.mark.parametrize("masked", [False, True])
def test_the_recall_slice_is_what_a_loop_over_windows_finds(make_run, masked) -> None:
    run, _ = make_run(data={"document_mask": masked})
    subject = load_subject(run.path, CPU)
    text = next(open_sets(subject))
    stream = Stream(text.source, start_id=subject.start_id)
    losses = _nll(subject, stream, window=16, stride=5, batch=1)
    slices: dict[bool, list[float]] = {True: [], False: []}
    for span in windows(len(stream), 16, 5):
        tokens = stream.read(span.start, span.stop + 1).tolist()
        documents = (stream.documents(span.start, span.stop + 1)[0] if masked else np.zeros(len(tokens))).tolist()
        places = itertools.pairwise(zip(documents, tokens, strict=True))
        pairs = [(d, a, b) if d == e else None for (d, a), (e, b) in places]
        for t in range(len(pairs) - span.scored, len(pairs)):
            if pairs[t] is not None:
                slices[pairs[t] in pairs[:t]].append(losses[span.start + t])
    assert min(map(len, slices.values())) > 50
    records = [measure(subject, text, Settings(window=16, stride=5, batch=batch), CPU) for batch in (1, 7)]
    for record in records:
        assert record["ar_tokens"] == record["ar_tokens_1_63"] == len(slices[True])
        assert record["ar_loss"] == pytest.approx(np.mean(slices[True]), rel=1e-5)
        assert record["other_loss"] == pytest.approx(np.mean(slices[False]), rel=1e-5)
        assert record["ar_loss_1024_up"] is None
