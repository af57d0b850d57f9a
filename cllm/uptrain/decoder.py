"""The decoder of teachers and students: layer outputs can be recorded, slots read at random, and the head distils.

Parameters and their names are those of `Decoder`. Recording happens outside of the blocks, so compiled and recomputed
blocks stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cllm.cache.slot import Slot
from cllm.cache.stores import Store
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.model.attention import Attention
from cllm.model.block import Block
from cllm.model.context import Context
from cllm.model.decoder import Decoder
from cllm.model.sizes import model_d_ff
from cllm.model.sources import OwnKV
from cllm.plan.describe import origin_text
from cllm.plan.plan import KVPlan, LayerPlan
from cllm.uptrain.loss import DistilledHead

OWN_KV = (
    "every layer projects keys and values separately, both from its own input, and reads these alone and as they are "
    "(such as mha, gqa, mqa)"
)
"""The models whose projections become those of other plans, in messages: `KVPlan.reads_itself` for every layer."""


class TracedDecoder(Decoder):
    """`Decoder` with a head for distillation, and `record_layers`; with `routed`, also with `route`."""

    def __init__(self, config: ModelConfig, *, d_ff: int | None = None, backend: str = "auto", routed: bool = False):
        """Raises `UserError` for `routed` and a plan in which layers do not all own and read alike."""
        super().__init__(config, d_ff=d_ff, backend=backend)
        self.head = DistilledHead(config.d_model, self.embed.num_embeddings, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self.attend = attend
        """`attend`, compiled with the blocks."""
        self._route: Sequence[int] | None = None
        if routed:
            _check_routable(self.plan)
            for i in range(len(self.plan)):
                block = block_of(self, i)
                block.attention, block.returns_slot = RoutedAttention(config, self.plan, i), True

    @property
    def route(self) -> Sequence[int] | None:
        """For every layer the layer whose slot it reads, itself or a lower one; None: each its own."""
        return self._route

    @route.setter
    def route(self, route: Sequence[int] | None) -> None:
        self._route = route
        self.hand_slots(None if route is None else [() if source == i else (source,) for i, source in enumerate(route)])

    def reads_others(self, i: int) -> Sequence[int]:
        """The other layers whose slots layer `i` reads, as `route` or the plan says."""
        return self._reads[i]

    @contextlib.contextmanager
    def record_layers(self) -> Iterator[list[Tensor]]:
        """Record the output of every layer, (B, T, d_model), in the list that is yielded."""
        outputs: list[Tensor] = []
        self.on_layer = outputs.append
        try:
            yield outputs
        finally:
            self.on_layer = None

    def start_context(self, input_ids: Tensor, positions: Tensor | None, document_ids: Tensor | None) -> Context:
        """The context of a pass over `input_ids` (B, T) without a cache; arguments as in `hidden`."""
        return self._context(input_ids, positions, document_ids, None, None, None)

    def compile_blocks(self) -> None:
        """As `Decoder.compile_blocks`; the distillation loss and attention by itself are compiled too."""
        super().compile_blocks()
        self.attend = torch.compile(attend, dynamic=False)
        assert isinstance(self.head, DistilledHead)
        self.head.compiled = True


def attend(
    block: Block, residual: Tensor, x: Tensor, slots: Sequence[Slot], context: Context
) -> tuple[Tensor, Slot | None]:
    """The output (B, T, d_model) of a block's attention and its slot; arguments as those of `Block.forward`."""
    return block.attention(residual, block.attention_norm(x), slots, context)


def _check_routable(plan: KVPlan) -> None:
    layers = plan.layers
    for i, layer in enumerate(layers):
        wrong = None if _kind(layer) == _kind(layers[0]) else "differs from layer 0"
        if not plan.reads_itself(i):
            wrong = origin_text(plan, i)
        if wrong:
            raise UserError(
                f"uptrain.random_sources: layer {i} {wrong}; allowed: plans in which {OWN_KV}, and all layers are alike"
            )


def _kind(layer: LayerPlan) -> tuple[object, int | None]:
    return layer.own, layer.window


class RoutedAttention(Attention):
    """Attention that reads the slot that it is handed; its own if it is handed none."""

    def write(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None
    ) -> tuple[Slot | None, Sequence[Slot]]:
        own, read = super().write(residual, normed, (), context, store)
        if not slots:
            return own, read
        assert own is not None
        # DDP waits for a gradient of every parameter. The own slot times 0 gives its projections one, of zeros.
        return own, (Slot(slots[0].k + 0 * own.k, slots[0].v + 0 * own.v),)


def block_of(model: Decoder, i: int) -> Block:
    """Layer `i`."""
    block = model.blocks[i]
    assert isinstance(block, Block)
    return block


def attention_of(model: Decoder, i: int) -> Attention:
    """The attention of layer `i`, which reads keys and values."""
    attention = block_of(model, i).attention
    assert isinstance(attention, Attention)
    return attention


def owner_of(model: Decoder, i: int) -> OwnKV:
    """The K/V projections of layer `i`, which owns a slot."""
    owner = block_of(model, i).attention.owner
    assert isinstance(owner, OwnKV)
    return owner


def build_traced(config: ModelConfig, *, backend: str = "auto", routed: bool = False) -> TracedDecoder:
    """The decoder of a config, without weights; arguments as in `TracedDecoder`."""
    return TracedDecoder(config, d_ff=model_d_ff(config), backend=backend, routed=routed)
