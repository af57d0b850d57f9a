"""Two tokenizers are the same when they do the same; token ids fit a vocabulary or are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer

from cllm.data.manifest import Manifest
from cllm.data.module import DataModule
from cllm.data.vocabulary import (
    backend_sha256,
    check_ids,
    load_tokenizer,
    read_tokenizer,
    same_tokenizer,
    tokenizer_sha256,
)
from cllm.errors import DataError, UserError

GPT2_RULE = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
SPLIT = {"type": "Split", "pattern": {"Regex": GPT2_RULE}, "behavior": "Isolated", "invert": False}


def added(content: str, i: int, *, special: bool) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": content, **flags, "special": special}


@pytest.fixture
def content(prepared) -> dict:
    """The JSON of a byte-level BPE of 320 tokens."""
    return json.loads((prepared / "tokenizer" / "tokenizer.json").read_text())


def of(content: dict) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}},
        {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}},
        {"pre_tokenizer": {**BYTES, "use_regex": True, "trim_offsets": False}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}},
        {"normalizer": {"type": "Sequence", "normalizers": []}},
        {"added_tokens": [added("<|endoftext|>", 0, special=True), added("<pad>", 320, special=True)]},
    ],
    ids=["nothing", "post_processor", "truncation", "offsets", "written_out", "empty_normalizer", "pad_token"],
)
def test_other_words_for_the_same_tokenizer(content, change):
    assert same_tokenizer(of(content), of(content | change))
    assert same_tokenizer(of(content | change), of(content))


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {**BYTES, "use_regex": True, "add_prefix_space": True}},
        {"pre_tokenizer": BYTES},
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES],
            }
        },
        {"added_tokens": [added("<|endoftext|>", 0, special=True), added("alpha beta", 320, special=False)]},
        {"added_tokens": [added("<|endoftext|>", 0, special=False)]},
    ],
    ids=["NFC", "lowercase", "prefix_space", "no_words", "digits", "new_word", "eos_in_texts"],
)
def test_another_tokenizer(content, change):
    assert not same_tokenizer(of(content), of(content | change))
    assert not same_tokenizer(of(content | change), of(content))


def test_another_vocabulary(content):
    fewer = content["model"] | {"merges": content["model"]["merges"][1:]}
    assert not same_tokenizer(of(content), of(content | {"model": fewer}))
    swapped = dict(content["model"]["vocab"])
    swapped["a"], swapped["b"] = swapped["b"], swapped["a"]
    assert not same_tokenizer(of(content), of(content | {"model": content["model"] | {"vocab": swapped}}))


def test_the_tokenizers_compared_are_left_alone(content):
    content["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    first, second = of(content), of(content | {"normalizer": {"type": "NFC"}})
    same_tokenizer(first, second)
    assert len(first.encode("alpha beta gamma delta").ids) == 2
    assert not first.encode_special_tokens


def _rewritten(prepared: Path, folder: Path) -> Manifest:
    """The prepared folder as if it had been made with the same tokenizer, written differently."""
    record = Manifest.load(prepared)
    content = json.loads((prepared / "tokenizer" / "tokenizer.json").read_text())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [SPLIT, BYTES]}
    for file in prepared.glob("*.*"):
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps(content))
    other = record.model_copy(update={"tokenizer_sha256": tokenizer_sha256(folder / "tokenizer"), "folder": folder})
    other.save(folder)
    return Manifest.load(folder)


def test_prepared_folders_are_compared_by_what_their_tokenizers_do(prepared, tmp_path):
    first, second = Manifest.load(prepared), _rewritten(prepared, tmp_path)
    assert first.tokenizer_sha256 != second.tokenizer_sha256
    assert first.same_tokenizer(second)
    assert second.is_tokenized_by(read_tokenizer(prepared / "tokenizer"))
    settings = {"seq_len": 16, "micro_batch": 2, "global_batch": 2}
    assert DataModule(str(prepared), {"x": str(tmp_path)}, **settings).validation_names == ["x"]
    content = json.loads((prepared / "tokenizer" / "tokenizer.json").read_text())
    content["added_tokens"][0]["content"] = "</s>"
    vocab = content["model"]["vocab"]
    vocab["</s>"] = vocab.pop("<|endoftext|>")
    assert not first.is_tokenized_by(of(content)), "its EOS is another token"


def test_hash_of_a_loaded_tokenizer_is_that_of_the_saved_one(prepared, tmp_path):
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(str(prepared / "tokenizer")).save_pretrained(str(tmp_path))
    assert backend_sha256(load_tokenizer(prepared / "tokenizer")) == tokenizer_sha256(tmp_path)
    assert backend_sha256(load_tokenizer(tmp_path)) == tokenizer_sha256(tmp_path)


def test_folders_without_a_usable_tokenizer(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json: missing"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer: "):
        read_tokenizer(tmp_path)
    with pytest.raises(UserError, match="its tokenizer cannot be loaded: "):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="not the JSON of a tokenizer"):
        tokenizer_sha256(tmp_path)


def test_a_tokenizer_with_parts_in_python_cannot_be_compared(content):
    tokenizer = of(content)
    tokenizer.pre_tokenizer = PreTokenizer.custom(object())
    for compare in (lambda: same_tokenizer(of(content), tokenizer), lambda: backend_sha256(tokenizer)):
        with pytest.raises(UserError, match=r"cannot be written as tokenizer\.json cannot be compared: "):
            compare()


def test_ids_in_and_out_of_range():
    check_ids(np.array([], dtype=np.int64), 1, "x", "y")
    check_ids(np.array([[0, 4], [2, 3]]), 5, "x", "y")
    with pytest.raises(DataError, match=r"^x: holds token 5, but y has tokens 0 to 4$"):
        check_ids(np.array([0, 5]), 5, "x", "y")
    with pytest.raises(DataError, match=r"^x: holds token -1, but y has tokens 0 to 4$"):
        check_ids(np.array([0, -1]), 5, "x", "y")
