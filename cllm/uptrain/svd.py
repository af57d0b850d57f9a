"""Latents for MLA from a layer's keys and values: partial RoPE, then a joint low-rank form of what is left.

A latent layer has one rotated key head for all query heads and a latent c from which every head's other channels and
values are expanded. Following MHA2MLA (arXiv 2502.14837) and TransMLA (arXiv 2502.07864):

1. R/2 of the D/2 rotated pairs keep their position. Within a pair the G key heads, complex numbers z_g, are replaced
   by their principal component z = uᴴ z, so that z_g ≈ u_g z; query heads of group g take conj(u_g) q. Complex
   combinations commute with RoPE, so this is exact where the heads of a pair are multiples of one another: always for
   G = 1.
2. What is left of the keys (other pairs, and the remainders of kept ones as far as qk_nope_head_dim has room) counts as
   if it had no position.
3. It is stacked with the values, both brought to the same mean square, and the stack M x of a layer's input is replaced
   by U (Uᵀ M) x with the kv_lora_rank principal directions of M C Mᵀ, C the second moment of x on the text or, without
   a text, of the identity. Latents are scaled to mean square 1.

The latent has an RMSNorm, which no linear projection has: c is off by its own size, token by token, which step 3 makes
1 on average. Where kv_lora_rank is at least d_model the latent is the layer's normalised input itself, whose size is
constant, and steps 2 and 3 lose nothing. So the whole is exact for kv_lora_rank >= d_model, all pairs kept and one KV
head; with more KV heads remainders of kept pairs lose their position. With norms on queries and keys, each head's norm
is replaced by its gain and one factor, the best on the text.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cllm.config.uptraining import KeepPairs
from cllm.errors import UserError
from cllm.model.attention import Attention, LatentAttention
from cllm.model.decoder import Decoder
from cllm.model.sources import OwnKV, OwnLatent
from cllm.plan.plan import Latent
from cllm.uptrain.calibrate import Batches, observe
from cllm.uptrain.decoder import TracedDecoder, attention_of, block_of
from cllm.uptrain.heads import heads_of, to_channels, to_pairs


def kept_pairs(head_dim: int, rope_dim: int, keep: KeepPairs) -> list[int]:
    """The pairs of a head that get the student's `rope_dim` / 2 frequencies, in their order: pair 0 turns fastest.

    Other choices (the lowest, or the largest by norm) have no place here: RoPE's frequencies follow from one theta.

    Raises:
        UserError: for more channels than a head has, and where evenly spaced pairs do not come out even.
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
    """Refuse latents that cannot be made.

    Raises:
        UserError: naming the layer or the key and what is allowed.
    """
    d = teacher.config.resolved_head_dim
    for i, latent in student.plan.reading(Latent).items():
        unkept = d - latent.qk_rope_head_dim
        for wrong, message in (
            (student.plan.layers[i].own is None, f"layer {i} reads another's latent; allowed: factor 1"),
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
                raise UserError(f"model.kv with init.method svd: {message}")
    if teacher.config.qk_norm and not calibrated:
        raise UserError("init.calibration_sequences is 0; models with qk_norm need 1 or more with init.method svd")


class _Moments:
    """What the text says of one layer: the second moment of its input, and of the sizes of its query and key heads."""

    def __init__(self) -> None:
        self.inputs: Tensor | float = 0.0
        self.sizes: dict[str, list[Tensor]] = {}

    def add(self, x: Tensor, attention: Attention) -> None:
        """`x` (N, d_model)."""
        wide = x.double()
        self.inputs = self.inputs + wide.T @ wide
        if attention.q_norm is None:
            return
        assert isinstance(attention.owner, OwnKV)
        for name, linear in (("q", attention.q_proj), ("k", attention.owner.k_proj)):
            rms = linear(x).unflatten(-1, (-1, attention.head_dim)).double().square().mean(-1).sqrt()  # N, heads
            more = [rms.sum(0), rms.square().sum(0)]
            before = self.sizes.get(name, [torch.zeros_like(t) for t in more])
            self.sizes[name] = [a + b for a, b in zip(before, more, strict=True)]

    def factor(self, name: str) -> Tensor:
        """(heads,): 1 / size of a head on average, s with the least Σ |k / rms(k) - s k|²."""
        first, second = self.sizes[name]
        return first / second.clamp(min=1e-30)


@torch.no_grad()
def make_latents(student: Decoder, teacher: TracedDecoder, batches: Batches, *, keep: KeepPairs) -> dict[str, float]:
    """Fill every latent layer of `student` from the teacher's keys, values, queries and outputs.

    Returns:
        For each layer, as `layer 5 latent`, the share of mean square of keys without position and values that the rank
        leaves out.
    """
    layers = list(student.plan.reading(Latent))
    moments = {i: _Moments() for i in layers}
    for seen in observe(teacher, batches) if layers and batches else ():
        for i in layers:
            moments[i].add(seen.normed(i), attention_of(teacher, i))
    return {f"layer {i} latent": _layer(student, teacher, i, moments[i], keep) for i in layers}


def _layer(student: Decoder, teacher: Decoder, i: int, moments: _Moments, keep: KeepPairs) -> float:
    mine, theirs = block_of(student, i).attention, attention_of(teacher, i)
    assert isinstance(mine, LatentAttention)
    assert isinstance(mine.owner, OwnLatent)
    assert isinstance(theirs.owner, OwnKV)
    latent, d = mine.latent, theirs.head_dim
    gain = block_of(teacher, i).attention_norm.weight.double()
    if theirs.owner.norm is not None:
        raise UserError(f"init.method svd: layer {i} of the teacher has a kv_norm; allowed: none")
    q, k, v = (heads_of(m, d).double() for m in (theirs.q_proj, theirs.owner.k_proj, theirs.owner.v_proj))
    if theirs.q_norm is not None and theirs.owner.k_norm is not None:
        q = q * theirs.q_norm.weight[:, None] * moments.factor("q")[:, None, None]
        k = k * theirs.owner.k_norm.weight[:, None] * moments.factor("k")[:, None, None]
    second = moments.inputs if isinstance(moments.inputs, Tensor) else torch.diag(gain.square())
    n_kv, n_heads = len(k), len(q)
    q = q * math.sqrt((latent.qk_nope_head_dim + latent.qk_rope_head_dim) / d)  # the other scale of scores

    pairs = kept_pairs(d, latent.qk_rope_head_dim, keep)
    z, w = to_pairs(k), to_pairs(q).unflatten(0, (n_kv, -1))  # G, P, d_model and G, H/G, P, d_model
    kept = z[:, pairs]
    gram = torch.einsum("gpm,mn,hpn->pgh", kept, second.to(kept.dtype), kept.conj())
    u = torch.linalg.eigh(gram)[1][..., -1].T  # G, R/2
    rope_key = torch.einsum("gp,gpm->pm", u.conj(), kept)
    rope_query = w[:, :, pairs] * u.conj()[:, None, :, None]
    left = z.clone()
    left[:, pairs] = kept - u[..., None] * rope_key

    others = [p for p in range(d // 2) if p not in set(pairs)] + pairs
    others = others[: latent.qk_nope_head_dim // 2]
    nope_key = _padded(to_channels(left[:, others]), latent.qk_nope_head_dim)  # G, nope, d_model
    nope_query = _padded(to_channels(w[:, :, others].flatten(0, 1)), latent.qk_nope_head_dim)
    down, up_k, up_v, lost = _low_rank(nope_key, v, second, gain, latent.kv_lora_rank)

    mine.owner.down_proj.weight.copy_(torch.cat((down, to_channels(rope_key))))
    mine.owner.norm.weight.fill_(1.0)
    mine.q_proj.weight.copy_(torch.cat((nope_query, to_channels(rope_query.flatten(0, 1))), dim=1).flatten(0, 1))
    up = torch.cat((up_k, _padded(up_v, latent.v_head_dim)), dim=1)  # G, nope + value, rank
    mine.kv_up_proj.weight.copy_(up.repeat_interleave(n_heads // n_kv, dim=0).flatten(0, 1))
    columns = theirs.o_proj.weight.unflatten(1, (n_heads, d)).transpose(0, 1).transpose(1, 2)  # H, D, d_model
    mine.o_proj.weight.copy_(_padded(columns, latent.v_head_dim).permute(2, 0, 1).flatten(1))
    return lost


def _padded(heads: Tensor, channels: int) -> Tensor:
    """(heads, channels, inputs), with zeros after the channels there are."""
    return torch.cat((heads, heads.new_zeros(len(heads), channels - heads.shape[1], heads.shape[2])), dim=1)


def _low_rank(k: Tensor, v: Tensor, second: Tensor, gain: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """(rank, d_model) down, (G, ..., rank) up for keys and for values, and the share of mean square that is lost.

    Args:
        k, v: (G, channels, d_model) fp64.
        second: (d_model, d_model), of the inputs.
        gain: (d_model,), of the norm that made the inputs.
        rank: of the latent.
    """
    stack = torch.cat((k.flatten(0, 1), v.flatten(0, 1)))
    n_keys, width = k.shape[0] * k.shape[1], stack.shape[1]

    def split(up: Tensor) -> tuple[Tensor, Tensor]:
        return up[:n_keys].unflatten(0, k.shape[:2]), up[n_keys:].unflatten(0, v.shape[:2])

    if rank >= width and bool((gain.abs() > 1e-4).all()):  # of constant size: x / gain has mean square 1
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
    # Principal components of mean square 1 each; components that do not exist are zeros, and the others make up for it.
    size = (values[used] / tokens * len(used) / rank).sqrt()
    down = stack.new_zeros(rank, width)
    down[: len(used)] = (vectors[:, used] / size).T @ even
    up = stack.new_zeros(len(stack), rank)
    up[:, : len(used)] = vectors[:, used] * size / balance[:, None]
    lost = 1 - values[used].sum() / values.clamp(min=0).sum()
    return down, *split(up), max(float(lost), 0.0)


def _tokens(second: Tensor, gain: Tensor) -> Tensor:
    """How many tokens `second` was summed over: inputs are the norm's, so x / gain has a mean square of 1."""
    usable = gain.abs() > 1e-4
    return (second.diagonal()[usable] / gain[usable].square()).mean()
