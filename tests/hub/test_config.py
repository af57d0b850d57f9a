"""config.json: what it holds, what it refuses."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.hub.config import CLLMConfig
from cllm.hub.model import CLLMForCausalLM
from cllm.model.sizes import build_decoder, count_parameters, model_d_ff

ROOT = Path(__file__).resolve().parents[2]


def _edit(folder: Path, **keys: object) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    return folder


@pytest.fixture
def folder(tiny_config, tmp_path) -> Path:
    CLLMConfig(model=tiny_config(kv={"preset": "cla", "n_kv_heads": 2}), eos_token_id=3).save_pretrained(tmp_path)
    return tmp_path


def test_the_file_holds_the_section_and_transformers_names(folder) -> None:
    content = json.loads((folder / "config.json").read_text())
    assert content["model_type"] == "cllm"
    assert content["model"]["kv"]["preset"] == "cla"
    names = {"vocab_size": 32, "hidden_size": 24, "num_hidden_layers": 8, "num_attention_heads": 4, "head_dim": 8}
    names |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64, "eos_token_id": 3}
    names |= {"tie_word_embeddings": False, "use_cache": True}
    assert {name: content[name] for name in names} == names


def test_a_saved_config_loads_back(folder, tiny_config) -> None:
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, CLLMConfig)
    assert config.model_config == tiny_config(kv={"preset": "cla", "n_kv_heads": 2})
    assert (config.design, config.eos_token_id, config.pad_token_id) == ("cla", 3, None)


def test_a_widened_mlp_is_stored_as_the_width_that_is_built(tmp_path) -> None:
    model = ModelConfig(vocab_size=64, d_model=32, n_layers=4, n_heads=4, match_params=True, kv={"preset": "fusedkv"})
    CLLMConfig(model=model).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.intermediate_size == model_d_ff(model) > model.resolved_d_ff
    assert count_parameters(build_decoder(config.model_config)) == count_parameters(build_decoder(model))


def test_what_may_be_set_sets_the_section(folder) -> None:
    config = AutoConfig.from_pretrained(folder, max_position_embeddings=128)
    assert config.model_config.max_seq_len == config.max_position_embeddings == 128
    config.tie_word_embeddings = True
    assert config.model_config.tie_embeddings is True
    model = CLLMForCausalLM(config)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not AutoConfig.from_pretrained(folder).tie_word_embeddings
    with pytest.raises(UserError, match=r"hidden_size is 25, but model\.d_model makes it 24"):
        config.hidden_size = 25
    with pytest.raises(UserError, match=r"model\.vocab_size: .*greater than or equal to 2, got 1"):
        config.vocab_size = 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda config: pickle.loads(pickle.dumps(config))])
def test_a_copied_config_is_another_one(copied, folder) -> None:
    config = AutoConfig.from_pretrained(folder)
    other = copied(config)
    assert other.to_dict() == config.to_dict()
    other.vocab_size, other.tie_word_embeddings = 40, True
    other.model["d_ff"] = 8
    assert (config.vocab_size, config.tie_word_embeddings, config.intermediate_size) == (32, False, 32)


def test_no_folder_names_code_to_run(folder) -> None:
    """Libraries look `auto_map` up; it is empty and never written."""
    config = AutoConfig.from_pretrained(folder)
    assert not config.auto_map
    assert "auto_map" not in json.loads((folder / "config.json").read_text())
    assert "auto_map" not in config.to_dict()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": 25}, r"config\.json: hidden_size is 25, but model\.d_model makes it 24"),
        ({"num_key_value_heads": 4}, r"num_key_value_heads is 4, but model\.kv makes it 2"),
        ({"tie_word_embeddings": True}, r"tie_word_embeddings is True, but model\.tie_embeddings makes it False"),
        ({"model": None}, r"config\.json: model: is required"),
        ({"model": {"d_modl": 24}}, r'config\.json: model\.d_modl: unknown key; did you mean "d_model"\?'),
        (
            {"model": {"d_model": 24, "n_layers": 2, "n_heads": 2, "vocab_size": 9, "kv": {"preset": "cls"}}},
            r'model\.kv\.preset: unknown preset "cls"; did you mean "cla"\?',
        ),
        ({"model": {"d_model": 24, "n_layers": 2, "n_heads": 2}}, r"model\.vocab_size: is null"),
    ],
)
def test_files_that_are_refused(folder, keys, message) -> None:
    with pytest.raises(UserError, match=message) as caught:
        AutoConfig.from_pretrained(_edit(folder, **keys))
    assert "\n" not in str(caught.value)


def test_transformers_may_be_imported_first(folder) -> None:
    code = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
import cllm
config = AutoConfig.from_pretrained(sys.argv[1])
assert type(AutoModelForCausalLM.from_config(config)).__name__ == "CLLMForCausalLM"
"""
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
