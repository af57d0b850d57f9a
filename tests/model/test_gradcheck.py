"""Gradients of reads and owners that papers do not have code for, against finite differences in fp64.

Norms, RoPE and sums compute in fp32 whatever the model's dtype, and a difference of 1e-6 would drown in their rounding:
here `Tensor.float` is `Tensor.double`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck

from cllm.config import ModelConfig
from cllm.kernels.attention import Mask
from cllm.kernels.joint import JointPart, joint_attention
from cllm.model.decoder import Decoder


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def test_one_softmax_over_two_slots_and_a_sink() -> None:
    """Of 2 and 1 KV heads and of 3 and 4 tokens, the second with a window."""
    torch.manual_seed(0)
    tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 3, 2, 4), (2,))]
    q, sink = tensors
    slots = [torch.randn(1, 3 + n // 2, 2 - n // 2, 4, dtype=torch.float64, requires_grad=True) for n in range(4)]

    def attend(q, sink, k, v, more_k, more_v):
        parts = [JointPart(k, v, Mask(None, False, None, None)), JointPart(more_k, more_v, Mask(2, False, None, None))]
        return joint_attention(q, parts, sink)

    assert gradcheck(attend, (q, sink, *slots))


CASES: dict[str, list[dict[str, Any]]] = {
    "gates": [{"own": {}}, {"read": {"gate": [0, {"own": {"window": 2}}]}}],
    "one gate": [{"own": {}}, {"read": {"gate": [0, {"own": {"window": 2}}], "gates": "complementary"}}],
    "sink and tie": [{"own": {}}, {"read": {"join": [0, {"own": {"window": 2, "tie": "kv"}}], "sink": True}}],
    "complex and matrix": [
        *[{"own": {"n_kv_heads": 1}}] * 2,
        {"keys": {"fuse": [0, 1], "granularity": "complex"}, "values": {"fuse": [0, 1], "granularity": "matrix"}},
    ],
    "tie": [{"own": {"tie": "kv", "kv_norm": True}}, {"own": {"tie": "kv", "input": 0}}],
    "mix": [{"own": {}}, {"own": {"mix": [0]}}],
    "halves": [
        {"own": {"only": "keys"}, "values": {"share": 1}},
        {"own": {"only": "values"}, "keys": {"share": 0}},
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_weights_of_attention(name: str) -> None:
    """Of all layers, with norms on queries and keys, and biases."""
    kv: dict[str, Any] = {"layers": [{"layers": i, **layer} for i, layer in enumerate(CASES[name])]}
    if name == "halves":
        kv["iterations"] = {"forward": 0, "backward": 2}
    shape = {"vocab_size": 5, "d_model": 4, "n_heads": 2, "head_dim": 4, "d_ff": 3, "max_seq_len": 8}
    options = {"qk_norm": True, "q_bias": True, "kv_bias": True}
    model = Decoder(ModelConfig(n_layers=len(kv["layers"]), kv=kv, **shape, **options)).double()
    generator, weights = torch.Generator().manual_seed(1), {}
    for key, parameter in model.named_parameters():
        size = 1 / 35 if ".mixed_" in key else 0.5  # weights that are multiplied by 35
        weights[key] = size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    checked = [key for key in weights if ".attention" in key or "stream_norms" in key]
    ids = torch.tensor([[1, 2, 3]])

    def logits(*values):
        return torch.func.functional_call(model, weights | dict(zip(checked, values, strict=True)), (ids,))

    assert gradcheck(logits, [weights[key].requires_grad_() for key in checked], atol=1e-6, rtol=1e-4, fast_mode=True)
