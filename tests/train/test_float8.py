"""fp8 products: where they are refused, which layers they take, and that nothing else about a model changes.

Products are emulated here, factors rounded to fp8 and multiplied in fp32; `tests/gpu/test_fp8.py` has the real ones.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from cllm.config import Config
from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.model.sizes import build_decoder
from cllm.runs import load_run
from cllm.train import prepare, run
from cllm.train.float8 import check_float8, convert_blocks
from cllm.train.optim import parameter_groups
from cllm.train.run import train

Tiny = Callable[..., Config]
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")


# ---- choosing and refusing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--train.precision", "fp32"], "fp8 tensorwise needs bf16 around it, but precision is fp32"),
        (["--train.strategy", "zero3"], "fp8 tensorwise keeps every weight that zero3 has gathered"),
    ],
)
def test_settings_that_contradict_fp8_are_refused(tiny: Tiny, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny("--train.fp8", "tensorwise", *settings)


def test_a_cpu_is_refused_before_a_folder_appears(tiny: Tiny) -> None:
    config = tiny("--train.fp8", "tensorwise")
    with pytest.raises(UserError, match=r"train\.fp8 is tensorwise, but the run is on a CPU"):
        train(config)
    assert not (Path(config.runs_dir) / config.name).exists()


def test_what_a_gpu_lacks_is_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("--train.fp8", "rowwise")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(UserError, match=r"train\.fp8 is rowwise, but A100 has compute capability 8\.0 .* need 8\.9"):
        check_float8(config, "gpu")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(UserError, match=r"train\.fp8 is rowwise, but torchao cannot be imported .* pip install"):
        check_float8(config, "gpu")
    odd = tiny("--train.fp8", "rowwise", "--data.seq_len", "20")
    with pytest.raises(UserError, match=r"micro_batch 2 x data\.seq_len 20 is 40 tokens; allowed: multiples of 16"):
        check_float8(odd, "gpu")
    check_float8(tiny(), "gpu")
    check_float8(tiny(), "cpu")


# ---- conversion -----------------------------------------------------------------------------------------------------


def build(config: Config) -> Decoder:
    torch.manual_seed(0)
    model = build_decoder(config.model)
    model.init_weights()
    return model


def fused(tiny: Tiny, *settings: str) -> Config:
    """Four layers of width 32 and d_ff 128, the upper two with fused keys and values: 2 x 7 + 2 x 5 linear layers."""
    return tiny("--model.kv.preset", "fusedkv", "--model.vocab_size", "320", *settings)


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
def test_names_parameters_and_optimizer_groups_stay(tiny: Tiny, recipe: str) -> None:
    config = fused(tiny)
    plain, model = build(config), build(config)
    before = dict(model.named_parameters())
    assert convert_blocks(model, recipe, emulate=True) == 2 * 7 + 2 * 5
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    state = model.state_dict()
    assert list(state) == list(plain.state_dict())
    assert all(type(tensor) is torch.Tensor and tensor.dtype == torch.float32 for tensor in state.values())
    plain.load_state_dict(state)
    model.load_state_dict(plain.state_dict())
    shapes = [[[p.shape for p in g["params"]] for g in parameter_groups(m, config.optim)] for m in (plain, model)]
    assert shapes[0] == shapes[1]


@needs_torchao
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_rounded_and_gradients_reach_every_weight(tiny: Tiny, recipe: str) -> None:
    config = fused(tiny)
    plain, model = build(config), build(config)
    convert_blocks(model, recipe, emulate=True)
    ids = torch.randint(320, (2, 33), generator=torch.Generator().manual_seed(1))
    exact, loss = (m.loss(ids[:, :-1], ids[:, 1:]) for m in (plain, model))
    assert loss.item() != exact.item()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    exact.backward()
    loss.backward()
    for (name, a), b in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert b.grad.dtype == torch.float32
        cosine = torch.cosine_similarity(a.grad.flatten(), b.grad.flatten(), dim=0)
        assert cosine > 0.97, f"{name}: {cosine}"


@needs_torchao
def test_only_linear_layers_of_blocks_with_fitting_dimensions_are_converted(tiny: Tiny) -> None:
    from torchao.float8.float8_linear import Float8Linear

    model = build(fused(tiny, "--model.d_ff", "40"))
    convert_blocks(model, "tensorwise", emulate=True)
    names = {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}
    assert names
    assert all(
        name.startswith("blocks.") and not name.endswith(("gate_proj", "up_proj", "down_proj")) for name in names
    )
    assert type(model.head).__name__ == "Head"
    with pytest.raises(UserError, match=r"none of the model's 24 linear layers has dimensions"):
        convert_blocks(build(fused(tiny, "--model.d_model", "24", "--model.head_dim", "12")), "tensorwise")


class Largest(CustomGraphPass):
    """How many largest values each compiled graph looks for."""

    def __init__(self) -> None:
        self.found: list[int] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.found.append(sum(node.target is torch.ops.aten.max.default for node in graph.nodes))

    def uuid(self) -> None:
        return None


@needs_torchao
def test_a_compiled_backward_looks_for_the_largest_gradients_alone(tiny: Tiny) -> None:
    """Seven layers read four inputs; the scales of these and of the weights are kept."""
    model, largest = build(tiny("--model.vocab_size", "320")), Largest()
    convert_blocks(model, "tensorwise", emulate=True)
    torch._dynamo.reset()
    block = model.blocks[0]
    block.compile(dynamic=False, options={"post_grad_custom_post_pass": largest})
    ids = torch.randint(320, (2, 32))
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(ids, ids)
    loss.backward()
    assert largest.found == [7 + 4, 7]


@needs_torchao
def test_a_run_learns_as_without_fp8_and_its_checkpoint_is_a_plain_one(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(fused(tiny, "--name", "plain"))
    monkeypatch.setattr(run, "check_float8", lambda config, accelerator: None)
    monkeypatch.setattr(prepare, "convert_blocks", functools.partial(convert_blocks, emulate=True))
    folder = train(fused(tiny, "--name", "narrow", "--train.fp8", "tensorwise"))
    losses = [[row["train/loss"] for row in f.metrics() if "train/loss" in row] for f in (plain, folder)]
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], abs=0.03)
    assert losses[1][-1] < losses[1][0]
    states = [load_run(f.path)[0].state_dict() for f in (plain, folder)]
    assert {n: (t.shape, t.dtype) for n, t in states[0].items()} == {
        n: (t.shape, t.dtype) for n, t in states[1].items()
    }
    with pytest.raises(UserError, match=r"train\.fp8 is None, but the run in .* was started with 'tensorwise'"):
        train(fused(tiny, "--name", "narrow", "--train.steps", "10"), resume="auto")
