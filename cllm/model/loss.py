"""Next-token cross-entropy."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""Label of a position that is not scored."""


def next_token_loss(logits: Tensor, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """Cross-entropy in nats, computed in fp32.

    Args:
        logits: (B, T, V).
        labels: (B, T) int64, already shifted: the token that follows; `IGNORE` is not scored.
        reduction: `mean` over scored positions, `sum`, or `none` for (B, T).
    """
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE, reduction=reduction)
    return loss.view(labels.shape) if reduction == "none" else loss
