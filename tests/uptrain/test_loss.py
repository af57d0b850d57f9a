"""The chunked distillation loss against the definition, from whole logits in fp64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from cllm.kernels.cross_entropy import IGNORE
from cllm.uptrain import loss as module
from cllm.uptrain.loss import Distilled, Target, distillation_loss, hidden_difference


def example(n: int = 37, vocab: int = 50):
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, 12, generator=draw), torch.randn(vocab, 12, generator=draw)
    teacher_hidden, teacher_weight = torch.randn(n, 16, generator=draw), torch.randn(vocab, 16, generator=draw)
    labels = torch.randint(0, vocab, (n,), generator=draw)
    labels[::5] = IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, teacher_weight, labels


def loss_of(hidden, weight, teacher_hidden, teacher_weight, labels, *, compiled: bool = False, **weights) -> Distilled:
    target = Target(teacher_hidden, teacher_weight, **weights)
    return distillation_loss(hidden, weight, labels, target, compiled=compiled)


def by_definition(hidden, weight, teacher_hidden, teacher_weight, labels, *, temperature, kl, next_token):
    scored = labels != IGNORE
    logits, theirs = (hidden @ weight.T)[scored].double(), (teacher_hidden @ teacher_weight.T)[scored].double()
    divergence = F.kl_div(
        (logits / temperature).log_softmax(-1),
        (theirs / temperature).log_softmax(-1),
        log_target=True,
        reduction="batchmean",
    )
    return kl * temperature**2 * divergence + next_token * F.cross_entropy(logits, labels[scored])


@pytest.mark.parametrize("rows", [1, 8, 1000])
@pytest.mark.parametrize(("temperature", "kl", "next_token"), [(2.0, 1.0, 0.5), (1.0, 0.3, 0.0), (3.0, 0.0, 1.0)])
def test_loss_and_gradients_are_those_of_whole_logits(monkeypatch, rows, temperature, kl, next_token) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 50 * rows)
    arguments, weights = example(), {"temperature": temperature, "kl": kl, "next_token": next_token}
    found = loss_of(*arguments, **weights)
    expected = by_definition(*arguments, **weights)
    torch.testing.assert_close(found.loss.double(), expected, rtol=1e-5, atol=1e-6)
    mine = torch.autograd.grad(2 * found.loss, arguments[:2])  # twice: the backward scales what it is handed
    theirs = torch.autograd.grad(2 * expected, arguments[:2])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kl", [0.0, 0.7])
def test_compiled_or_not_it_is_the_same_loss(monkeypatch, kl: float) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 50 * 20)
    arguments, options = example(), {"temperature": 2.0, "kl": kl, "next_token": 0.5}
    torch._dynamo.reset()
    found = [loss_of(*arguments, **options, compiled=compiled) for compiled in (False, True)]
    for plain, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, plain)
    for plain, compiled in zip(*(torch.autograd.grad(one.loss, arguments[:2]) for one in found), strict=True):
        torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_divergence_of_almost_equal_models_is_not_rounding(compiled: bool) -> None:
    """It goes with the square of the difference, below what rounding does to Σ p log(p/q), and is never negative."""
    hidden, weight, _, _, labels = (t.detach() for t in example(vocab=5000))
    for apart in (1e-3, 1e-4, 0.0):
        teacher = hidden + apart * torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        arguments = (hidden, weight, teacher, weight, labels)
        exact = (hidden.double(), weight.double(), teacher.double(), weight.double(), labels)
        expected = by_definition(*exact, temperature=2.0, kl=1.0, next_token=0.0)
        found = loss_of(*arguments, temperature=2.0, kl=1.0, next_token=0.5, compiled=compiled).kl
        assert found.item() == pytest.approx(expected.item(), rel=0.02, abs=1e-11)


def test_parts_are_told_without_their_weights() -> None:
    arguments = example()
    found = loss_of(*arguments, temperature=2.0, kl=0.25, next_token=0.5)
    torch.testing.assert_close(found.loss, 0.25 * found.kl + 0.5 * found.next_token)
    alone = by_definition(*arguments, temperature=2.0, kl=1.0, next_token=0.0)
    torch.testing.assert_close(found.kl.double(), alone, rtol=1e-5, atol=1e-6)
    assert not found.kl.requires_grad


def test_a_frozen_head_gets_no_gradient_and_the_hidden_states_the_same() -> None:
    hidden, weight, *rest = example()
    options = {"temperature": 2.0, "kl": 1.0, "next_token": 1.0}
    whole = torch.autograd.grad(loss_of(hidden, weight, *rest, **options).loss, hidden)[0]
    frozen = loss_of(hidden, weight.detach(), *rest, **options).loss
    assert torch.equal(torch.autograd.grad(frozen, hidden)[0], whole)


def test_a_model_does_not_diverge_from_itself() -> None:
    hidden, weight, _, _, labels = example()
    found = loss_of(hidden, weight, hidden, weight, labels, temperature=2.0, kl=1.0, next_token=0.0)
    assert found.kl == 0
    assert torch.autograd.grad(found.loss, hidden)[0].abs().max() == 0


def test_one_chunk_of_logits_is_all_that_is_held(monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 4 * 50 * 8)
    seen = []
    real = torch.Tensor.log_softmax

    def counted(x, *args, **kwargs):
        seen.append(len(x))
        return real(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "log_softmax", counted)
    loss_of(*example(), temperature=2.0, kl=1.0, next_token=1.0)
    assert max(seen) == 8


def test_the_difference_of_hidden_states_is_relative_to_the_teachers() -> None:
    teacher = [torch.full((3, 4), 100.0), torch.full((3, 4), 2.0)]
    student = [teacher[0] * 1.1, teacher[1] * 1.3]
    assert float(hidden_difference(student, teacher)) == pytest.approx((0.01 + 0.09) / 2, rel=1e-4)
