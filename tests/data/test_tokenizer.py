"""The tokenizer in a prepared folder is the one that made the tokens, and any Hugging Face program can load it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from cllm.data.manifest import Manifest
from cllm.data.store import TokenStore

REPO = Path(__file__).resolve().parents[2]


def test_loads_as_a_hugging_face_tokenizer(prepared):
    tokenizer = AutoTokenizer.from_pretrained(str(prepared / "tokenizer"))
    manifest = Manifest.load(prepared)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.eos_token_id == manifest.eos_id
    assert len(tokenizer) == manifest.vocab_size
    text = "def f(x):\n    return  x  # naïve 🙂 !"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert manifest.tokenizer()(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_loaded_tokenizer_keeps_its_hash(tmp_path, prepared, run, recipe, documents):
    # What lets a validation set be made later, for data that is there already.
    (tmp_path / "a.txt").write_text(documents(1)[0])
    status, out = run(recipe([tmp_path / "a.txt"], tokenizer={"load": str(prepared / "tokenizer")}))
    assert status == 0
    first, second = Manifest.load(prepared), Manifest.load(out)
    assert second.tokenizer_sha256 == first.tokenizer_sha256
    assert (second.vocab_size, second.eos_id) == (first.vocab_size, first.eos_id)
    assert AutoTokenizer.from_pretrained(str(out / "tokenizer")).eos_token_id == first.eos_id


def test_large_vocabulary_takes_four_bytes_a_token(tmp_path, prepared, run, recipe):
    tokenizer = AutoTokenizer.from_pretrained(str(prepared / "tokenizer"))
    tokenizer.add_tokens([f"word{i}" for i in range(2**16 + 5)])
    tokenizer.save_pretrained(str(tmp_path / "large"))
    (tmp_path / "a.txt").write_text(f"x word{2**16 + 4}")
    status, out = run(recipe([tmp_path / "a.txt"], tokenizer={"load": str(tmp_path / "large")}))
    assert status == 0
    manifest = Manifest.load(out)
    assert manifest.dtype == "uint32"
    assert manifest.vocab_size == len(tokenizer)
    store = TokenStore(out)
    assert store.read(len(store) - 2, len(store)).tolist() == [len(tokenizer) - 1, manifest.eos_id]


def test_tokenizer_without_eos_is_refused(tmp_path, prepared, run, recipe, capsys):
    folder = tmp_path / "headless"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((prepared / "tokenizer" / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    (tmp_path / "a.txt").write_text("text")
    status, out = run(recipe([tmp_path / "a.txt"], tokenizer={"load": str(folder)}))
    assert status == 2
    assert "has no EOS token (eos_token)" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_training_is_repeatable_across_processes(tmp_path, prepared, hash_seed):
    corpus = prepared.parent / "recipe.yaml"
    words = [sys.executable, str(REPO / "data" / "prepare.py"), "--config", str(corpus), "--out", str(tmp_path / "out")]
    subprocess.run(words, env={"PYTHONHASHSEED": hash_seed}, capture_output=True, check=True)
    assert Manifest.load(tmp_path / "out") == Manifest.load(prepared).model_copy(update={"folder": tmp_path / "out"})
