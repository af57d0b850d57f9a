"""The kernels that can compute attention.

base.py    `Backend`, `Case` (the facts by which one is chosen), and how packages are found and checked
mask.py    `Mask`, `Documents`: which keys a query sees, as rules, as a matrix and as document boundaries
flash.py   FlashAttention-2 and FlashAttention-3
flash4.py  FlashAttention-4
flex.py    torch's FlexAttention
blocks.py  attention with its log-sum-exp in plain torch, for sdpa
sdpa.py    torch's scaled_dot_product_attention, and cuDNN's kernel
varlen.py  the FlashAttention-2 that is built into torch

A new backend is a subclass of `Backend`, an entry in `BACKENDS`, and a name in `cllm.config.BackendName`.

Imports the config, for the names of backends.
"""

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
"""By name, fastest first, in the order of `cllm.config.BackendName`: on an H200 FlashAttention-4 is faster than cuDNN,
and cuDNN faster than FlashAttention-2 (docs/attention.md)."""

__all__ = ["BACKENDS", "Backend", "Case", "Documents", "FlashBackend", "Mask", "document_boundaries", "max_documents"]
