"""The error that a compressed cache makes in attention's output, as a weight of the errors of keys and values.

A layer reads a slot with query heads h of KV head g. To first order, the output of head h for a query q at position t
changes by

    values   W_h Σ_j a_tj δv_j                              W_h (M, D) the head's part of W_O
    keys     W_h Σ_j a_tj δs_tj (v_j - Σ_i a_ti v_i)        δs_tj = (R_{t-j} q)·δk_j / √D, keys before RoPE

with attention weights a and RoPE's rotation R. If errors of different tokens, and those of keys and values, are
independent, the expected square for token j is E_t[a_tj²] times

    values   δvᵀ N_g δv,    N_g = Σ_h W_hᵀ W_h · E[1 / ρ]
    keys     δkᵀ M_g δk,    M_g = Σ_h u_h / D · E[(R_Δ q)(R_Δ q)ᵀ / ρ],    u_h = tr(W_h cov(v) W_hᵀ)

summed over all layers and heads that read KV head g. ρ is the squared length of the residual stream, at the query's own
token, that a layer adds its output to, because norms divide by it. Keys and values, heads and layers are in one unit
then and can share one budget. Each query has its own ρ, and not their mean, because that of a first token is up to
thousands of times as large as others from some layer on (massive activations, arXiv 2402.17762). The mean of a short
prompt would be that token's, and errors in the layers above would seem to count for nothing.

**Channels.** The root of a form makes it the squared error that an SVD minimises: X M^(1/2) ≈ A Cᵀ, and
X ≈ A (M^(-1/2) C)ᵀ.

**Tokens.** A token of much attention counts more. All layers of a group share A, so a token has one weight in a group:
the mean over its heads of E_t[a_tj²], each divided by its mean over tokens. Its square root, plus a tenth of the mean
so that no token is free, multiplies the squared errors when the basis is fitted (`ROW_POWER`, `ROW_FLOOR`: found on a
real checkpoint, where the plain weight lost more; neither the estimate from the last queries nor independence holds
well). A = X M^(1/2) C is a projection and does not depend on it.

**Rotation.** q is taken from the prompt's own last queries. One form has to serve all tokens of a slot, so the relative
position Δ is averaged over 1 ... n. Write a rotated pair of channels as a complex number z, which RoPE multiplies by
exp(iθΔ); then, over queries and Δ,

    E[z_a conj(z_b)] = C_ab mean_Δ exp(i(θ_a - θ_b)Δ)        E[z_a z_b] = P_ab mean_Δ exp(i(θ_a + θ_b)Δ)

with C and P the two complex second moments of queries. For n → ∞ only C_aa stays: each pair's 2 x 2 block is c·I, and
the form commutes with every rotation. At finite n slow pairs do not average out, and what stays of their directions
matters, so the means are computed for the actual n.

Shapes: B batch, n tokens, H query heads, G KV heads, D channels of a head, M d_model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.errors import UserError
from cllm.model.rope import apply_rope
from cllm.posthoc.code import Code
from cllm.posthoc.readers import NOT_RECORDED, RecordedQueries, SlotReader
from cllm.posthoc.sinks import Sinks
from cllm.posthoc.slots import SlotTensors

ROW_POWER, ROW_FLOOR = 0.5, 0.1
"""The exponent of a token's weight, and what is added to it, relative to the mean."""
_FLOOR = 1e-4
"""Of the mean eigenvalue of a form: added to it, so that no direction is free."""


@dataclass(frozen=True)
class Weights:
    """The weights of one slot's errors."""

    root: Tensor
    """(B, G, D, D) fp32: the symmetric root of the form, block by block."""
    inverse: Tensor
    """(B, G, D, D) fp32: its inverse."""
    attention: Tensor
    """(B, n) fp32: of the tokens, sinks left out, with a mean of 1 over the tokens that are not padding."""

    def weigh(self, rows: Tensor) -> Tensor:
        """Rows (B, n, G · D), times the root."""
        return _blocks(rows, self.root)

    def unweigh(self, columns: Tensor) -> Tensor:
        """The inverse root, times `columns` (B, G · D, r)."""
        return _blocks(columns.mT, self.inverse).mT


def _blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    heads = rows.unflatten(-1, blocks.shape[1:3])  # B, n, G, D
    return torch.einsum("bngd,bgde->bnge", heads.to(blocks.dtype), blocks).flatten(2)


def row_weights(weights: Sequence[Weights]) -> Tensor:
    """(B, n, 1): the roots of the weights of tokens in a group of slots."""
    mean = torch.stack([w.attention for w in weights]).mean(0)
    powered = mean.clamp(min=0) ** ROW_POWER
    return (powered / _mean_of_positive(powered) + ROW_FLOOR).sqrt()[..., None]


def _mean_of_positive(x: Tensor) -> Tensor:
    """(B, 1, ...): the mean of `x` (B, n, ...), which is 0 for padding, over the other tokens."""
    return x.sum(1, keepdim=True).clamp(min=1e-30) / (x > 0).sum(1, keepdim=True).clamp(min=1)


def rotated_moment(moment: Tensor, cos: Tensor, sin: Tensor, tokens: Tensor | None = None) -> Tensor:
    """The mean over Δ of E[(R_Δ q)(R_Δ q)ᵀ].

    Args:
        moment: E[q qᵀ] before RoPE, (..., D, D).
        cos: of the angles of every Δ, (m, D / 2).
        sin: the same.
        tokens: (B,) int64, how many first Δ each sequence has, for `moment` (B, G, D, D); None: all have m.

    Returns:
        (..., D, D) in fp64.
    """
    half = moment.shape[-1] // 2
    wide = moment.double()
    xx, xy = wide[..., :half, :half], wide[..., :half, half:]
    yx, yy = wide[..., half:, :half], wide[..., half:, half:]
    turn = torch.complex(cos.double(), sin.double())  # m, D/2
    counted = turn
    if tokens is not None:  # B, 1, m, D/2
        counted = turn * (torch.arange(len(turn), device=turn.device) < tokens[:, None])[:, None, :, None]
    number = len(turn) if tokens is None else tokens[:, None, None, None]
    hermitian = torch.complex(xx + yy, yx - xy) * (counted.mT @ turn.conj() / number)  # E[z_a conj(z_b)]
    plain = torch.complex(xx - yy, xy + yx) * (counted.mT @ turn / number)  # E[z_a z_b]
    first = torch.cat(((hermitian + plain).real, (plain - hermitian).imag), dim=-1)
    second = torch.cat(((hermitian + plain).imag, (hermitian - plain).real), dim=-1)
    return torch.cat((first, second), dim=-2) / 2


class ErrorWeights:
    """The weights of errors in the keys and values of a filled cache."""

    def __init__(
        self,
        keys: SlotTensors,
        values: SlotTensors,
        readers: Mapping[int, Sequence[SlotReader]],
        queries: RecordedQueries,
    ):
        """
        Args:
            keys: before RoPE.
            values: of the same slots.
            readers: of each slot.
            queries: of all readers, in the prompt.
        """
        self.keys, self.values, self.readers, self.queries = keys, values, readers, queries
        layers = {reader.layer: reader for slot in keys.slots for reader in readers.get(slot, ())}
        if not layers:
            raise UserError(NOT_RECORDED)
        self._layers = layers
        self._relative = {i: self._relative_counts(queries.streams(i, keys.tokens)) for i in layers}
        self._attention = {i: self._squared_attention(reader) for i, reader in layers.items()}
        self._grams = {i: torch.einsum("mhd,mhe->hde", *[r.output.float()] * 2) for i, r in layers.items()}
        self._covariances = self._read_covariances()

    def of_keys(self) -> dict[int, Weights]:
        """By slot."""
        distances = torch.arange(1, self.keys.tokens + 1, device=self.keys.data[0].device)[None]
        starts = None if self.keys.sinks is None else self.keys.sinks.starts
        tokens = None if starts is None else self.keys.tokens - starts
        found = {}
        for slot, stored in zip(self.keys.slots, self.keys.data, strict=True):
            heads, dim = stored.shape[2:]
            cos, sin = self._table(dim, distances)
            cos, sin = cos[0, :, 0, 0], sin[0, :, 0, 1]  # Δ, D / 2
            forms, attention = [], []
            for reader in (r for r in self.readers[slot] if r.keys is not None):
                i = reader.layer
                spread = self._covariances[i].repeat_interleave(reader.output.shape[1] // heads, dim=1)  # B, H, D, D
                unit = torch.einsum("hde,bhde->bh", self._grams[i], spread) / dim
                q = self.queries.of(i, self.keys.tokens).float()
                relative = self._relative[i][..., None, None]
                moment = torch.einsum("bmhd,bmhe->bhde", q * relative, q) * unit[..., None, None]
                form = rotated_moment(moment.unflatten(1, (heads, -1)).sum(2), cos, sin, tokens)
                forms.append(_scaled(form, reader.keys))
                attention.append(self._attention[i])
            found[slot] = _weights(forms, attention)
        return found

    def of_values(self) -> dict[int, Weights]:
        """By slot."""
        found = {}
        for slot, stored in zip(self.values.slots, self.values.data, strict=True):
            heads = stored.shape[2]
            forms, attention = [], []
            for reader in (r for r in self.readers[slot] if r.values is not None):
                gram = self._grams[reader.layer].unflatten(0, (heads, -1)).sum(1).double()
                form = gram * self._relative[reader.layer].double().sum(1)[:, None, None, None]
                forms.append(_scaled(form, reader.values))
                attention.append(self._attention[reader.layer])
            found[slot] = _weights(forms, attention)
        return found

    def output_changes(self, keys: Mapping[int, Code], values: Mapping[int, Code]) -> tuple[float, float]:
        """Two changes of attention's output: if all keys are read from their codes, and if all values are.

        Nothing is approximated: the last queries attend to the decoded tensors. Each is the squared length of the
        change, divided by that of the query's residual stream, the mean over queries and sequences, summed over layers.

        Args:
            keys: codes of keys after RoPE, by slot.
            values: of the same slots.
        """
        of_keys = of_values = 0.0
        for i, reader in self._layers.items():
            v = self._read(i, self.values)
            attention, _ = self._attend(reader, self._read(i, self.keys))
            other, _ = self._attend(reader, self._read(i, self.keys, keys))
            of_keys += self._change(reader, other - attention, v)
            of_values += self._change(reader, attention, self._read(i, self.values, values) - v)
        return of_keys, of_values

    def _change(self, reader: SlotReader, attention: Tensor, v: Tensor) -> float:
        """See `output_changes`, for one layer whose change is `attention` (B, G, H / G, m, S) of `v` (B, S, G, D)."""
        heads = torch.einsum("bgrms,bsgd->bmgrd", attention, v).flatten(2, 3)
        squares = torch.einsum("bmhd,ehd->bme", heads, reader.output.float()).square().sum(-1)
        return (squares * self._relative[reader.layer]).sum(1).mean().item()

    def _counts(self, last: int) -> Tensor:
        """(B or 1, m) fp32: for the `last` m tokens, one over their number; 0 for padding."""
        columns = torch.arange(self.keys.tokens - last, self.keys.tokens, device=self.keys.data[0].device)[None]
        starts = None if self.keys.sinks is None else self.keys.sinks.starts
        real = torch.ones_like(columns) if starts is None else columns >= starts[:, None]
        return real.float() / real.sum(1, keepdim=True).clamp(min=1)

    def _relative_counts(self, streams: Tensor) -> Tensor:
        """(B, m): `_counts`, divided by the squared length `streams` (B, m) of each token's residual stream."""
        return self._counts(streams.shape[1]) / streams.clamp(min=1e-30)

    def _table(self, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        assert self.keys.rope is not None
        return self.keys.rope(head_dim, positions)

    def _squared_attention(self, reader: SlotReader) -> Tensor:
        """(B, n): the mean over the last queries and all heads of a_tj², each head divided by its mean over tokens.

        A window of the layer is ignored, and so are keys from slots that are not compressed.
        """
        keys, sinks = self.keys, self.keys.sinks
        attention, counted = self._attend(reader, self._read(reader.layer, keys))
        received = attention.square().sum(-2) / counted.sum(-2).clamp(min=1)  # B, G, H / G, S
        received = received.flatten(1, 2).mT  # B, S, H
        received = received if sinks is None else sinks.without(received)
        if keys.is_text is not None:
            received = received * keys.is_text[..., None]
        return (received / _mean_of_positive(received)).mean(-1)

    def _attend(self, reader: SlotReader, k: Tensor) -> tuple[Tensor, Tensor]:
        """The attention (B, G, H / G, m, S) of the last m queries for keys `k` (B, S, G, D) after RoPE; and booleans
        (B or 1, 1, 1, m, S), which tokens a query sees."""
        keys = self.keys
        q = self.queries.of(reader.layer, keys.tokens).float()  # B, m, H, D
        columns = torch.arange(keys.tokens - q.shape[1], keys.tokens, device=q.device)[None]  # 1, m
        starts = None if keys.sinks is None else keys.sinks.starts
        visible = torch.arange(keys.tokens, device=q.device) <= columns[..., None]  # 1, m, S
        positions = columns
        if starts is not None:
            visible = visible & (torch.arange(keys.tokens, device=q.device) >= starts[:, None, None])
            positions = (columns - starts[:, None]).clamp(min=0)
        q = apply_rope(q, self._table(q.shape[-1], positions)) / q.shape[-1] ** 0.5
        scores = torch.einsum("bmgrd,bsgd->bgrms", q.unflatten(2, (k.shape[2], -1)), k)
        counted = visible[:, None, None]
        return scores.masked_fill(~counted, -1e30).softmax(-1) * counted, counted

    def _read(self, layer: int, tensors: SlotTensors, codes: Mapping[int, Code] | None = None) -> Tensor:
        """(B, S, G, D) fp32: the keys, after RoPE, or the values that a layer reads, with sinks.

        Args:
            layer: which reads them.
            tensors: the keys or the values of all slots.
            codes: of them, by slot, to read in their place; sinks stay exact.
        """
        total: Tensor | None = None
        for slot, cached in zip(tensors.slots, tensors.cached, strict=True):
            for reader in (r for r in self.readers[slot] if r.layer == layer):
                factors = reader.keys if tensors.kind == "k" else reader.values
                if factors is None:
                    continue
                x = cached if codes is None else _with_sinks(codes[slot].decode(), cached, tensors.sinks)
                part = x.float() * factors.to(x.device, torch.float32)
                total = part if total is None else total + part
        if total is None:  # the layer reads values only, of slots with other keys; or keys only
            return torch.zeros_like(tensors.cached[self._read_by(layer)], dtype=torch.float32)
        return total

    def _read_by(self, layer: int) -> int:
        """The index of a slot that a layer reads. All of them have one shape."""
        return next(n for n, slot in enumerate(self.keys.slots) if layer in {r.layer for r in self.readers[slot]})

    def _read_covariances(self) -> dict[int, Tensor]:
        """The covariance (B, G, D, D) of the values that each layer reads; those of different slots as independent."""
        total: dict[int, Tensor] = {}
        covariances = [_covariance(v, self.values.is_text) for v in self.values.data]
        for slot, own in zip(self.values.slots, covariances, strict=True):
            for reader in (r for r in self.readers[slot] if r.values is not None):
                part = _scaled(own, reader.values)
                total[reader.layer] = total[reader.layer] + part if reader.layer in total else part
        found = {i: total.get(i) for i in self._attention}
        return {i: torch.ones_like(covariances[self._read_by(i)]) if t is None else t for i, t in found.items()}


def _with_sinks(x: Tensor, cached: Tensor, sinks: Sinks | None) -> Tensor:
    """`x` (B, n, G, D) with the sinks of `cached` (B, S, G, D) in their places."""
    if sinks is None:
        return x
    exact = sinks.of(cached)
    return sinks.join(Slot(x, x), Slot(exact, exact)).k


def _covariance(rows: Tensor, is_text: Tensor | None) -> Tensor:
    """The covariance (B, G, D, D) fp32 of `rows` (B, n, G, D) over tokens, padding left out."""
    rows = rows.float()
    counts = rows.new_ones(rows.shape[:2]) if is_text is None else is_text.float()
    total = counts.sum(1).clamp(min=1)
    mean = torch.einsum("bn,bngd->bgd", counts, rows) / total[:, None, None]
    centred = (rows - mean[:, None]) * counts[..., None, None]
    return torch.einsum("bngd,bnge->bgde", centred, centred) / total[:, None, None, None]


def _weights(forms: Sequence[Tensor], attention: Sequence[Tensor]) -> Weights:
    """The weights of a slot that several layers read: forms (B, G, D, D) are summed, tokens' weights averaged."""
    form = torch.stack(list(forms)).sum(0).double()
    floor = _FLOOR * form.diagonal(dim1=-2, dim2=-1).mean((-1, -2)).clamp(min=1e-30)  # B
    form = form + floor[:, None, None, None] * torch.eye(form.shape[-1], dtype=form.dtype, device=form.device)
    squares, vectors = torch.linalg.eigh(form)
    values = squares.clamp(min=1e-300).sqrt()
    root, inverse = ((vectors * v[..., None, :] @ vectors.mT).float() for v in (values, 1 / values))
    return Weights(root, inverse, torch.stack(list(attention)).mean(0))


def _scaled(form: Tensor, factors: Tensor | None) -> Tensor:
    """The form (B, G, D, D) of what a layer reads, as one of a slot, which it reads `factors` times."""
    assert factors is not None
    factors = factors.to(form.device, form.dtype)
    return form * factors[:, :, None] * factors[:, None]
