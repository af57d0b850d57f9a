"""Ranks by what they cost on a calibration text, as two papers search for them.

Both measure the cost L(r) of levels r, where level 1 costs nothing. A threshold τ gives each tensor the smallest level
that costs at most τ,

    r(τ) = min {r : L(r) ≤ τ}

and the search takes the smallest τ at which all tensors together fit a budget.

`search`, ASVD (arXiv 2312.05821): for every tensor p and every share r of its rank, L_p(r) is the loss of calibration
tokens when only p has that share. The paper measures perplexity, which orders shares as the loss does.

`errors`, EigenAttention (arXiv 2408.05646): for every slot s and every share r of the sum of singular values, L_s(r) is
the largest relative error of the output O of a layer that reads s, when its inputs are exact,

    L_s(r) = max over layers l that read s, and r' ≥ r, of ‖O_l(r') - O_l‖ / ‖O_l‖

The paper lowers r of a layer in steps of 0.02 while its error is within τ; the maximum over r' stops at the first that
is not. There τ is given; here it follows from the budget.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.posthoc.fixed_bases import Basis, Spectrum, energy_ranks, ranks_at
from cllm.posthoc.method import Engine
from cllm.posthoc.turns import add_hook

P = TypeVar("P")
Place = tuple[int, Literal["k", "v"]]
"""A slot, and its keys or values."""

TOKENS = 256
"""Length of the pieces of calibration text that are measured; at most `PIECES` of them."""
PIECES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSearch:
    """One way to measure what ranks cost."""

    name: str
    """That of the allocation."""
    levels: tuple[float, ...]
    """Those that are measured, rising and below 1."""
    of_what: str
    """The whole of which a level is a share, for messages."""
    ranks: Callable[[Spectrum, float], list[int]]
    """The ranks of a tensor at a level."""
    measure: Callable[[ProjectedModel, Sequence[float]], dict[Place, list[float]]]
    """L at each of the levels, for every tensor."""

    def costs(
        self,
        engine: Engine,
        ids: Tensor,
        sinks: int,
        modules: Mapping[Place, nn.Module],
        basis: Callable[[Place, Sequence[int]], Basis],
        spectra: Mapping[Place, Spectrum],
    ) -> dict[Place, list[float]]:
        """L at each of `levels`, for every tensor.

        Args:
            engine: the model.
            ids: calibration tokens (B, T).
            sinks: first tokens of a piece whose keys and values stay exact.
            modules: for each tensor the module whose output it is: (B, T, width), (B, T, G, D) or (B, G, T, D).
            basis: of a tensor with given ranks.
            spectra: of each tensor.

        Raises:
            UserError: if there are too few tokens, as many as an output with heads has heads, or a cost is not finite.
        """

        def at(place: Place, level: float) -> Basis:
            return basis(place, self.ranks(spectra[place], level))

        length = min(TOKENS, ids.shape[1])
        pieces = torch.cat([part for part in ids.split(length, dim=1) if part.shape[1] == length])[:PIECES]
        with torch.no_grad():
            found = self.measure(ProjectedModel(self.name, engine, pieces, sinks, modules, at), self.levels)
        if not all(math.isfinite(value) for of in found.values() for value in of):
            raise UserError(f"allocation={self.name}: a cost is not finite; allowed: allocation=uniform")
        return found

    def level_at(self, costs: Sequence[float], threshold: float) -> float:
        """r(τ) of a tensor."""
        return min((level for level, cost in zip(self.levels, costs, strict=True) if cost <= threshold), default=1.0)

    def threshold(
        self, costs: Mapping[P, Sequence[float]], size: Callable[[dict[P, float]], float], budget: float
    ) -> float | None:
        """The smallest threshold at which all tensors have a `size` of at most `budget`; None: even the largest costs
        more."""
        thresholds = [-math.inf, *sorted({cost for of in costs.values() for cost in of})]

        def fits(threshold: float) -> bool:
            return size({place: self.level_at(of, threshold) for place, of in costs.items()}) <= budget

        low, high = 0, len(thresholds) - 1
        if not fits(thresholds[high]):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(thresholds[middle]) else (middle + 1, high)
        return thresholds[high]


@dataclass(frozen=True)
class ProjectedModel:
    """A model whose keys and values can be projected while it reads a calibration text."""

    allocation: str
    engine: Engine
    ids: Tensor
    """(B, T) of the calibration text."""
    sinks: int
    modules: Mapping[Place, nn.Module]
    basis: Callable[[Place, float], Basis]
    """Of a tensor at a level."""

    @contextmanager
    def projected(self, places: Sequence[Place], level: float, tokens: int) -> Iterator[None]:
        """The tensors of `places` are projected at `level` in passes of `tokens` tokens inside of the context."""
        handles = []
        try:
            for place in places:
                of = self.basis(place, level)

                def project(_: nn.Module, args: Any, y: Tensor, of: Basis = of) -> Tensor:
                    return self._project(y, of, tokens)

                handles += add_hook(self.modules[place], project, self.engine.layer_of(place[0]))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _project(self, y: Tensor, of: Basis, tokens: int) -> Tensor:
        if y.ndim == 4 and y.shape[1] == y.shape[2] > 1:
            raise UserError(
                f"allocation={self.allocation}: of {self.ids.shape[1]} calibration tokens {tokens} are read at once, "
                f"as many as there are heads ({y.shape[1]}), so it is not clear which axis of a tensor has the tokens; "
                "allowed: a calibration text of any other length"
            )
        heads_first = y.ndim == 4 and y.shape[1] != tokens
        exact = y.transpose(1, 2) if heads_first else y
        rows = of.project(exact[:, self.sinks :].flatten(2).float()) @ of.matrix.float().mT
        rows = rows if of.bias is None else rows + of.bias.float()
        rows = rows.view(exact[:, self.sinks :].shape)
        changed = torch.cat((exact[:, : self.sinks], rows.to(y.dtype)), dim=1)
        return changed.transpose(1, 2) if heads_first else changed


def losses_alone(model: ProjectedModel, levels: Sequence[float]) -> dict[Place, list[float]]:
    """L_p(r) of ASVD, in nats a token."""
    length = model.ids.shape[1]
    if length < 2:
        raise UserError("allocation=search needs a loss: give 2 or more calibration tokens, or allocation=uniform")

    def loss(place: Place, level: float) -> float:
        with model.projected([place], level, length - 1):
            logits = model.engine.logits(model.ids[:, :-1], model.engine.new_cache())
        return F.cross_entropy(logits.float().flatten(0, 1), model.ids[:, 1:].flatten()).item()

    return {place: [loss(place, level) for level in levels] for place in model.modules}


@dataclass
class _Outputs:
    """The outputs of a model's layers in a first pass; later passes compare theirs, and go on with the first ones."""

    sinks: int
    exact: list[list[Tensor]] = field(default_factory=list)
    """(B, T, d_model) of each layer, one for each time that it runs in a pass."""

    @contextmanager
    def record(self, layers: Sequence[nn.Module]) -> Iterator[None]:
        self.exact = [[] for _ in layers]
        with self._hooked(layers, lambda layer, x: self.exact[layer].append(x.clone())):
            yield

    @contextmanager
    def compare(self, layers: Sequence[nn.Module]) -> Iterator[list[float | Tensor]]:
        """Yields ‖O' - O‖² of each layer, which are complete at the end of the context."""
        lost: list[float | Tensor] = [0.0] * len(layers)
        times = [0] * len(layers)

        def see(layer: int, x: Tensor) -> Tensor:
            exact = self.exact[layer][times[layer]]
            times[layer] += 1
            lost[layer] = lost[layer] + _square(x[:, self.sinks :].float() - exact[:, self.sinks :].float())
            return exact.clone()

        with self._hooked(layers, see):
            yield lost

    def squares(self) -> list[Tensor]:
        """‖O‖² of each layer."""
        return [torch.stack([_square(x[:, self.sinks :].float()) for x in of]).sum() for of in self.exact]

    @contextmanager
    def _hooked(self, layers: Sequence[nn.Module], see: Callable[[int, Tensor], Tensor | None]) -> Iterator[None]:
        """Call `see` with the output of every layer, which becomes the result unless it is None."""

        def hook(layer: int) -> Callable[..., Any]:
            def change(_: nn.Module, args: Any, output: Any) -> Any:
                if not isinstance(output, tuple):
                    return see(layer, output)
                return None if (x := see(layer, output[0])) is None else (x, *output[1:])

            return change

        handles = [layer.register_forward_hook(hook(i)) for i, layer in enumerate(layers)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _square(x: Tensor) -> Tensor:
    return x.double().square().sum()


def layer_errors(model: ProjectedModel, levels: Sequence[float]) -> dict[Place, list[float]]:
    """L_s(r) of EigenAttention, for the keys and for the values of every slot s. Outputs of sinks do not count.

    One pass measures a level for all layers: each gets exact inputs, but keys and values that are projected.
    """
    engine, layers, places = model.engine, model.engine.layers(), list(model.modules)
    outputs, cache = _Outputs(model.sinks), engine.new_cache()
    with engine.all_tokens():
        with outputs.record(layers):
            engine.hidden(model.ids, cache)
        readers = {
            slot: [read.layer for read in engine.compressible(cache).reads if slot in read.slots] for slot, _ in places
        }
        found: dict[Place, list[float]] = {place: [] for place in places}
        stored = torch.stack(outputs.squares()).clamp(min=1e-300)
        largest = {slot: 0.0 for slot, _ in places}
        for level in reversed(levels):
            with outputs.compare(layers) as lost, model.projected(places, level, model.ids.shape[1]):
                engine.hidden(model.ids, engine.new_cache())
            errors = (torch.stack([torch.as_tensor(of).to(stored) for of in lost]) / stored).sqrt().tolist()
            for slot, of in readers.items():
                largest[slot] = max(largest[slot], *(errors[layer] for layer in of))
            for place, costs in found.items():
                costs.insert(0, largest[place[0]])
    return found


SEARCHES = {
    search.name: search
    for search in (
        RankSearch(
            name="search",
            levels=(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),  # the paper's, and half of its smallest
            of_what="all ranks",
            ranks=lambda spectrum, level: ranks_at(spectrum, 1.0, level),
            measure=losses_alone,
        ),
        RankSearch(
            name="errors",
            levels=tuple(n / 50 for n in range(1, 50)),
            of_what="the sum of singular values",
            ranks=energy_ranks,
            measure=layer_errors,
        ),
    )
}
"""By the name of the allocation."""
