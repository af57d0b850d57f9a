"""Embeddings of tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """Embeddings times sqrt(d_model) (Gemma). The weight itself, which may also be the head's, is not scaled."""

    @property
    def embed_scale(self) -> Tensor:
        """The factor, a tensor without dimensions, under the name that PEFT's adapters of embeddings look for."""
        return torch.tensor(self.embedding_dim**0.5, device="cpu")

    def forward(self, input_ids: Tensor) -> Tensor:
        """(..., d_model) for integers of any shape. The factor has the weight's dtype, as in transformers' Gemma."""
        return super().forward(input_ids) * self.embed_scale.to(self.weight.dtype)
