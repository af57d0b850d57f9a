"""scripts/convert.py import and plain: other families' folders in, and out again."""

import re

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import cllm  # noqa: F401 - registers the classes
from cllm.errors import UserError
from cllm.hub.exchange import export_folder, import_folder
from cllm.hub.export import as_pretrained


@pytest.fixture
def llama(tmp_path):
    """A folder with a tiny Llama, its generation config and a file of its tokenizer."""

    def make(**options):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=40,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            eos_token_id=7,
            **options,
        )
        model = LlamaForCausalLM(config)
        model.generation_config = GenerationConfig(eos_token_id=7, pad_token_id=0, top_k=11, do_sample=True)
        folder = tmp_path / "llama"
        model.save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text("{}")
        return folder, model.eval()

    return make


def tensors(folder):
    found: dict[str, torch.Tensor] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_comes_in_and_goes_out_bit_for_bit(llama, convert, tmp_path, capsys, tied):
    folder, original = llama(tie_word_embeddings=tied)
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    assert convert("import", folder, inside) == 0
    assert "parameters" in capsys.readouterr().out
    ids = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))
    ours = AutoModelForCausalLM.from_pretrained(inside).eval()
    assert type(ours).__name__ == "CLLMForCausalLM"
    assert (ours.model.head.weight is ours.model.embed.weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, original(ids).logits, atol=1e-5, rtol=1e-5)
    assert ours.generation_config.top_k == 11
    assert ours.config.eos_token_id == 7
    assert (inside / "tokenizer_config.json").exists()

    assert convert("plain", inside, outside) == 0
    assert "written as llama" in capsys.readouterr().out
    before, after = tensors(folder), tensors(outside)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(outside).eval()
        assert torch.equal(theirs(ids).logits, original(ids).logits)
    assert (outside / "tokenizer_config.json").exists()


def test_what_cannot_be_converted_leaves_nothing_behind(llama, convert, tmp_path, capsys):
    folder, _ = llama()
    capsys.readouterr()
    assert convert("import", folder / "nowhere", tmp_path / "a") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "config.json: missing" in error
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="b: exists"):
        import_folder(folder, tmp_path / "b")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        import_folder(folder, tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "llama"]


def _cut(file):
    file.write_bytes(file.read_bytes()[:-100])


BROKEN = {
    "a shard is missing": ("model-00002*", lambda f: f.unlink(), r"model-00002-of-\d+\.safetensors"),
    "a shard is cut": ("model-00002*", _cut, r"model-00002-of-\d+\.safetensors: cannot be read: "),
    "no weights": ("model*", lambda f: f.unlink(), "no file named model.safetensors"),
    "no JSON": ("config.json", lambda f: f.write_text("{"), r"config\.json"),
    "a list": ("config.json", lambda f: f.write_text("[]"), r"config\.json: holds a list"),
    "no such plan": (
        "config.json",
        lambda f: f.write_text(f.read_text().replace('"preset": "gqa"', '"preset": "gqq"')),
        r"broken: config\.json: model\.kv\.preset: unknown preset",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_plain_tells_what_is_broken_in_a_line(name, tmp_path, tiny_config, random_model, convert, capfd):
    files, damage, message = BROKEN[name]
    model = as_pretrained(random_model(tiny_config(kv={"preset": "gqa", "n_kv_heads": 2}, n_layers=2)))
    model.save_pretrained(tmp_path / "broken", max_shard_size="20KB")
    for file in (tmp_path / "broken").glob(files):
        damage(file)
    capfd.readouterr()
    assert convert("plain", tmp_path / "broken", tmp_path / "out") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1, error
    assert re.search(message, error), error
    assert not (tmp_path / "out").exists()


def test_plain_refuses_what_the_family_has_not(llama, tmp_path, tiny_config, random_model):
    as_pretrained(random_model(tiny_config(kv={"preset": "fusedkv"}))).save_pretrained(tmp_path / "fused")
    with pytest.raises(UserError, match="layer 4"):
        export_folder(tmp_path / "fused", tmp_path / "out")
    folder, _ = llama()
    with pytest.raises(UserError, match="is a llama checkpoint already"):
        export_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
