"""quack's in-place cross-entropy, and the loss computed with it, against fp32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cllm.kernels import cross_entropy
from cllm.kernels.cross_entropy import IGNORE
from cllm.model import loss
from cllm.model.loss import Head, linear_cross_entropy


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocabulary", [280, 32_000, 50_257, 128_256])
def test_nats_and_gradient_are_those_of_fp32(gpu: torch.device, vocabulary: int, dtype: torch.dtype) -> None:
    if reason := cross_entropy.unavailable(gpu, vocabulary, dtype):
        pytest.skip(reason)
    draw = torch.Generator(gpu).manual_seed(0)
    logits = (3 * torch.randn(300, vocabulary, device=gpu, generator=draw)).to(dtype)
    labels = torch.randint(vocabulary, (300,), device=gpu, generator=draw)
    labels[[0, 7, 299]] = IGNORE
    leaf = logits.float().clone().requires_grad_()
    wanted = F.cross_entropy(leaf, labels, ignore_index=IGNORE, reduction="none")
    wanted.sum().backward()
    nats = cross_entropy.by_quack(logits, labels, IGNORE)
    torch.testing.assert_close(nats, wanted.detach(), atol=1e-5, rtol=1e-5)
    rounding = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(logits.float(), leaf.grad, atol=1e-7, rtol=rounding)
    assert not logits[7].any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_of_several_chunks(gpu: torch.device, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients as close to fp32 as those of all logits at once in bf16."""
    monkeypatch.setattr(loss, "_CHUNK_BYTES", 2 * 4096 * 104)
    draw = torch.Generator(gpu).manual_seed(0)
    hidden = torch.randn(1000, 256, device=gpu, generator=draw).bfloat16()
    weight = (torch.randn(4096, 256, device=gpu, generator=draw) / 16).bfloat16()
    labels = torch.randint(4096, (1000,), device=gpu, generator=draw)
    labels[:100] = IGNORE

    def found(compute, dtype):
        leaves = [t.to(dtype).requires_grad_() for t in (hidden, weight)]
        value = compute(*leaves)
        return [value.detach().float(), *(g.float() for g in torch.autograd.grad(value, leaves))]

    def whole(hidden, weight):
        return F.cross_entropy((hidden @ weight.T).float(), labels, ignore_index=IGNORE, reduction=reduction)

    exact = found(whole, torch.float32)
    theirs = found(whole, torch.bfloat16)
    ours = found(lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, reduction), torch.bfloat16)
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-3)
    for mine, other, right in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert (mine - right).norm() < 1.5 * (other - right).norm() < 0.02 * right.norm()


def test_a_head_under_autocast_gives_fp32_gradients(gpu: torch.device) -> None:
    torch.manual_seed(0)
    head = Head(64, 512, bias=False).to(gpu)
    hidden = torch.randn(2, 32, 64, device=gpu, requires_grad=True)
    labels = torch.randint(512, (2, 32), device=gpu)
    with torch.autocast("cuda", torch.bfloat16):
        found = head(hidden, labels)
    found.backward()
    assert found.dtype == head.weight.grad.dtype == hidden.grad.dtype == torch.float32
    wanted = F.cross_entropy(F.linear(hidden.detach(), head.weight.detach()).flatten(0, 1), labels.flatten())
    assert found.item() == pytest.approx(wanted.item(), rel=1e-2)
