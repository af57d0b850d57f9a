"""Random sources against R-CLA (arXiv 2604.22782): what is drawn, what is read, and what is fixed at inference."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from cllm.config import Config
from cllm.config.load import validate
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.train.run import train
from cllm.train.uptraining import draw_route
from cllm.uptrain.attention import attention_outputs
from cllm.uptrain.complete import load_config
from cllm.uptrain.decoder import build_traced

IDS = [5, 17, 3, 17, 30, 8]
N, P, DRAWS = 5, 0.6, 4000


@pytest.mark.parametrize("owners_only", [False, True])
def test_the_draw_is_the_published_one_or_restricted_to_owners(owners_only: bool) -> None:
    """Layer l reads itself with probability 1 - p, and otherwise each layer below with p / l (R-CLA) or, restricted,
    each of the n owners below with p / n."""
    routes = [draw_route(N, P, 0, step, owners_only=owners_only) for step in range(DRAWS)]
    expected = defaultdict[tuple[int, int], float](float)  # (layer, source): the mean reads, given the owners drawn
    for route in routes:
        for layer in range(N):
            below = [j for j in range(layer) if route[j] == j or not owners_only]
            expected[layer, layer] += 1 - P if below else 1
            for j in below:
                expected[layer, j] += P / len(below)
    found = Counter((layer, source) for route in routes for layer, source in enumerate(route))
    assert set(found) == {(layer, source) for layer in range(N) for source in range(layer + 1)}
    for read, mean in expected.items():
        assert found[read] == pytest.approx(mean, abs=4 * (DRAWS / 4) ** 0.5), read  # four standard deviations
    assert found[0, 0] == DRAWS, "layer 0 always reads its own"
    away = sum(route[route[layer]] != route[layer] for route in routes for layer in range(1, N))
    assert (away == 0) == owners_only, "in R-CLA a source may read another layer itself"


def test_a_layer_reads_what_the_drawn_layer_projects(reference, tiny_config, random_model) -> None:
    """Keys and values, of all heads, as the source projects them from its own input, whatever the source reads."""
    config = tiny_config(n_layers=4, kv={"preset": "gqa"})
    weights = random_model(config).state_dict()
    model = build_traced(config, routed=True)
    model.load_state_dict(weights)
    model.route = [0, 0, 1, 0]
    rows = ["own:2", "own:2 keys 0 values 0", "own:2 keys 1 values 1", "own:2 keys 0 values 0"]
    named = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    slow = reference.SlowDecoder(named, rows, n_heads=4, head_dim=8, latent={})
    expected, found = slow.by_layers(IDS), model(torch.tensor([IDS]))[0]
    torch.testing.assert_close(found.double(), expected, atol=2e-5, rtol=2e-5)
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (found * probe).sum().backward()
    (expected * probe).sum().backward()
    for name, parameter in model.named_parameters():
        wanted = slow.weights[name].grad
        wanted = torch.zeros_like(parameter).double() if wanted is None else wanted  # projections that nobody reads
        torch.testing.assert_close(parameter.grad.double(), wanted, atol=1e-4, rtol=1e-4, msg=name)
    assert model.blocks[1].attention.owner.k_proj.weight.grad.norm() > 0, "the source gets the gradient"


@pytest.mark.parametrize("route", [None, [0, 0, 1, 0]])
def test_the_loss_on_outputs_of_attention_follows_the_route(route, tiny_config, random_model) -> None:
    """On the model's own residual stream, outputs are those of the pass."""
    config = tiny_config(n_layers=4, kv={"preset": "gqa"})
    model = build_traced(config, routed=True)
    model.load_state_dict(random_model(config).state_dict())
    model.route = route
    outputs, streams = list[torch.Tensor](), list[torch.Tensor]()
    for block in model.blocks:
        block.attention.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    ids = torch.tensor([IDS])
    model.hidden(ids, states=streams)
    expected = list(outputs)
    for found, wanted in zip(attention_outputs(model, streams, ids), expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_at_inference_layers_read_the_nearest_owner_of_a_fixed_set(tiny_config, random_model) -> None:
    """The trained weights in the plan of the set S: mu(l) = l in S, otherwise the highest owner below."""
    kept = {0, 2, 3}
    nearest = [max(j for j in kept if j <= layer) for layer in range(6)]
    config = tiny_config(n_layers=6, kv={"preset": "gqa"})
    weights = random_model(config).state_dict()
    routed = build_traced(config, routed=True)
    routed.load_state_dict(weights)
    layers = [
        {"layers": layer, "own": {"n_kv_heads": 2}} if layer in kept else {"layers": layer, "read": {"share": source}}
        for layer, source in enumerate(nearest)
    ]
    shared = Decoder(tiny_config(n_layers=6, kv={"layers": layers}))
    missing, _ = shared.load_state_dict(weights, strict=False)
    assert not missing
    ids = torch.tensor([IDS])
    with torch.no_grad():
        full = routed(ids)
        assert torch.equal(full, random_model(config)(ids)), "without a route every layer reads its own"
        routed.route = nearest
        torch.testing.assert_close(shared(ids), routed(ids), atol=1e-5, rtol=1e-5)
        routed.route = None
        assert torch.equal(routed(ids), full)


def test_nothing_is_random_in_evaluation(tiny: Callable[..., Config], tmp_path: Path) -> None:
    """With weights that hardly move, validation losses between steps of other draws are equal."""
    base = tiny()
    start = train(base)
    data = base.as_yaml_data()
    data |= {"name": "routed", "init": {"from": str(start.path)}}
    data["uptrain"] = {"random_sources": 0.9, "random_sources_from": "all"}
    data["optim"] |= {"lr": 1e-12, "min_lr": 0.0}
    data["train"] |= {"steps": 4, "validate_every": 1, "log_every": 1}
    del data["model"]
    file = tmp_path / "routed.yaml"
    file.write_text(yaml.safe_dump(data), encoding="utf-8")
    rows = train(load_config([file], [])).metrics()
    found = [row["val/loss"] for row in rows if "val/loss" in row]
    assert len(found) > 2
    assert found == pytest.approx([found[0]] * len(found), abs=1e-6)


def test_sources_to_draw_from_need_a_draw(tiny: Callable[..., Config]) -> None:
    data = tiny().as_yaml_data() | {"init": {"from": "runs/x"}, "uptrain": {"random_sources_from": "all"}}
    with pytest.raises(UserError, match=r"random_sources_from is all, but uptrain\.random_sources is 0"):
        validate(Config, data)


@pytest.mark.parametrize(
    ("kv", "message"),
    [
        ({"preset": "kv_tie"}, r"layer 0 owns a slot of keys and values \(\d KV heads?, K = V\)"),
        ({"preset": "svformer"}, r"layer 1 owns a slot of keys \(.*\) and reads keys of its own and values of layer 0"),
        ({"preset": "mha", "window": 4, "full_every": 2}, "layer 1 differs from layer 0"),
    ],
)
def test_plans_without_a_choice_are_refused_with_the_reason(kv, message: str, tiny_config) -> None:
    with pytest.raises(UserError, match=rf"uptrain\.random_sources: {message}.*; allowed: plans in which"):
        build_traced(tiny_config(kv=kv), routed=True)
