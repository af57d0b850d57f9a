"""transformers' `QuantizedCache`, filled and counted like the other methods."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    HQQQuantizedLayer,
    QuantizedCache,
    QuantizedLayer,
    QuantoQuantizedLayer,
)

from cllm.errors import UserError
from cllm.posthoc.code import Codes
from cllm.posthoc.compress import Outcome, relative_error
from cllm.posthoc.method import Compressor
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors
from cllm.posthoc.tensor_tree import Change

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKAGES = {"quanto": "optimum-quanto", "hqq": "hqq"}
_BITS = {"quanto": (2, 4), "hqq": (1, 2, 3, 4, 8)}
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

    @model_validator(mode="after")
    def _bits_of_backend(self) -> Self:
        if self.bits not in (known := _BITS[self.backend]):
            others = " or ".join(f"backend={name}" for name, bits in _BITS.items() if self.bits in bits)
            raise ValueError(
                f"bits={self.bits}: backend={self.backend} has {' or '.join(map(str, known))} bits; allowed: one of "
                f"these, or {others}"
            )
        return self

    @property
    def chooses_for_batch(self) -> bool:
        return self.backend == "hqq"  # it stops moving z by the mean error of the batch

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        raise UserError(f"{self.name}: serves transformers models only; for cllm models: kivi")

    def transformers_cache(self, cache: Cache, model: PreTrainedModel) -> _QuantizedWithSinks:
        """`cache` quantised. Raises `UserError` if the library is missing or refuses, or all tokens are sinks."""
        if (tokens := cache.get_seq_length()) <= self.sinks:
            raise UserError(f"{self.name}: sinks={self.sinks} of {tokens} tokens; allowed: 0 to {tokens - 1}")
        options: dict[str, int] = {
            "nbits": self.bits, "q_group_size": self.group, "residual_length": self.residual,
            "axis_key": _AXIS[self.backend], "axis_value": _AXIS[self.backend],
        }  # fmt: skip
        try:
            quantized = _QuantizedWithSinks([_LAYERS[self.backend](**options) for _ in cache.layers])
        except ImportError:
            raise UserError(
                f"{self.name}: backend={self.backend} is not installed: pip install {_PACKAGES[self.backend]}"
            ) from None
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from None
        quantized.fill(cache, self.sinks)
        return quantized


class _Rearranged(QuantizedLayer):
    """A layer whose sequences can be rearranged: their codes, which are packed together, stay where they are until all
    tokens are quantised again."""

    sequences: Tensor | None = None
    """(B,) int64: the index of each sequence among those that were quantised; None: its own."""
    keys: Any
    values: Any

    def _quantize(self, tensor: Tensor, axis: int) -> Any:  # type: ignore[override]
        self.sequences = None  # `tensor` has the present sequences
        return super()._quantize(tensor, axis)  # type: ignore[safe-super]

    def _dequantize(self, q_tensor: Any) -> Tensor:
        return self.in_order(super()._dequantize(q_tensor))  # type: ignore[safe-super]

    def in_order(self, read: Tensor) -> Tensor:
        """The present sequences of the quantised ones (B', ...)."""
        return read if self.sequences is None else read.index_select(0, self.sequences)

    def rearrange(self, change: Change, batch: int) -> None:
        """Replace the tensors of `batch` sequences by `change(tensor)`."""
        before = torch.arange(batch, device=self.device) if self.sequences is None else self.sequences
        self.sequences = change(before)
        if self.exact_tokens:
            self.keys, self.values = change(self.keys), change(self.values)

    @property
    def exact_tokens(self) -> int:
        """Tokens after the quantised ones."""
        return self.keys.shape[-2] if self.keys.dim() == 4 else 0

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last `-tokens_to_remove` tokens. Raises `UserError` if some of them are quantised."""
        tokens: int = self.get_seq_length()
        drop = -tokens_to_remove if tokens_to_remove <= 0 else max(tokens - tokens_to_remove, 0)
        if drop > (exact := self.exact_tokens):
            raise UserError(
                f"cache: cannot drop {drop} tokens: the first {tokens - exact} of {tokens} are quantised; allowed: up "
                f"to {exact}"
            )
        if drop:
            self.keys, self.values = self.keys[..., : exact - drop, :], self.values[..., : exact - drop, :]
            self.cumulative_length -= drop


def _with_full_groups(x: Tensor, numbers: int, size: int) -> Tensor:
    """`x` (B, G, n, D) with its last token repeated until groups of `size` fill the tokens, of `numbers` each."""
    more = -x.shape[-2] % (size // math.gcd(size, numbers))
    return torch.cat((x, x[..., -1:, :].expand(*x.shape[:-2], more, -1)), dim=-2)


class _Quanto(_Rearranged, QuantoQuantizedLayer):
    """Codes of optimum-quanto, of any number of tokens: the last is repeated until groups fill a sequence."""

    def _quantize(self, tensor: Tensor, axis: int) -> Any:  # type: ignore[override]
        x = _with_full_groups(tensor, tensor[0, :, 0].numel(), self.q_group_size)
        return super()._quantize(x, axis), tensor.shape[-2]

    def _dequantize(self, q_tensor: tuple[Any, int]) -> Tensor:
        codes, tokens = q_tensor
        return self.in_order(QuantoQuantizedLayer._dequantize(self, codes)[..., :tokens, :])


class _HQQ(_Rearranged, HQQQuantizedLayer):
    """Codes of hqq, of any number of tokens: the last is repeated until groups fill the packs."""

    def _quantize(self, tensor: Tensor, axis: int) -> Any:  # type: ignore[override]
        x = _with_full_groups(tensor, tensor[..., 0, :].numel(), self.q_group_size * _PACKED[self.nbits])
        codes, meta = super()._quantize(x.reshape(-1, self.q_group_size), axis)  # hqq reads 3 bits of matrices alone
        return codes, {**meta, "tokens": tensor.shape[-2], "padded": x.shape}

    def _dequantize(self, q_tensor: tuple[Tensor, dict[str, Any]]) -> Tensor:
        meta = q_tensor[1]
        read = HQQQuantizedLayer._dequantize(self, q_tensor).view(meta["padded"])[..., : meta["tokens"], :]
        return self.in_order(read)


_LAYERS: dict[str, Any] = {"quanto": _Quanto, "hqq": _HQQ}


class _QuantizedWithSinks(QuantizedCache):
    """A quantised cache after exact sinks, with a count of its bytes."""

    outcome: Outcome
    sinks: list[tuple[Tensor, Tensor]]
    """(B, G, s, D) keys and values of each layer."""

    def __init__(self, layers: list[Any]):
        Cache.__init__(self, layers=layers)  # that of QuantizedCache makes layers that cannot be rearranged

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
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences of `indices` (n,) int64, in that order. Codes of the others stay until all tokens are
        quantised again."""
        self._rearrange(lambda t: t.index_select(0, indices.to(t.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence `repeats` times, copies next to each other."""
        self._rearrange(lambda t: t.repeat_interleave(repeats, dim=0))

    def _rearrange(self, change: Change) -> None:
        batch, layers = len(self.sinks[0][0]), cast("list[_Rearranged]", self.layers)
        for layer in layers:
            layer.rearrange(change, batch)
        self.sinks = [(change(k), change(v)) for k, v in self.sinks]

    def nbytes(self) -> int:
        """Bytes of codes, scales, zeros and the exact tokens."""
        return sum(tensor.nbytes for tensor in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Codes, scales, zeros and the exact tokens; tensors of one layer that share memory occur once."""
        found: list[Tensor] = []
        layers: list[Any] = self.layers
        for layer, sinks in zip(layers, self.sinks, strict=True):
            parts = (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values, layer.sequences, *sinks)
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
