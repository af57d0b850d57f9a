"""Folders that somebody else made: no code of theirs is run or offered, and no name in their files leads elsewhere."""

import builtins
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from cllm.errors import UserError
from cllm.trust import check_model_folder, load_tokenizer, read_object, weight_map


@pytest.fixture(autouse=True)
def nobody_is_asked(monkeypatch):
    """transformers asks "run the custom code? [y/N]" with `input`."""

    asked = []

    def ask(prompt: str = "") -> str:
        asked.append(prompt)
        return "n"

    monkeypatch.setattr(builtins, "input", ask)
    yield
    assert not asked


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder whose Python file leaves a trace when it is run."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "folder"
    folder.mkdir()
    trace = f"open({str(tmp_path / 'trace')!r}, 'w').close()\n"
    (folder / "evil.py").write_text(trace + "class Evil: pass\n")
    yield folder
    assert not (tmp_path / "trace").exists()


def write(file: Path, **content) -> None:
    file.write_text(json.dumps(content))


EVIL = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}


def test_a_model_that_needs_code_is_refused_by_file_and_key(folder) -> None:
    write(folder / "config.json", model_type="evil", auto_map=EVIL)
    with pytest.raises(UserError, match=r"config\.json: auto_map names Python code .* never runs code from a folder$"):
        check_model_folder(folder)


def test_code_beside_a_known_model_is_left_alone_and_said(folder, caplog) -> None:
    write(folder / "config.json", model_type="llama", auto_map=EVIL)
    check_model_folder(folder)
    assert "auto_map names Python code" in caplog.text
    assert "transformers' own llama is used" in caplog.text


@pytest.mark.parametrize("named", [EVIL, ["evil.Evil", None], "evil.Evil"])
def test_a_tokenizer_that_needs_code_is_refused_by_file_and_key(folder, named) -> None:
    write(folder / "tokenizer_config.json", tokenizer_class="Evil", auto_map=named)
    with pytest.raises(UserError, match=r"tokenizer_config\.json: auto_map names Python code .* never runs code"):
        load_tokenizer(folder)


def test_a_tokenizer_of_a_folder_whose_config_names_code_asks_nothing(folder) -> None:
    write(folder / "config.json", model_type="evil", auto_map=EVIL)
    write(folder / "tokenizer_config.json", tokenizer_class="Evil")
    with pytest.raises(UserError, match="its tokenizer cannot be loaded") as refused:
        load_tokenizer(folder)
    assert len(str(refused.value)) < 600 + len(str(folder))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"attn_implementation": "someone/kernel"}, r"config\.json: attn_implementation is 'someone/kernel', code"),
        ({"text_config": {"_attn_implementation": "a/b"}}, "_attn_implementation is 'a/b', code from the Hub"),
        ({"transformers_weights": "../x.safetensors"}, r"transformers_weights: names '\.\./x\.safetensors'"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; allowed: 1 to 10000"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; allowed"),
        ({"text_config": {"n_layer": float("nan")}}, "n_layer is nan; allowed"),
    ],
)
def test_what_a_config_may_not_say(folder, config, message) -> None:
    write(folder / "config.json", model_type="llama", **config)
    with pytest.raises(UserError, match=message):
        check_model_folder(folder)


def test_an_adapter_stands_for_another_model(folder) -> None:
    write(folder / "config.json", model_type="llama")
    write(folder / "adapter_config.json", base_model_name_or_path="/elsewhere")
    with pytest.raises(UserError, match=r"adapter_config\.json: the folder holds an adapter; merge it"):
        check_model_folder(folder)


@pytest.mark.parametrize("name", ["../b.safetensors", "/etc/passwd", "sub/b.safetensors", "", 3, None, ["a"]])
def test_an_index_names_files_of_its_folder(folder, name) -> None:
    write(folder / "config.json", model_type="llama")
    index = folder / "model.safetensors.index.json"
    write(index, weight_map={"a": "a.safetensors", "b": name})
    for check in (weight_map, lambda _: check_model_folder(folder)):
        with pytest.raises(UserError, match=r"index\.json: weight_map:? names .*; allowed: names of files in"):
            check(index)


def test_an_index_of_links_may_be_read(folder, tmp_path) -> None:
    """As in the Hugging Face cache, where every file is a link to ../../blobs."""
    (tmp_path / "blob").touch()
    (folder / "a.safetensors").symlink_to(tmp_path / "blob")
    index = tmp_path / "index-blob"
    write(index, weight_map={"a": "a.safetensors"})
    (folder / "model.safetensors.index.json").symlink_to(index)
    assert weight_map(folder / "model.safetensors.index.json") == {"a": "a.safetensors"}


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", "null", "[" * 100_000, b"\xff\xfe", "1" * 5000])
def test_what_is_no_json_object_is_one_short_line(tmp_path, content) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"config\.json: (cannot be read|holds a)") as refused:
        read_object(file)
    assert len(str(refused.value)) < 500 + len(str(file))
