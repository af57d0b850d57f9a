"""The error that a compressed cache makes in attention's output, as a quadratic form of the errors of keys and values.

A layer reads a slot with query heads h of KV head g. To first order, the output of head h for a query q at position t
changes by

    values   W_h Σ_j a_tj δv_j                              W_h (M, D) the head's part of W_O
    keys     W_h Σ_j a_tj δs_tj (v_j - Σ_i a_ti v_i)        δs_tj = (R_{t-j} q)·δk_j / √D, keys before RoPE

with attention weights a and RoPE's rotation R. Errors of different tokens are taken as independent, and those of keys
as independent of values. Then both sums have the factor Σ_j a_tj², and for each token the expected squares are

    values   δvᵀ N_g δv,    N_g = Σ_h W_hᵀ W_h
    keys     δkᵀ M_g δk,    M_g = Σ_h u_h / D · E[(R_Δ q)(R_Δ q)ᵀ],    u_h = tr(W_h cov(v) W_hᵀ)

over all layers and heads that read KV head g. Both are in the same unit, so that keys and values, heads and layers can
share one budget. Multiplying by a root of the form makes it the plain squared error that an SVD minimises:
X M^(1/2) ≈ A Cᵀ, X ≈ A (M^(-1/2) C)ᵀ.

**Rotation.** q is taken from the prompt's own queries. One form has to serve all tokens of a slot, so the relative
position Δ is averaged over 1 ... n. Write a rotated pair of channels as a complex number z, which RoPE multiplies by
exp(iθΔ); then, over queries and Δ,

    E[z_a conj(z_b)] = C_ab  mean_Δ exp(i(θ_a - θ_b)Δ)        E[z_a z_b] = P_ab mean_Δ exp(i(θ_a + θ_b)Δ)

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

from cllm.posthoc.readers import RecordedQueries, SlotReader
from cllm.posthoc.slots import SlotTensors

_FLOOR = 1e-4
"""Of the mean eigenvalue of a form: added to it, so that no direction is free."""


@dataclass(frozen=True)
class Roots:
    """The symmetric root of a slot's form, block by block, and its inverse: (B, G, D, D) fp32 each."""

    root: Tensor
    inverse: Tensor

    def weigh(self, rows: Tensor) -> Tensor:
        """Rows (B, n, G · D), times the root."""
        return _blocks(rows, self.root)

    def unweigh(self, columns: Tensor) -> Tensor:
        """The inverse root, times `columns` (B, G · D, r)."""
        return _blocks(columns.mT, self.inverse).mT


def _blocks(rows: Tensor, blocks: Tensor) -> Tensor:
    heads = rows.unflatten(-1, blocks.shape[1:3])  # B, n, G, D
    return torch.einsum("bngd,bgde->bnge", heads.to(blocks.dtype), blocks).flatten(2)


def rotated_moment(moment: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The mean over Δ of E[(R_Δ q)(R_Δ q)ᵀ].

    Args:
        moment: E[q qᵀ] before RoPE, (..., D, D).
        cos: of the angles of every Δ, (m, D / 2).
        sin: the same.

    Returns:
        (..., D, D) in fp64.
    """
    half = moment.shape[-1] // 2
    wide = moment.double()
    xx, xy = wide[..., :half, :half], wide[..., :half, half:]
    yx, yy = wide[..., half:, :half], wide[..., half:, half:]
    turn = torch.complex(cos.double(), sin.double())  # m, D/2
    hermitian = torch.complex(xx + yy, yx - xy) * (turn.mT @ turn.conj() / len(turn))  # E[z_a conj(z_b)]
    plain = torch.complex(xx - yy, xy + yx) * (turn.mT @ turn / len(turn))  # E[z_a z_b]
    first = torch.cat(((hermitian + plain).real, (plain - hermitian).imag), dim=-1)
    second = torch.cat(((hermitian + plain).imag, (hermitian - plain).real), dim=-1)
    return torch.cat((first, second), dim=-2) / 2


def covariance(rows: Tensor, is_text: Tensor | None) -> Tensor:
    """The covariance (B, G, D, D) fp32 of `rows` (B, n, G, D) over tokens, padding left out."""
    rows = rows.float()
    counts = rows.new_ones(rows.shape[:2]) if is_text is None else is_text.float()
    total = counts.sum(1).clamp(min=1)
    mean = torch.einsum("bn,bngd->bgd", counts, rows) / total[:, None, None]
    centred = (rows - mean[:, None]) * counts[..., None, None]
    return torch.einsum("bngd,bnge->bgde", centred, centred) / total[:, None, None, None]


def _second_moment(queries: Tensor, counted: Tensor) -> Tensor:
    """E[q qᵀ] (B, H, D, D) fp32 of queries (B, n, H, D), those counted."""
    counts = counted.float()
    rows = queries.float() * counts[..., None, None]
    return torch.einsum("bnhd,bnhe->bhde", rows, rows) / counts.sum(1).clamp(min=1)[:, None, None, None]


def _roots(form: Tensor) -> Roots:
    """Roots of forms (B, G, D, D)."""
    wide = form.double()
    floor = wide.diagonal(dim1=-2, dim2=-1).mean(-1).mean(-1) * _FLOOR
    wide = wide + (floor.clamp(min=1e-30)[:, None, None] * torch.ones_like(wide[..., 0])).diag_embed()
    squares, vectors = torch.linalg.eigh(wide)
    values = squares.clamp(min=1e-300).sqrt()
    root, inverse = (vectors * v[..., None, :] @ vectors.mT for v in (values, 1 / values))
    return Roots(root.float(), inverse.float())


def weigh_keys(
    keys: SlotTensors,
    values: SlotTensors,
    readers: Mapping[int, Sequence[SlotReader]],
    queries: RecordedQueries,
    table: tuple[Tensor, Tensor],
) -> dict[int, Roots]:
    """For each slot the roots of M.

    Args:
        keys: before RoPE.
        values: of the same slots.
        readers: of each slot's keys or values.
        queries: of all readers, in the prompt.
        table: cos and sin (m, D / 2) of the relative positions to average over.
    """
    covariances = {j: covariance(v, values.is_text) for j, v in zip(values.slots, values.data, strict=True)}
    read_values = _values_of_layers(readers, covariances)
    roots = {}
    for slot, k in zip(keys.slots, keys.data, strict=True):
        form = k.new_zeros((len(k), *k.shape[2:], k.shape[3]), dtype=torch.float64)
        for reader in (r for r in readers[slot] if r.keys is not None):
            heads = reader.output.shape[1]
            spread = read_values[reader.layer].repeat_interleave(heads // k.shape[2], dim=1)  # B, H, D, D
            gram = torch.einsum("mhd,mhe->hde", *[reader.output.float()] * 2)
            unit = torch.einsum("hde,bhde->bh", gram, spread)
            moment = _second_moment(*queries.of(reader.layer, keys.tokens, _with_sinks(keys)))
            weighted = (moment * unit[..., None, None] / k.shape[3]).unflatten(1, (k.shape[2], -1)).sum(2)
            assert reader.keys is not None
            form += _scaled(rotated_moment(weighted, *table), reader.keys)
        roots[slot] = _roots(form)
    return roots


def weigh_values(values: SlotTensors, readers: Mapping[int, Sequence[SlotReader]]) -> dict[int, Roots]:
    """For each slot the roots of N, the same for every sequence of the batch."""
    roots = {}
    for slot, v in zip(values.slots, values.data, strict=True):
        form = v.new_zeros((1, *v.shape[2:], v.shape[3]), dtype=torch.float64)
        for reader in (r for r in readers[slot] if r.values is not None):
            gram = torch.einsum("mhd,mhe->hde", *[reader.output.float()] * 2)
            assert reader.values is not None
            form += _scaled(gram.unflatten(0, (v.shape[2], -1)).sum(1)[None].double(), reader.values)
        roots[slot] = _roots(form.expand(len(v), -1, -1, -1))
    return roots


def _scaled(form: Tensor, factors: Tensor) -> Tensor:
    """The form (B, G, D, D) of what a layer reads, as one of the slot's tensors, of which it reads `factors` times."""
    factors = factors.to(form.device, torch.float64)
    return form * factors[:, :, None] * factors[:, None]


def _values_of_layers(
    readers: Mapping[int, Sequence[SlotReader]], covariances: Mapping[int, Tensor]
) -> dict[int, Tensor]:
    """The covariance (B, G, D, D) of the values that each layer reads, those of different slots as independent."""
    total: dict[int, Tensor] = {}
    for slot, layers in readers.items():
        for reader in layers:
            if reader.values is not None and slot in covariances:
                part = _scaled(covariances[slot], reader.values).float()
                total[reader.layer] = total[reader.layer] + part if reader.layer in total else part
    return total


def _with_sinks(keys: SlotTensors) -> Tensor | None:
    """(B, tokens) booleans, False for padding, of all tokens of the prefix."""
    starts = None if keys.sinks is None else keys.sinks.starts
    if starts is None:
        return None
    return torch.arange(keys.tokens, device=starts.device) >= starts[:, None]
