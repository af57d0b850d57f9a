"""Palu (arXiv 2407.21118): the projections of groups of heads factorised offline; the latents are cached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from cllm.posthoc.code import Code
from cllm.posthoc.fixed_bases import Basis, Spectrum
from cllm.posthoc.grown import Joiner, first_of
from cllm.posthoc.method import Engine, TensorCoder
from cllm.posthoc.projecting import Allocation, Place, ProjectingMethod, input_moments
from cllm.posthoc.registry import register
from cllm.posthoc.token_codes import TokenQuantized, hadamard


@register("palu", summary="latents of the factorised projections of groups of heads; bases from calibration tokens")
class Palu(ProjectingMethod):
    """Palu: for every group of KV heads, W_g ≈ L R by a singular value decomposition that is whitened by the inputs,

        S = chol(E[x xᵀ]),    W_g S = U Σ Vᵀ,    cached: R x, before RoPE,    read: L R x = U_r U_rᵀ W_g x

    Ranks follow the Fisher information of the projections. With `bits` the latents of a token are quantised, each
    group's by itself. `hadamard` fuses an orthonormal Hadamard matrix H into both factors, L H and Hᵀ R, so that a few
    large latents do not set the step of the others; without quantisation it changes nothing.

    Latents are coordinates in the orthonormal U_r, where the paper's are scaled by √Σ_r⁻¹: an error of a latent is one
    of the same size in the key or value. H has a block for each power of two in r.
    """

    heads: int | None = Field(4, ge=1)
    """Neighbouring KV heads of a slot that share a basis, the last ones maybe fewer; null: all. Keys that are
    normalised head by head have a basis for each head, and more are an error."""
    allocation: Allocation = "fisher"
    """`fisher`, the paper's: ranks in proportion to the mean absolute gradient of the loss in a projection. `uniform`:
    one rank; `energy`: as needed for the same share of the singular values; `progressive`: as in `lorc`; `search`: as
    in `asvd`."""
    whiten: bool = True
    """Whether S is that of the inputs; false: the identity."""
    bits: int | None = Field(None, ge=1, le=8)
    """Bits of a latent, with a scale and a zero for each token and group of heads, which count in `ratio`; null:
    latents are exact, unless a quantiser after + codes them per column."""
    hadamard: bool = False
    """Whether the factors contain a Hadamard matrix."""

    def spectra(self, engine: Engine, ids: Tensor) -> dict[Place, Spectrum]:
        moments = input_moments(engine, ids, self.sinks, "products") if self.whiten else None
        return self.spectra_of_weights(engine, moments)

    def basis_of(self, place: Place, ranks: Sequence[int], dtype: torch.dtype) -> Basis:
        if not self.hadamard:
            return super().basis_of(place, ranks, dtype)
        exact = super().basis_of(place, ranks, torch.float64)
        mixed = exact.matrix @ torch.block_diag(*map(hadamard, ranks)).to(exact.matrix.device)
        return Basis(mixed.to(dtype), None if exact.bias is None else exact.bias.to(dtype))

    def stored(self, rows: Tensor, dtype: torch.dtype, ranks: Sequence[int]) -> Code:
        return (
            super().stored(rows, dtype, ranks)
            if self.bits is None
            else TokenQuantized.of(rows, ranks, self.bits, dtype)
        )

    def stored_numbers(self, ranks: Sequence[int], tokens: int, width: int, dtype: torch.dtype) -> float:
        if self.bits is None:
            return super().stored_numbers(ranks, tokens, width, dtype)
        return TokenQuantized.nbytes(tokens, ranks, self.bits, dtype.itemsize) / dtype.itemsize

    def extended(self, code: Code, rows: Tensor, dtype: torch.dtype, kind: Literal["k", "v"] = "k") -> Code:
        first = first_of(code)
        if not isinstance(first, TokenQuantized):
            return super().extended(code, rows, dtype, kind)
        return Joiner().join(code, TokenQuantized.of(rows, first.sizes, first.bits, dtype))

    def coded_by(self, coder: TensorCoder) -> Self:
        if self.bits is not None:
            raise ValueError(
                f"bits={self.bits} codes the latents already; allowed: one of bits and a quantiser after +"
            )
        return super().coded_by(coder)
