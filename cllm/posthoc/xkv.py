"""xKV (arXiv 2503.18893): one SVD for the keys, and one for the values, of several layers at once."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Codable, Code, Exact, Part, TensorCoder
from cllm.posthoc.landmarks import Landmarks, landmark_bytes, make_landmarks
from cllm.posthoc.lowrank import (
    Algorithm,
    LowRank,
    Products,
    energy_rank,
    multiply,
    ranks_for_budget,
    right_vectors,
)
from cllm.posthoc.streams import side_by_side


class XKV(Codable):
    """Cross-layer SVD (xKV): for a group of G layers, keys before RoPE and values each,

        [X_1, ..., X_G] ≈ A [B_1, ..., B_G],    A (n, r) shared over the group, B_l (r, width) of each layer

    with the r leading singular vectors. Ranks are those of a group: xKV-4 at 8x of Llama-3.1-8B is
    `xkv:group=4,rank_k=384,rank_v=576`. Exactly one of ranks, `ratio` and `energy` chooses them.
    """

    name: ClassVar[str] = "xkv"
    keys_before_rope: ClassVar[bool] = True

    group: int = Field(4, ge=1)
    """Slots that share a basis, neighbours; the last group may be short."""
    group_k: int | None = Field(None, ge=1)
    """For keys and latents, where it differs."""
    group_v: int | None = Field(None, ge=1)
    """For values, where it differs."""
    rank_k: int | None = Field(None, ge=1)
    """Rank of a group's keys, or latents."""
    rank_v: int | None = Field(None, ge=1)
    """Rank of a group's values."""
    ratio: float | None = Field(None, ge=1)
    """Bytes of the whole cache to those held after, at this length and before a quantiser after +: windows, states,
    RoPE keys of latents, sinks and landmarks count, and factors make up for them. Ranks of keys and values are 1 : 1.5,
    as in the paper. 1 keeps every tensor as it is."""
    energy: float | None = Field(None, gt=0, le=1)
    """The share of Σσ² that every group keeps, in every sequence."""
    svd: Algorithm = "gram"
    """`exact`, `gram`, `random` or `power`, from slow to fast; see `lowrank.py`."""
    products: Products = "fp32"
    """`fp32`, `tf32` or `bf16`: what products with the cached tensors are rounded to, in `svd=random` and
    `svd=power` and for A."""
    select: int | None = Field(None, ge=1)
    """Compressed tokens that a pass of one token reads, for each KV head, by `landmarks.py`; null: all."""
    chunk: int = Field(8, ge=1)
    """Tokens that are chosen together, by their mean key."""
    outliers: int | None = Field(None, ge=0)
    """Chunks of each KV head that are always read, their keys kept exact; null: 24 for every 1024 of `select`, as in
    ShadowKV."""
    local: int = Field(4, ge=0)
    """Last full chunks, which are always read like outliers, and with them what is left of a chunk after."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        ranks = self.rank_k is not None or self.rank_v is not None
        if ranks + (self.ratio is not None) + (self.energy is not None) != 1:
            raise ValueError("give exactly one of ranks (rank_k, rank_v), ratio and energy")
        fast = self.svd in ("random", "power")
        if self.energy is not None and fast:
            raise ValueError(f"energy needs all singular values, which svd={self.svd} has not; allowed: exact, gram")
        if self.products != "fp32" and not fast:
            raise ValueError(
                f"products={self.products} goes with svd=random and svd=power; svd={self.svd} is made in fp64"
            )
        if self.select is None and (alone := sorted({"chunk", "outliers", "local"} & self.model_fields_set)):
            raise ValueError(f"{alone[0]} goes with select, which is not given")
        if self.select is not None and self.select % self.chunk:
            raise ValueError(f"select={self.select} is no multiple of chunk={self.chunk}")
        if self.select is not None and self.ratio == 1:
            raise ValueError("select chooses from factors, which ratio=1 has not")
        if self.select is not None and self.recompress is not None:
            raise ValueError(
                f"recompress={self.recompress}: select={self.select} keeps exact keys, which are gone when tokens are "
                "compressed again; allowed: one of the two"
            )
        return self

    def coded_by(self, coder: TensorCoder) -> Self:
        if self.ratio == 1:
            raise ValueError("ratio=1 keeps every tensor as it is and has no factors to code; allowed: above 1")
        return super().coded_by(coder)

    def encode(self, keys: Part, values: Part | None) -> tuple[list[Code | None], list[Code | None]]:
        if self.select is not None and values is None:
            raise UserError(f"{self.name}: select={self.select}: the slots are latents; allowed: keys and values")
        groups_k = keys.groups(self.group_k or self.group)
        groups_v = values.groups(self.group_v or self.group) if values else []
        if self.ratio == 1:
            return [None] * len(keys.slots), [None] * len(keys.slots)
        ranks_k, ranks_v = self._ranks(keys, groups_k, values, groups_v)
        codes_k: list[Code | None] = [None] * len(keys.slots)
        codes_v: list[Code | None] = [None] * len(keys.slots)
        jobs = [(keys, group, rank, codes_k) for group, rank in zip(groups_k, ranks_k, strict=True)]
        if values is not None:
            jobs += [(values, group, rank, codes_v) for group, rank in zip(groups_v, ranks_v, strict=True)]
        side_by_side([partial(self._code, *job) for job in jobs], keys.data[0].device)
        return codes_k, codes_v

    def check_all_sinks(self, tokens: int) -> None:
        if self.ratio is not None and self.ratio > 1:
            raise UserError(
                f"{self.name}: ratio={self.ratio:g}: at {tokens} tokens sinks={self.sinks} leave nothing to compress; "
                f"allowed: ratio=1, fewer sinks, or more tokens"
            )

    @property
    def chooses(self) -> bool:
        return self.select is not None

    def landmarks(self, k: Tensor, text: Tensor | None) -> Landmarks | None:
        if self.select is None:
            return None
        return make_landmarks(k, text, budget=self.select, **self._chunks(self.select))

    def _chunks(self, select: int) -> dict[str, int]:
        """How chunks are made, and how many of them are always read."""
        outliers = 24 * select // 1024 if self.outliers is None else self.outliers
        return {"chunk": self.chunk, "outliers": outliers, "local": self.local}

    def _ranks(
        self, keys: Part, groups_k: list[list[int]], values: Part | None, groups_v: list[list[int]]
    ) -> tuple[list[int | None], list[int | None]]:
        """The rank of each group; None: as many as `energy` needs."""
        if self.energy is not None:
            return [None] * len(groups_k), [None] * len(groups_v)
        sizes_k, sizes_v = _sizes(keys, groups_k), _sizes(values, groups_v) if values else []
        tokens = keys.data[0].shape[1]
        if self.ratio is not None:
            return self._ranks_for_ratio(self.ratio, keys, sizes_k, sizes_v)
        if self.rank_k is None or (self.rank_v is None and values is not None):
            raise UserError(f"{self.name}: give rank_k and rank_v, one is missing")
        for option, rank, sizes in (("rank_k", self.rank_k, sizes_k), ("rank_v", self.rank_v, sizes_v)):
            for layers, width in sizes:
                if rank is not None and rank > min(keys.tokens, layers * width):
                    raise UserError(
                        f"{self.name}: {option}={rank}: {layers} slots of {width} channels have {keys.tokens} tokens; "
                        f"allowed: 1 to {min(keys.tokens, layers * width)}"
                    )
        # Tokens without sinks have no higher rank than there are of them.
        ranks = [None if rank is None else min(rank, tokens) for rank in (self.rank_k, self.rank_v)]
        return [ranks[0]] * len(groups_k), [ranks[1]] * len(groups_v)

    def _ranks_for_ratio(
        self, ratio: float, keys: Part, sizes_k: list[tuple[int, int]], sizes_v: list[tuple[int, int]]
    ) -> tuple[list[int | None], list[int | None]]:
        tokens = keys.data[0].shape[1]
        whole = keys.whole or sum(tokens * n * w for n, w in (*sizes_k, *sizes_v))
        stays = keys.stays
        if self.select is not None:
            size, chunks = keys.dtype.itemsize, self._chunks(self.select)
            stays += sum(landmark_bytes(k.shape, size, **chunks) for k in keys.data) / size
        if stays * ratio >= whole:
            raise UserError(
                f"{self.name}: ratio={ratio:g}: at {keys.tokens} tokens {stays / whole:.0%} of the cache stay as they "
                "are (windows, states, RoPE keys of latents, sinks) or are landmarks; allowed: below "
                f"{whole / stays:.2f}"
            )
        found = ranks_for_budget(whole / ratio - stays, tokens, sizes_k, sizes_v, keys_to_values=1.5)
        if found is None:
            beside = f"and the {stays / whole:.0%} of the cache that stay" if stays else "alone"
            raise UserError(
                f"{self.name}: ratio={ratio:g}: at {keys.tokens} tokens the bases of {max(n for n, _ in sizes_k)} "
                f"slots {beside} exceed it, even at rank 1; allowed: a lower ratio, smaller groups, or more tokens"
            )
        return list(found[0]), list(found[1])

    def _code(self, part: Part, group: list[int], rank: int | None, codes: list[Code | None]) -> None:
        """Write the codes of the slots of `group` into `codes`."""
        # Products in bf16 read half of the bytes, values as they are cached.
        dtype = torch.bfloat16 if self.products == "bf16" else torch.float32
        x = torch.cat([part.flat(i, dtype=dtype) for i in group], dim=-1)  # B, n, layers · width
        vectors, spectrum = right_vectors(x, self.svd, rank, self.products)
        if rank is None:
            assert spectrum is not None
            assert self.energy is not None
            vectors = vectors[..., : energy_rank(spectrum, self.energy)]
        rows = multiply(x, vectors, self.products)  # B, n, r
        # Columns of A differ in size by orders of magnitude, as the keys' channels do: coded like keys.
        a: Code = Exact(rows.to(part.dtype))
        if self._coder is not None:
            a = self._coder.code(rows, "k", part.dtype, (rows.shape[2],))
        width = tuple(part.data[group[0]].shape[2:])
        for i, b in zip(group, vectors.chunk(len(group), dim=1), strict=True):
            codes[i] = LowRank(a, b.to(part.dtype, copy=True).contiguous(), width)


class SVD(XKV):
    """The same for each layer by itself: `xkv` with groups of one."""

    name: ClassVar[str] = "svd"

    group: int = Field(1, ge=1, le=1)
    """1."""


def _sizes(part: Part, groups: list[list[int]]) -> list[tuple[int, int]]:
    """(layers, width) of each group."""
    return [(len(group), part.data[group[0]].flatten(2).shape[2]) for group in groups]
