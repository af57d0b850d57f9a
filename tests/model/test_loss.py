"""The chunked loss against the definition, in value and gradients."""

from __future__ import annotations

import pytest
import torch

from cllm.kernels.cross_entropy import IGNORE
from cllm.model import loss as module
from cllm.model.loss import Head, next_token_loss


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 50 * 3)  # three rows of a vocabulary of 50


def case(dtype: torch.dtype = torch.float32):
    torch.manual_seed(0)
    head = Head(8, 50, bias=False)
    hidden = torch.randn(2, 7, 8, requires_grad=True)
    labels = torch.randint(0, 50, (2, 7))
    labels[0, :3] = IGNORE
    return head, hidden, labels


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_and_gradients_equal_the_definition(reduction: str) -> None:
    head, hidden, labels = case()
    weights = torch.randn(2, 7) if reduction == "none" else torch.tensor(1.7)
    found = head(hidden, labels, reduction=reduction)
    (found * weights).sum().backward()
    gradients = hidden.grad, head.weight.grad
    hidden.grad = head.weight.grad = None
    expected = next_token_loss(head(hidden), labels, reduction=reduction)
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients, (hidden.grad, head.weight.grad))


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_without_gradients_equals_the_definition(reduction: str) -> None:
    head, hidden, labels = case()
    with torch.no_grad():
        found = head(hidden, labels, reduction=reduction)
    torch.testing.assert_close(found, next_token_loss(head(hidden), labels, reduction=reduction).detach())


def test_nothing_to_score_is_zero_and_not_nan() -> None:
    head, hidden, labels = case()
    loss = head(hidden, torch.full_like(labels, IGNORE))
    loss.backward()
    assert loss == 0
    assert not head.weight.grad.any()


def test_under_autocast_the_loss_is_fp32_and_weights_get_fp32_gradients() -> None:
    head, hidden, labels = case()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(hidden, labels)
    loss.backward()
    assert loss.dtype == head.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss, next_token_loss(head(hidden), labels), rtol=2e-2, atol=2e-2)


def test_at_most_one_chunk_of_logits_is_in_memory() -> None:
    head, hidden, labels = case()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        head(hidden, labels)
    assert max(saved) < labels.numel() * 50
