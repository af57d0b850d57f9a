"""Distillation: KL divergence from a teacher and next-token cross-entropy, all logits a chunk at a time.

    KL(teacher || student) = Σ_v p_v (log p_v - log q_v),    p = softmax(teacher / τ),  q = softmax(student / τ)

The loss is kl · τ² · KL + next_token · CE, each a mean over scored tokens (Hinton et al., arXiv 1503.02531: τ² keeps
the gradient's size when τ changes). Like `cllm/model/loss.py`, gradients are computed with the loss, chunk by chunk, so
that of both models' logits one chunk in fp32 is all there ever is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllm.kernels.cross_entropy import IGNORE
from cllm.model.loss import Head

_CHUNK_BYTES = 2**28
"""Size of one chunk's logits in fp32; about seven tensors of that size exist at once, compiled less than two."""


@dataclass(frozen=True, slots=True)
class Target:
    """What the student's logits are held against."""

    hidden: Tensor
    """(B, T, d) the teacher's normalised hidden states."""
    weight: Tensor
    """(V, d) the teacher's head."""
    temperature: float
    kl: float
    """Weight of the divergence."""
    next_token: float
    """Weight of cross-entropy."""


class Distilled(NamedTuple):
    """Scalars in fp32."""

    loss: Tensor
    """The weighted sum, differentiable."""
    kl: Tensor
    """τ² KL in nats a token, for the log."""
    next_token: Tensor
    """Cross-entropy in nats a token, for the log."""


class DistilledHead(Head):
    """An output head that also compares with a teacher's, inside its forward, where a sharded weight is whole."""

    compiled = False
    """Whether what is done with logits is compiled: they are read a few times then, and some twenty times otherwise."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels: Tensor | None = None, *, reduction: str = "mean", target: Target | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """As `Head`; with `target` and `labels` (B, T), what `distillation_loss` gives, as a plain tuple: ZeRO-3 takes
        what a module returns apart and makes it again."""
        if target is None:
            return super().forward(hidden, labels, reduction=reduction)
        assert labels is not None
        student, teacher = (hidden.flatten(0, -2), self.weight), (target.hidden.flatten(0, -2), target.weight)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            student, teacher = (
                (student[0].to(dtype), student[1].to(dtype)),
                (teacher[0].to(dtype), teacher[1].to(dtype)),
            )
        found = distillation_loss(
            *student,
            *teacher,
            labels.flatten(),
            temperature=target.temperature,
            kl=target.kl,
            next_token=target.next_token,
            compiled=self.compiled,
        )
        return tuple(found)


def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
    *,
    temperature: float,
    kl: float,
    next_token: float,
    compiled: bool = False,
) -> Distilled:
    """The loss of `hidden @ weight.T` against `teacher_hidden @ teacher_weight.T`, differentiable in the student's.

    Args:
        hidden: (N, d), fp32 or bf16.
        weight: (V, d), the same dtype.
        teacher_hidden: (N, e); the teacher gets no gradient.
        teacher_weight: (V, e).
        labels: (N,) int64; positions with `IGNORE` count in neither loss.
        temperature: τ.
        kl: weight of τ² KL.
        next_token: weight of cross-entropy.
        compiled: compile what is done with logits.
    """
    teacher = (teacher_hidden.detach(), teacher_weight.detach())
    compare = functools.partial(
        _compiled() if compiled else compare_logits, temperature=temperature, kl=kl, next_token=next_token
    )
    return Distilled(*_ChunkedDistillation.apply(hidden, weight, *teacher, labels, compare, kl > 0))


def compare_logits(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    share: Tensor,
    *,
    temperature: float,
    kl: float,
    next_token: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and their gradient from whole logits, with one chain of element-wise operations between reductions.

    Args:
        student: (N, V) logits.
        teacher: the same of the teacher, or None where `kl` is 0.
        labels: (N,) int64.
        share: (N,) fp32: of each position in the mean, 0 where it is not scored.
        temperature: τ.
        kl: weight of τ² KL.
        next_token: weight of cross-entropy.

    Returns:
        The gradient (N, V) of the weighted sum by `student`, in the dtype of `student`; τ² KL and cross-entropy, in
        fp32.
    """
    logits, target = student.float(), labels.clamp(min=0)[:, None]
    log_sum = logits.logsumexp(dim=-1, keepdim=True)
    nats = ((log_sum - logits.gather(-1, target))[:, 0] * share).sum()
    gradient = (logits - log_sum).exp() * next_token
    hit = target == torch.arange(logits.shape[-1], device=logits.device)
    gradient = torch.where(hit, gradient - next_token, gradient)
    divergence = torch.zeros_like(nats)
    if teacher is not None:
        log_q = (logits / temperature).log_softmax(dim=-1)
        log_p = (teacher.float() / temperature).log_softmax(dim=-1)
        p, q, apart = log_p.exp(), log_q.exp(), log_p - log_q
        # Of almost equal models Σ p log(p/q) is a sum of rounding errors of either sign. With Σ (q - p) = 0 added its
        # terms are p (x + exp(-x) - 1), x = log(p/q): never negative, and x²/2 - x³/6 + ... where p is close to q.
        near = p * apart.square() * (1 / 2 - apart * (1 / 6 - apart * (1 / 24 - apart / 120)))
        terms = torch.where(apart.abs() < 0.25, near, p * apart + (q - p))
        divergence = (terms.sum(-1) * share).sum() * temperature**2
        gradient = gradient + (q - p) * (kl * temperature)
    return (gradient * share[:, None]).to(student.dtype), divergence, nats


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(compare_logits, dynamic=False)


class _ChunkedDistillation(torch.autograd.Function):
    """Computes gradients with the loss, chunk by chunk, and only scales them in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        labels: Tensor,
        compare: functools.partial[tuple[Tensor, Tensor, Tensor]],
        needs_teacher: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kl_total, next_total = hidden.new_zeros((2,), dtype=torch.float32)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        hidden_grad = torch.empty_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        shares = (labels != IGNORE) / (labels != IGNORE).sum().clamp(min=1)
        rows = max(_CHUNK_BYTES // (4 * weight.shape[0]), 1)
        rows = -(-len(hidden) // -(-len(hidden) // rows))  # chunks of one size where it can be: one compiled graph
        start = 0
        for part, theirs, targets, share in zip(
            *(tensor.split(rows) for tensor in (hidden, teacher_hidden, labels, shares)), strict=True
        ):
            logits = theirs @ teacher_weight.T if needs_teacher else None
            gradient, divergence, nats = compare(part @ weight.T, logits, targets, share)
            kl_total += divergence
            next_total += nats
            if hidden_grad is not None:
                hidden_grad[start : start + len(part)] = gradient @ weight
            if weight_grad is not None:
                weight_grad += gradient.T @ part
            start += len(part)
        ctx.save_for_backward(hidden_grad, None if weight_grad is None else weight_grad.to(weight.dtype))
        ctx.mark_non_differentiable(kl_total, next_total)
        weights = compare.keywords
        return weights["kl"] * kl_total + weights["next_token"] * next_total, kl_total, next_total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = (None if g is None else g * grads[0].to(g.dtype) for g in ctx.saved_tensors)
        return (*found, None, None, None, None, None)


def hidden_difference(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over pairs (..., d) of |student - teacher|² / |teacher|², a scalar in fp32; each sum over all tokens.

    Relative, since streams grow with depth and models differ in scale: the plain square of the last layers would drown
    the rest.
    """
    pairs = [(s.float(), t.detach().float()) for s, t in zip(student, teacher, strict=True)]
    parts = [(s - t).square().sum() / t.square().sum().clamp(min=1e-12) for s, t in pairs]
    return torch.stack(parts).mean()
