"""Gradients with checkpointing, iteration and autocast, for every parameter of every preset."""

import weakref

import pytest
import torch
import torch.nn.functional as F

from cllm.model.decoder import Decoder
from cllm.model.fusion import ComplexRead, MatrixRead
from cllm.model.sources import FusedRead
from cllm.plan.presets import preset_names

NAMES = [*preset_names(), "yoco with retention"]


def loss_and_gradients(model, seed: int = 0):
    model.zero_grad()
    ids = torch.randint(32, (2, 17), generator=torch.Generator().manual_seed(seed))
    loss = F.cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_no_gradient(name, preset_config, random_model):
    """Slots passed by side effect would give the right loss but lose the owners' gradients."""
    model = random_model(preset_config(name, qk_norm=True))
    loss, gradients = loss_and_gradients(model)
    model.gradient_checkpointing = True
    loss_again, gradients_again = loss_and_gradients(model)
    assert torch.equal(loss, loss_again)
    for key, gradient in gradients.items():
        torch.testing.assert_close(gradients_again[key], gradient, atol=1e-7, rtol=1e-6, msg=key)


FUSING = ["fusedkv", "fusedkv_lite_learnable", "explicit", "fusedkv, complex keys and matrix values"]


@pytest.fixture
def fusing(preset_config, tiny_config, random_model):
    """A model whose layers fuse keys, values or both; weights are drawn."""

    def build(name):
        if name != "explicit":
            return random_model(preset_config(name, qk_norm=True))
        layers = [{"layers": "0-1", "own": {}}, {"layers": "2-3", "keys": {"fuse": [0, 1]}, "values": {"share": 0}}]
        return random_model(tiny_config(n_layers=4, kv={"layers": layers}))

    return build


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", FUSING)
def test_recomputed_fusion_changes_no_gradient_and_is_not_saved(name, autocast, fusing, monkeypatch):
    model, kept = fusing(name), []
    for kind in (FusedRead, ComplexRead, MatrixRead):

        def watched(self, slots, plain=kind.forward):
            made = plain(self, slots)
            kept.append(weakref.ref(made.untyped_storage()))
            return made

        monkeypatch.setattr(kind, "forward", watched)
    found = []
    for model.recompute_fusion in (False, True):
        kept.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            ids = torch.randint(32, (2, 17), generator=torch.Generator().manual_seed(0))
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        assert kept
        assert all((ref() is None) == model.recompute_fusion for ref in kept)
        model.zero_grad()
        loss.backward()
        found.append((loss.detach(), {key: p.grad for key, p in model.named_parameters()}))
    (loss, gradients), (loss_again, gradients_again) = found
    assert torch.equal(loss, loss_again)
    for key, gradient in gradients.items():
        assert torch.equal(gradients_again[key], gradient), key


def test_compiled_blocks_save_less_if_fusion_is_recomputed(fusing):
    model, found = fusing("fusedkv"), []
    ids = torch.randint(32, (2, 17), generator=torch.Generator().manual_seed(0))
    for model.recompute_fusion in (False, True):
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(dynamic=False, fullgraph=True, backend="aot_eager_decomp_partition")
        nbytes = 0

        def count(tensor):
            nonlocal nbytes
            nbytes += tensor.nbytes
            return tensor

        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append((nbytes, [p.grad for p in model.parameters()]))
    torch._dynamo.reset()
    (before, gradients), (after, gradients_again) = found
    one = 4 * 2 * 16 * model.config.n_heads * model.config.resolved_head_dim  # fp32 (2, 16, G, D)
    assert before - after == 4 * 2 * one, "keys and values of the four layers that fuse"
    for gradient, again in zip(gradients, gradients_again, strict=True):
        torch.testing.assert_close(again, gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_of_a_new_model_has_a_gradient(name, preset_config, reference, tiny_config):
    options = reference.PRESETS[name][0] if name in reference.PRESETS else {}
    if "iterations" in options:  # the default, 7 and 2
        kv = {"preset": name, "n_kv_heads": 2}
        model = Decoder(tiny_config(kv=kv, qk_norm=True, q_bias=True, kv_bias=True))
    else:
        model = Decoder(preset_config(name, qk_norm=True, q_bias=True, kv_bias=True))
    torch.manual_seed(0)
    model.init_weights()
    _, gradients = loss_and_gradients(model)
    for key, gradient in gradients.items():
        assert gradient is not None, key
        assert gradient.isfinite().all(), key
        rows = gradient.flatten(1) if gradient.ndim > 1 else gradient[:, None]
        if key != "embed.weight":  # not every token occurs
            assert (rows != 0).any(dim=1).all(), f"{key}: a row has no gradient"


@pytest.mark.parametrize("backward", [1, 2])
def test_a_cyclic_plan_needs_two_passes_with_gradient(backward, tiny_config, random_model):
    """With one, the target's keys get no gradient from the layers that read from above (LCKV, section 2.3)."""
    iterations = {"forward": 3, "backward": backward}
    model = random_model(tiny_config(kv={"preset": "lckv", "warmup": 2, "iterations": iterations}, n_layers=4))
    with torch.no_grad():
        model.blocks[2].attention.o_proj.weight.zero_()  # layer 2 no longer uses its own keys and values
    _, gradients = loss_and_gradients(model)
    assert bool((gradients["blocks.2.attention.owner.k_proj.weight"] != 0).any()) == (backward == 2)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_bf16_autocast_trains_with_fp32_gradients(name, checkpointing, preset_config):
    model = Decoder(preset_config(name))
    torch.manual_seed(0)
    model.init_weights()
    exact, _ = loss_and_gradients(model)
    model.gradient_checkpointing = checkpointing
    with torch.autocast("cpu", torch.bfloat16):
        loss, gradients = loss_and_gradients(model)
    assert abs(loss - exact) < 0.02
    assert all(g is not None and g.dtype == torch.float32 and g.isfinite().all() for g in gradients.values())
    for module in model.modules():
        if isinstance(module, FusedRead):
            assert module.weight.grad.any()


@pytest.mark.parametrize("name", ["fusedkv", "fusedkv_lite", "cla"])
def test_gradient_of_a_shared_slot_agrees_with_finite_differences(name, preset_config, random_model):
    """Along the key projection of an owner that many layers read."""
    model = random_model(preset_config(name)).double()
    owner = next(j for j in model.plan.owners if model.plan.last_reader(j) != j)
    weight = model.blocks[owner].attention.owner.k_proj.weight
    ids = torch.randint(32, (1, 8), generator=torch.Generator().manual_seed(0))
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).double()

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])

    slope = (torch.autograd.grad(loss(), weight)[0] * direction).sum()
    with torch.no_grad():
        weight += 1e-3 * direction
        up = loss()
        weight -= 2e-3 * direction
        down = loss()
    assert float(slope) == pytest.approx(float((up - down) / 2e-3), rel=5e-2)


@pytest.mark.parametrize("name", preset_names())
def test_a_block_returns_its_slot_only_if_another_layer_reads_it(name, preset_config, random_model):
    """Otherwise a compiled block would compute zero gradients for it, and add them."""
    model = random_model(preset_config(name))
    handed = {}

    def keep(block: torch.nn.Module, _: object, found: tuple[torch.Tensor, object]) -> None:
        handed[block] = found[1] is not None

    for block in model.blocks:
        block.register_forward_hook(keep)
    model(torch.randint(32, (1, 8), generator=torch.Generator().manual_seed(0)))
    read = {j for i in range(len(model.plan)) for j in model.plan.reads_others(i)}
    assert [handed[block] for block in model.blocks] == [i in read for i in range(len(model.blocks))]
