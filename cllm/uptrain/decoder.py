"""A decoder for uptraining: its layers can be listened to and read at random, and its head compares with a teacher's.

Parameters and their names are those of `Decoder`. What is added happens outside of the blocks, so that compiling and
recomputing them changes nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cllm.cache.cache import KVCache
from cllm.cache.slot import Slot
from cllm.cache.stores import Store
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.model.attention import Attention, Context
from cllm.model.block import Block
from cllm.model.decoder import Decoder, Slots
from cllm.model.sizes import model_d_ff
from cllm.model.sources import OwnKV
from cllm.plan.plan import LayerPlan
from cllm.uptrain.loss import DistilledHead


class TracedDecoder(Decoder):
    """`Decoder` with `listen`; with `routed`, also with `route`."""

    def __init__(self, config: ModelConfig, *, d_ff: int | None = None, backend: str = "auto", routed: bool = False):
        """Raises `UserError` for `routed` and a plan in which layers do not all own and read alike."""
        super().__init__(config, d_ff=d_ff, backend=backend)
        self.head = DistilledHead(config.d_model, self.embed.num_embeddings, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self._heard: list[Tensor] | None = None
        self.route: Sequence[int] | None = None
        """For every layer the layer whose slot it reads, itself or a lower one; None: each its own."""
        if routed:
            self._make_routable()

    @contextlib.contextmanager
    def listen(self) -> Iterator[list[Tensor]]:
        """Collect the stream as it enters the first layer and leaves each: n_layers + 1 tensors (B, T, d_model)."""
        heard: list[Tensor] = []
        self._heard = heard
        try:
            yield heard
        finally:
            self._heard = None

    def compile_blocks(self) -> None:
        """As `Decoder` does, and what the head does with logits."""
        super().compile_blocks()
        assert isinstance(self.head, DistilledHead)
        self.head.compiled = True

    def _layer(self, i: int, x: Tensor, slots: Slots, context: Context, cache: KVCache | None) -> tuple[Tensor, Slots]:
        if self._heard is not None and i == 0:
            self._heard.append(x)
        if self.route is None:
            x, slots = super()._layer(i, x, slots, context, cache)
        else:
            x, slots = self._routed(i, self.route[i], x, slots, context)
        if self._heard is not None:
            self._heard.append(x)
        return x, slots

    def _routed(self, i: int, source: int, x: Tensor, slots: Slots, context: Context) -> tuple[Tensor, Slots]:
        read = () if source == i else slots[source]
        if self.gradient_checkpointing and torch.is_grad_enabled():
            x, own = checkpoint(self.blocks[i], x, context, *read, use_reentrant=False)
        else:
            x, own = self.blocks[i](x, context, *read)
        return x, {**slots, i: own}

    def _make_routable(self) -> None:
        layers = self.plan.layers
        for i, layer in enumerate(layers):
            if not self.plan.reads_itself(i) or _kind(layer) != _kind(layers[0]):
                raise UserError(
                    f"uptrain.random_sources: layer {i} differs from layer 0, or reads another layer; allowed: plans "
                    "in which every layer owns and all are alike (mha, gqa, mqa)"
                )
        for i, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            block.attention, block.shares = RoutedAttention(self.config, self.plan, i), True
        self._last_reader = dict.fromkeys(self.plan.owners, len(layers))  # any layer above may be a slot's last


def _kind(layer: LayerPlan) -> tuple[object, int | None]:
    return layer.own, layer.window


class RoutedAttention(Attention):
    """Attention that reads the slot it is handed, where it is handed one, instead of its own."""

    def write(
        self, residual: Tensor, normed: Tensor, slots: Sequence[Slot], context: Context, store: Store | None
    ) -> tuple[Slot | None, Sequence[Slot]]:
        own, read = super().write(residual, normed, (), context, store)
        if not slots:
            return own, read
        assert own is not None
        # The own slot times 0: its projections then get gradients of 0, which DDP waits for, and not none at all.
        return own, (Slot(slots[0].k + 0 * own.k, slots[0].v + 0 * own.v),)


def block_of(model: Decoder, i: int) -> Block:
    """Layer `i`."""
    block = model.blocks[i]
    assert isinstance(block, Block)
    return block


def attention_of(model: Decoder, i: int) -> Attention:
    """The mixer of layer `i`, which reads keys and values."""
    attention = block_of(model, i).attention
    assert isinstance(attention, Attention)
    return attention


def owner_of(model: Decoder, i: int) -> OwnKV:
    """The projections of layer `i`, which has some."""
    owner = block_of(model, i).attention.owner
    assert isinstance(owner, OwnKV)
    return owner


def build_traced(config: ModelConfig, *, backend: str = "auto", routed: bool = False) -> TracedDecoder:
    """The decoder of a config, to be loaded into; arguments as of `TracedDecoder`."""
    return TracedDecoder(config, d_ff=model_d_ff(config), backend=backend, routed=routed)
