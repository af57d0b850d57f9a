"""VFOLD: the values of neighbouring layers, folded into common coordinates, are averaged."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from pydantic import Field, PrivateAttr
from torch import Tensor

from cllm.errors import UserError
from cllm.model.value_folds import ValueSums
from cllm.posthoc.code import Code, Codes, Exact
from cllm.posthoc.method import Codable, Engine
from cllm.posthoc.projecting import check_slots, check_tokens
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


class Fold:
    """The map between a slot's values and its anchor's. It belongs to the method and does not count as a cache's
    tensor."""

    def __init__(self, order: Tensor, to_own: Tensor):
        self.order, self.to_own = order, to_own
        """(G,) int64: the own head that goes with each head of the anchor; (G, D, D) fp32: T⁻¹ of each head."""
        self.to_anchor = torch.linalg.inv(to_own.double()).float()

    def anchored(self, v: Tensor) -> Tensor:
        """V P T (B, n, G, D) fp32, for values (B, n, G, D)."""
        return torch.einsum("bngd,gde->bnge", v[:, :, self.order].float(), self.to_anchor)

    def own(self, v: Tensor) -> Tensor:
        """The inverse of `anchored`."""
        out = torch.empty_like(v)
        out[:, :, self.order] = torch.einsum("bngd,gde->bnge", v.float(), self.to_own).to(v.dtype)
        return out

    def to(self, device: torch.device) -> Fold:
        """On another device."""
        return Fold(self.order.to(device), self.to_own.to(device))


@dataclass(frozen=True)
class Folded(Code):
    """One slot's values: the mean of a group, in the coordinates of its anchor, then the last tokens."""

    mean: Code
    """(B, m, G · D), shared by the slots of the group."""
    recent: Tensor
    """(B, n - m, G, D): the slot's own values of the last tokens."""
    fold: Fold | None
    """None for the anchor."""

    def decode(self) -> Tensor:
        mean = self.mean.decode().unflatten(-1, self.recent.shape[2:])
        return torch.cat((mean if self.fold is None else self.fold.own(mean), self.recent), dim=1)

    def read_flops(self) -> int:
        batch, _, heads, dim = self.recent.shape
        tokens = self.mean.decode().shape[1]
        return 0 if self.fold is None else 2 * batch * tokens * heads * dim * dim


@register("vfold", summary="values of neighbouring slots averaged in common coordinates; keys stay exact")
class VFold(Codable):
    """VFOLD: within a group of neighbouring slots the values of slot m are brought into the coordinates of an anchor l,
    the middle one, by canonical correlation, with heads paired by the Hungarian method (`cllm/model/value_folds.py`),

        stored: V̄ = mean over the group of V_m P_m T_m,    read by the layers of slot m: V̄ T_m⁻¹ P_mᵀ

    The folds are computed once, from calibration tokens. They can be part of the weights: W_V ← W_V T with
    W_O ← T⁻¹ W_O does not change what a model computes, and `folded` returns such a model. Without it the map is
    applied when values are read. Sinks and the last tokens are exact; with `recompress`, tokens are averaged when they
    have left the window, and averages are not changed by averaging again.
    """

    group: int = Field(2, ge=2)
    """Neighbouring slots whose values are averaged; the last group may be smaller."""
    recent: int = Field(128, ge=0)
    """Last tokens of the prefix whose values are stored for each slot."""

    _folds: dict[int, Fold] | None = PrivateAttr(None)
    _is_folded: bool = PrivateAttr(False)

    @torch.no_grad()
    def prepare(self, engine: Engine, ids: Tensor) -> None:
        check_slots(self.name, engine)
        check_tokens(self.name, ids, self.sinks)
        cache = engine.new_cache()
        engine.hidden(ids, cache)
        cached = engine.compressible(cache)
        self._folds, self._is_folded = {}, False
        for keys, values in cached.tensors(before_rope=False, sinks=cached.sinks(self.sinks)):
            if values is None:
                raise UserError(self._latents(keys))
            for group in values.groups(self.group):
                anchor = anchor_of(group)
                columns = {i: values.data[i].flatten(0, 1).permute(1, 2, 0) for i in group}  # G, D, tokens
                for i in group:
                    if i != anchor:
                        order, inverses = ValueSums.of(columns[anchor], columns[i]).matched()
                        fold = Fold(torch.tensor(order), inverses.float())
                        self._folds[values.slots[i]] = fold.to(values.data[i].device)

    def facts(self) -> dict[str, Any]:
        if self._folds is None:
            return {}
        conditions = {slot: torch.linalg.cond(fold.to_own.double()).max() for slot, fold in self._folds.items()}
        return {"condition": {str(slot): round(float(c), 3) for slot, c in conditions.items()}}

    def weight_bytes(self) -> int:
        folds = (self._folds or {}).values()
        return sum(fold.to_own.nbytes * (not self._is_folded) + fold.order.nbytes for fold in folds)

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        if values is None:
            raise UserError(self._latents(keys))
        if self._folds is None:
            raise UserError(f"{self.name}: not calibrated: call prepare(engine, ids) first")
        k_codes: Codes = [None] * len(keys.slots)
        if self._coder is not None:
            for i, x in enumerate(keys.data):
                rows = keys.flat(i, padding="repeat")
                k_codes[i] = self._coder.code(rows, "k", keys.dtype, tuple(x.shape[2:]))
        v_codes: Codes = [None] * len(keys.slots)
        groups = values.groups(self.group)
        if self._coder is None and max(map(len, groups)) < 2:
            raise UserError(
                f"{self.name}: the model has {len(groups)} slot to average; allowed: models with two slots or more"
            )
        for group in groups:
            self._average(group, values, v_codes)
        return k_codes, v_codes

    def _average(self, group: list[int], values: SlotTensors, codes: Codes) -> None:
        """Write the codes of the slots of `group`."""
        if len(group) == 1 and self._coder is None:
            return
        anchor, merged = anchor_of(group), max(values.data[group[0]].shape[1] - self.recent, 0)
        folds = {i: None if i == anchor else self._fold(values.slots[i]) for i in group}
        rows = mean_of([(values.data[i][:, :merged], folds[i]) for i in group])
        mean: Code = Exact(rows.to(values.dtype))
        if self._coder is not None:
            if values.is_text is not None:
                cut = values.is_text[:, :merged]
                rows = torch.where(cut[..., None], rows, torch.zeros_like(rows))
            mean = self._coder.code(rows, "v", values.dtype, (rows.shape[2],)) if merged else mean
        for i in group:
            codes[i] = Folded(mean, values.data[i][:, merged:].clone(), folds[i])

    def absorb(
        self, keys: SlotTensors, values: SlotTensors | None, codes: tuple[Sequence[Code], Sequence[Code]]
    ) -> tuple[Codes, Codes]:
        """The values are those of all tokens at once: exact ones that leave the window are averaged."""
        assert values is not None
        k_codes: Codes = [None] * len(keys.slots)
        v_codes: Codes = [None] * len(keys.slots)
        if self._coder is not None:
            for i, code in enumerate(codes[0]):
                width = tuple(keys.data[i].shape[2:])
                k_codes[i] = self._coder.extend(code, keys.flat(i), "k", keys.dtype, width)
        for group in values.groups(self.group):
            folded = {i: code for i in group if isinstance(code := codes[1][i], Folded)}
            if not folded:
                continue
            tails = {i: torch.cat((code.recent, values.data[i]), dim=1) for i, code in folded.items()}
            merged = max(tails[group[0]].shape[1] - self.recent, 0)
            rows = mean_of([(tails[i][:, :merged], code.fold) for i, code in folded.items()])
            mean = self._longer(folded[group[0]].mean, rows, values.dtype)
            for i, code in folded.items():
                v_codes[i] = Folded(mean, tails[i][:, merged:].clone(), code.fold)
        return k_codes, v_codes

    def _longer(self, mean: Code, rows: Tensor, dtype: torch.dtype) -> Code:
        """`mean` with the averages `rows` (B, n, G · D) fp32 behind its own."""
        if self._coder is None or not isinstance(mean, Exact):
            return self.extended(mean, rows, dtype, "v")
        rows = torch.cat((mean.data.float(), rows), dim=1)  # too few to be coded so far
        if not self._coder.coded_rows(rows.shape[1]):
            return Exact(rows.to(dtype))
        return self._coder.code(rows, "v", dtype, (rows.shape[2],))

    def _fold(self, slot: int) -> Fold:
        assert self._folds is not None
        if slot not in self._folds:
            raise UserError(f"{self.name}: not calibrated for slot {slot}: call prepare(engine, ids) first")
        return self._folds[slot]

    def _latents(self, keys: SlotTensors) -> str:
        return f"{self.name}: slot {keys.slots[0]} is a latent, which has no values; allowed: slots of keys and values"

    @torch.no_grad()
    def folded(self, engine: Engine) -> tuple[Engine, Self]:
        """A copy of the model that computes the same and whose values are in common coordinates, and the method for it.

        For every folded slot, W_V ← W_V T, and in the layers that read it W_O ← T⁻¹ W_O. Heads keep their order, so
        that queries and keys do not change; the method for the copy only has to pair heads when it averages.

        Raises:
            UserError: if the method is not calibrated, or a layer reads the values of several slots.
        """
        if self._folds is None or self._is_folded:
            raise UserError(f"{self.name}: folded needs folds of this model: call prepare(engine, ids) first, once")
        changed, method = copy.deepcopy(engine), self.model_copy()
        method._folds, method._is_folded = {}, True
        for slot, fold in self._folds.items():
            t, back = torch.empty_like(fold.to_own), torch.empty_like(fold.to_own)
            t[fold.order], back[fold.order] = fold.to_anchor, fold.to_own  # by own head
            for reader in changed.readers(slot):
                if reader.values is None:
                    continue
                if reader.values.numel() != 1 or reader.values.item() != 1:
                    raise UserError(
                        f"{self.name}: layer {reader.layer} reads the values of slot {slot} with weights of channels, "
                        "which no change of its output projection can undo; allowed: layers that read one slot"
                    )
                heads = reader.output.unflatten(1, (len(t), -1))  # M, G, H / G, D
                heads.copy_(torch.einsum("mgrd,ged->mgre", heads.float(), back.to(heads.device)).to(heads.dtype))
            projection = changed.projections(slot)[1]
            weight = projection.weight.view(len(t), -1, projection.in_features)
            weight.copy_(torch.einsum("gde,gdm->gem", t.to(weight.device), weight.float()).to(weight.dtype))
            if projection.bias is not None:
                bias = projection.bias.view(len(t), -1)
                bias.copy_(torch.einsum("gde,gd->ge", t.to(bias.device), bias.float()).to(bias.dtype))
            one = torch.eye(t.shape[-1]).expand_as(t).contiguous().to(t.device)
            method._folds[slot] = Fold(fold.order, one)
        return changed, method


def mean_of(parts: Sequence[tuple[Tensor, Fold | None]]) -> Tensor:
    """The mean (B, n, G · D) fp32 of values (B, n, G, D) in the coordinates of the anchor, whose fold is None."""
    folded = [v.float() if fold is None else fold.anchored(v) for v, fold in parts]
    return torch.stack(folded).mean(0).flatten(2)


def anchor_of(group: list[int]) -> int:
    """The middle one of a group, into whose coordinates the others are folded."""
    return group[len(group) // 2]
