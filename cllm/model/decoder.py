"""The decoder: token ids to logits, its layers wired as the KV plan says.

`Decoder.hidden` is the whole wiring: a dictionary of slots travels up the stack, each block is handed the slots it
reads, an owner's slot joins the dictionary and leaves it after its last reader. Cyclic runs of layers, which read slots
from above, are computed several times over, each time with the slots of the time before.
"""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cllm.config import ModelConfig
from cllm.kv.sources import FusedRead, Slot, slot_widths
from cllm.model.attention import Context
from cllm.model.block import Block
from cllm.model.loss import Head
from cllm.model.norm import RMSNorm

Slots = dict[int, Slot]


class Decoder(nn.Module):
    """A pre-norm decoder. `config.vocab_size` must be set; `d_ff` overrides the config's (see `model/sizes.py`)."""

    def __init__(self, config: ModelConfig, *, d_ff: int | None = None, backend: str = "auto"):
        super().__init__()
        assert config.vocab_size is not None, "set model.vocab_size before building the model"
        self.config, self.plan, self.backend = config, config.plan(), backend
        self.gradient_checkpointing = False
        self.fp32_residual = False
        """Under autocast, keep the residual stream in fp32 and not in autocast's dtype."""
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        d_ff = d_ff or config.resolved_d_ff
        self.blocks = nn.ModuleList(Block(config, self.plan, i, d_ff) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Head(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self._last_reader = {j: self.plan.last_reader(j) for j in self.plan.owners}
        self._spans = dict(self.plan.cyclic_spans())

    def init_weights(self) -> None:
        """Draw all weights from torch's global generator as `config.init` says; norms become 1, biases 0."""
        init = self.config.init
        residual_std = init.std / math.sqrt(2 * self.config.n_layers) if init.scale_residual else init.std
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                writes_residual = name.endswith((".o_proj", ".mlp.down_proj"))
                nn.init.normal_(module.weight, std=residual_std if writes_residual else init.std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=init.std)
            elif isinstance(module, FusedRead | RMSNorm):
                module.reset_parameters()

    def compile_blocks(self) -> None:
        """Compile each block by itself with torch.compile; layers that do the same share the compiled code.

        The compiler tunes its elementwise kernels (coordinate descent), which a training run pays back in a minute.
        """
        # Kinds of layer, times a few: with and without gradient, training and validation shapes.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(self.blocks))
        options = {"coordinate_descent_tuning": True}
        for block in self.blocks:
            block.compile(dynamic=False, options=options)
        self.norm.compile(dynamic=False, options=options)

    def forward(self, input_ids: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """Logits (B, T, vocab_size) for `input_ids` (B, T); see `hidden` for the rest."""
        return self.head(self.hidden(input_ids, positions, document_ids))

    def loss(
        self,
        input_ids: Tensor,
        labels: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        reduction: str = "mean",
    ) -> Tensor:
        """Next-token cross-entropy in nats, logits a chunk at a time; see `model/loss.py` for `labels` (B, T)."""
        return self.head(self.hidden(input_ids, positions, document_ids), labels, reduction=reduction)

    def hidden(self, input_ids: Tensor, positions: Tensor | None = None, document_ids: Tensor | None = None) -> Tensor:
        """The normalised hidden states (B, T, d_model) that the head reads.

        Args:
            input_ids: (B, T) integers.
            positions: (B or 1, T) integers for RoPE; 0 to T-1 by default.
            document_ids: (B, T) integers, ascending; tokens see only their own document. Positions are not derived
                from it: pass positions that restart where documents should not know of each other.
        """
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        context = Context(self.config.rope, positions, document_ids, self.backend)
        context.prepare(self.plan, self.config.resolved_head_dim)
        x, layer = self.embed(input_ids), 0
        if not self.fp32_residual and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        slots: Slots = {}
        while layer < len(self.blocks):
            last = self._spans.get(layer)
            if last is None:
                x, slots = self._layer(layer, x, slots, context)
            else:
                x, slots = self._iterate(layer, last, x, slots, context)
                layer = last
            slots = {j: slot for j, slot in slots.items() if self._last_reader[j] > layer}
            layer += 1
        return self.norm(x)

    def _layer(self, i: int, x: Tensor, slots: Slots, context: Context) -> tuple[Tensor, Slots]:
        block = self.blocks[i]
        read = [tensor for j in self.plan.reads_others(i) for tensor in slots[j]]
        if self.gradient_checkpointing and torch.is_grad_enabled():
            x, own = checkpoint(block, x, context, *read, use_reentrant=False)
        else:
            x, own = block(x, context, *read)
        return x, slots if own is None else {**slots, i: own}

    def _iterate(self, first: int, last: int, x: Tensor, slots: Slots, context: Context) -> tuple[Tensor, Slots]:
        """Layers `first` to `last`, some of which read slots from above (LCKV, arXiv 2405.10637, section 2.3).

        Every pass starts from the same `x`. Slots from above are those of the pass before, zeros in the first; the
        diagonal is masked, so after n passes the first n tokens are exact. Only the last `backward` passes have
        gradients.
        """
        iterations = self.plan.iterations
        assert iterations is not None
        from_above = {j for i in range(first, last + 1) for j in self.plan.reads(i) if j > i}
        carried = {j: self._empty_slot(j, x) for j in from_above}
        out, after = x, slots
        for turn in range(iterations.forward + iterations.backward):
            with torch.no_grad() if turn < iterations.forward else contextlib.nullcontext():
                out, after = x, {**slots, **carried}
                for i in range(first, last + 1):
                    out, after = self._layer(i, out, after, context)
            carried = {j: after[j] for j in from_above}
        return out, after

    def _empty_slot(self, owner: int, x: Tensor) -> Slot:
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        widths = slot_widths(self.plan.layers[owner].own, self.config.resolved_head_dim)
        return Slot(*(x.new_zeros((*x.shape[:2], *width), dtype=dtype) for width in widths))
