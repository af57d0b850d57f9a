"""The initial weights of a decoder."""

from __future__ import annotations

import pytest
import torch

from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.hub.config import CLLMConfig
from cllm.hub.model import CLLMForCausalLM
from cllm.model import attention, sizes
from cllm.model.decoder import Decoder
from cllm.model.sizes import build_decoder, count_parameters, meta_decoder, model_d_ff
from cllm.model.sources import FusedRead, make_read
from cllm.plan.plan import Fuse
from cllm.plan.presets import preset_names


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("mha", {"qk_norm": True, "q_bias": True}),
        ("gqa", {"kv_bias": True}),
        ("mla", {}),
        ("yoco with retention", {}),
        ("fusedkv", {"tie_embeddings": True}),
        ("fusedkv_lite", {"match_params": True}),
        ("lckv", {}),
    ],
)
def test_all_weights_are_drawn_and_what_is_tied_stays_tied(name, more, preset_config, monkeypatch):
    """`build_decoder` gives the weights of `init_weights` on a decoder that torch initialised, for any memory."""
    config = preset_config(name, **more)
    wanted = Decoder(config, d_ff=model_d_ff(config))
    torch.manual_seed(3)
    wanted.init_weights()
    monkeypatch.setattr(sizes, "_uninitialised", lambda meta: torch.full(meta.shape, torch.nan, dtype=meta.dtype))
    torch.manual_seed(3)
    found = build_decoder(config)
    assert list(found.state_dict()) == list(wanted.state_dict())
    for key, value in wanted.state_dict().items():
        assert torch.equal(found.state_dict()[key], value), key
    assert (found.head.weight is found.embed.weight) == config.tie_embeddings
    assert [p.requires_grad for p in found.parameters()] == [p.requires_grad for p in wanted.parameters()]
    assert len(list(found.parameters())) == len(list(wanted.parameters()))


def fingerprint(model: torch.nn.Module) -> float:
    """A sum in which every weight has a different factor, to be compared up to rounding."""
    weights = torch.cat([tensor.detach().double().flatten() for tensor in model.state_dict().values()])
    return float((weights * torch.arange(len(weights)).double().cos()).sum())


TINY = {"vocab_size": 32, "d_model": 24, "n_layers": 8, "n_heads": 4, "head_dim": 8, "d_ff": 32, "max_seq_len": 64}


@pytest.mark.parametrize(
    ("kv", "more", "drawn", "pretrained"),
    [
        ({"preset": "mha"}, {"qk_norm": True, "q_bias": True}, 3.1679836657659086, -2.4912854359422587),
        ({"preset": "mla"}, {}, 1.4555084758021772, -2.8773929718899103),
        ({"preset": "yoco", "lower": "retention"}, {}, -3.309469971177058, -4.752515729879549),
        ({"preset": "fusedkv"}, {"tie_embeddings": True}, -2.1195712732417156, -5.52278006838176),
        ({"preset": "fusedkv", "init": "randn"}, {}, -5.963107326507279, -12.055595764416953),
        ({"preset": "fusedkv_lite"}, {"match_params": True}, 1.2112793026260187, -4.214196200776656),
        ({"preset": "lckv"}, {}, -1.4452132341761856, -1.8616548548141356),
        ({"preset": "cla"}, {}, 0.6508721174943752, 0.7011740414112315),
    ],
)
def test_a_seed_gives_the_same_weights_in_every_version(kv, more, drawn, pretrained):
    """Two sums, because torch initialises the layers of transformers' class first, which draws numbers."""
    config = ModelConfig.model_validate({**TINY, **more, "kv": kv})
    torch.manual_seed(3)
    assert fingerprint(build_decoder(config)) == pytest.approx(drawn, abs=1e-5)
    torch.manual_seed(3)
    assert fingerprint(CLLMForCausalLM(CLLMConfig(model=config)).model) == pytest.approx(pretrained, abs=1e-5)


@pytest.mark.parametrize("name", [*preset_names(), "yoco with retention"])
def test_a_decoder_that_was_built_computes_finite_logits(name, preset_config):
    logits = build_decoder(preset_config(name, qk_norm=True))(torch.arange(8)[None])
    assert logits.isfinite().all()
    assert logits.std() < 1, "an untrained model knows nothing"


def test_a_decoder_on_the_meta_device_has_no_memory_and_draws_no_numbers(preset_config):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model = meta_decoder(preset_config("fusedkv"))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


class ScaledRead(FusedRead):
    """A new kind of read: a fused read times a learned scale in a separate module."""

    def __init__(self, *arguments, scale: torch.nn.Module):
        super().__init__(*arguments)
        self.scale = scale

    def forward(self, slots):
        return super().forward(slots) * self.scale.weight


class Scale(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(1))


class DrawnScale(Scale):
    def reset_parameters(self):
        torch.nn.init.ones_(self.weight)


class HalfDrawnScale(DrawnScale):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.empty(1))


@pytest.fixture
def read_with(monkeypatch, preset_config):
    """A config whose layers read through a `ScaledRead` with a scale of the given class."""

    def build(scale: type[Scale]) -> ModelConfig:
        def make(read, part, places, n_kv_heads, head_dim):
            if isinstance(read, Fuse):
                sources = [places[j] for j in read.layers]
                return ScaledRead(read, sources, part, n_kv_heads, head_dim, scale=scale())
            return make_read(read, part, places, n_kv_heads, head_dim)

        monkeypatch.setattr(attention, "make_read", make)
        return preset_config("fusedkv")

    return build


def test_a_new_kind_of_read_is_initialised_by_its_reset_parameters(read_with):
    model = build_decoder(read_with(DrawnScale))
    scales = [module.weight for module in model.modules() if isinstance(module, Scale)]
    assert len(scales) == 8
    assert all(scale.item() == 1 for scale in scales)
    assert model(torch.arange(8)[None]).isfinite().all()


def test_a_module_without_reset_parameters_is_refused(read_with):
    config = read_with(Scale)
    message = r"blocks\.4\.attention\.keys\.scale \(Scale\) has parameters but no reset_parameters"
    for build in (build_decoder, meta_decoder, Decoder):
        with pytest.raises(TypeError, match=message):
            build(config)


def test_a_module_that_leaves_a_parameter_out_is_refused(read_with):
    message = r"blocks\.4\.attention\.keys\.scale\.reset_parameters\(\) \(HalfDrawnScale\) does not initialise bias"
    with pytest.raises(TypeError, match=message):
        build_decoder(read_with(HalfDrawnScale))


def test_a_model_larger_than_the_memory_is_refused(tiny_config):
    config = tiny_config(d_model=2**16, head_dim=2**12, n_heads=16, d_ff=2**18, n_layers=64)
    with pytest.raises(UserError, match=r"model has [\d,]{17} parameters, .* GiB of memory; lower model\.d_model"):
        build_decoder(config)


def test_widths_that_cannot_match_are_refused(tiny_config):
    config = tiny_config(kv={"preset": "mla", "kv_lora_rank": 4096}, match_params=True)
    with pytest.raises(UserError) as error:
        meta_decoder(config)
    twin = count_parameters(meta_decoder(tiny_config()))
    least = count_parameters(meta_decoder(tiny_config(kv={"preset": "mla", "kv_lora_rank": 4096}, d_ff=1)))
    assert str(error.value).startswith(
        f"model.match_params: the nearest d_ff, 1, gives the model {least:,} parameters, and its mha twin has {twin:,}"
    )
