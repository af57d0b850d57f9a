"""Latents for MLA from a layer's keys and values: partial RoPE, then a joint low-rank form of the rest.

A latent layer has one rotated key head for all query heads, and a latent c from which the other key channels and the
values of every head are expanded. Following MHA2MLA (arXiv 2502.14837) and TransMLA (arXiv 2502.07864):

1. R/2 of the D/2 rotated pairs keep their position. Within a pair the G key heads, complex numbers z_g, are replaced
   by their principal component z = uᴴ z, so that z_g ≈ u_g z; query heads of group g take conj(u_g) q. Complex
   combinations commute with RoPE, so this is exact if the heads of a pair are multiples of one another: always for
   G = 1.
2. The rest of the keys is treated as if it had no position: the other pairs, and the remainders of kept pairs as far as
   qk_nope_head_dim has room.
3. It is stacked with the values, both scaled to the same mean square, and the stack M x of a layer's input is replaced
   by U (Uᵀ M) x with the kv_lora_rank principal directions of M C Mᵀ. C is the second moment of x on the text, or
   without a text the identity. Latents are scaled to mean square 1.

If several layers read one latent, its owner's input y replaces the input x of every other layer: x ≈ R y by least
squares on the text, so that all their keys and values are projections of y. The steps above then take the heads of all
these layers together: one RoPE key, one latent, and up-projections for each layer.

The latent has an RMSNorm, which no linear projection reproduces: c is wrong by its own size, token by token, and step 3
makes that size 1 on average. If kv_lora_rank is at least d_model, the latent is the layer's normalised input itself, of
constant size, and steps 2 and 3 lose nothing. The conversion is then exact with all pairs kept and one KV head; with
more KV heads the remainders of kept pairs lose their position. With norms on queries and keys, each head's norm is
replaced by its gain and one factor, the best on the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cllm.config.uptraining import KeepPairs
from cllm.errors import UserError
from cllm.model.attention import Attention, LatentAttention
from cllm.model.decoder import Decoder
from cllm.model.sources import OwnKV, OwnLatent
from cllm.plan.plan import Latent
from cllm.uptrain.calibrate import Batches, observe
from cllm.uptrain.decoder import TracedDecoder, attention_of, block_of
from cllm.uptrain.heads import heads_of, to_channels, to_pairs
from cllm.uptrain.ridge import solve


def kept_pairs(head_dim: int, rope_dim: int, keep: KeepPairs) -> list[int]:
    """The pairs of a head that get the student's `rope_dim` / 2 frequencies, in order: pair 0 has the highest.

    Other choices, such as the lowest or the largest by norm, are not possible: one theta sets all frequencies of RoPE.

    Raises:
        UserError: if a head has fewer channels, or `uniform` would need a fractional step between pairs.
    """
    if rope_dim > head_dim:
        raise UserError(f"model.kv: qk_rope_head_dim is {rope_dim}; allowed with init.method svd: up to {head_dim}")
    if keep == "uniform" and head_dim % rope_dim:
        raise UserError(
            f"init.rope_pairs is uniform, but qk_rope_head_dim {rope_dim} does not divide head_dim {head_dim}; "
            "allowed: high, or a divisor"
        )
    step = head_dim // rope_dim if keep == "uniform" else 1
    return [j * step for j in range(rope_dim // 2)]


def check_latents(student: Decoder, teacher: Decoder, *, calibrated: bool) -> None:
    """Refuse latents that cannot be computed from the teacher.

    Raises:
        UserError: naming the layer or the key and what is allowed.
    """
    d = teacher.config.resolved_head_dim
    for layer, latent in student.plan.reading(Latent).items():
        unkept = d - latent.qk_rope_head_dim
        for wrong, message in (
            (
                latent.blocks > 1,
                f"a latent has {latent.blocks} blocks; allowed: 1, since the softmax over each block is not a part of "
                "the teacher's softmax",
            ),
            (latent.q_lora_rank is not None, f"q_lora_rank is {latent.q_lora_rank}; allowed: null"),
            (latent.v_head_dim < d, f"v_head_dim is {latent.v_head_dim}; allowed: {d} or more"),
            (
                latent.qk_nope_head_dim < unkept,
                f"qk_nope_head_dim is {latent.qk_nope_head_dim}; allowed with qk_rope_head_dim "
                f"{latent.qk_rope_head_dim}: {unkept} or more",
            ),
            (teacher.config.q_bias or teacher.config.kv_bias, "latents have no biases, and the teacher has"),
        ):
            if wrong:
                raise UserError(f"model.kv with init.method svd: layer {layer}: {message}")
    shared = any(student.plan.layers[i].own is None for i in student.plan.reading(Latent))
    if (teacher.config.qk_norm or shared) and not calibrated:
        what = "latents that several layers read" if shared else "models with qk_norm"
        raise UserError(f"init.calibration_sequences is 0; {what} need 1 or more with init.method svd")


class _Moments:
    """Statistics of one layer on the text: second moments of its input and of the sizes of its query and key heads, and
    for a layer that reads another's latent the products of that layer's input with its own."""

    def __init__(self) -> None:
        self.inputs: Tensor | float = 0.0
        self.cross = torch.zeros(())
        self.sizes: dict[str, list[Tensor]] = {}

    def add(self, x: Tensor, attention: Attention, of_owner: Tensor | None) -> None:
        """Add a batch: `x` (N, d_model), the normalised input of `attention`, and that of the layer that it reads."""
        wide = x.double()
        self.inputs = self.inputs + wide.T @ wide
        if of_owner is not None:
            self.cross = self.cross.to(x.device) + of_owner.double().T @ wide
        if attention.q_norm is None:
            return
        assert isinstance(attention.owner, OwnKV)
        for name, linear in (("q", attention.q_proj), ("k", attention.owner.k_proj)):
            rms = linear(x).unflatten(-1, (-1, attention.head_dim)).double().square().mean(-1).sqrt()  # N, heads
            more = [rms.sum(0), rms.square().sum(0)]
            before = self.sizes.get(name, [torch.zeros_like(t) for t in more])
            self.sizes[name] = [a + b for a, b in zip(before, more, strict=True)]

    def factor(self, name: str) -> Tensor:
        """(heads,): the factor s that replaces a head's norm, with the least Σ |k / rms(k) - s k|²."""
        first, second = self.sizes[name]
        return first / second.clamp(min=1e-30)


@torch.no_grad()
def make_latents(
    student: Decoder, teacher: TracedDecoder, batches: Batches, *, keep: KeepPairs, ridge: float = 1e-4
) -> dict[str, float]:
    """Set the weights of every latent layer of `student` from the teacher's keys, values, queries and outputs.

    Returns:
        For each layer that owns a latent, as `layer 5 latent`, the fraction of the mean square of keys without position
        and values that the low rank loses; for each that reads another's, as `layer 6 input`, the fraction of the mean
        square of its keys and values that no linear map of the owner's input gives.
    """
    plan = student.plan
    groups = {i: plan.readers("keys")[i] for i in plan.owners if isinstance(plan.owned(i), Latent)}
    moments = {i: _Moments() for layers in groups.values() for i in layers}
    for seen in observe(teacher, batches) if groups and batches else ():
        for owner, layers in groups.items():
            for i in layers:
                moments[i].add(seen.normed(i), attention_of(teacher, i), seen.normed(owner) if i != owner else None)
    errors: dict[str, float] = {}
    for owner, layers in groups.items():
        heads = [_heads(student, teacher, i, moments[i]) for i in layers]
        for i, of_layer in zip(layers, heads, strict=True):
            if i != owner:
                lost = of_layer.move(moments[i], moments[owner], _gain(teacher, i), _gain(teacher, owner), ridge)
                errors[f"layer {i} input"] = lost
        errors[f"layer {owner} latent"] = _group(student, teacher, owner, layers, heads, moments[owner], keep)
    return errors


def _gain(teacher: Decoder, i: int) -> Tensor:
    return block_of(teacher, i).attention_norm.weight.double()


@dataclass(slots=True)
class _Heads:
    """Projections (heads, D, d_model) fp64 of one layer of the teacher, with norms on heads as factors."""

    q: Tensor
    k: Tensor
    v: Tensor

    def move(self, own: _Moments, owner: _Moments, gain: Tensor, owner_gain: Tensor, ridge: float) -> float:
        """Let keys and values be projected from the input y of the owner's layer instead of the layer's own input x.

        x is replaced by R y with the least squared error, R = (Σ x yᵀ) (Σ y yᵀ)⁻¹, and a penalty on the distance from
        the R that replaces the gain of one norm by that of the other.

        Returns:
            The fraction of the mean square of keys and values that is lost.
        """
        assert isinstance(own.inputs, Tensor)
        assert isinstance(owner.inputs, Tensor)
        usable = owner_gain.abs() > 1e-4
        start = torch.diag(torch.where(usable, gain / torch.where(usable, owner_gain, 1.0), 0.0))
        moved = solve(owner.inputs, own.cross, start, ridge).T  # R
        stack = torch.cat((self.k.flatten(0, 1), self.v.flatten(0, 1)))
        unexplained = own.inputs - moved @ own.cross - own.cross.T @ moved.T + moved @ owner.inputs @ moved.T
        lost = ((stack @ unexplained) * stack).sum() / ((stack @ own.inputs) * stack).sum().clamp(min=1e-30)
        self.k, self.v = self.k @ moved, self.v @ moved
        return float(lost)


def _heads(student: Decoder, teacher: Decoder, i: int, moments: _Moments) -> _Heads:
    mine, theirs = block_of(student, i).attention, attention_of(teacher, i)
    assert isinstance(mine, LatentAttention)
    assert isinstance(theirs.owner, OwnKV)
    d, latent = theirs.head_dim, mine.latent
    if theirs.owner.norm is not None:
        raise UserError(f"init.method svd: layer {i} of the teacher has a kv_norm; allowed: none")
    q, k, v = (heads_of(m, d).double() for m in (theirs.q_proj, theirs.owner.k_proj, theirs.owner.v_proj))
    if theirs.q_norm is not None and theirs.owner.k_norm is not None:
        q = q * theirs.q_norm.weight[:, None] * moments.factor("q")[:, None, None]
        k = k * theirs.owner.k_norm.weight[:, None] * moments.factor("k")[:, None, None]
    return _Heads(q * math.sqrt((latent.qk_nope_head_dim + latent.qk_rope_head_dim) / d), k, v)  # scale of scores


def _group(
    student: Decoder,
    teacher: Decoder,
    owner: int,
    layers: Sequence[int],
    heads: Sequence[_Heads],
    moments: _Moments,
    keep: KeepPairs,
) -> float:
    """Set the weights of `layers`, which read the latent of `owner`, from `heads` that project that layer's input."""
    mine = block_of(student, owner).attention
    assert isinstance(mine, LatentAttention)
    assert isinstance(mine.owner, OwnLatent)
    latent, d, gain = mine.latent, teacher.config.resolved_head_dim, _gain(teacher, owner)
    second = moments.inputs if isinstance(moments.inputs, Tensor) else torch.diag(gain.square())
    k, v = (torch.cat([getattr(of_layer, name) for of_layer in heads]) for name in ("k", "v"))
    n_kv = len(heads[0].k)

    pairs = kept_pairs(d, latent.qk_rope_head_dim, keep)
    z = to_pairs(k)  # G, P, d_model, where G counts the KV heads of all layers
    kept = z[:, pairs]
    gram = torch.einsum("gpm,mn,hpn->pgh", kept, second.to(kept.dtype), kept.conj())
    u = torch.linalg.eigh(gram)[1][..., -1].T  # G, R/2
    rope_key = torch.einsum("gp,gpm->pm", u.conj(), kept)
    left = z.clone()
    left[:, pairs] = kept - u[..., None] * rope_key

    others = [p for p in range(d // 2) if p not in set(pairs)] + pairs
    others = others[: latent.qk_nope_head_dim // 2]
    nope_key = _padded(to_channels(left[:, others]), latent.qk_nope_head_dim)  # G, nope, d_model
    down, up_k, up_v, lost = _low_rank(nope_key, v, second, gain, latent.kv_lora_rank)
    mine.owner.down_proj.weight.copy_(torch.cat((down, to_channels(rope_key))))
    mine.owner.norm.weight.fill_(1.0)
    up = torch.cat((up_k, _padded(up_v, latent.v_head_dim)), dim=1)  # G, nope + value, rank
    for i, of_layer, phases, of_up in zip(layers, heads, u.split(n_kv), up.split(n_kv), strict=True):
        _set_reader(student, teacher, i, of_layer.q, phases, of_up, pairs, others)
    return lost


def _set_reader(
    student: Decoder,
    teacher: Decoder,
    i: int,
    q: Tensor,
    phases: Tensor,
    up: Tensor,
    pairs: Sequence[int],
    others: Sequence[int],
) -> None:
    """Set queries, up-projections (G, nope + value, rank) and outputs of layer `i`."""
    mine, theirs = block_of(student, i).attention, attention_of(teacher, i)
    assert isinstance(mine, LatentAttention)
    latent, n_heads, n_kv = mine.latent, len(q), len(phases)
    w = to_pairs(q).unflatten(0, (n_kv, -1))  # G, H/G, P, d_model
    rope_query = w[:, :, pairs] * phases.conj()[:, None, :, None]
    nope_query = _padded(to_channels(w[:, :, others].flatten(0, 1)), latent.qk_nope_head_dim)
    mine.q_proj.weight.copy_(torch.cat((nope_query, to_channels(rope_query.flatten(0, 1))), dim=1).flatten(0, 1))
    assert isinstance(mine.kv_up_proj, nn.Linear)
    mine.kv_up_proj.weight.copy_(up.repeat_interleave(n_heads // n_kv, dim=0).flatten(0, 1))
    columns = theirs.o_proj.weight.unflatten(1, (n_heads, theirs.head_dim)).transpose(0, 1).transpose(1, 2)
    mine.o_proj.weight.copy_(_padded(columns, latent.v_head_dim).permute(2, 0, 1).flatten(1))  # from H, value, d_model


def _padded(heads: Tensor, channels: int) -> Tensor:
    """`heads` (heads, ..., inputs) padded with zeros to (heads, channels, inputs)."""
    return torch.cat((heads, heads.new_zeros(len(heads), channels - heads.shape[1], heads.shape[2])), dim=1)


def _low_rank(k: Tensor, v: Tensor, second: Tensor, gain: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Replace key and value projections by a joint one of low rank.

    Args:
        k, v: (G, channels, d_model) fp64.
        second: (d_model, d_model), the second moment of the inputs.
        gain: (d_model,), the gain of the norm before them.
        rank: of the latent.

    Returns:
        (rank, d_model) down, (G, channels, rank) up for keys and for values, and the fraction of the mean square that
        is lost.
    """
    stack = torch.cat((k.flatten(0, 1), v.flatten(0, 1)))
    n_keys, width = k.shape[0] * k.shape[1], stack.shape[1]

    def split(up: Tensor) -> tuple[Tensor, Tensor]:
        return up[:n_keys].unflatten(0, k.shape[:2]), up[n_keys:].unflatten(0, v.shape[:2])

    if rank >= width and bool((gain.abs() > 1e-4).all()):  # x / gain has mean square 1
        down = torch.zeros(rank, width, dtype=stack.dtype, device=stack.device)
        down[:width] = torch.diag(1 / gain)
        up = torch.zeros(len(stack), rank, dtype=stack.dtype, device=stack.device)
        up[:, :width] = stack * gain * math.sqrt(width / rank)
        return down, *split(up), 0.0
    squares = ((stack @ second) * stack).sum(-1)
    balance = torch.ones_like(squares)
    balance[:n_keys] = (squares[n_keys:].sum() / squares[:n_keys].sum().clamp(min=1e-30)).sqrt().clamp(1e-3, 1e3)
    even = stack * balance[:, None]
    values, vectors = torch.linalg.eigh(even @ second @ even.T)
    order = values.argsort(descending=True)
    used = [n for n in order.tolist()[:rank] if values[n] > values.max() * 1e-12]
    tokens = _tokens(second, gain)
    # Principal components of mean square 1 each. Missing ones are zeros, and the others are larger in return.
    size = (values[used] / tokens * len(used) / rank).sqrt()
    down = stack.new_zeros(rank, width)
    down[: len(used)] = (vectors[:, used] / size).T @ even
    up = stack.new_zeros(len(stack), rank)
    up[:, : len(used)] = vectors[:, used] * size / balance[:, None]
    lost = 1 - values[used].sum() / values.clamp(min=0).sum()
    return down, *split(up), max(float(lost), 0.0)


def _tokens(second: Tensor, gain: Tensor) -> Tensor:
    """The number of tokens in the sum `second`: inputs are normalised, so x / gain has a mean square of 1."""
    usable = gain.abs() > 1e-4
    return (second.diagonal()[usable] / gain[usable].square()).mean()
