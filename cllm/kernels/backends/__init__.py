"""The kernels that can compute attention, fastest first."""

from cllm.kernels.backends.base import Backend, Case, FlashBackend
from cllm.kernels.backends.flash import Flash2, Flash3
from cllm.kernels.backends.flash4 import Flash4
from cllm.kernels.backends.flex import Flex
from cllm.kernels.backends.mask import Documents, Mask, document_boundaries, max_documents
from cllm.kernels.backends.sdpa import Cudnn, Sdpa
from cllm.kernels.backends.varlen import Varlen

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (Flash4(), Cudnn(), Flash3(), Flash2(), Varlen(), Flex(), Sdpa())
}
"""By name, fastest first: on an H200 FlashAttention-4 beats cuDNN beats FlashAttention-2 (docs/attention.md)."""

__all__ = ["BACKENDS", "Backend", "Case", "Documents", "FlashBackend", "Mask", "document_boundaries", "max_documents"]
