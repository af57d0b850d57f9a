"""The output head and next-token cross-entropy, computed in chunks of logits.

Logits are the largest tensor of a small model: 65,536 tokens times a vocabulary of 128,000 are 33 GB in fp32. Given
labels, `Head` computes the loss for a few thousand tokens at a time, together with the gradients of hidden states and
weights. So only one chunk of logits is in memory.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.kernels import cross_entropy
from cllm.kernels.cross_entropy import IGNORE

log = logging.getLogger(__name__)


_CHUNK_BYTES = 2**29
"""Size of one chunk's logits in the dtype in which the cross-entropy is computed."""
CrossEntropy = Callable[[Tensor, Tensor, int], Tensor]
"""`cllm.kernels.cross_entropy.by_quack` or `by_torch`."""


def next_token_loss(logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats from all logits at once, in fp32: the definition that the other forms must match.

    Args:
        logits: (..., V).
        labels: (...) int64, already shifted: the next token; `IGNORE` is not scored.
        reduction: `mean` over scored positions, `sum`, or `none` for the shape of `labels`.
    """
    loss = F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction=reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


class Head(nn.Linear):
    """The output head: hidden states to logits, or directly to the loss.

    The loss is computed in this module's forward, because a strategy that shards weights gathers them there.
    """

    def forward(self, hidden: Tensor, labels: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits (B, T, V) for `hidden` (B, T, d_model); with `labels` (B, T), the loss as in `next_token_loss`."""
        if labels is None:
            return super().forward(hidden)
        return head_loss(hidden, self.weight, labels, reduction)


def head_loss(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """`next_token_loss` for `hidden` (B, T, d_model), a head's `weight` (V, d_model) and `labels` (B, T)."""
    flat, targets = hidden.flatten(0, -2), labels.flatten()
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        flat, weight = flat.to(dtype), weight.to(dtype)
    if not torch.is_grad_enabled() or reduction == "none":
        nats = [next_token_loss(part @ weight.T, t, reduction="none") for part, t in _chunks(flat, targets, weight)]
        total = torch.cat(nats).view(labels.shape)
        return total if reduction == "none" else total.sum() / _divisor(targets, reduction)
    return linear_cross_entropy(flat, weight, targets, reduction)


def _chunks(hidden: Tensor, labels: Tensor, weight: Tensor, element_size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """Rows whose logits, `element_size` bytes each, fill a chunk."""
    rows = max(_CHUNK_BYTES // (element_size * weight.shape[0]), 1)
    rows -= rows % 8 if rows > 8 else 0
    return list(zip(hidden.split(rows), labels.split(rows), strict=True))


def _divisor(labels: Tensor, reduction: str) -> Tensor:
    return (labels != IGNORE).sum().clamp(min=1) if reduction == "mean" else labels.new_ones(())


@functools.cache
def _kernel(device: torch.device, vocabulary: int, dtype: torch.dtype) -> CrossEntropy | None:
    """The function that computes a chunk on a GPU; None for liger-kernel, which divides into chunks itself."""
    if (reason := cross_entropy.unavailable(device, vocabulary, dtype)) is None:
        log.info("loss: quack-kernels' cross-entropy on chunks of logits")
        return cross_entropy.by_quack
    if (liger_reason := _liger_unavailable()) is None:
        log.info("loss: liger-kernel's fused linear cross-entropy; not quack (%s)", reason)
        return None
    log.info("loss: the chunked torch form; not quack (%s), not liger-kernel (%s)", reason, liger_reason)
    return cross_entropy.by_torch


def _liger_unavailable() -> str | None:
    """The reason why liger-kernel cannot be used, or None."""
    try:
        import liger_kernel.ops.fused_linear_cross_entropy  # noqa: F401
    except ImportError as error:
        return str(error)
    return None


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy of `hidden @ weight.T` in nats, in chunks of logits, differentiable in both factors.

    Args:
        hidden: (N, d_model), fp32 or bf16.
        weight: (V, d_model), the same dtype.
        labels: (N,) int64; `IGNORE` is not scored.
        reduction: `mean` over scored positions or `sum`.

    Returns:
        A scalar in fp32. Softmax and the sums over chunks are in fp32. On a GPU it is computed by quack-kernels or
        liger-kernel if installed, otherwise by torch.
    """
    if hidden.is_cuda:
        return _by_kernels(hidden, weight, labels, reduction)
    return by_chunks(hidden, weight, labels, reduction, cross_entropy.by_torch)


@torch.compiler.disable
def _by_kernels(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    kernel = _kernel(hidden.device, weight.shape[0], hidden.dtype)
    if kernel is None:
        return by_liger(hidden, weight, labels, reduction)
    return by_chunks(hidden, weight, labels, reduction, kernel)


def by_chunks(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str, kernel: CrossEntropy) -> Tensor:
    """`linear_cross_entropy` with `kernel` for each chunk of logits."""
    return _ChunkedCrossEntropy.apply(hidden, weight, labels, _divisor(labels, reduction), kernel)


def by_liger(hidden: Tensor, weight: Tensor, labels: Tensor, reduction: str) -> Tensor:
    """`linear_cross_entropy` by liger-kernel, which must be installed."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # Autograd functions take positional arguments: bias, class weights, ignore index, z-loss, smoothing, reduction,
    # soft cap, return z-loss, dtype of the weight gradient's sum.
    fused = LigerFusedLinearCrossEntropyFunction.apply
    result = fused(hidden, weight, labels, None, None, IGNORE, 0.0, 0.0, reduction, None, False, torch.float32)
    return result[0] if isinstance(result, tuple) else result


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients together with the loss, chunk by chunk. The backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, divisor: Tensor, kernel: CrossEntropy
    ) -> Tensor:
        total = hidden.new_zeros((), dtype=torch.float32)
        hidden_grad = torch.empty_like(hidden)
        weight_grad = torch.zeros_like(weight, dtype=torch.float32)
        start, element_size = 0, 4 if kernel is cross_entropy.by_torch else hidden.element_size()
        for part, targets in _chunks(hidden, labels, weight, element_size):
            logits = part @ weight.T
            total += kernel(logits, targets, IGNORE).sum()
            torch.mm(logits, weight, out=hidden_grad[start : start + len(part)])
            _add_product(weight_grad, logits.T, part)
            start += len(part)
        ctx.save_for_backward(hidden_grad, weight_grad, divisor)
        return total / divisor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad, weight_grad, divisor = ctx.saved_tensors
        scale = grads[0] / divisor
        return (
            (hidden_grad * scale).to(hidden_grad.dtype),
            (weight_grad * scale).to(hidden_grad.dtype),
            None,
            None,
            None,
        )


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """`total += a @ b`, accumulated in fp32 for a and b of lower precision; one fused call on a GPU."""
    if total.is_cuda and a.dtype != total.dtype:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b
