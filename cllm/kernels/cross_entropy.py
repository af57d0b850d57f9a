"""Cross-entropy of logits and its gradient, which overwrites them: quack-kernels on Hopper GPUs, torch elsewhere.

Shapes: N tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from cllm.kernels import quack

IGNORE = -100
"""Label of a position that is not scored."""


@functools.cache
def unavailable(device: torch.device, vocabulary: int, dtype: torch.dtype) -> str | None:
    """The reason why quack's kernel cannot be used, or None. The first call for a vocabulary compiles and runs it."""

    def trial() -> None:
        by_quack(torch.zeros(8, vocabulary, device=device, dtype=dtype), torch.zeros(8, device=device).long(), -100)

    return quack.unavailable(device, "cross_entropy", ["cross_entropy_fwd_out"], trial)


def by_quack(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """Cross-entropy (N,) fp32 in nats of each row, 0 for the label `ignore`.

    `logits` (N, V), contiguous, are overwritten by the gradient of the sum, softmax - one-hot. One kernel reads them
    once and computes in fp32.
    """
    nats = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    quack.load_module("cross_entropy").cross_entropy_fwd_out(logits, labels, None, nats, None, logits, None, ignore)
    return nats


def by_torch(logits: Tensor, labels: Tensor, ignore: int) -> Tensor:
    """`by_quack` in plain torch, with fp32 copies of `logits`."""
    wide, scored = logits.float(), labels != ignore
    index = labels.where(scored, 0)[:, None]
    log_sum = wide.logsumexp(dim=-1)
    nats = (log_sum - wide.gather(-1, index)[:, 0]) * scored
    gradient = (wide - log_sum[:, None]).exp_()
    gradient.scatter_add_(-1, index, gradient.new_full(index.shape, -1.0))
    logits.copy_(gradient.mul_(scored[:, None]))
    return nats
