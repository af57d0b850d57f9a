"""LoRC (arXiv 2410.03111): projections factorised without data, with ranks that fall with depth."""

from __future__ import annotations

from torch import Tensor

from cllm.posthoc.fixed_bases import Spectrum
from cllm.posthoc.method import Engine
from cllm.posthoc.projecting import Allocation, Place, ProjectingMethod
from cllm.posthoc.registry import register


@register("lorc", summary="latents of factorised projections, of higher rank in early layers; bases need no data")
class LoRC(ProjectingMethod):
    """LoRC: the singular value decomposition of W_K and of W_V themselves, W ≈ U_r U_rᵀ W. The ranks are progressive,

        κ̃_l = Π_{j >= l} κ(W_K,j) κ(W_V,j),    r_l = r_max [1 - (max log κ̃ - log κ̃_l) / (max - min) (1 - least)]

    so that early layers, whose errors pass through all later ones, are compressed least.
    """

    allocation: Allocation = "progressive"
    """`progressive`, the paper's: falling with depth. `uniform`: one rank; `fisher`: in proportion to the mean absolute
    gradient of the loss in a projection; `energy`: as needed for the same share of the singular values."""

    def spectra(self, engine: Engine, ids: Tensor) -> dict[Place, Spectrum]:
        return self.spectra_of_weights(engine, None)
