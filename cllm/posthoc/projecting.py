"""The base of methods that project keys and values on bases fixed before a prompt is seen (`fixed_bases.py`)."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, PrivateAttr, model_validator
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.posthoc.budget import check_all_sinks, elements_for_ratio, largest
from cllm.posthoc.code import Code, Codes, Exact
from cllm.posthoc.factorising import Factorising
from cllm.posthoc.fixed_bases import (
    Basis,
    Projected,
    Spectrum,
    condition_number,
    energy_ranks,
    progressive_shares,
    ranks_at,
)
from cllm.posthoc.inputs import each_input
from cllm.posthoc.key_norm import KeyNorm
from cllm.posthoc.lowrank import low_rank_already
from cllm.posthoc.method import Codable, Engine, naming
from cllm.posthoc.rank_search import SEARCHES, Place, RankSearch
from cllm.posthoc.slots import SlotTensors

Kind = Literal["k", "v"]
Allocation = Literal["uniform", "fisher", "progressive", "energy", "search", "errors"]
KINDS: tuple[Kind, ...] = ("k", "v")

FISHER_TOKENS = 256
"""Length of the pieces of calibration text whose gradients are taken; at most `FISHER_PIECES` of them."""
FISHER_PIECES = 8


class ProjectingMethod(Factorising, Codable):
    """Keys before RoPE and values, each on a basis that belongs to the method and not to a cache.

    `prepare` computes the bases; `spectra` is all that a subclass must define.
    """

    keys_before_rope: ClassVar[bool] = True

    keep: float | None = Field(None, gt=0, le=1)
    """The largest share of a tensor's numbers that is kept, before `allocation` lowers it; with `allocation=energy` the
    share of the sum of singular values, and with `search` and `errors` the share of the numbers of all tensors."""
    ratio: float | None = Field(None, ge=1)
    """Bytes of the uncompressed cache over bytes of the compressed one, at this length and before a quantiser after +;
    `keep` is chosen so. Exactly one of the two."""
    heads: int | None = Field(None, ge=1)
    """Neighbouring KV heads of a slot that share a basis, the last ones maybe fewer; null: all. Keys that are
    normalised head by head have a basis for each head, and more are an error."""
    allocation: Allocation = "uniform"
    """How ranks differ between keys and values of different slots: `uniform`: not; `fisher`: in proportion to the mean
    absolute gradient of the loss in their projections; `progressive`: falling with depth, by the condition numbers of
    the projections; `energy`: as each group of heads needs for the same share of its singular values; `search`: by the
    loss of calibration tokens with one tensor at a time at ten shares, each of which is a pass; `errors`: as each slot
    needs for one bound on the relative errors of the outputs of layers, in 50 passes (`rank_search.py`)."""
    least: float = Field(0.5, gt=0, le=1)
    """With `allocation=progressive`, the smallest rank of a slot over the largest."""

    _spectra: dict[Place, Spectrum] = PrivateAttr(default_factory=dict)
    _shares: dict[Place, float] = PrivateAttr(default_factory=dict)
    _costs: dict[Place, list[float]] = PrivateAttr(default_factory=dict)
    """Of `SEARCHES[allocation]`."""
    _threshold: float | None = PrivateAttr(None)
    _bases: dict[Place, Basis] = PrivateAttr(default_factory=dict)
    _ranks: dict[Place, list[int]] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _one_size(self) -> Self:
        if (self.keep is None) == (self.ratio is None):
            raise ValueError("give exactly one of keep and ratio")
        if "least" in self.model_fields_set and self.allocation != "progressive":
            raise ValueError("least goes with allocation=progressive")
        return self

    @abstractmethod
    def spectra(self, engine: Engine, ids: Tensor) -> dict[Place, Spectrum]:
        """The bases of all slots of a model, from calibration tokens `ids` (B, T)."""

    @torch.no_grad()
    def prepare(self, engine: Engine, ids: Tensor) -> None:
        check_tokens(self.name, ids, self.sinks)
        check_slots(self.name, engine)
        with naming(self.name):
            self._spectra, self._bases, self._ranks = self.spectra(engine, ids), {}, {}
            self.note_solver(Spectrum.SOLVER)
            self._shares = self._allocate(engine, ids)
            self._costs, self._threshold = self._measure(engine, ids), None

    def facts(self) -> dict[str, Any]:
        threshold = {} if self._threshold is None else {"threshold": self._threshold}
        ranks = {f"{slot}.{kind}": ranks for (slot, kind), ranks in sorted(self._ranks.items())}
        return {**super().facts(), "ranks": ranks, **threshold}

    def weight_bytes(self) -> int:
        return sum(basis.nbytes for basis in self._bases.values())

    def check_all_sinks(self, tokens: int) -> None:
        check_all_sinks(self.name, self.ratio, self.sinks, tokens)

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        if values is None:
            raise low_rank_already(self.name)
        for slot, k in zip(keys.slots, keys.data, strict=True):
            known = self._spectra.get((slot, "k"))
            if known is None or sum(known.widths) != math.prod(k.shape[2:]):
                raise UserError(f"{self.name}: not calibrated for slot {slot}: call prepare(engine, ids) first")
        self._ranks, self._bases = self._choose_ranks(keys, values), {}
        k_codes, v_codes = ([self._code(tensors, i) for i in range(len(tensors.slots))] for tensors in (keys, values))
        return list(k_codes), list(v_codes)

    def _code(self, tensors: SlotTensors, i: int) -> Code:
        place, device = (tensors.slots[i], tensors.kind), tensors.data[i].device
        found = self.basis_of(place, self._ranks[place], tensors.dtype)
        basis = Basis(found.matrix.to(device), None if found.bias is None else found.bias.to(device))
        self._bases[place] = basis
        rows = basis.project(tensors.flat(i, padding="repeat"))
        a = self.stored(rows, tensors.dtype, self._ranks[place])
        return Projected(a, basis, tuple(tensors.data[i].shape[2:]))

    def basis_of(self, place: Place, ranks: Sequence[int], dtype: torch.dtype) -> Basis:
        """The basis of a tensor, with a rank for each of its groups of heads."""
        return self._spectra[place].basis(ranks, dtype)

    def absorb(
        self, keys: SlotTensors, values: SlotTensors | None, codes: tuple[Sequence[Code], Sequence[Code]]
    ) -> tuple[Codes, Codes]:
        assert values is not None
        k_codes, v_codes = (
            [self._extend(code, tensors, i) for i, code in enumerate(of)]
            for tensors, of in zip((keys, values), codes, strict=True)
        )
        return list(k_codes), list(v_codes)

    def _extend(self, code: Code, tensors: SlotTensors, i: int) -> Code:
        """`code` of slot `i` with later tokens behind its own, on its basis."""
        assert isinstance(code, Projected)
        return dataclasses.replace(code, a=self.extended(code.a, code.basis.project(tensors.flat(i)), tensors.dtype))

    def stored(self, rows: Tensor, dtype: torch.dtype, ranks: Sequence[int]) -> Code:
        """The latents (B, n, r), with `ranks` columns for each group of heads; a quantiser after + codes them per
        column, like keys."""
        if self._coder is None:
            return Exact(rows.to(dtype))
        return self._coder.code(rows, "k", dtype, (rows.shape[2],))

    def _choose_ranks(self, keys: SlotTensors, values: SlotTensors) -> dict[Place, list[int]]:
        places: list[Place] = [(slot, tensors.kind) for tensors in (keys, values) for slot in tensors.slots]

        def ranks(keep: float) -> dict[Place, list[int]]:
            return {place: self._ranks_of(place, keep) for place in places}

        widths = {place: sum(self._spectra[place].widths) for place in places}
        search = SEARCHES.get(self.allocation)
        if self.keep is not None:
            if search is None:
                return ranks(self.keep)
            budget = self.keep * sum(widths.values())
            return self._search(search, widths, lambda of: sum(map(sum, of.values())), budget, keys)
        assert self.ratio is not None
        tokens = keys.data[0].shape[1]

        def cost_of(ranks: Mapping[Place, list[int]]) -> float:
            return sum(self.stored_numbers(of, tokens, widths[place], keys.dtype) for place, of in ranks.items())

        def cost(share: float) -> float:
            return cost_of(ranks(share))

        budget = elements_for_ratio(self.name, self.ratio, keys, values)
        if search is not None:
            return self._search(search, widths, cost_of, budget, keys)
        top = 1.0 if self.allocation == "energy" else 1 / min(self._shares.values(), default=1.0)
        keep = largest(cost, budget + 1e-6, top)
        if keep is None:
            raise UserError(
                f"{self.name}: ratio={self.ratio:g}: at {keys.tokens} tokens rank 1 everywhere exceeds it; allowed: a "
                "lower ratio, or more heads for each basis"
            )
        return ranks(keep)

    def _search(
        self,
        search: RankSearch,
        widths: Mapping[Place, int],
        cost: Callable[[Mapping[Place, list[int]]], float],
        budget: float,
        keys: SlotTensors,
    ) -> dict[Place, list[int]]:
        """The ranks of a search that cost at most `budget`."""

        def ranks(levels: Mapping[Place, float]) -> dict[Place, list[int]]:
            return {place: search.ranks(self._spectra[place], levels[place]) for place in widths}

        found = search.threshold(self._costs, lambda levels: cost(ranks(levels)), budget + 1e-6)
        if found is None:
            given = f"keep={self.keep:g}" if self.ratio is None else f"ratio={self.ratio:g}: at {keys.tokens} tokens"
            raise UserError(
                f"{self.name}: {given}: a share of {search.levels[0]:g} of {search.of_what}, the least that "
                f"allocation={search.name} measures, exceeds it; allowed: a lower ratio, a higher keep, or another "
                "allocation"
            )
        self._threshold = found if math.isfinite(found) else None
        return ranks({place: search.level_at(self._costs[place], found) for place in widths})

    def stored_numbers(self, ranks: Sequence[int], tokens: int, width: int, dtype: torch.dtype) -> float:
        """Numbers of the cache's `dtype` that a tensor of `width` takes."""
        return sum(ranks) * (tokens + self.stored_rows(width))

    def stored_rows(self, width: int) -> int:
        """Numbers that a cache stores for each rank of a tensor of `width`, besides one for each token."""
        return 0

    def _ranks_of(self, place: Place, keep: float) -> list[int]:
        if self.allocation == "energy":
            return energy_ranks(self._spectra[place], keep)
        return ranks_at(self._spectra[place], keep, self._shares.get(place, 1.0))

    def _allocate(self, engine: Engine, ids: Tensor) -> dict[Place, float]:
        """The rank of each tensor over the largest rank; none for allocations that do not need it."""
        if self.allocation == "fisher":
            sizes = fisher_sizes(engine, ids)
            highest = max(sizes.values(), default=0.0) or 1.0
            return {place: max(size / highest, 1e-3) for place, size in sizes.items()}
        if self.allocation == "progressive":
            slots = sorted({slot for slot, _ in self._spectra})
            logs = {place: condition_number(spectrum) for place, spectrum in self._spectra.items()}
            conditions = [sum(log for (j, _), log in logs.items() if j == slot) for slot in slots]
            shares = dict(zip(slots, progressive_shares(conditions, self.least), strict=True))
            return {(slot, kind): shares[slot] for slot in slots for kind in KINDS}
        return {}

    def _measure(self, engine: Engine, ids: Tensor) -> dict[Place, list[float]]:
        """The costs of the allocations that search; none for others."""
        if (search := SEARCHES.get(self.allocation)) is None:
            return {}
        weights = {(slot, kind): engine.projections(slot)[kind == "v"].weight for slot, kind in self._spectra}

        def basis(place: Place, ranks: Sequence[int]) -> Basis:
            weight = weights[place]
            found = self._spectra[place].basis(ranks, weight.dtype)
            return Basis(found.matrix.to(weight.device), None if found.bias is None else found.bias.to(weight.device))

        return search.costs(engine, ids, self.sinks, outputs_of(engine, self._spectra), basis, self._spectra)

    def spectra_of_weights(self, engine: Engine, moments: Mapping[int, Tensor] | None) -> dict[Place, Spectrum]:
        """From forms W M Wᵀ, of normalised keys G [W, b] M [W, b]ᵀ G with their gains G = diag(g).

        Args:
            engine: the model.
            moments: for each slot M (d_model + 1, d_model + 1), of the inputs [x, 1]; None: the identity.
        """
        found: dict[Place, Spectrum] = {}
        dims = head_dims(engine)
        for slot in engine.slots():
            key_norm = engine.key_norm(slot)
            for kind, linear in zip(KINDS, engine.projections(slot), strict=True):
                norm = key_norm if kind == "k" else None
                form = form_of(linear, norm, None if moments is None else moments[slot])
                channels = self._basis_channels(slot, len(form), dims[slot], norm)
                found[slot, kind] = Spectrum.of(form, linear.bias if norm is None else None, channels)
        return found

    def _basis_channels(self, slot: int, channels: int, head_dim: int, norm: KeyNorm | None) -> int:
        """How many of the `channels` of a slot's keys, with a norm or without, or of its values share a basis."""
        shared = channels if self.heads is None else self.heads * head_dim
        if norm is None or len(norm.gains) == channels:
            return shared
        if "heads" in self.model_fields_set and shared > head_dim:
            given = "null" if self.heads is None else self.heads
            raise UserError(
                f"heads={given}: slot {slot}: the keys of each head are normalised by themselves (qk_norm), so heads "
                "have no common form; allowed: heads=1, or without heads, which is 1 for these keys"
            )
        return head_dim


def check_slots(name: str, engine: Engine) -> None:
    """Raise `UserError`, naming the method, if the model has no slots to calibrate for."""
    if not engine.slots():
        raise UserError(f"{name}: nothing to compress: all slots have a window or are recurrent states")


def check_tokens(name: str, ids: Tensor, sinks: int) -> None:
    """Raise `UserError`, naming the method, if calibration tokens `ids` (B, T) are all sinks."""
    if ids.shape[1] <= sinks:
        raise UserError(
            f"{name}: {ids.shape[1]} calibration tokens, and sinks={sinks} are left out of the fit; "
            f"allowed: {sinks + 1} or more"
        )


@torch.no_grad()
def head_dims(engine: Engine) -> dict[int, int]:
    """Channels of a head of every slot, from a pass of one token."""
    cache, device = engine.new_cache(), engine.head.weight.device
    engine.hidden(torch.zeros(1, 1, dtype=torch.long, device=device), cache)  # type: ignore[arg-type]
    return {slot: stored.k.shape[-1] for slot, stored in engine.compressible(cache).slots.items()}


@torch.no_grad()
def input_moments(
    engine: Engine, ids: Tensor, sinks: int, form: Literal["products", "sizes"], power: float = 1.0
) -> dict[int, Tensor]:
    """Means over calibration tokens, without sinks, of the inputs [x, 1] of each slot's projections and their biases.

    Returns:
        For each slot, with n = d_model + 1, `products`: E[[x, 1] [x, 1]ᵀ] (n, n); `sizes`: mean |[x, 1]|^power (n,);
        fp32.
    """
    means: dict[int, Tensor] = {}

    def see(slot: int, x: Tensor) -> None:
        rows = F.pad(x[:, sinks:].flatten(0, 1).float(), (0, 1), value=1.0)
        means[slot] = rows.mT @ rows / len(rows) if form == "products" else rows.abs().pow(power).mean(0)

    with each_input(engine, engine.slots(), see):
        engine.hidden(ids, engine.new_cache())
    return means


def form_of(linear: nn.Linear, norm: KeyNorm | None, moment: Tensor | None) -> Tensor:
    """F M Fᵀ (width, width) fp64, with F the projection's weight, or the gains of its norm times [W, b].

    Args:
        linear: the projection; its bias counts only if there is a norm.
        norm: of keys.
        moment: M (d_model + 1, d_model + 1) of [x, 1]; None: the identity.
    """
    factor = linear.weight.double()
    if norm is not None:
        if linear.bias is not None:
            factor = torch.cat((factor, linear.bias.double()[:, None]), dim=1)
        factor = norm.per_channel(len(factor))[:, None] * factor
    inputs = factor.shape[1]
    return factor @ factor.mT if moment is None else factor @ moment[:inputs, :inputs].double() @ factor.mT


def outputs_of(engine: Engine, places: Iterable[Place]) -> dict[Place, nn.Module]:
    """The modules whose outputs are the keys before RoPE, and the values, of `places`."""

    def module(slot: int, kind: Kind) -> nn.Module:
        norm = engine.key_norm(slot) if kind == "k" else None
        return engine.projections(slot)[kind == "v"] if norm is None else norm.module

    return {(slot, kind): module(slot, kind) for slot, kind in places}


@torch.inference_mode(False)
def fisher_sizes(engine: Engine, ids: Tensor) -> dict[Place, float]:
    """The mean over a projection's weights of the root of the summed squared gradients of the loss, as Palu has it."""
    places: list[Place] = [(slot, kind) for slot in engine.slots() for kind in KINDS]
    weights = [engine.projections(slot)[kind == "v"].weight for slot, kind in places]
    pieces = [piece for row in ids.clone() for piece in row[None].split(FISHER_TOKENS, dim=1) if piece.shape[1] > 1]
    if not pieces:
        raise UserError("allocation=fisher needs a loss: give 2 or more calibration tokens, or allocation=uniform")
    before = [weight.requires_grad for weight in weights]
    squares = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        with torch.enable_grad():
            for piece in pieces[:FISHER_PIECES]:
                logits = engine.logits(piece[:, :-1], engine.new_cache())
                loss = F.cross_entropy(logits.float().flatten(0, 1), piece[:, 1:].flatten())
                for square, gradient in zip(squares, torch.autograd.grad(loss, weights), strict=True):
                    square += gradient.float().square()
    finally:
        for weight, needed in zip(weights, before, strict=True):
            weight.requires_grad_(needed)
    sizes = [square.sqrt().mean().item() for square in squares]
    if not all(map(math.isfinite, sizes)):
        raise UserError("allocation=fisher: a gradient is not finite; allowed: allocation=uniform")
    return dict(zip(places, sizes, strict=True))
