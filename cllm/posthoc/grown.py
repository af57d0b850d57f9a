"""Codes of compressed tokens that later tokens join.

A block of later tokens joins a code in one of two ways: its tensors are put behind those of the code, or it is coded by
itself. Blocks that are coded by themselves have one shape, so all of them are decoded at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cllm.posthoc.code import Code, Exact
from cllm.posthoc.tensor_tree import TensorTree


@dataclass(frozen=True)
class Grown(Code):
    """Compressed tokens, and K blocks of later ones, each coded by itself."""

    first: Code
    """(B, n, *width)."""
    blocks: Code
    """The code of one block, with tensors (B, K, ...) in place of (B, ...)."""

    def decode(self) -> Tensor:
        count = next(self.blocks.tensors()).shape[1]
        later = self.blocks.map(lambda t: t.flatten(0, 1)).decode()  # B · K, tokens of a block, *width
        return torch.cat((self.first.decode(), later.unflatten(0, (-1, count)).flatten(1, 2)), dim=1)

    def read_flops(self) -> int:
        return self.first.read_flops() + self.blocks.map(lambda t: t.flatten(0, 1)).read_flops()


class Joiner:
    """Puts codes of later tokens behind codes. Tensors that several codes share before, they share afterwards."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, ...], tuple[tuple[Tensor, ...], Tensor]] = {}

    def join(self, code: Code, block: Code) -> Code:
        """`code` with the tokens of `block` behind its own."""
        if isinstance(code, Exact) and isinstance(block, Exact):
            return Exact(self.cat(code.data, block.data))
        if isinstance(code, Grown) and _form(code.blocks, blocks=True) == _form(block, blocks=False):
            news = {id(old): new for old, new in zip(code.blocks.tensors(), block.tensors(), strict=True)}
            return Grown(code.first, code.blocks.map(lambda old: self.cat(old, self._block(news[id(old)]))))
        return Grown(code, block.map(self._block))

    def cat(self, *tensors: Tensor) -> Tensor:
        """The `tensors` (B, n, ...) one after the other, along their tokens; the same tensor for the same arguments."""
        return self._once(tensors, lambda: torch.cat(tensors, dim=1))

    def _block(self, tensor: Tensor) -> Tensor:
        """`tensor` (B, ...) as that of one block (B, 1, ...)."""
        return self._once((tensor,), lambda: tensor[:, None])

    def _once(self, tensors: tuple[Tensor, ...], make: Callable[[], Tensor]) -> Tensor:
        key = tuple(map(id, tensors))
        if key not in self._found:
            self._found[key] = tensors, make()  # keeps the tensors, so that ids stay taken
        return self._found[key][1]


def _form(tree: object, *, blocks: bool) -> object:
    """Everything of a code but the numbers in its tensors: of `blocks` (B, K, ...), that of one block."""
    if isinstance(tree, Tensor):
        return ("tensor", tree.shape[0], *tree.shape[2 if blocks else 1 :], tree.dtype)
    if isinstance(tree, TensorTree):
        return (type(tree), *((name, _form(value, blocks=blocks)) for name, value in tree.fields().items()))
    return tree


def first_of(code: Code) -> Code:
    """The part of `code` that was there before later tokens joined."""
    return first_of(code.first) if isinstance(code, Grown) else code


def join_all(codes: Sequence[Code], blocks: Sequence[Code | None]) -> list[Code | None]:
    """Every code with its block behind it; None stays None."""
    joiner = Joiner()
    return [None if block is None else joiner.join(code, block) for code, block in zip(codes, blocks, strict=True)]
