"""KV heads of two layers matched, and a layer rewritten so that it computes the same with heads like another layer's.

The output of a layer does not change if

- its KV heads are reordered, together with the query heads that read them and the columns of o_proj that take their
  outputs;
- a rotated pair of a key head, as one complex number z, is divided by conj(u), and that pair of the query heads that
  read it is multiplied by u: RoPE multiplies both by phases, and Re(conj(u q) · z / conj(u)) = Re(conj(q) · z);
- a value head v becomes M⁻ᵀ v, and the columns W of o_proj that read it become W Mᵀ.

An `Alignment` is one choice of the three. With |u| = 1 and M orthogonal it keeps lengths, and the best alignment with
another layer is closed-form: the order with the largest sum of similarities (hungarian.py), u = conj(c) / |c| for the
complex product c = Σ conj(z_other) z, and M = U Vᵀ from the SVD of Σ v_other vᵀ (Procrustes). Without alignment,
sharing or averaging heads would combine unrelated coordinates. With norms on keys (`qk_norm`) each channel has its own
gain, which a phase would mix; keys are then only reordered.

Shapes: G KV heads, D channels, P = D / 2 pairs (j, j + P), N rows compared: inputs of a projection, or tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cllm.model.attention import Attention
from cllm.model.hungarian import hungarian
from cllm.model.sources import OwnKV, Part


@dataclass(frozen=True, slots=True)
class Alignment:
    """A change of a layer's KV heads: head h becomes head `order[h]`, with other keys and values."""

    order: list[int]
    key_factors: Tensor
    """(G, P) complex: u, which queries are multiplied by."""
    value_maps: Tensor
    """(G, D, D): M, whose transpose o_proj is multiplied by."""

    @classmethod
    def identity(cls, n_heads: int, head_dim: int, order: list[int] | None = None) -> Alignment:
        """No change, or `order` alone."""
        key_factors = torch.ones(n_heads, head_dim // 2, dtype=torch.complex128)
        value_maps = torch.eye(head_dim, dtype=torch.float64).expand(n_heads, -1, -1)
        return cls(list(range(n_heads)) if order is None else order, key_factors, value_maps)

    def align_keys(self, heads: Tensor) -> Tensor:
        """The keys that `heads` (G, D, N) become."""
        factors = self.key_factors.conj().to(heads.device)[..., None]
        return to_channels(to_pairs(heads[self.order]) / factors).to(heads.dtype)

    def align_values(self, heads: Tensor) -> Tensor:
        """The values that `heads` (G, D, N) become."""
        return torch.linalg.solve(self.value_maps.mT.to(heads.device), heads[self.order].double()).to(heads.dtype)


def to_pairs(heads: Tensor) -> Tensor:
    """(G, D, N) real as (G, P, N) complex fp64: channel j and channel j + P."""
    first, second = heads.double().chunk(2, dim=-2)
    return torch.complex(first, second)


def to_channels(pairs: Tensor) -> Tensor:
    """The inverse of `to_pairs`."""
    return torch.cat((pairs.real, pairs.imag), dim=-2)


@dataclass(slots=True)
class Grams:
    """Sums over N of products of one layer's heads (second index) with another layer's (first)."""

    keys: Tensor
    """(G, G, P) complex: Σ conj(other) own."""
    values: Tensor
    """(G, G, D, D): Σ other ownᵀ."""
    norms: Tensor
    """(4, G): squares summed of other's keys, own keys, other's values, own values."""

    @classmethod
    def of(cls, other_k: Tensor, own_k: Tensor, other_v: Tensor, own_v: Tensor) -> Grams:
        """From heads (G, D, N)."""
        a, b = to_pairs(other_k), to_pairs(own_k)
        norms = [t.double().square().sum((-2, -1)) for t in (other_k, own_k, other_v, own_v)]
        values = torch.einsum("gdn,hen->ghde", other_v.double(), own_v.double())
        return cls(torch.einsum("gpn,hpn->ghp", a.conj(), b), values, torch.stack(norms))

    def __add__(self, more: Grams) -> Grams:
        return Grams(self.keys + more.keys, self.values + more.values, self.norms + more.norms)

    def alignment(self, *, full: bool, rotate_keys: bool, own: Sequence[Part] = ()) -> Alignment:
        """The alignment that brings the second layer closest to the first without changing lengths.

        Heads are matched by the sum of the cosines of keys and of values after the best factors and maps. Without
        `full`, heads are only reordered, and matched as they are; without `rotate_keys`, keys are. A half in `own` is
        the layer's own, which is reordered with it and matches in any order.

        It is computed on the CPU, which decomposes matrices of a head's size in less time than a GPU takes to launch.
        """
        keys, values, norms = (t.cpu() for t in (self.keys, self.values, self.norms))
        k = keys.abs().sum(-1) if full and rotate_keys else keys.real.sum(-1)
        v = torch.linalg.svdvals(values).sum(-1) if full else values.diagonal(dim1=-2, dim2=-1).sum(-1)
        scale = norms.clamp(min=1e-30).sqrt()
        score = torch.zeros_like(k)
        if "k" not in own:
            score = score + k / (scale[0][:, None] * scale[1])
        if "v" not in own:
            score = score + v / (scale[2][:, None] * scale[3])
        order = hungarian(score)
        reordered = Alignment.identity(len(order), values.shape[-1], order)
        if not full:
            return reordered
        rows = torch.arange(len(order))
        key_factors = unit(keys[rows, order]) if rotate_keys and "k" not in own else reordered.key_factors
        return Alignment(order, key_factors, reordered.value_maps if "v" in own else procrustes(values[rows, order]))


def unit(products: Tensor) -> Tensor:
    """The phase that makes each complex product real and positive; 1 for a product of 0."""
    size = products.abs()
    return torch.where(size > 0, products.conj() / size.clamp(min=1e-300), torch.ones_like(products))


def procrustes(products: Tensor) -> Tensor:
    """(..., D, D) orthogonal O with the largest trace of O productsᵀ, the sum of other · (O own)."""
    u, _, vh = torch.linalg.svd(products)
    return u @ vh


# ---- modules ---------------------------------------------------------------------------------------------------------


def heads_of(linear: nn.Linear, head_dim: int) -> Tensor:
    """The weight of a projection to heads, (G, D, inputs); a bias is one more input."""
    weight = linear.weight if linear.bias is None else torch.cat((linear.weight, linear.bias[:, None]), dim=1)
    return weight.detach().unflatten(0, (-1, head_dim))


def set_heads(linear: nn.Linear, heads: Tensor) -> None:
    """Write `heads` (G, D, inputs) to a projection, the inverse of `heads_of`."""
    flat = heads.flatten(0, 1)
    with torch.no_grad():
        linear.weight.copy_(flat[:, : linear.in_features])
        if linear.bias is not None:
            linear.bias.copy_(flat[:, -1])


def align_owner(owner: OwnKV, alignment: Alignment) -> None:
    """Change the keys and values that `owner` projects."""
    set_heads(owner.k_proj, alignment.align_keys(heads_of(owner.k_proj, owner.head_dim)))
    set_heads(owner.v_proj, alignment.align_values(heads_of(owner.v_proj, owner.head_dim)))


def align_reader(attention: Attention, alignment: Alignment) -> None:
    """Change queries and output so that `attention` computes with aligned keys and values what it did with its own."""
    d, n_kv = attention.head_dim, len(alignment.order)
    q = heads_of(attention.q_proj, d)  # H, D, inputs
    of_kv = q.unflatten(0, (n_kv, -1))[alignment.order]  # G, H/G, D, inputs
    factors = alignment.key_factors.to(q.device)[:, None, :, None]
    set_heads(attention.q_proj, to_channels(to_pairs(of_kv) * factors).to(q.dtype).flatten(0, 1))
    o = attention.o_proj.weight.detach().unflatten(1, (n_kv, -1, d))[:, alignment.order]  # d_model, G, H/G, D
    mapped = torch.einsum("mgrd,ged->mgre", o.double(), alignment.value_maps.to(o.device))
    with torch.no_grad():
        attention.o_proj.weight.copy_(mapped.flatten(1))
