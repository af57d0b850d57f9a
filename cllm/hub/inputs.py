"""transformers' `attention_mask` and `position_ids` as a decoder's padding, positions and documents.

A decoder takes the start of each sequence, and counts positions from there. Padding on the right needs no mask, since
no token sees later ones, but a cache would store it. Holes between tokens are refused. These checks run only for inputs
of several tokens (prefill), because in decoding they would force a device sync at every step.

Collators of packed batches, such as transformers' `DataCollatorWithFlattening`, give the boundaries of documents a
second time, for kernels that take them. They have to agree with the positions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cllm.errors import UserError


class Inputs(NamedTuple):
    """Arguments of `Decoder.hidden` besides the tokens, and padding on the right."""

    positions: Tensor | None = None
    """(B or 1, T) int64; None: counted from the first token that is not padding."""
    document_ids: Tensor | None = None
    """(B, T) int64; None: one document in each sequence."""
    starts: Tensor | None = None
    """(B,) int64, padding tokens before each sequence; None: no padding."""
    after: int = 0
    """The largest number of padding tokens after a sequence."""


def read_inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    *,
    past: int | None = None,
    known: Tensor | None = None,
    more_follow: bool = True,
) -> Inputs:
    """`attention_mask` and `position_ids` as a decoder's inputs.

    Args:
        input_ids: (B, T).
        attention_mask: (B, past + T), zeros for padding, or None.
        position_ids: (B or 1, T). With padding or a cache they must equal the positions that those imply. Otherwise a
            new document begins wherever they do not increase by one, as in packed batches.
        past: tokens in the cache; None: no cache.
        known: (B,) padding at the start of the cache, or of the full prompt, of which these tokens may be a part.
        more_follow: whether the caller asked for the cache, so more tokens may follow; otherwise sequences may have
            padding on the right.

    Raises:
        UserError: for padding on the right that a cache would store, holes, sequences without a token, masks of another
            shape, and positions that contradict the padding.
    """
    batch, length = input_ids.shape
    _check_shapes(batch, length, attention_mask, position_ids, past or 0)
    if past and length == 1:
        return Inputs()
    starts, after = None, 0
    if attention_mask is not None:
        starts, after = _padding(attention_mask, cached=past is not None and more_follow, known=known)
    if past or known is not None:
        if attention_mask is not None:
            _check_same_padding(starts, known, (past or 0) + length)
        starts = known
    if position_ids is None:
        return Inputs(starts=None if past else starts, after=after)
    if past is None and starts is None:
        return _packed(position_ids.expand(batch, -1))
    _check_positions(position_ids, length, past or 0, starts, attention_mask)
    return Inputs(starts=None if past else starts, after=after)


_BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k")
_SEQUENCES = "seq_idx"
_LONGEST = ("max_length_q", "max_length_k")
"""Lengths of the longest document. They follow from the boundaries, and kernels use them to plan their work."""


def pop_packing(others: dict[str, Any]) -> dict[str, Tensor]:
    """Remove what describes a packed batch from keyword arguments; returns what `check_packing` has to check."""
    given = {name: others.pop(name, None) for name in (*_BOUNDARIES, _SEQUENCES, *_LONGEST)}
    return {name: given[name] for name in (*_BOUNDARIES, _SEQUENCES) if given[name] is not None}


def check_packing(packing: dict[str, Tensor], tokens: Tensor, documents: Tensor | None) -> None:
    """Compare the boundaries of documents in `packing` with those that follow from `position_ids`.

    Args:
        packing: `cu_seq_lens_q` and `cu_seq_lens_k`, (documents + 1,) int: where each document begins in the flattened
            batch, then its length; `seq_idx`, (B, T) int: the number of each token's document.
        tokens: (B, T).
        documents: `Inputs.document_ids`.

    Raises:
        UserError: if they differ.
    """
    if not packing:
        return
    begins = torch.ones_like(tokens, dtype=torch.bool)
    begins[:, 1:] = False if documents is None else documents[:, 1:] != documents[:, :-1]
    expected = torch.cat(
        (begins.flatten().nonzero().flatten(), begins.new_full((1,), tokens.numel(), dtype=torch.long))
    )
    for name, given in packing.items():
        if name == _SEQUENCES:
            agrees = given.shape == tokens.shape and torch.equal(given[:, 1:] != given[:, :-1], begins[:, 1:])
        else:
            agrees = torch.equal(given.to(expected), expected)
        if not agrees:
            kind = "documents" if name == _SEQUENCES else "boundaries"
            raise UserError(
                f"{name}: its {kind} are not those of position_ids, which have to restart where a document begins"
            )


def _check_shapes(batch: int, length: int, mask: Tensor | None, positions: Tensor | None, past: int) -> None:
    if mask is not None and (not isinstance(mask, Tensor) or mask.ndim != 2):
        found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise UserError(
            f"attention_mask is {found}; allowed: (batch, tokens), zeros for padding (the layers' own masks come from "
            "the KV plan)"
        )
    if mask is not None and mask.shape != (batch, past + length):
        cached = f" after {past} in the cache" if past else ""
        raise UserError(
            f"attention_mask is {tuple(mask.shape)}; for {batch} x {length} tokens{cached} it has to be "
            f"{(batch, past + length)}"
        )
    if positions is not None and (positions.ndim != 2 or positions.shape not in ((batch, length), (1, length))):
        raise UserError(f"position_ids are {tuple(positions.shape)}; allowed: {(batch, length)} or {(1, length)}")


def padding_of(mask: Tensor, *, cached: bool, known: Tensor | None = None) -> Tensor | None:
    """(B,) zeros before each sequence of `mask` (B, S); None if no sequence has any.

    Raises `UserError` for holes, for padding on the right that would be `cached`, and for a sequence without a token,
    unless `known` padding shows that it starts later.
    """
    return _padding(mask, cached=cached, known=known)[0]


def _padding(mask: Tensor, *, cached: bool, known: Tensor | None) -> tuple[Tensor | None, int]:
    """As `padding_of`, and the largest number of zeros after a sequence."""
    real = mask != 0
    expected = mask.new_zeros(len(mask), dtype=torch.long) if known is None else known
    before = (real.cumsum(1) == 0).sum(1)
    after = (real.flip(1).cumsum(1) == 0).sum(1)
    rows = torch.stack((before, after, real.sum(1), expected), dim=1).tolist()  # the only device sync
    for row, (left, right, count, start) in enumerate(rows):
        if count == 0 and start >= left:
            continue
        if count == 0:
            raise UserError(f"attention_mask: sequence {row} is all padding; leave it out")
        if left + count + right != mask.shape[1]:
            raise UserError(
                f"attention_mask: sequence {row} has a hole: padding between its tokens; allowed: zeros before or after"
            )
        if right and cached:
            raise UserError(
                f"attention_mask: sequence {row} has {right} padding tokens at its end, which a cache would keep; pad "
                'on the left (tokenizer.padding_side = "left"), or set use_cache=False'
            )
    most = max((right for _, right, count, _ in rows if count), default=0)
    return before if any(left for left, *_ in rows) else None, most


def _check_same_padding(starts: Tensor | None, known: Tensor | None, columns: int) -> None:
    if starts is None and known is None:
        return
    found = 0 if starts is None else starts.tolist()
    expected = 0 if known is None else known.clamp(max=columns).tolist()
    if found != expected:
        raise UserError(
            f"attention_mask: pads {found} tokens on the left, but the cache was begun with {expected}; go on with the "
            "mask of the first call and ones after it"
        )


def _check_positions(position_ids: Tensor, length: int, past: int, starts: Tensor | None, mask: Tensor | None) -> None:
    columns = torch.arange(past, past + length, device=position_ids.device)
    implied = columns[None] if starts is None else columns - starts[:, None]
    found, implied = torch.broadcast_tensors(position_ids, implied)
    wrong = found != implied
    if mask is not None:  # positions of padding do not matter
        wrong = wrong & (mask[:, past:] != 0)
    wrong = wrong.nonzero()
    if len(wrong):
        row, token = wrong[0].tolist()
        raise UserError(
            f"position_ids: token {token} of sequence {row} is at {found[row, token]}, but attention_mask and the "
            f"cache put it at {implied[row, token]}; leave position_ids out (packed documents need use_cache=False)"
        )


def _packed(positions: Tensor) -> Inputs:
    breaks = positions[:, 1:] != positions[:, :-1] + 1
    if not breaks.any():
        return Inputs(positions=positions)
    first = breaks.new_zeros((len(positions), 1))
    return Inputs(positions=positions, document_ids=torch.cat((first, breaks), dim=1).cumsum(1))
