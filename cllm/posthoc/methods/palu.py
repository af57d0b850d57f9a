"""Palu (arXiv 2407.21118): the projections of groups of heads factorised offline; the latents are cached."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cllm.posthoc.fixed_bases import Spectrum
from cllm.posthoc.method import Engine
from cllm.posthoc.projecting import Allocation, Place, ProjectingMethod, input_moments
from cllm.posthoc.registry import register


@register("palu", summary="latents of the factorised projections of groups of heads; bases from calibration tokens")
class Palu(ProjectingMethod):
    """Palu: for every group of KV heads, W_g ≈ L R by a singular value decomposition that is whitened by the inputs,

        S = chol(E[x xᵀ]),    W_g S = U Σ Vᵀ,    cached: R x, before RoPE,    read: L R x = U_r U_rᵀ W_g x

    Ranks follow the Fisher information of the projections. A quantiser after + codes the latents; the paper's Hadamard
    matrix is left out.
    """

    heads: int | None = Field(4, ge=1)
    """Neighbouring KV heads of a slot that share a basis, the last ones maybe fewer; null: all."""
    allocation: Allocation = "fisher"
    """`fisher`, the paper's: ranks in proportion to the mean absolute gradient of the loss in a projection. `uniform`:
    one rank; `energy`: as needed for the same share of the singular values; `progressive`: as in `lorc`; `search`: as
    in `asvd`."""
    whiten: bool = True
    """Whether S is that of the inputs; false: the identity."""

    def spectra(self, engine: Engine, ids: Tensor) -> dict[Place, Spectrum]:
        moments = input_moments(engine, ids, self.sinks, "products") if self.whiten else None
        return self.spectra_of_weights(engine, moments)
