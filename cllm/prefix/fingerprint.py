"""The digest of a model: its config and every weight. Caches of two models are interchangeable only if it is equal."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.model.decoder import Decoder


def decoder_of(model: nn.Module) -> Decoder:
    """The decoder in `model`: a `Decoder`, a transformers class around one, or a PEFT model around that.

    Raises:
        UserError: for anything else.
    """
    found = [m for m in model.modules() if isinstance(m, Decoder)] if isinstance(model, nn.Module) else []
    if len(found) != 1:
        raise UserError(f"model is a {type(model).__name__}; allowed: a model of cllm, as cllm.load returns it")
    return found[0]


def fingerprint(decoder: Decoder) -> str:
    """SHA-256, 64 hexadecimal digits, of the config, of the names, dtypes, shapes and bytes of all weights, and of the
    adapters that are switched on. It takes about as long as reading the weights at 1 GB/s a core."""
    config = decoder.config.model_dump(mode="json")
    state = decoder.state_dict()
    digests = sha256_of_all(state.values())
    content = [[name, digest] for name, digest in zip(state, digests, strict=True)]
    text = json.dumps({"config": config, "weights": content, "adapters": _adapters(decoder)}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def version(decoder: Decoder) -> tuple[Any, ...]:
    """Changes with every change of a weight that torch counts, and of adapters; much cheaper than `fingerprint`."""
    tensors = (*decoder.parameters(), *decoder.buffers())
    counts = tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in tensors)
    return counts, json.dumps(_adapters(decoder))


def _adapters(decoder: Decoder) -> list[Any]:
    """The state of PEFT's layers, which switches weights on and off without changing them."""
    layers: list[Any] = [
        m for m in decoder.modules() if hasattr(m, "active_adapters") and hasattr(m, "merged_adapters")
    ]
    return [[bool(m.disable_adapters), list(m.active_adapters), sorted(m.merged_adapters)] for m in layers]


def sha256_of_all(tensors: Iterable[Tensor]) -> list[str]:
    """The SHA-256 of each tensor's dtype, shape and bytes, on several cores."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, tensors))


def _sha256(tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel():
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
