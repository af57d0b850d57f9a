"""Gemma 1 and the text models of Gemma 3: what is folded into weights, gradients, decoding, sizes, tools around them.

Logits and refused configs are in test_families.py, random plans with such layers in tests/plan.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    PreTrainedModel,
    SiglipVisionConfig,
)

import cllm
from cllm.cache.accounting import cache_bytes
from cllm.cache.cache import KVCache
from cllm.config import ModelConfig, Rope
from cllm.errors import UserError
from cllm.hub.exchange import import_folder
from cllm.hub.export import as_pretrained
from cllm.hub.families import export_family, load_family, read_family
from cllm.hub.families.memory import decoder_of
from cllm.model.context import Context
from cllm.model.decoder import Decoder
from cllm.model.rope import rope_table
from cllm.model.sizes import build_decoder, count_parameters, layer_flops_per_token, meta_decoder
from cllm.posthoc.engine import engine_of
from cllm.posthoc.registry import parse

SLIDING, FULL = "sliding_attention", "full_attention"
IDS = torch.randint(1, 48, (2, 40), generator=torch.Generator().manual_seed(1))
SHAPES: dict[str, dict[str, Any]] = {
    "1B": {"num_key_value_heads": 1},
    "4B": {
        "query_pre_attn_scalar": 20,
        "rope_parameters": {
            FULL: {"rope_type": "linear", "rope_theta": 5e4, "factor": 8.0},
            SLIDING: {"rope_type": "default", "rope_theta": 300.0},
        },
    },
}


def gemma(name: str = "4B", seed: int = 0, **options: Any) -> PreTrainedModel:
    """A tiny Gemma 3 of two periods, with head_dim other than hidden_size / heads and random norms."""
    sizes = {"vocab_size": 48, "hidden_size": 40, "intermediate_size": 56, "num_hidden_layers": 6, "head_dim": 12}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    kinds = {"sliding_window": 5, "layer_types": [SLIDING, SLIDING, FULL] * 2, "query_pre_attn_scalar": 12}
    ids = {"bos_token_id": 2, "eos_token_id": None, "pad_token_id": 0}
    config = Gemma3TextConfig(**{**sizes, **kinds, **ids, **SHAPES[name], **options}, attn_implementation="eager")
    model = Gemma3ForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor_name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if "norm" in tensor_name else noise / parameter.shape[-1] ** 0.5)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """`folder("4B", seed=1)`: the folder of a `gemma`."""

    def save(*arguments: Any, **options: Any) -> Path:
        gemma(*arguments, **options).save_pretrained(tmp_path / "gemma")
        return tmp_path / "gemma"

    return save


def decoder(folder: Path) -> Decoder:
    config, state = load_family(folder)
    model = build_decoder(config)
    model.load_state_dict(state)
    return model.eval()


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Compared with the largest number of all."""
    torch.testing.assert_close(found, expected, atol=tolerance * float(expected.detach().abs().max()), rtol=0)


# ---- with transformers' weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients_equal_transformers(name: str, seed: int, folder: Callable[..., Path]) -> None:
    theirs, ours = gemma(name, seed), decoder(path := folder(name, seed))
    expected, found = theirs(input_ids=IDS).logits, ours(IDS)
    assert_close(found, expected)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2))
    (expected * probe).sum().backward()
    (found * probe).sum().backward()
    of = dict(theirs.named_parameters())
    mine = dict(ours.named_parameters())
    table = read_family(path).weights
    assert {weight.source for weight in table} == of.keys()
    for weight in table:
        gradient, wanted = mine[weight.target].grad, of[weight.source].grad
        assert gradient is not None
        assert wanted is not None
        assert_close(gradient * weight.scale, wanted, 3e-5)


@pytest.fixture
def with_images(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """The folder of a tiny Gemma 3 that takes images too, and the model."""
    text = gemma()
    images = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = SiglipVisionConfig(**images, image_size=28, patch_size=14)
    config = Gemma3Config(text_config=text.config, vision_config=vision, mm_tokens_per_image=1, image_token_index=47)
    model = Gemma3ForConditionalGeneration(config).eval()
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.save_pretrained(tmp_path / "images")
    return tmp_path / "images", model


def test_the_text_model_of_one_that_takes_images_is_read(with_images: tuple[Path, PreTrainedModel]) -> None:
    folder, model = with_images
    ids = IDS.clamp(max=46)  # 47 stands for an image
    with torch.no_grad():
        assert_close(decoder(folder)(ids), model(input_ids=ids).logits)
    text = read_family(folder)
    assert text.family == "gemma3"
    assert text.token_ids == {"bos_token_id": 2, "eos_token_id": None, "pad_token_id": 0}
    config = json.loads((folder / "config.json").read_text())
    for changes, message in (
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is .*gptq.*; allowed: null"),
        (
            {"text_config": config["text_config"] | {"model_type": "llama"}},
            'text_config: model_type is "llama"; allowed',
        ),
        ({"text_config": config["text_config"] | {"attention_bias": True}}, "attention_bias is true; allowed: false"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=message):
            read_family(folder)


def test_tensors_beside_the_text_model_are_known_by_name(with_images: tuple[Path, PreTrainedModel]) -> None:
    folder, _ = with_images
    stored = load_file(folder / "model.safetensors")
    save_file({**stored, "audio_tower.weight": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"tensor audio_tower\.weight is no part of a gemma3 model"):
        load_family(folder)


def test_one_plus_the_weight_of_a_norm_is_rounded_once(tmp_path: Path) -> None:
    """A number in bf16 has 8 bits: 1 + weight is off by 2^-8 of itself at most. As fp32 it is kept."""
    model = gemma().bfloat16()
    model.save_pretrained(tmp_path)
    theirs = dict(model.named_parameters())
    (_, stored), (_, wide) = load_family(tmp_path), load_family(tmp_path, torch.float32)
    norms = [weight for weight in read_family(tmp_path).weights if weight.offset]
    assert len(norms) == 6 * 6 + 1
    for weight in norms:
        exact = (theirs[weight.source].double() + 1) * weight.scale
        assert stored[weight.target].dtype == torch.bfloat16
        torch.testing.assert_close(stored[weight.target].double(), exact, rtol=2**-8, atol=0)
        torch.testing.assert_close(wide[weight.target].double(), exact, rtol=1e-6, atol=0)


def test_embeddings_in_bf16_are_scaled_as_transformers_does(folder: Callable[..., Path]) -> None:
    path, ids = folder(), torch.arange(48)[None]
    theirs, ours = gemma().bfloat16(), decoder(path).bfloat16()
    assert torch.equal(ours.embed(ids), theirs.get_input_embeddings()(ids))


@pytest.mark.parametrize("name", SHAPES)
def test_generation_gives_the_tokens_of_transformers(name: str, folder: Callable[..., Path]) -> None:
    theirs, ours = gemma(name), as_pretrained(decoder(folder(name)))
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = theirs.generate(IDS[:, :12], **options)
    assert torch.equal(ours.generate(IDS[:, :12], **options), expected)
    assert torch.equal(ours.generate(IDS[:, :12], cache_implementation="static", **options), expected)


@pytest.mark.parametrize("max_len", [None, 40])
def test_a_cache_gives_the_logits_of_a_full_pass(max_len: int | None, folder: Callable[..., Path]) -> None:
    model = decoder(folder()).requires_grad_(False)
    full, cache = model(IDS), KVCache(model.config, max_len=max_len)
    parts = [model(part, cache=cache) for part in IDS.split([9, 1, 1, 7, *([1] * 22)], dim=1)]
    assert_close(torch.cat(parts, dim=1), full)
    cache = KVCache(model.config, max_len=max_len)
    assert_close(model.head(model.prefill(IDS, cache, chunk=6)), full[:, -1:])


def test_every_rope_table_is_made_before_the_layers(
    folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[float] = []
    before: list[int] = []

    def recorded(rope: Rope, dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        made.append(rope.theta)
        return rope_table(rope, dim, positions)

    def counted(self: Context, *arguments: Any) -> None:
        prepare(self, *arguments)
        before.append(len(made))

    prepare = Context.prepare
    monkeypatch.setattr("cllm.model.context.rope_table", recorded)
    monkeypatch.setattr(Context, "prepare", counted)
    model = decoder(folder())
    cache = KVCache(model.config)
    for ids in (IDS[:, :5], IDS[:, 5:6]):
        model(ids, cache=cache)
        assert len(made) == before[-1]
    assert made == [300.0, 5e4] * 2


@pytest.mark.usefixtures("eager_graphs")
def test_compiled_blocks_compute_the_same(folder: Callable[..., Path]) -> None:
    model = decoder(path := folder()).requires_grad_(False)
    expected = model(IDS)
    compiled = decoder(path).requires_grad_(False)
    compiled.compile_blocks()
    assert_close(compiled(IDS), expected)


def test_a_model_in_memory_gives_its_logits(folder: Callable[..., Path]) -> None:
    model = gemma()
    with torch.no_grad():
        assert_close(decoder_of(model, folder())(IDS), model(input_ids=IDS).logits)


def test_an_imported_folder_is_read_again(folder: Callable[..., Path], tmp_path: Path) -> None:
    expected = decoder(path := folder())
    import_folder(path, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, expected(IDS))
        embeds = again.get_input_embeddings()(IDS)
        assert torch.equal(again(inputs_embeds=embeds).logits, expected(IDS))
    section = json.loads((tmp_path / "ours" / "config.json").read_text())["model"]
    assert (section["rope"]["theta"], section["rope"]["windowed_theta"]) == (5e4, 300.0)
    assert (section["norms_after"], section["mlp_activation"], section["scale_embeddings"]) == (True, "gelu_tanh", True)


# ---- sizes by hand ---------------------------------------------------------------------------------------------------

# As config.json of the checkpoints on the Hub says it, with names of transformers 4.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "gemma-3-270m": (
        268_098_176,
        {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4},
    ),
    "gemma-3-1b-pt": (
        999_885_952,
        {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4},
    ),
}
COMMON = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_parameters_and_bytes(name: str, tmp_path: Path) -> None:
    parameters, shape = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **shape}))
    config = read_family(tmp_path).config
    model = meta_decoder(config)
    assert count_parameters(model) == parameters
    d, f, n = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    layer = d * 256 * (4 + 1 + 1 + 4) + 3 * d * f
    assert parameters == 262144 * d + n * (layer + 4 * d + 2 * 256) + d
    full = [i for i in range(n) if i % 6 == 5]
    assert [i for i, of in enumerate(config.plan().layers) if of.window is None] == full
    assert {of.window for of in config.plan().layers} == {512, None}
    assert (config.rope.theta, config.rope.windowed_theta) == (1e6, 1e4)
    assert cache_bytes(config, context=32768) == (len(full) * 32768 + (n - len(full)) * 512) * 2 * 256 * 2
    flops = layer_flops_per_token(model, 256)  # every query sees 128.5 keys in all layers
    assert flops == pytest.approx([2 * layer + 4 * 4 * 256 * 128.5] * n)


def test_gemma_3_linear_scaling_is_that_of_layers_without_a_window(tmp_path: Path) -> None:
    scaling = {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}
    (tmp_path / "config.json").write_text(json.dumps({**COMMON, **PUBLISHED["gemma-3-1b-pt"][1], **scaling}))
    rope = read_family(tmp_path).config.rope
    assert rope.scaling is not None
    assert (rope.scaling.type, rope.scaling.factor) == ("linear", 8.0)
    assert rope.of(True).scaling is None
    assert rope.of(False) is rope


# ---- tools around it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["xkv:group=2,energy=1.0", "xkv:group=2,energy=1.0,weight=queries"])
def test_compression_that_loses_nothing(method: str, folder: Callable[..., Path]) -> None:
    """Layers without a window are compressed. Their keys are rotated back by the base that such layers have."""
    model = decoder(folder()).requires_grad_(False)
    engine, compressor = engine_of(model), parse(method)
    compressor.prepare(engine, IDS)
    cache = engine.new_cache()
    with compressor.watch(engine):
        engine.hidden(IDS[:, :30], cache)
    compressed = engine.compress(cache, compressor)
    found = torch.cat([engine.logits(IDS[:, t : t + 1], compressed) for t in range(30, 40)], dim=1)
    assert_close(found, model(IDS)[:, 30:], 1e-4)


@pytest.mark.parametrize(
    "method", ["h2o:ratio=1.5", "snapkv:ratio=1.5", "xkv:group=2,ratio=1.5,weight=queries", "turboquant:mean_bits=3"]
)
def test_the_cache_of_the_model_of_transformers_is_refused_where_keys_or_queries_rotate(method: str) -> None:
    with pytest.raises(UserError, match=r"rope type is .*'sliding_attention': 'default'.*; allowed: default, linear"):
        cllm.compress(gemma(), IDS[:, :30], method)


def test_a_stored_prefix_is_read_again(folder: Callable[..., Path], tmp_path: Path) -> None:
    model = as_pretrained(decoder(folder())).eval()
    cache = cllm.compress(model, IDS[:1], "xkv:group=2,ratio=1.5,sinks=2")
    cllm.save_prefix(tmp_path / "p", cache, model, IDS[:1])
    again, _ = cllm.load_prefix(tmp_path / "p", model)
    for following in ([[7]], [[8, 9]]):
        ids = torch.tensor(following)
        assert torch.equal(model.model(ids, cache=cache), model.model(ids, cache=again))


def test_merged_adapters_of_embeddings_give_what_they_gave_apart(folder: Callable[..., Path]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = as_pretrained(decoder(folder(tie_word_embeddings=False)))
    plain = base(IDS).logits.detach()
    options = {"r": 2, "task_type": "CAUSAL_LM", "init_lora_weights": False, "target_modules": ["embed"]}
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        apart = model(IDS).logits
        assert (apart - plain).abs().max() > 0.1
        assert_close(model.merge_and_unload()(IDS).logits, apart)


def test_an_embedding_that_does_not_scale_is_refused_and_a_resized_one_scales(folder: Callable[..., Path]) -> None:
    model = as_pretrained(decoder(folder()))
    expected = model(IDS).logits.detach()
    with pytest.raises(UserError, match=r"the embedding is a Embedding, .*model\.scale_embeddings is true"):
        model.set_input_embeddings(torch.nn.Embedding(48, 40))
    model.resize_token_embeddings(64)
    assert_close(model(IDS).logits[..., :48], expected)


BEYOND = {"norms_after": True, "mlp_activation": "gelu_tanh", "scale_embeddings": True}
BEYOND_LLAMA: list[dict[str, Any]] = [
    *({key: value} for key, value in BEYOND.items()),
    {"rope": {"windowed_theta": 1e3}, "kv": {"preset": "mha", "window": 5}},
]


@pytest.mark.parametrize("model", BEYOND_LLAMA, ids=lambda model: next(iter(model)))
def test_formats_without_such_layers_are_refused(
    model: dict[str, Any], tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    config = tiny_config(**model)
    (key,) = config.beyond_llama
    with pytest.raises(UserError, match=f"cannot be written as llama: model.{key} is .*, which no family has"):
        export_family(config, build_decoder(config).state_dict(), tmp_path / "out")
