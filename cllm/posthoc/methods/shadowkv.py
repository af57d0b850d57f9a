"""ShadowKV (arXiv 2410.21465): low-rank keys before RoPE, exact values, and tokens selected by landmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from cllm.errors import UserError
from cllm.posthoc.code import Code, Codes, Exact
from cllm.posthoc.factorising import Factorising
from cllm.posthoc.grown import Joiner
from cllm.posthoc.host_rows import HostRows
from cllm.posthoc.landmarks import Landmarks, make_landmarks, outlier_chunks
from cllm.posthoc.later_rows import absorb_factors
from cllm.posthoc.lowrank import LowRank, low_rank_already
from cllm.posthoc.method import Codable, TensorCoder
from cllm.posthoc.registry import register
from cllm.posthoc.slots import SlotTensors


@dataclass(frozen=True)
class Rows(Code):
    """Values that are not in factors, but which a decode step reads together with keys that are."""

    code: Code

    def decode(self) -> Tensor:
        return self.code.decode()

    def factors(self) -> tuple[Tensor, Tensor | None]:
        return self.decode().flatten(2), None

    @property
    def has_factors(self) -> bool:
        return True

    def read_flops(self) -> int:
        return self.code.read_flops()


@register("shadowkv", summary="low-rank keys of each slot, exact values, and a step that reads selected tokens only")
class ShadowKV(Factorising, Codable):
    """ShadowKV: for each slot and prompt X ≈ A Bᵀ of the keys before RoPE by their leading singular vectors, and exact
    values. A decode step reads the `select` tokens whose chunks' mean keys (landmarks) fit the query best, and outlier
    chunks and the last chunks with exact keys. It combines `svd` and `select` of `xkv`.

    With `values=host`, as in the paper, values are in host memory, and a decode step copies the selected ones.
    """

    keys_before_rope: ClassVar[bool] = True
    no_recompress: ClassVar[str | None] = "exact keys of outliers are gone when tokens are compressed again"

    values: Literal["device", "host"] = "device"
    """Where values are: with the keys, or in host memory, pinned for a GPU and counted by `host_nbytes` alone."""
    rank: int = Field(160, ge=1)
    """Rank of the keys of a slot."""
    select: int | None = Field(2048, ge=1)
    """Compressed tokens per KV head that a decode step reads; null: all, without landmarks."""
    chunk: int = Field(8, ge=1)
    """Tokens that are selected together, by their mean key."""
    outliers: int | None = Field(None, ge=0)
    """Chunks of each KV head that are always read, with exact keys; null: 24 for every 1024 of `select`."""
    local: int = Field(4, ge=0)
    """Last full chunks that are always read, like outliers, with the rest of a chunk after them."""

    @model_validator(mode="after")
    def _selection(self) -> Self:
        if self.every is not None and self.select is not None:
            raise ValueError(
                f"every={self.every}: select={self.select} reads the prompt's outliers and last chunks in every step, "
                "and later tokens have neither; allowed: select=null"
            )
        if self.select is not None and self.select % self.chunk:
            raise ValueError(f"select={self.select} is no multiple of chunk={self.chunk}")
        if self.select is None and self.values == "host":
            raise ValueError("values=host: select=null reads all values in every step; allowed: values=device")
        if self.select is None and (alone := sorted({"chunk", "outliers", "local"} & self.model_fields_set)):
            raise ValueError(f"{alone[0]} goes with select, which is null")
        return self

    @property
    def adapts_solver(self) -> bool:
        return True

    def coded_by(self, coder: TensorCoder) -> Self:
        if self.values == "host":
            raise ValueError("values=host stores exact values; allowed: values=device, or no quantiser after +")
        return super().coded_by(coder)

    def absorb(
        self, keys: SlotTensors, values: SlotTensors | None, codes: tuple[Sequence[Code], Sequence[Code]]
    ) -> tuple[Codes, Codes]:
        assert values is not None
        k_codes, _ = absorb_factors((keys, None), codes, (1, 1), self.extended)
        v_codes: Codes = []
        for i, code in enumerate(codes[1]):
            assert isinstance(code, Rows)
            width = tuple(values.data[i].shape[2:])
            if self._coder is None:
                joined = Joiner().join(code.code, Exact(values.data[i]))
            else:
                joined = self._coder.extend(code.code, values.flat(i), "v", values.dtype, width)
            v_codes.append(Rows(joined))
        return k_codes, v_codes

    @property
    def selects_tokens(self) -> bool:
        return self.select is not None

    def landmarks(self, k: Tensor, is_text: Tensor | None) -> Landmarks | None:
        if self.select is None:
            return None
        outliers = outlier_chunks(self.outliers, self.select)
        return make_landmarks(k, is_text, chunk=self.chunk, budget=self.select, outliers=outliers, local=self.local)

    def encode(self, keys: SlotTensors, values: SlotTensors | None) -> tuple[Codes, Codes]:
        if values is None:
            raise low_rank_already(self.name)
        return keys.code_stacks(self._keys), [self._values(values, i) for i in range(len(values.slots))]

    def _keys(self, keys: SlotTensors) -> Code:
        """The code of one slot, or of several as one with the sequences of all."""
        rows = keys.flat(0)
        tokens, width = rows.shape[1:]
        if self.rank > width:
            raise UserError(
                f"{self.name}: rank={self.rank}: keys of slot {keys.slots[0]} have {width} channels; allowed: 1 to "
                f"{width}"
            )
        vectors = self.leading_vectors(rows, min(self.rank, tokens), keys.dtype)
        rows = rows @ vectors
        a: Code = Exact(rows.to(keys.dtype))
        if self._coder is not None:
            a = self._coder.code(rows, "k", keys.dtype, (rows.shape[2],))
        return LowRank(a, vectors.to(keys.dtype, copy=True), tuple(keys.data[0].shape[2:]))

    def _values(self, values: SlotTensors, i: int) -> Code:
        if self.values == "host":
            return HostRows.of(values.data[i])
        if self._coder is None:
            return Rows(Exact(values.data[i].clone()))
        rows, width = values.flat(i, padding="repeat"), tuple(values.data[i].shape[2:])
        return Rows(self._coder.code(rows, "v", values.dtype, width))
