"""transformers' `QuantizedCache`, filled and counted like the other methods."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers.cache_utils import Cache, QuantizedCache

from cllm.errors import UserError
from cllm.posthoc.code import Codes
from cllm.posthoc.compress import Outcome, relative_error
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
_AXIS = {"quanto": 0, "hqq": 1}
"""The axis for which the elements of a group are neighbours in memory; hqq's other one mixes sequences and heads."""
_PACKED = {1: 8, 2: 4, 3: 1, 4: 2, 8: 1}
"""By bits: hqq packs this many groups together, and fails for another number of groups; with 3 bits it pads them."""


@register("hf_quantized", summary="transformers' QuantizedCache, for transformers models; needs optimum-quanto or hqq")
class HFQuantized(Compressor):
    """transformers' `QuantizedCache`, for transformers models: groups of neighbouring elements of a token share a scale
    and a zero. The last tokens are exact until there are `residual` of them; then all tokens are quantised again.

        Q = round(X / s + z)    X' = s (Q - z)    s = (max X - min X) / (2^b - 1)    z = -min X / s

    hqq then moves z to minimise a norm of X - X' that is robust to outliers (half-quadratic quantisation).
    """

    no_every: ClassVar[str | None] = "hf_quantized has residual instead"
    no_recompress: ClassVar[str | None] = "hf_quantized has residual instead"

    backend: Literal["quanto", "hqq"] = "quanto"
    """The library that quantises: quanto (2 or 4 bits) or hqq (1, 2, 3, 4 or 8)."""
    bits: Literal[1, 2, 3, 4, 8] = 4
    """Bits of a code."""
    group: int = Field(64, ge=1)
    """Elements that share a scale."""
    residual: int = Field(128, ge=1)
    """Number of exact tokens at which all tokens are quantised."""

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        raise UserError(f"{self.name}: serves transformers models only; for cllm models: kivi")

    def transformers_cache(self, cache: Cache, model: PreTrainedModel) -> _QuantizedWithSinks:
        """`cache` quantised. Raises `UserError` if the library is missing or refuses, or all tokens are sinks."""
        if (tokens := cache.get_seq_length()) <= self.sinks:
            raise UserError(f"{self.name}: sinks={self.sinks} of {tokens} tokens; allowed: 0 to {tokens - 1}")
        try:
            quantized = _QuantizedWithSinks(
                self.backend, model.config, nbits=self.bits, q_group_size=self.group, residual_length=self.residual,
                axis_key=_AXIS[self.backend], axis_value=_AXIS[self.backend],
            )  # fmt: skip
        except ImportError:
            raise UserError(
                f"{self.name}: backend={self.backend} is not installed: pip install {_PACKAGES[self.backend]}"
            ) from None
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from None
        if self.backend == "hqq":
            layers: list[Any] = quantized.layers
            for layer in layers:
                _pack_whole(layer, _PACKED[self.bits])
        quantized.fill(cache, self.sinks)
        return quantized


def _pack_whole(layer: Any, packed: int) -> None:
    """Make `layer` of transformers take any number of tokens: the last is repeated until groups fill the packs."""
    quantize, dequantize = layer._quantize, layer._dequantize

    def padded(x: Tensor, axis: int) -> tuple[Tensor, dict[str, Any]]:
        tokens, numbers = x.shape[-2], x[..., :1, :].numel()
        whole = layer.q_group_size * packed
        more = -tokens % (whole // math.gcd(whole, numbers))
        x = torch.cat((x, x[..., -1:, :].expand(*x.shape[:-2], more, -1)), dim=-2)
        codes, meta = quantize(x.reshape(-1, layer.q_group_size), axis)  # hqq reads 3 bits of matrices alone
        return codes, {**meta, "tokens": tokens, "padded": x.shape}

    def cropped(stored: tuple[Tensor, dict[str, Any]]) -> Tensor:
        read: Tensor = dequantize(stored)
        return read.view(stored[1]["padded"])[..., : stored[1]["tokens"], :]

    layer._quantize, layer._dequantize = padded, cropped


class _QuantizedWithSinks(QuantizedCache):
    """A quantised cache after exact sinks, with a count of its bytes."""

    outcome: Outcome
    sinks: list[tuple[Tensor, Tensor]]
    """(B, G, s, D) keys and values of each layer."""

    def fill(self, cache: Cache, sinks: int) -> None:
        """Copy the tokens of `cache`, the first `sinks` exactly."""
        seconds, errors, self.sinks = 0.0, {}, []
        layers: list[Any] = cache.layers
        for i, layer in enumerate(layers):
            began = time.perf_counter()
            exact = layer.keys[:, :, sinks:], layer.values[:, :, sinks:]
            self.sinks.append((layer.keys[:, :, :sinks].clone(), layer.values[:, :, :sinks].clone()))
            self.update(*exact, i)
            stored: Any = self.layers[i]
            stored.cumulative_length += sinks
            if layer.keys.is_cuda:
                _ = layer.keys.sum().item()  # waits for the device
            seconds += time.perf_counter() - began
            read = stored._dequantize(stored._quantized_keys), stored._dequantize(stored._quantized_values)
            pairs = zip("kv", read, exact, strict=True)
            errors[i] = {part: relative_error(*(t.transpose(1, 2) for t in (a, b))) for part, a, b in pairs}
        self.seconds, self.outcome = seconds, Outcome(seconds, errors)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """As in transformers, with the sinks in front."""
        later = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        k, v = (torch.cat(pair, dim=-2) for pair in zip(self.sinks[layer_idx], later, strict=True))
        return k, v

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence beam_idx[b] was: (B,) int64."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]
        self.sinks = [(k.index_select(0, beam_idx), v.index_select(0, beam_idx)) for k, v in self.sinks]

    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and the exact tokens."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Codes, scales, zeros and the exact tokens; tensors of one layer that share memory occur once."""
        found: list[Tensor] = []
        layers: list[Any] = self.layers
        for layer, sinks in zip(layers, self.sinks, strict=True):
            parts = (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values, *sinks)
            found += {tensor.data_ptr(): tensor for tensor in _plain(parts)}.values()
        return found


def _plain(value: Any) -> Iterator[Tensor]:
    """The plain tensors in containers and in tensor subclasses."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _plain(item)
    elif hasattr(value, "__tensor_flatten__"):
        for name in value.__tensor_flatten__()[0]:
            yield from _plain(getattr(value, name))
    elif isinstance(value, Tensor):
        yield value
