"""scripts/convert.py import and plain: other families' folders in, and out again."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM

import cllm  # noqa: F401 - registers the classes
from cllm.errors import UserError
from cllm.hub.exchange import export_folder, import_folder

ROOT = Path(__file__).resolve().parents[2]


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
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as stored:
            found |= {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
    return found


def convert(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "convert.py", *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_llama_comes_in_and_goes_out_bit_for_bit(llama, tmp_path, tied):
    folder, original = llama(tie_word_embeddings=tied)
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    done = convert("import", folder, inside)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout
    ids = torch.randint(40, (2, 20), generator=torch.Generator().manual_seed(0))
    ours = AutoModelForCausalLM.from_pretrained(inside).eval()
    assert type(ours).__name__ == "CLLMForCausalLM"
    assert (ours.model.head.weight is ours.model.embed.weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, original(ids).logits, atol=1e-5, rtol=1e-5)
    assert ours.generation_config.top_k == 11
    assert ours.config.eos_token_id == 7
    assert (inside / "tokenizer_config.json").exists()

    done = convert("plain", inside, outside)
    assert done.returncode == 0, done.stderr
    assert "written as llama" in done.stdout
    before, after = tensors(folder), tensors(outside)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        theirs = LlamaForCausalLM.from_pretrained(outside).eval()
        assert torch.equal(theirs(ids).logits, original(ids).logits)
    assert (outside / "tokenizer_config.json").exists()


def test_what_cannot_be_converted_leaves_nothing_behind(llama, tmp_path):
    folder, _ = llama()
    done = convert("import", folder / "nowhere", tmp_path / "a")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "config.json: missing" in done.stderr
    (tmp_path / "b").mkdir()
    with pytest.raises(UserError, match="b: exists"):
        import_folder(folder, tmp_path / "b")
    (folder / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        import_folder(folder, tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "llama"]


def test_plain_refuses_what_the_family_has_not(llama, tmp_path, tiny_config, random_model):
    from cllm.hub.export import as_pretrained

    as_pretrained(random_model(tiny_config(kv={"preset": "fusedkv"}))).save_pretrained(tmp_path / "fused")
    with pytest.raises(UserError, match="layer 4"):
        export_folder(tmp_path / "fused", tmp_path / "out")
    folder, _ = llama()
    with pytest.raises(UserError, match="is a llama checkpoint already"):
        export_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
