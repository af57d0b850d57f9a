"""Distillation: KL divergence from a teacher and next-token cross-entropy, computed from one chunk of logits at a time.

    KL(teacher || student) = Σ_v p_v (log p_v - log q_v),    p = softmax(teacher / τ),  q = softmax(student / τ)

The loss is kl · τ² · KL + next_token · CE, each a mean over scored tokens (Hinton et al., arXiv 1503.02531: τ² keeps
the gradient's size when τ changes). As in `cllm/model/loss.py`, gradients are computed together with the loss, chunk by
chunk, so only one chunk of each model's logits exists at a time, in fp32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllm.kernels.cross_entropy import IGNORE
from cllm.model.loss import Head

_CHUNK_BYTES = 2**28
"""Size of one chunk's logits in fp32. About seven tensors of that size exist at once; less than two if compiled."""


@dataclass(frozen=True, slots=True)
class Target:
    """The teacher's side of the loss, and the weights of its parts."""

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
    """An output head that also computes the distillation loss.

    It does so in its forward, in which ZeRO has gathered its weight.
    """

    compiled = False
    """Whether `compare_logits` is compiled: it then reads the logits a few times, otherwise about twenty times."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, labels: Tensor | None = None, *, reduction: str = "mean", target: Target | None = None
    ) -> Tensor | tuple[Tensor, ...]:
        """As `Head`; with `target` and `labels` (B, T), the fields of `Distilled`.

        They are a plain tuple, since ZeRO-3 rebuilds the containers that a module returns.
        """
        if target is None:
            return super().forward(hidden, labels, reduction=reduction)
        assert labels is not None
        tensors = [hidden.flatten(0, -2), self.weight, target.hidden.flatten(0, -2), target.weight]
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            tensors = [tensor.to(dtype) for tensor in tensors]
        mine, weight, theirs, their_weight = tensors
        target = dataclasses.replace(target, hidden=theirs, weight=their_weight)
        return tuple(distillation_loss(mine, weight, labels.flatten(), target, compiled=self.compiled))


def distillation_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, target: Target, *, compiled: bool = False
) -> Distilled:
    """The loss of the logits `hidden @ weight.T` against those of `target`, differentiable in `hidden` and `weight`.

    Args:
        hidden: (N, d), fp32 or bf16.
        weight: (V, d), the same dtype.
        labels: (N,) int64; positions with `IGNORE` count in neither loss.
        target: with hidden states (N, e) and a head (V, e), which get no gradient.
        compiled: compile `compare_logits`.
    """
    compare = functools.partial(
        _compiled() if compiled else compare_logits,
        temperature=target.temperature,
        kl=target.kl,
        next_token=target.next_token,
    )
    teacher = (target.hidden.detach(), target.weight.detach())
    return Distilled(*_ChunkedDistillation.apply(hidden, weight, *teacher, labels, compare, target.kl > 0))


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
    """Compute the losses and their gradient from logits, in one chain of element-wise operations between reductions.

    Args:
        student: (N, V) logits.
        teacher: (N, V) logits of the teacher, or None if `kl` is 0.
        labels: (N,) int64.
        share: (N,) fp32, the weight of each position in the mean; 0 for positions that are not scored.
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
        # For almost equal models Σ p log(p/q) is a sum of rounding errors of either sign. Adding Σ (q - p) = 0 makes
        # its terms p (x + exp(-x) - 1), x = log(p/q): never negative, and x²/2 - x³/6 + ... if p is close to q.
        near = p * apart.square() * (1 / 2 - apart * (1 / 6 - apart * (1 / 24 - apart / 120)))
        terms = torch.where(apart.abs() < 0.25, near, p * apart + (q - p))
        divergence = (terms.sum(-1) * share).sum() * temperature**2
        gradient = gradient + (q - p) * (kl * temperature)
    return (gradient * share[:, None]).to(student.dtype), divergence, nats


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    return torch.compile(compare_logits, dynamic=False)


class _ChunkedDistillation(torch.autograd.Function):
    """The loss, and its gradients computed with it, chunk by chunk; the backward only scales them."""

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
        rows = -(-len(hidden) // -(-len(hidden) // rows))  # chunks of equal size if possible: one compiled graph
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
        scaled = (None if g is None else g * grads[0].to(g.dtype) for g in ctx.saved_tensors)
        return (*scaled, None, None, None, None, None)


def hidden_difference(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over pairs (..., d) of |student - teacher|² / |teacher|², a scalar in fp32; each sum over all tokens.

    It is relative because hidden states grow with depth: otherwise the last layers would outweigh all others.
    """
    pairs = [(s.float(), t.detach().float()) for s, t in zip(student, teacher, strict=True)]
    parts = [(s - t).square().sum() / t.square().sum().clamp(min=1e-12) for s, t in pairs]
    return torch.stack(parts).mean()
