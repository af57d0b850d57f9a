"""xKV (arXiv 2503.18893): one SVD for the keys, and one for the values, of several layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.budget import check_all_sinks
from cllm.posthoc.code import Code, Codes, Exact
from cllm.posthoc.factor_budget import FactorBudget
from cllm.posthoc.factorising import Factorising
from cllm.posthoc.group import Group, alike, as_one_batch, group_sizes
from cllm.posthoc.landmarks import Landmarks, landmark_bytes, make_landmarks, outlier_chunks
from cllm.posthoc.later_rows import absorb_factors
from cllm.posthoc.lowrank import Algorithm, LowRank, Solver, choose_solver, energy_rank, padded
from cllm.posthoc.method import Codable, TensorCoder
from cllm.posthoc.mixed import code_mixed
from cllm.posthoc.parallel import run_in_parallel
from cllm.posthoc.products import Products, multiply
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors
from cllm.posthoc.weighted import Weighted
from cllm.posthoc.weighting import Weights, row_weights


@register(
    "xkv",
    summary="for a group of neighbouring slots one basis over tokens, and factors for each slot",
    sweep=("xkv:group={group},ratio={ratio}", "xkv:group={group},ratio={ratio}+kivi:bits=4,group=32,residual=0"),
)
class XKV(Factorising, Weighted, Codable):
    """Cross-layer SVD (xKV): for a group of G layers, separately for keys before RoPE and for values,

        [X_1, ..., X_G] ≈ A [B_1, ..., B_G],    A (n, r) shared over the group, B_l (r, width) of each layer

    with the r leading singular vectors. A rank is that of a group: xKV-4 at 8x of Llama-3.1-8B is
    `xkv:group=4,rank_k=384,rank_v=576`. Exactly one of ranks, `ratio` and `energy` determines the ranks. `weight`,
    `spread` and `codes` are not in the paper.
    """

    keys_before_rope: ClassVar[bool] = True
    follows_eviction: ClassVar[bool] = True

    group: int = Field(4, ge=1)
    """Neighbouring slots that share a basis; the last group may be smaller."""
    group_k: int | None = Field(None, ge=1)
    """`group` for keys and latents; null: the same."""
    group_v: int | None = Field(None, ge=1)
    """`group` for values; null: the same."""
    rank_k: int | None = Field(None, ge=1)
    """Rank of a group's keys, or latents."""
    rank_v: int | None = Field(None, ge=1)
    """Rank of a group's values."""
    ratio: float | None = Field(None, ge=1)
    """Bytes of the uncompressed cache over bytes of the compressed one, at this length and before a quantiser after +.
    Windows, states, RoPE keys of latents, sinks and landmarks count, so factors are smaller to make up for them. Ranks
    of keys and values are 1 : 1.5, as in the paper. 1 stores every tensor as it is."""
    energy: float | None = Field(None, gt=0, le=1)
    """Share of Σσ² that every group keeps, in every sequence."""
    svd: Literal["auto", Algorithm] = "auto"
    """`exact`, `gram`, `random` or `power`, from slow to fast (`lowrank.py`). `auto`: `power` for a cache in bf16 or
    fp16; `gram` for one in fp32, and with `energy` and `spread`, which need all singular values."""
    products: Products | None = None
    """`fp32`, `tf32` or `bf16`: precision of products with cached tensors, in `svd=random`, `svd=power` and for A.
    null: `fp32`, except with `svd=auto` and a cache in bf16, where `power` has `tf32`."""
    batched: bool | None = None
    """Factorise groups of one shape as one batch; false: on a GPU in parallel streams. null: true with `power` and
    `random` on a GPU."""
    weight: Literal["none", "queries"] = "none"
    """The error that the factors minimise: of keys and values as they are, or `queries`: of attention's output, by the
    prompt's own queries and the output projections (`weighting.py`)."""
    spread: bool = False
    """Share the bytes of `ratio` over all groups, keys and values where they save the most weighted error; otherwise
    all groups of keys have one rank, and all of values another."""
    codes: Literal["none", "mixed"] = "none"
    """`mixed`: columns of A have 8, 4, 2, 1 or 0 bits each, chosen under `ratio`, and B has 8 (`mixed.py`)."""
    select: int | None = Field(None, ge=1)
    """Compressed tokens per KV head that a decode step reads, selected by `landmarks.py`; null: all."""
    chunk: int = Field(8, ge=1)
    """Tokens that are selected together, by their mean key."""
    outliers: int | None = Field(None, ge=0)
    """Chunks of each KV head that are always read, with exact keys; null: 24 for every 1024 of `select`, as in
    ShadowKV."""
    local: int = Field(4, ge=0)
    """Last full chunks that are always read, like outliers, with the rest of a chunk after them."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        ranks = self.rank_k is not None or self.rank_v is not None
        if ranks + (self.ratio is not None) + (self.energy is not None) != 1:
            raise ValueError("give exactly one of ranks (rank_k, rank_v), ratio and energy")
        fast = self.svd in ("random", "power")
        if self.energy is not None and fast:
            raise ValueError(
                f"energy needs all singular values, which svd={self.svd} has not; allowed: auto, exact, gram"
            )
        if self.products not in (None, "fp32") and not fast:
            other = "chooses products itself" if self.svd == "auto" else "is made in fp64"
            raise ValueError(f"products={self.products} goes with svd=random and svd=power; svd={self.svd} {other}")
        if self.spread and (self.ratio is None or self.weight == "none"):
            raise ValueError(
                "spread compares errors of keys and values under one budget; allowed: with ratio and weight=queries"
            )
        if self.spread and fast:
            raise ValueError(
                f"spread needs all singular values, which svd={self.svd} has not; allowed: auto, exact, gram"
            )
        if self.codes != "none" and not self.spread:
            raise ValueError(f"codes={self.codes} shares bits over all columns; allowed: with spread=true")
        if self.select is None and (alone := sorted({"chunk", "outliers", "local"} & self.model_fields_set)):
            raise ValueError(f"{alone[0]} goes with select, which is not given")
        if self.select is not None and self.select % self.chunk:
            raise ValueError(f"select={self.select} is no multiple of chunk={self.chunk}")
        if self.select is not None and self.ratio == 1:
            raise ValueError("select chooses from factors, which ratio=1 has not")
        if self.select is not None and self.every is not None:
            raise ValueError(
                f"every={self.every}: select={self.select} reads the prompt's outliers and last chunks in every step, "
                "and later tokens have neither; allowed: one of the two"
            )
        if self.select is not None and self.recompress is not None:
            raise ValueError(
                f"recompress={self.recompress}: select={self.select} keeps exact keys, which are gone when tokens are "
                "compressed again; allowed: one of the two"
            )
        return self

    def coded_by(self, coder: TensorCoder) -> Self:
        if self.ratio == 1:
            raise ValueError("ratio=1 keeps every tensor as it is and has no factors to code; allowed: above 1")
        if self.codes != "none":
            raise ValueError(f"codes={self.codes} codes the factors already; allowed: one of the two")
        return super().coded_by(coder)

    @property
    def weighting(self) -> str | None:
        return None if self.weight == "none" else f"weight={self.weight}"

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        if self.select is not None and values is None:
            raise UserError(f"{self.name}: select={self.select}: the slots are latents; allowed: keys and values")
        groups_k = keys.groups(self.group_k or self.group)
        groups_v = values.groups(self.group_v or self.group) if values else []
        if self.ratio == 1:
            return [None] * len(keys.slots), [None] * len(keys.slots)
        codes_k: Codes = [None] * len(keys.slots)
        codes_v: Codes = [None] * len(keys.slots)
        weights_k, weights_v = self._weights(keys, values)
        groups = [Group(keys, group, weights_k, codes_k) for group in groups_k]
        if values is not None:
            groups += [Group(values, group, weights_v, codes_v) for group in groups_v]
        if self.codes == "mixed":
            self._in_parallel(self._factor, groups, [None] * len(groups))
            self._choose_widths(keys, groups)
            run_in_parallel([partial(code_mixed, group, self._weighted) for group in groups], keys.data[0].device)
            return codes_k, codes_v
        if self.spread:
            self._in_parallel(self._factor, groups, [None] * len(groups))
            ranks: Sequence[int | None] = self._budget(keys).spread_ranks(groups)
        else:
            ranks_k, ranks_v = self._ranks(keys, groups_k, values, groups_v)
            ranks = [*ranks_k, *ranks_v]
        self._in_parallel(self._code_together, groups, ranks)
        return codes_k, codes_v

    @property
    def adapts_solver(self) -> bool:
        return self.svd == "auto" and self.ratio != 1

    def absorb(
        self, keys: SlotTensors, values: SlotTensors | None, codes: tuple[Sequence[Code], Sequence[Code]]
    ) -> tuple[Codes, Codes]:
        sizes = (self.group_k or self.group, self.group_v or self.group)
        return absorb_factors((keys, values), codes, sizes, self.extended)

    def check_follows_eviction(self) -> None:
        if self.weight != "none":
            raise ValueError(
                f"weight={self.weight} needs the attention of all tokens of the prompt, and some are evicted; allowed: "
                "weight=none"
            )
        if self.select is not None:
            raise ValueError(
                f"select={self.select} selects chunks of tokens that follow one another, and evicted ones leave gaps; "
                "allowed: null"
            )
        if self.ratio == 1:
            raise ValueError("ratio=1 keeps every tensor as it is, as without xkv; allowed: above 1")

    def shared_rows(self, slots: Sequence[int]) -> list[list[int]]:
        sizes = self.group_k or self.group, self.group_v or self.group
        return [list(slots[i : i + size]) for size in sizes for i in range(0, len(slots), size)]

    def check_all_sinks(self, tokens: int) -> None:
        check_all_sinks(self.name, self.ratio, self.sinks, tokens)

    @property
    def selects_tokens(self) -> bool:
        return self.select is not None

    @property
    def chooses_for_batch(self) -> bool:
        return self.energy is not None or self.spread or self.codes == "mixed"

    def landmarks(self, k: Tensor, is_text: Tensor | None) -> Landmarks | None:
        if self.select is None:
            return None
        return make_landmarks(k, is_text, budget=self.select, **self._chunks(self.select))

    def _chunks(self, select: int) -> dict[str, int]:
        """The size of chunks, and how many are always read: arguments of `make_landmarks`."""
        return {"chunk": self.chunk, "outliers": outlier_chunks(self.outliers, select), "local": self.local}

    def _ranks(
        self, keys: SlotTensors, groups_k: list[list[int]], values: SlotTensors | None, groups_v: list[list[int]]
    ) -> tuple[list[int | None], list[int | None]]:
        """The rank of each group; None: as `energy` needs."""
        if self.energy is not None:
            return [None] * len(groups_k), [None] * len(groups_v)
        sizes_k, sizes_v = group_sizes(keys, groups_k), group_sizes(values, groups_v) if values else []
        tokens = keys.data[0].shape[1]
        if self.ratio is not None:
            return self._budget(keys).ranks(sizes_k, sizes_v)
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

    def _budget(self, keys: SlotTensors) -> FactorBudget:
        """The numbers that factors may have for `ratio`."""
        assert self.ratio is not None
        landmarks = 0.0
        if self.select is not None:
            size, chunks = keys.dtype.itemsize, self._chunks(self.select)
            landmarks = sum(landmark_bytes(k.shape, size, **chunks) for k in keys.data) / size
        return FactorBudget(name=self.name, ratio=self.ratio, keys=keys, landmarks=landmarks)

    def _choose_widths(self, keys: SlotTensors, groups: list[Group]) -> None:
        """Set the widths of the columns of all groups, which have been factorised, under `ratio`."""
        kept = []
        for group in groups:
            assert group.vectors is not None
            kept.append(multiply(self._weighted(group), group.vectors, "fp32").square().sum(1).mean(0))
        for group, widths in zip(groups, self._budget(keys).widths(groups, kept), strict=True):
            group.widths = widths

    def _weights(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[dict[int, Weights], dict[int, Weights]]:
        """The weights of errors of every slot's keys and values; none for `weight=none`."""
        if self.weighting is None:
            return {}, {}
        weights = self.error_weights(keys, values)
        return weights.of_keys(), weights.of_values()

    def _solver(self, group: Group) -> Solver:
        """The solver for a group."""
        if self.svd != "auto":
            return Solver(self.svd, self.products or "fp32")
        solver = choose_solver(group.tensors.dtype, spectrum=self.energy is not None or self.spread)
        return solver if self.products is None else replace(solver, products=self.products)

    def _weighted(self, group: Group) -> Tensor:
        """(B, n, layers · width): the rows of a group, weighted."""
        return self._weighted_together([group])

    def _weighted_together(self, groups: list[Group]) -> Tensor:
        """(groups · B, n, layers · width): the rows of `groups`, which have one shape, weighted."""
        # Products in bf16 read half of the bytes, and cached values are bf16 already.
        narrow = self._solver(groups[0]).products == "bf16" and not groups[0].weights
        first, slots = groups[0].tensors.data[groups[0].slots[0]], len(groups[0].slots)
        batch, tokens, width = first.flatten(2).shape
        shape, dtype = (len(groups) * batch, tokens, slots * width), torch.bfloat16 if narrow else torch.float32
        x = torch.empty(shape, dtype=dtype, device=first.device)
        for group, rows in zip(groups, x.split(batch), strict=True):
            for i, part in zip(group.slots, rows.split(width, dim=2), strict=True):
                if group.weights:
                    part.copy_(group.weights[group.tensors.slots[i]].weigh(group.tensors.flat(i)))
                else:
                    group.tensors.write(i, part)
        return x

    def _in_parallel(
        self, job: Callable[[list[Group], list[int | None]], object], groups: list[Group], ranks: Sequence[int | None]
    ) -> None:
        """Call `job` with all `groups`, and their ranks: with several at once if they are one batch."""
        device, solver = groups[0].tensors.data[0].device, self._solver(groups[0])
        batched = as_one_batch(self.batched, solver.algorithm, device)
        jobs = alike(groups, ranks, batched=batched, svd=solver.algorithm)
        run_in_parallel([partial(job, *each) for each in jobs], device)

    def _factor(self, groups: list[Group], ranks: list[int | None]) -> list[Tensor]:
        """Set the vectors and the spectra of `groups`, which have one shape, and return their weighted rows.

        The first columns of a basis of a higher rank are those of a lower one, so the highest of `ranks` counts.
        """
        x = self._weighted_together(groups)
        batch = len(x) // len(groups)
        rows = list(x.split(batch))
        if groups[0].weights:
            scales = [row_weights([group.weights[group.tensors.slots[j]] for j in group.slots]) for group in groups]
            x = torch.cat([part * scale for part, scale in zip(rows, scales, strict=True)])
        rank = None if None in ranks else max(rank for rank in ranks if rank is not None)
        vectors, spectrum = self.singular_vectors(x, rank, self._solver(groups[0]))
        for i, group in enumerate(groups):
            part_of = slice(i * batch, (i + 1) * batch)
            group.vectors, group.spectrum = vectors[part_of], None if spectrum is None else spectrum[part_of]
        return rows

    def _code_together(self, groups: list[Group], ranks: list[int | None]) -> None:
        """Write the codes of the slots of `groups`, which have one shape."""
        rows = self._factor(groups, ranks) if groups[0].vectors is None else [self._weighted(g) for g in groups]
        for group, rank, x in zip(groups, ranks, rows, strict=True):
            self._code(group, rank, x)

    def _code(self, group: Group, rank: int | None, x: Tensor) -> None:
        """Write the codes of the slots of `group`, whose weighted rows are `x`."""
        vectors, tensors = group.vectors, group.tensors
        assert vectors is not None
        if rank is None:
            assert group.spectrum is not None
            assert self.energy is not None
            rank = energy_rank(group.spectrum, self.energy)
        vectors = vectors[..., :rank]
        group.vectors = None
        dtype = tensors.dtype if self._coder is None else torch.float32
        rows = multiply(x, vectors, self._solver(group).products, dtype)  # B, n, r
        # The columns of A differ by orders of magnitude, like channels of keys, so they are coded per column.
        if self._coder is None:
            slot = tensors.data[group.slots[0]]
            rows, vectors = (padded(x, slot, tensors.dtype) for x in (rows, vectors))
            a: Code = Exact(rows)
        else:
            a = self._coder.code(rows, "k", tensors.dtype, (rows.shape[2],))
        width = tuple(tensors.data[group.slots[0]].shape[2:])
        parts = list(vectors.chunk(len(group.slots), dim=1))
        if group.weights:
            parts = [group.weights[tensors.slots[i]].unweigh(b) for i, b in zip(group.slots, parts, strict=True)]
        for i, b in zip(group.slots, torch.stack(parts).to(tensors.dtype), strict=True):
            group.codes[i] = LowRank(a, b, width)


@register("svd", summary="as xkv, for each slot separately", sweep=("svd:ratio={ratio}",))
class SVD(XKV):
    """The same for each layer separately: `xkv` with groups of one."""

    group: int = Field(1, ge=1, le=1)
    """No other value is allowed."""
