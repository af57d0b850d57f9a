"""A reference attention in the place of a decoder's, which learns in which layer it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import pytest
from torch import Tensor

import cllm.model.attention as attention_module
from cllm.model.decoder import Decoder


class SlowAttention(Protocol):
    """Attention (B, T, H, D) of q (B, T, H, D) and k, v (B, S, G, D)."""

    layer: int
    """The layer that calls it."""
    __call__: Callable[..., Tensor]


def replace_attention(model: Decoder, slow: SlowAttention, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `slow` compute the attention of `model`, and of every other decoder, until `monkeypatch` is undone."""
    for i, block in enumerate(model.blocks):
        block.attention.register_forward_pre_hook(lambda *_, i=i: setattr(slow, "layer", i))

    def attend(q, k, v, mask, **_):
        return slow(q, k, v, window=mask.window, exclude_self=mask.exclude_self)

    monkeypatch.setattr(attention_module, "attention", attend)
