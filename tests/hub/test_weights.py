"""What save_pretrained writes, from_pretrained reads: bit for bit, or not at all."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from cllm.errors import UserError
from cllm.hub.config import CLLMConfig
from cllm.hub.model import CLLMForCausalLM
from cllm.model.decoder import Decoder
from cllm.model.sizes import build_decoder
from cllm.model.sources import FusedRead
from cllm.plan.presets import preset_names

ROOT = Path(__file__).resolve().parents[2]
IDS = torch.arange(1, 13).view(2, 6)


def _same(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _rewrite(folder: Path, change) -> None:
    """Let `change` edit the tensors in a folder's weight file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_loads_as_it_was_saved(name, hub_model, preset_config, tmp_path) -> None:
    model = hub_model(config=preset_config(name))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert _same(model, loaded)
    assert not loaded.training
    with torch.no_grad():
        expected = model.model(IDS)
        assert torch.equal(loaded(IDS, use_cache=False).logits, expected)
    assert {key.partition(".")[0] for key in load_file(tmp_path / "model.safetensors")} == {"model"}


def test_layers_that_own_nothing_have_no_kv_weights(hub_model, tmp_path) -> None:
    hub_model({"preset": "cla"}, n_layers=4).save_pretrained(tmp_path)
    owners = {key.split(".")[2] for key in load_file(tmp_path / "model.safetensors") if ".owner." in key}
    assert owners == {"0", "2"}


def test_a_fresh_process_computes_the_same(hub_model, tmp_path) -> None:
    """And `import cllm` alone makes transformers know the folder, without importing transformers itself."""
    model = hub_model(qk_norm=True)
    model.save_pretrained(tmp_path)
    code = """
import sys, cllm
assert not {"transformers", "torch", "pydantic"} & set(sys.modules)
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
with torch.no_grad():
    logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(torch.arange(1, 13).view(2, 6), use_cache=False).logits
torch.save(logits, sys.argv[1] + "/logits.pt")
"""
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        assert torch.equal(torch.load(tmp_path / "logits.pt"), model(IDS, use_cache=False).logits)


def test_tied_embeddings_are_stored_once_and_stay_tied(hub_model, tmp_path) -> None:
    model = hub_model(tie_embeddings=True)
    model.save_pretrained(tmp_path)
    assert "model.head.weight" not in load_file(tmp_path / "model.safetensors")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.model.head.weight is loaded.model.embed.weight
    assert _same(model, loaded)


def test_weights_in_several_files(hub_model, tmp_path) -> None:
    model = hub_model(tie_embeddings=True)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert _same(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_bf16_leaves_fusion_weights_alone(hub_model, tmp_path) -> None:
    model = hub_model()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    fused = {id(p) for module in loaded.modules() if isinstance(module, FusedRead) for p in module.parameters()}
    assert fused
    original = model.state_dict()
    for name, parameter in loaded.named_parameters():
        if id(parameter) in fused:
            assert torch.equal(parameter, original[name])
        else:
            assert torch.equal(parameter, original[name].bfloat16()), name
    with torch.no_grad():
        assert loaded(IDS).logits.dtype == torch.bfloat16


def test_new_weights_are_those_of_a_new_decoder(tiny_config) -> None:
    config = CLLMConfig(model=tiny_config(kv={"preset": "fusedkv", "init": "randn"}))
    torch.manual_seed(5)
    model = CLLMForCausalLM(config)
    torch.manual_seed(5)
    decoder = Decoder(config.model_config)  # lets torch start its layers first, which draws numbers
    decoder.init_weights()
    assert _same(model.model, decoder)


def _post_init(model: CLLMForCausalLM) -> None:
    model.post_init()


def _resize(model: CLLMForCausalLM) -> None:
    model.resize_token_embeddings(40, mean_resizing=False)
    model.post_init()


@pytest.mark.parametrize("change", [_post_init, CLLMForCausalLM.init_weights, _resize])
@pytest.mark.parametrize("start", ["config", "folder", "decoder"])
def test_weights_are_drawn_once(start, change, hub_model, tmp_path) -> None:
    """Whoever initialises a second time, as transformers does, keeps them, whether trained or loaded."""
    model = hub_model()
    if start == "folder":
        model.save_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
    elif start == "config":
        model = CLLMForCausalLM(model.config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    change(model)
    for name, parameter in model.named_parameters():
        assert (parameter[: shapes[name][0]] == 0.5).all(), name


def test_weights_of_the_meta_device_are_drawn_when_they_have_memory(tiny_config) -> None:
    config = CLLMConfig(model=tiny_config())
    with torch.device("meta"):
        model = CLLMForCausalLM(config)
    assert model.base_model.layers[0].mlp.up_proj.weight.is_meta
    model.to_empty(device="cpu")
    torch.manual_seed(5)
    model.init_weights()
    decoder = build_decoder(config.model_config)
    torch.manual_seed(5)
    decoder.init_weights()
    assert _same(model.model, decoder)


def test_a_missing_an_extra_and_a_misshapen_tensor_are_errors(hub_model, tmp_path) -> None:
    hub_model().save_pretrained(tmp_path)

    def refused() -> str:
        with pytest.raises(UserError) as caught:
            AutoModelForCausalLM.from_pretrained(tmp_path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    _rewrite(tmp_path, lambda tensors: tensors.pop("model.blocks.5.attention.keys.weight"))
    assert "missing: model.blocks.5.attention.keys.weight" in refused()
    _rewrite(tmp_path, lambda tensors: tensors.update({"model.blocks.5.attention.keys.weight": torch.ones(2, 1, 5)}))
    assert "model.blocks.5.attention.keys.weight is (2, 1, 5), not (2, 1, 4)" in refused()
    _rewrite(tmp_path, lambda tensors: tensors.update({"model.blocks.5.attention.keys.weight": torch.ones(2, 1, 4)}))
    assert AutoModelForCausalLM.from_pretrained(tmp_path)
    _rewrite(tmp_path, lambda tensors: tensors.update({"model.extra": torch.ones(2)}))
    assert "not in the model: model.extra" in refused()
    with pytest.raises(UserError, match="ignore_mismatched_sizes"):
        CLLMForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)


def test_a_plan_that_does_not_fit_the_weights_is_an_error(hub_model, tmp_path) -> None:
    """In one line: transformers' table of tensors is not printed."""
    hub_model({"preset": "cla"}).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["model"]["kv"]["factor"] = 4
    (tmp_path / "config.json").write_text(json.dumps(content))
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transformers").addHandler(handler)
    with pytest.raises(UserError, match=r"not in the model: model\.blocks\.2\.attention\.owner\.k_proj\.weight and"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    logging.getLogger("transformers").removeHandler(handler)
    assert not messages


def test_tied_weights_that_differ_are_an_error(hub_model, tmp_path) -> None:
    hub_model(tie_embeddings=True).save_pretrained(tmp_path)
    _rewrite(tmp_path, lambda tensors: tensors.update({"model.head.weight": torch.ones(32, 24)}))
    with pytest.raises(UserError, match=r"model\.tie_embeddings is true, but model\.head\.weight differs"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_vocabulary_can_grow(hub_model, tmp_path) -> None:
    for tied in (False, True):
        model = hub_model(tie_embeddings=tied)
        before = model(IDS, use_cache=False).logits
        model.resize_token_embeddings(40, mean_resizing=False)
        assert torch.equal(model(IDS, use_cache=False).logits[..., :32], before)
        assert model(IDS, labels=IDS).loss.isfinite()
        model.save_pretrained(tmp_path / str(tied))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(tied))
        assert loaded.config.model_config.vocab_size == 40
        assert _same(model, loaded)
