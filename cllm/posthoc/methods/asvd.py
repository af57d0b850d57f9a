"""ASVD (arXiv 2312.05821): projections factorised with their input channels scaled by the size of activations."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from cllm.posthoc.fixed_bases import Spectrum
from cllm.posthoc.method import Engine
from cllm.posthoc.projecting import Place, ProjectingMethod, input_moments
from cllm.posthoc.registry import register

_OFFSET = 1e-6


@register("asvd", summary="latents of projections factorised with scaled inputs; scales from calibration tokens")
class ASVD(ProjectingMethod):
    """ASVD: the projections are factorised with scaled input channels, for keys and values of every slot separately,

        D = diag(mean |x|^α + 1e-6),    W D = U Σ Vᵀ,    cached: √Σ_r V_rᵀ D⁻¹ x,    read: U_r U_rᵀ W x

    The paper searches the rank of each projection by perplexity: `allocation=search`. It takes ten passes of up to 512
    calibration tokens for each, so the default is one rank for all.
    """

    alpha: float = Field(0.5, ge=0, le=2)
    """α: 0 factorises W itself."""

    def spectra(self, engine: Engine, ids: Tensor) -> dict[Place, Spectrum]:
        sizes = input_moments(engine, ids, self.sinks, "sizes", self.alpha)
        return self.spectra_of_weights(engine, {i: (size + _OFFSET).square().diag() for i, size in sizes.items()})
