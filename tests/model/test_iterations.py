"""Cyclic plans: iterating converges to decoding token by token, the definition; and causality of every preset."""

import itertools

import pytest
import torch

from cllm.plan.presets import preset_names

CYCLIC = ["lckv", "lasagna_middle", "lasagna_top", "pizza_middle", "pizza_top", "sandwich_middle", "sandwich_top"]
T = 8
IDS = torch.randint(32, (1, T), generator=torch.Generator().manual_seed(0))


def iterated(tiny_config, random_model, name: str, forward: int, backward: int):
    kv = {"preset": name, "n_kv_heads": 2, "iterations": {"forward": forward, "backward": backward}}
    return random_model(tiny_config(kv=kv))


def sequential(reference, model, name: str) -> torch.Tensor:
    weights = {key: p.detach().double() for key, p in model.named_parameters()}
    rows = reference.PRESETS[name][1]
    slow = reference.SlowDecoder(weights, rows, n_heads=4, head_dim=8, latent=reference.LATENT)
    with torch.no_grad():
        return slow.by_tokens(IDS[0].tolist())


def test_cyclic_presets_are_those_that_read_from_above(preset_config):
    assert sorted(CYCLIC) == [name for name in preset_names() if preset_config(name).plan().cyclic_spans()]


@pytest.mark.parametrize("name", CYCLIC)
def test_as_many_passes_as_tokens_are_exact(name, reference, tiny_config, random_model):
    model = iterated(tiny_config, random_model, name, T - 2, 2)
    with torch.no_grad():
        logits = model(IDS)[0].double()
    torch.testing.assert_close(logits, sequential(reference, model, name), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CYCLIC)
def test_n_passes_are_exact_for_the_first_n_tokens_and_better_the_more(name, reference, tiny_config, random_model):
    expected = sequential(reference, iterated(tiny_config, random_model, name, 1, 1), name)
    errors = []
    for passes in range(2, T + 1):
        model = iterated(tiny_config, random_model, name, passes - 1, 1)
        with torch.no_grad():
            off = (model(IDS)[0].double() - expected).abs().amax(dim=-1)
        assert off[:passes].max() < 1e-4, f"{passes} passes"
        errors.append(float(off.norm()))
    assert errors[0] > 1e-2
    assert all(later <= earlier for earlier, later in itertools.pairwise(errors)), errors


@pytest.mark.parametrize(
    ("name", "layers"), [("lckv", [1, 2, 3, 4, 5]), ("sandwich_middle", [2, 3]), ("lasagna_top", [1, 2, 4, 6])]
)
def test_first_token_attends_to_nothing_where_a_layer_reads_from_above(name, layers, preset_config, random_model):
    model = random_model(preset_config(name))
    seen: dict[int, torch.Tensor] = {}
    for i, block in enumerate(model.blocks):
        block.attention.o_proj.register_forward_hook(lambda _, __, out, i=i: seen.__setitem__(i, out[:, 0]))
    with torch.no_grad():
        model(IDS)
    assert [i for i in range(8) if not seen[i].any()] == layers


def test_only_the_backward_passes_record_gradients(random_model, tiny_config):
    flags = []
    kv = {"preset": "lckv", "iterations": {"forward": 3, "backward": 2}}
    model = random_model(tiny_config(kv=kv))
    model.blocks[3].register_forward_hook(lambda *_: flags.append(torch.is_grad_enabled()))
    model(IDS)
    assert flags == [False] * 3 + [True] * 2


def test_a_span_leaves_the_layers_outside_it_to_one_pass(preset_config, random_model):
    model = random_model(preset_config("sandwich_middle"))  # 0_1_4x5_7: layers 2 to 4 are a cycle
    calls = [0] * 8
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda *_, i=i: calls.__setitem__(i, calls[i] + 1))
    with torch.no_grad():
        model(IDS)
    assert calls == [1, 1, 4, 4, 4, 1, 1, 1]


@pytest.mark.parametrize("name", [*preset_names(), "yoco with retention"])
def test_a_token_changes_no_logits_before_it_and_its_own(name, preset_config, random_model):
    model = random_model(preset_config(name))
    with torch.no_grad():
        before = model(IDS)
        for t in range(T):
            changed = IDS.clone()
            changed[0, t] = (changed[0, t] + 1) % 32
            after = model(changed)
            torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-5, rtol=1e-5)
            assert (after[:, t] - before[:, t]).abs().max() > 1e-2
