"""KV heads of two layers matched, and a layer rewritten so that it computes the same with heads like another's.

A layer's heads have no names: what it computes stays the same if

- its KV heads are put in another order, and with them the blocks of query heads that read them and the columns of
  o_proj that take their outputs;
- a rotated pair of a key head, seen as one complex number z, is divided by conj(u), and the pairs of the query heads
  that read it are multiplied by u: RoPE multiplies both by phases, and Re(conj(u q) · z / conj(u)) = Re(conj(q) · z);
- a value head v becomes M⁻ᵀ v, and the columns W of o_proj that read it become W Mᵀ.

A `Turn` is one choice of the three, and *turning* a layer applies it. With |u| = 1 and M orthogonal lengths stay, and
the best turn onto another layer is closed-form: the largest sum of similarities over orders (assign.py), u = conj(c) /
|c| for the complex product c = Σ conj(z_other) z, M = U Vᵀ for the SVD of Σ v_other vᵀ (Procrustes). Sharing or
averaging heads that were never turned compares arbitrary coordinates. With norms on keys (`qk_norm`) each channel has a
gain of its own, which a phase would mix: keys are then only reordered.

Shapes: G KV heads, D channels, P = D / 2 pairs (j, j + P), N rows compared: inputs of a projection, or tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cllm.model.attention import Attention
from cllm.model.sources import OwnKV
from cllm.uptrain.assign import assign


@dataclass(frozen=True, slots=True)
class Turn:
    """Head h becomes what head `order[h]` was; then its pairs and values are turned."""

    order: list[int]
    pairs: Tensor
    """(G, P) complex: u, what queries are multiplied by."""
    maps: Tensor
    """(G, D, D): M, whose transpose o_proj is multiplied by."""

    @classmethod
    def none(cls, n_heads: int, head_dim: int, order: list[int] | None = None) -> Turn:
        """Only the order changes, or nothing."""
        pairs = torch.ones(n_heads, head_dim // 2, dtype=torch.complex128)
        maps = torch.eye(head_dim, dtype=torch.float64).expand(n_heads, -1, -1)
        return cls(list(range(n_heads)) if order is None else order, pairs, maps)

    def keys(self, heads: Tensor) -> Tensor:
        """`heads` (G, D, N) turned."""
        return to_channels(to_pairs(heads[self.order]) / self.pairs.conj().to(heads.device)[..., None]).to(heads.dtype)

    def values(self, heads: Tensor) -> Tensor:
        """`heads` (G, D, N) turned."""
        return torch.linalg.solve(self.maps.mT.to(heads.device), heads[self.order].double()).to(heads.dtype)


def to_pairs(heads: Tensor) -> Tensor:
    """(G, D, N) real as (G, P, N) complex fp64: channel j and channel j + P."""
    first, second = heads.double().chunk(2, dim=-2)
    return torch.complex(first, second)


def to_channels(pairs: Tensor) -> Tensor:
    """The inverse of `to_pairs`."""
    return torch.cat((pairs.real, pairs.imag), dim=-2)


@dataclass(slots=True)
class Grams:
    """Sums over N of products of one layer's heads (second index) with another's (first)."""

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

    def turn(self, *, full: bool, turn_keys: bool) -> Turn:
        """The turn that brings the second layer closest to the first without changing lengths, or without `full` the
        order alone. Heads are matched by the sum of cosines of keys and values, each as large as the turn makes it.

        All of it on the CPU, which decomposes matrices of a head's size sooner than a GPU is asked to."""
        keys, values, norms = (t.cpu() for t in (self.keys, self.values, self.norms))
        k = keys.abs().sum(-1) if full and turn_keys else keys.real.sum(-1)
        v = torch.linalg.svdvals(values).sum(-1) if full else values.diagonal(dim1=-2, dim2=-1).sum(-1)
        scale = norms.clamp(min=1e-30).sqrt()
        score = k / (scale[0][:, None] * scale[1]) + v / (scale[2][:, None] * scale[3])
        order = assign(score)
        turn = Turn.none(len(order), values.shape[-1], order)
        if not full:
            return turn
        rows = torch.arange(len(order))
        pairs = unit(keys[rows, order]) if turn_keys else turn.pairs
        return Turn(order, pairs, procrustes(values[rows, order]))


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
    """(G, D, inputs) of a projection to heads; a bias is one more input."""
    weight = linear.weight if linear.bias is None else torch.cat((linear.weight, linear.bias[:, None]), dim=1)
    return weight.detach().unflatten(0, (-1, head_dim))


def set_heads(linear: nn.Linear, heads: Tensor) -> None:
    """Write what `heads_of` reads."""
    flat = heads.flatten(0, 1)
    with torch.no_grad():
        linear.weight.copy_(flat[:, : linear.in_features])
        if linear.bias is not None:
            linear.bias.copy_(flat[:, -1])


def turn_owner(owner: OwnKV, turn: Turn) -> None:
    """Turn the keys and values that `owner` projects."""
    set_heads(owner.k_proj, turn.keys(heads_of(owner.k_proj, owner.head_dim)))
    set_heads(owner.v_proj, turn.values(heads_of(owner.v_proj, owner.head_dim)))


def turn_reader(attention: Attention, turn: Turn) -> None:
    """Change queries and output so that `attention` computes with turned keys and values what it did with its own."""
    d, n_kv = attention.head_dim, len(turn.order)
    q = heads_of(attention.q_proj, d)  # H, D, inputs
    of_kv = q.unflatten(0, (n_kv, -1))[turn.order]  # G, H/G, D, inputs
    pairs = turn.pairs.to(q.device)[:, None, :, None]
    set_heads(attention.q_proj, to_channels(to_pairs(of_kv) * pairs).to(q.dtype).flatten(0, 1))
    o = attention.o_proj.weight.detach().unflatten(1, (n_kv, -1, d))[:, turn.order]  # d_model, G, H/G, D
    mapped = torch.einsum("mgrd,ged->mgre", o.double(), turn.maps.to(o.device))
    with torch.no_grad():
        attention.o_proj.weight.copy_(mapped.flatten(1))
