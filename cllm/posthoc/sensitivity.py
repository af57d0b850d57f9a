"""Keys before RoPE and values of a calibration text, with the gradients of the loss with respect to each number.

The squared gradients are the diagonal of the Fisher information, as KVQuant (arXiv 2401.18079) approximates it.

Shapes: B batch, T tokens, n tokens of a piece.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.posthoc.method import Engine
from cllm.posthoc.projecting import FISHER_PIECES, FISHER_TOKENS, KINDS, Place
from cllm.posthoc.slots import NOTHING_TO_COMPRESS
from cllm.posthoc.turns import add_hook


@dataclass(frozen=True)
class Sensitive:
    """The keys before RoPE, or the values, of one slot."""

    x: Tensor
    """(1, n, width)."""
    gradient: Tensor
    """(1, n, width) fp32: of the sum of the losses of the tokens, with respect to x."""


def sensitivities(engine: Engine, ids: Tensor, user: str) -> Iterator[dict[Place, Sensitive]]:
    """For each piece of the calibration tokens `ids` (B, T), the keys (`k`) and values (`v`) of every slot.

    Raises:
        UserError: naming `user`, an option, if a slot's keys are not just projected, there are fewer than 2 tokens, or
            a gradient is not finite.
    """
    try:
        modules = {(slot, kind): engine.projections(slot)[kind == "v"] for slot in engine.slots() for kind in KINDS}
        for slot in engine.slots():
            if engine.key_norm(slot) is not None:
                raise UserError(f"slot {slot}: its keys are normalised after their projection (qk_norm); allowed: none")
    except UserError as error:
        raise UserError(f"{user} needs gradients of keys before RoPE: {error}") from None
    if not modules:
        raise UserError(NOTHING_TO_COMPRESS)
    pieces = [piece for row in ids for piece in row[None].split(FISHER_TOKENS, dim=1) if piece.shape[1] > 1]
    if not pieces:
        raise UserError(f"{user} needs a loss: give 2 or more calibration tokens")
    for piece in pieces[:FISHER_PIECES]:
        yield _of_piece(engine, piece, modules, user)


@torch.inference_mode(False)
@torch.enable_grad()
def _of_piece(engine: Engine, piece: Tensor, modules: dict[Place, nn.Linear], user: str) -> dict[Place, Sensitive]:
    piece = piece.clone()  # not of an inference mode
    outputs: dict[Place, Tensor] = {}
    changes: dict[Place, Tensor] = {}
    handles = []
    try:
        for place, module in modules.items():

            def change(_: nn.Module, args: Any, y: Tensor, place: Place = place) -> Tensor:
                if place not in changes:
                    changes[place] = torch.zeros_like(y, requires_grad=True)
                outputs[place] = y.detach()
                return y + changes[place]

            handles += add_hook(module, change, engine.layer_of(place[0]))
        logits = engine.logits(piece[:, :-1], engine.new_cache())
    finally:
        for handle in handles:
            handle.remove()
    loss = F.cross_entropy(logits.float().flatten(0, 1), piece[:, 1:].flatten(), reduction="sum")
    found = torch.autograd.grad(loss, list(changes.values()))
    if not all(gradient.isfinite().all() for gradient in found):
        raise UserError(f"{user}: a gradient is not finite")
    return {place: Sensitive(outputs[place], gradient.float()) for place, gradient in zip(changes, found, strict=True)}
