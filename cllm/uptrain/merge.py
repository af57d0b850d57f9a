"""KV heads of a layer merged into fewer: clusters of similar heads, and the best shared head for each on a text.

Heads are first rewritten in common coordinates, which does not change the layer (heads.py), and only then merged. One
shared head (k, v) takes the place of the g heads (k_h, v_h) of a cluster:

- Keys, for each rotated pair as a complex number: k_h ≈ m_h k with the least Σ_h E|q_h|² E|k_h - m_h k|². With
  z_h = s_h k_h, s_h² = E|q_h|², and the principal eigenvector e of E z z^H: k = e^H z and m_h = e_h / s_h. Queries are
  multiplied by conj(m_h). With norms on queries and keys, channels have gains that a phase would mix: k is the mean.
- Values: v_h ≈ B_h v with the least Σ_h E|O_h (v_h - B_h v)|², where O_h are the columns of o_proj that read head h.
  With F_h = (O_hᵀ O_h)^½, z_h = F_h v_h and the D principal eigenvectors E of E z zᵀ: v = Eᵀ z, B_h = F_h⁻¹ E_h, which
  o_proj takes on.

Clusters have equal sizes. They start as runs of neighbours; two heads are exchanged as long as that raises the share of
the energy of keys and values that pairs of heads in one cluster would keep. Averaging heads without alignment is the
uptraining of GQA (arXiv 2305.13245); aligning them first lowers its loss (arXiv 2412.20677).

Shapes: G KV heads of the teacher, n of the student, g = G / n, D channels, P = D / 2 pairs.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.model.attention import Attention
from cllm.model.decoder import Decoder
from cllm.model.sources import OwnKV
from cllm.uptrain.calibrate import Batches, Observed, observe
from cllm.uptrain.decoder import TracedDecoder, attention_of, owner_of
from cllm.uptrain.heads import heads_of, set_heads, to_channels, to_pairs

_SMALL = 1e-12


@dataclass(slots=True)
class HeadSums:
    """Sums over tokens for the KV heads of one layer, fp64."""

    keys: Tensor
    """(P, G, G) complex: Σ k_g conj(k_h)."""
    values: Tensor
    """(G, D, G, D): Σ v_g v_hᵀ."""
    queries: Tensor
    """(P, G): Σ |q|², over the query heads that read each KV head."""

    @classmethod
    def of(cls, seen: Observed, i: int, attention: Attention, owner: OwnKV) -> HeadSums:
        """The sums of one batch."""
        k, v = seen.slot(i, owner, rotated=False)
        q = attention.q_proj(seen.normed(i)).unflatten(-1, (-1, attention.head_dim))
        q = q if attention.q_norm is None else attention.q_norm(q)
        pairs, v = to_pairs(k), v.double()
        power = to_pairs(q.permute(1, 2, 0)).abs().square().sum(-1)  # H, P
        return cls(
            torch.einsum("gpn,hpn->pgh", pairs, pairs.conj()),
            torch.einsum("gdn,hen->gdhe", v, v),
            power.unflatten(0, (len(k), -1)).sum(1).T,
        )

    def __add__(self, more: HeadSums) -> HeadSums:
        return HeadSums(self.keys + more.keys, self.values + more.values, self.queries + more.queries)

    def cpu(self) -> HeadSums:
        """A copy on the CPU, where matrices of this size are decomposed faster."""
        return HeadSums(self.keys.cpu(), self.values.cpu(), self.queries.cpu())


@dataclass(frozen=True, slots=True)
class Merged:
    """The shared heads of one layer."""

    clusters: list[list[int]]
    """For each shared head the teacher's heads, in the order of the student's query heads."""
    key_weights: Tensor
    """(n, g, P) complex: k = Σ_h weight_h k_h."""
    key_factors: Tensor
    """(n, g, P) complex: k_h ≈ factor_h k."""
    value_weights: Tensor
    """(n, g, D, D): v = Σ_h weight_h v_h."""
    value_maps: Tensor
    """(n, g, D, D): v_h ≈ map_h v."""
    lost: tuple[float, float]
    """The share of the energy of keys, weighted by queries, and of values, weighted by outputs, that is lost."""


def merge(sums: HeadSums, outputs: Tensor, n: int, *, rotate_keys: bool) -> Merged:
    """The best `n` shared heads.

    Args:
        sums: of the layer.
        outputs: (G, D, D) fp64, O_hᵀ O_h.
        n: number of shared heads, which divides G.
        rotate_keys: false with norms on queries and keys.
    """
    groups, d = len(outputs), outputs.shape[-1]
    scale = (sums.queries / sums.queries.mean(1, keepdim=True).clamp(min=_SMALL)).clamp(min=1e-6).sqrt()  # P, G
    keys = sums.keys * scale[:, :, None] * scale[:, None, :]
    power, basis = torch.linalg.eigh(outputs)
    power = power.clamp(min=1e-6 * float(power.max().clamp(min=_SMALL))).sqrt()
    root, inverse = ((basis * p[:, None]) @ basis.mT for p in (power, 1 / power))
    values = torch.einsum("gde,gehf,hif->gdhi", root, sums.values, root)
    clusters = cluster(_affinity(keys, values), n)
    g = groups // n
    key_weights, key_factors = (torch.empty(n, g, d // 2, dtype=torch.complex128) for _ in range(2))
    value_weights, value_maps = (torch.empty(n, g, d, d, dtype=torch.float64) for _ in range(2))
    kept_keys = kept_values = 0.0
    for m, heads in enumerate(clusters):
        of_values = values[heads][:, :, heads].reshape(g * d, g * d)
        energies, vectors = torch.linalg.eigh(of_values)
        kept_values += float(energies[-d:].sum())
        top = vectors[:, -d:].unflatten(0, (g, d))  # g, D, D
        maps = inverse[heads] @ top
        size = maps.square().sum().div(g * d).sqrt()  # values of the teacher's size
        value_weights[m], value_maps[m] = top.mT @ root[heads] * size, maps / size
        of_keys = keys[:, heads][:, :, heads]  # P, g, g
        if not rotate_keys:
            key_weights[m], key_factors[m] = 1 / g, 1
            continue
        squares, directions = torch.linalg.eigh(of_keys)
        kept_keys += float(squares[:, -1].sum())
        first = directions[:, :, -1]  # P, g
        factors = first / scale[:, heads]
        length = factors.abs().square().mean(1, keepdim=True).sqrt()
        key_weights[m], key_factors[m] = (first.conj() * scale[:, heads] * length).T, (factors / length).T
    key_energy = float(keys.diagonal(dim1=1, dim2=2).real.sum())
    value_energy = float(torch.einsum("gdgd->", values))
    lost = (1 - kept_keys / max(key_energy, _SMALL), 1 - kept_values / max(value_energy, _SMALL))
    return Merged(clusters, key_weights, key_factors, value_weights, value_maps, lost)


def _affinity(keys: Tensor, values: Tensor) -> Tensor:
    """(G, G): the shares of the energy of keys and of values that one shared head keeps of two, added."""
    groups, d = values.shape[:2]
    found = torch.zeros(groups, groups, dtype=torch.float64)
    for a, b in itertools.combinations(range(groups), 2):
        of_keys = keys[:, [a, b]][:, :, [a, b]]
        of_values = values[[a, b]][:, :, [a, b]].reshape(2 * d, 2 * d)
        energy = of_keys.diagonal(dim1=1, dim2=2).real.sum().clamp(min=_SMALL)
        kept = torch.linalg.eigvalsh(of_keys)[:, -1].sum() / energy
        kept = kept + torch.linalg.eigvalsh(of_values)[-d:].sum() / of_values.trace().clamp(min=_SMALL)
        found[a, b] = found[b, a] = kept
    return found


def cluster(affinity: Tensor, n: int) -> list[list[int]]:
    """`n` clusters of equal sizes with a large sum of affinities (G, G) within them, by exchanges of two heads."""
    table = affinity.tolist()
    size = len(table) // n
    clusters = [list(range(m * size, (m + 1) * size)) for m in range(n)]

    def gain(a: int, x: int, b: int, y: int) -> float:
        first, second = clusters[a][x], clusters[b][y]
        leave = [h for h in clusters[a] if h != first], [h for h in clusters[b] if h != second]
        after = sum(table[second][h] for h in leave[0]) + sum(table[first][h] for h in leave[1])
        return after - sum(table[first][h] for h in leave[0]) - sum(table[second][h] for h in leave[1])

    while True:
        exchanges = [
            (gain(a, x, b, y), a, x, b, y)
            for a, b in itertools.combinations(range(n), 2)
            for x in range(size)
            for y in range(size)
        ]
        best, a, x, b, y = max(exchanges, default=(0.0, 0, 0, 0, 0))
        if best <= 1e-9:
            return clusters
        clusters[a][x], clusters[b][y] = clusters[b][y], clusters[a][x]


def merged_layers(owners: Mapping[int, OwnKV], teacher: Decoder) -> list[int]:
    """The layers whose projections in `owners` have fewer heads than the teacher's."""
    return [i for i, owner in owners.items() if owner_heads(owner) < owner_heads(owner_of(teacher, i))]


@torch.no_grad()
def merge_heads(
    student: Decoder, teacher: TracedDecoder, owners: Mapping[int, OwnKV], batches: Batches
) -> dict[str, float]:
    """Merge the teacher's KV heads in every layer of `student` with fewer of them.

    Args:
        student: with the teacher's queries and outputs, which are rewritten.
        teacher: evaluates the text.
        owners: projections with the student's number of heads, which are overwritten.
        batches: the text.

    Returns:
        The shares of the energy that are lost, as `layer 5 merged keys`.

    Raises:
        UserError: if no layer has fewer.
    """
    layers = merged_layers(owners, teacher)
    if not layers:
        raise UserError(
            "init.heads is merge, but no layer of model.kv has fewer KV heads than the model that init.from names; "
            "allowed: mean"
        )
    sums: dict[int, HeadSums] = {}
    for seen in observe(teacher, batches):
        for i in layers:
            more = HeadSums.of(seen, i, attention_of(teacher, i), owner_of(teacher, i))
            sums[i] = sums[i] + more if i in sums else more
    lost: dict[str, float] = {}
    for i in layers:
        theirs, attention = owner_of(teacher, i), attention_of(student, i)
        columns = _columns(attention, owner_heads(theirs)).cpu()
        found = merge(
            sums[i].cpu(),
            torch.einsum("mgrd,mgre->gde", columns, columns),
            owner_heads(owners[i]),
            rotate_keys=theirs.k_norm is None,
        )
        _write(found, theirs, owners[i], attention)
        names = (f"layer {i} merged keys", f"layer {i} merged values")
        lost |= dict(zip(names, found.lost, strict=True))
        if theirs.k_norm is not None:
            del lost[names[0]]
    return lost


def owner_heads(owner: OwnKV) -> int:
    """The number of KV heads that an owner projects."""
    return owner.k_proj.out_features // owner.head_dim


def _columns(attention: Attention, groups: int) -> Tensor:
    """o_proj by the KV head that its columns read: (d_model, G, H / G, D) fp64."""
    return attention.o_proj.weight.detach().double().unflatten(1, (groups, -1, attention.head_dim))


def _write(merged: Merged, theirs: OwnKV, owner: OwnKV, attention: Attention) -> None:
    """Set the projections of `owner`, and the queries and the output of `attention`."""
    d, order = theirs.head_dim, torch.tensor(merged.clusters).flatten()
    groups, device = len(order), theirs.k_proj.weight.device
    clusters = order.unflatten(0, (len(merged.clusters), -1)).to(device)
    k, v = (heads_of(linear, d).double() for linear in (theirs.k_proj, theirs.v_proj))  # G, D, inputs
    pairs = torch.einsum("ngp,ngpi->npi", merged.key_weights.to(device), to_pairs(k)[clusters])
    _set(owner.k_proj, to_channels(pairs))
    _set(owner.v_proj, torch.einsum("ngde,ngei->ndi", merged.value_weights.to(device), v[clusters]))
    q = to_pairs(heads_of(attention.q_proj, d)).unflatten(0, (groups, -1))[order.to(device)]  # G, H / G, P, inputs
    factors = merged.key_factors.to(device).flatten(0, 1)[:, None, :, None].conj()
    _set(attention.q_proj, to_channels(q * factors).flatten(0, 1))
    columns = _columns(attention, groups)[:, order.to(device)]
    mapped = torch.einsum("mgrd,gde->mgre", columns, merged.value_maps.to(device).flatten(0, 1))
    attention.o_proj.weight.copy_(mapped.flatten(1))


def _set(linear: nn.Linear, heads: Tensor) -> None:
    set_heads(linear, heads.to(linear.weight.dtype))
