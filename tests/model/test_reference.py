"""Every preset's logits and gradients against the slow decoder of tests/reference.py, written from the papers."""

import pytest
import torch

from cllm.plan.presets import preset_names

IDS = [5, 17, 3, 17, 30, 8]


def slow_decoder(reference, model, rows):
    weights = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    options = {**reference.LATENT, "q_lora_rank": getattr(model.plan.layers[0].own, "q_lora_rank", None)}
    config = model.config
    return reference.SlowDecoder(weights, rows, n_heads=config.n_heads, head_dim=config.head_dim, latent=options)


def assert_equal_to_reference(reference, model, rows):
    slow = slow_decoder(reference, model, rows)
    expected = slow.by_layers(IDS, **reference.ITERATIONS)
    logits = model(torch.tensor([IDS]))[0]
    torch.testing.assert_close(logits.double(), expected, atol=2e-5, rtol=2e-5)

    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (logits * probe).sum().backward()
    (expected * probe).sum().backward()
    for name, parameter in model.named_parameters():
        wanted = slow.weights[name].grad
        assert wanted is not None, name
        assert parameter.grad is not None, name
        error = (parameter.grad - wanted).norm() / wanted.norm()
        assert error < 2e-5, f"{name}: the gradient is {error:.1e} off"


@pytest.mark.parametrize("name", preset_names())
def test_logits_and_gradients_of_every_preset(name, reference, preset_config, random_model):
    extras = {} if name in ("mla", "mlra", "xmla") else {"qk_norm": True, "q_bias": True, "kv_bias": True}
    model = random_model(preset_config(name, **extras))
    assert_equal_to_reference(reference, model, reference.PRESETS[name][1])


VARIANTS = [
    "yoco with retention",
    "mla, full-rank queries",
    "fusedkv, scalar weights",
    "fusedkv, weights per head",
    "fusedkv, scalar weights per head",
    "fusedkv, complex keys and matrix values",
    "fusedkv, three sources",
    "learnable, weights per head",
    "cla, factor 3",
    "mha, window and kv norm",
    "swiftkv, groups of two",
    "ced, groups of two",
    "joins of every slot",
    "halves of other layers",
    "mixes of mixes",
    "tied slots of other layers",
    "a loop that reads its first turn",
    "heads of three sizes",
]


def test_all_variants_are_listed(reference):
    assert sorted(VARIANTS) == sorted(reference.VARIANTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_of_variants(name, reference, preset_config, random_model):
    assert_equal_to_reference(reference, random_model(preset_config(name)), reference.VARIANTS[name][1])


@pytest.mark.parametrize(
    "name",
    [
        *("mha", "fusedkv", "fusedkv, complex keys and matrix values", "yoco", "yoco with retention", "mla", "mlra"),
        *(
            "yoco_u",
            "a loop that reads its first turn",
            "heads of three sizes",
            "trailing",
            "swiftkv",
            "svformer",
            "kv_tie",
            "yoco_pp",
            "ced",
            "hysparse",
        ),
    ],
)
def test_layer_by_layer_and_token_by_token_are_equal(name, reference, preset_config, random_model):
    """Decoding order changes nothing in a plan that reads from below."""
    model = random_model(preset_config(name))
    rows = reference.PRESETS[name][1] if name in reference.PRESETS else reference.VARIANTS[name][1]
    with torch.no_grad():
        expected = slow_decoder(reference, model, rows).by_tokens(IDS)
        torch.testing.assert_close(model(torch.tensor([IDS]))[0].double(), expected, atol=2e-5, rtol=2e-5)


def test_every_row_of_a_batch_is_computed_alone(preset_config, random_model):
    model = random_model(preset_config("fusedkv"))
    ids = torch.randint(32, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batched = model(ids)
        for row in range(3):
            torch.testing.assert_close(model(ids[row : row + 1])[0], batched[row], atol=1e-5, rtol=1e-5)
