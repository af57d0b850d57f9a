"""Output projections refitted so that a student's residual stream stays close to its teacher's, layer by layer.

Teacher and student run over a calibration text together, from the bottom up, each on its own residual stream. In layer
i let r be the student's stream as it enters, z (H D) the outputs of its attention heads, and t the teacher's stream
after attention. o_proj becomes the W with the least Σ |t - r - W z|² / |t|² + ρ m |W - W_0|² over tokens, where W_0 is
the projection before and m the mean square of z / |t|. The division gives every token the same weight, also those with
very large streams. Errors of keys and values are thus weighed by what attention makes of them, and layers above correct
what layers below have lost, as in layer-wise compression (GPTQ, arXiv 2210.17323, section 2). The next layer sees the
student's new stream.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cllm.errors import UserError
from cllm.model.decoder import Decoder
from cllm.uptrain.calibrate import Batches, inputs_of
from cllm.uptrain.decoder import TracedDecoder, block_of
from cllm.uptrain.ridge import LinearFit


@torch.no_grad()
def refit_outputs(
    student: Decoder, teacher: TracedDecoder, layers: Collection[int], batches: Batches, *, ridge: float
) -> dict[str, float]:
    """Refit o_proj of `layers`, bottom-up, on the streams that the student's new lower layers give.

    With `norms_after` the stream is not linear in o_proj, which raises `UserError`.

    Args:
        student: with its first weights.
        teacher: of the same width.
        layers: layers of softmax attention; layers that are computed by iteration are left out.
        batches: the text. Streams and slots of all of it are kept, in fp32.
        ridge: pull towards the projections as they are.

    Returns:
        |t - x|² / |t|² of the streams after attention, as `layer 5 stream`, for each of `layers`.
    """
    if student.config.norms_after:
        raise UserError(
            "init.outputs refits output projections, but model.norms_after puts a norm between them and the residual "
            "stream; allowed: none"
        )
    cyclic = {i for first, last in student.plan.cyclic_spans() for i in range(first, last + 1)}
    wanted = [i for i in layers if i < min(cyclic, default=len(student.blocks))]
    errors: dict[str, float] = {}
    if not wanted:
        return errors
    pairs = [(_Run(teacher, batch), _Run(student, batch)) for batch in batches]
    for i in range(max(wanted) + 1):
        fit, second = LinearFit(), torch.zeros(())
        for theirs, mine in pairs:
            target = theirs.layer(i, "mlp_norm")
            theirs.target, theirs.weight = target, target.double().norm(dim=-1, keepdim=True).clamp(min=1e-30)
            if i in wanted:
                z = mine.head_outputs(i).double() / theirs.weight
                fit.add(z, ((target - mine.x.flatten(0, 1)).double() / theirs.weight).T)
                second = second.to(z) + z.T @ z
        if i in wanted:
            o_proj: Any = block_of(student, i).attention.o_proj
            o_proj.weight.copy_(fit.solve(second, o_proj.weight, ridge)[0])
        left, tokens = 0.0, 0
        for theirs, mine in pairs:
            found = mine.layer(i, "mlp_norm")
            left += float(((found - theirs.target).double() / theirs.weight).square().sum())
            tokens += len(found)
        if i in wanted:
            errors[f"layer {i} stream"] = left / tokens
    return errors


class _Run:
    """A decoder over one batch, a layer at a time."""

    def __init__(self, model: Decoder, batch: dict[str, Tensor]):
        ids, positions, documents = inputs_of(batch, model.embed.weight.device)
        self.model = model
        self.context = model._context(ids, positions, documents, None, None, None)
        self.x: Tensor = model.embed(ids)
        self.slots: dict[int, Any] = {}
        self.target, self.weight = torch.zeros(()), torch.ones(())
        """The teacher's stream (B T, d_model) after attention of the last layer, and its norm (B T, 1)."""

    def layer(self, i: int, record: str) -> Tensor:
        """Compute layer `i`; returns the input (B T, d_model) of its module `record`."""
        with _recorded(block_of(self.model, i).get_submodule(record)) as inputs:
            self.x, slots = self.model._layer(i, self.x, self.slots, self.context, None)
        self.slots = {j: slot for j, slot in slots.items() if self.model.plan.last_reader(j) > i}
        return inputs[0].flatten(0, 1)

    def head_outputs(self, i: int) -> Tensor:
        """The outputs (B T, H D) of the heads of layer `i`, which is not left."""
        attention: Any = block_of(self.model, i).attention
        with _recorded(attention.o_proj) as inputs:
            self.model._layer(i, self.x, self.slots, self.context, None)
        return inputs[0].flatten(0, 1)


@contextmanager
def _recorded(module: nn.Module) -> Iterator[list[Tensor]]:
    """A list of the first arguments of `module`."""
    inputs: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    try:
        yield inputs
    finally:
        handle.remove()
