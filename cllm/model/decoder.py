"""The decoder: token ids to logits, its layers wired as the KV plan says.

`Decoder.hidden` is the whole wiring: a dictionary of slots travels up the stack, each block is handed the slots it
reads, an owner's slot joins the dictionary and leaves it after its last reader. Cyclic runs of layers, which read slots
from above, are computed several times over, each time with the slots of the time before.
"""

from __future__ import annotations

import contextlib
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cllm.cache.slot import Slot
from cllm.cache.stores import SlotStore, Step
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.kernels.attention import document_boundaries
from cllm.kernels.fp8_casts import FP8_CASTS
from cllm.kernels.sum_products import SUM_PRODUCTS
from cllm.model.attention import Cached, Context
from cllm.model.block import Block
from cllm.model.loss import Head
from cllm.model.norm import RMSNorm
from cllm.model.precision import product_dtype

if TYPE_CHECKING:
    from cllm.cache.cache import KVCache

Slots = dict[int, Slot]


def recompute(function: Any, *inputs: Any) -> Any:
    """`function(*inputs)`, which is computed again in the backward and keeps no activations."""
    return checkpoint(function, *inputs, use_reentrant=False)


def _check_can_be_drawn(name: str, module: nn.Module) -> None:
    """Raises `TypeError` for a module with parameters of its own that `Decoder.init_weights` could not draw."""
    if isinstance(module, nn.Linear | nn.Embedding) or not dict(module.named_parameters(recurse=False)):
        return
    if not callable(getattr(module, "reset_parameters", None)):
        raise TypeError(
            f"{name} ({type(module).__name__}) has parameters and no reset_parameters(), with which init_weights would "
            "draw them"
        )


def _reset(name: str, module: nn.Module) -> None:
    """Call `reset_parameters` of a module with parameters of its own, and check that it has filled them all."""
    _check_can_be_drawn(name, module)
    own = dict(module.named_parameters(recurse=False))
    if not own:
        return
    with torch.no_grad():
        for parameter in own.values():
            parameter.fill_(torch.nan)
    reset: Any = module.reset_parameters
    reset()
    for key, parameter in own.items():
        if not parameter.is_meta and bool(parameter.isnan().any()):
            raise TypeError(f"{name}.reset_parameters() ({type(module).__name__}) does not draw {key}")


class Decoder(nn.Module):
    """A pre-norm decoder. `config.vocab_size` must be set; `d_ff` overrides the config's.

    The constructor leaves weights to `init_weights`, or to those that are loaded: `model/sizes.py` has `build_decoder`,
    which gives a decoder ready to use, and `meta_decoder`, which gives one to be counted or loaded into.
    """

    def __init__(self, config: ModelConfig, *, d_ff: int | None = None, backend: str = "auto"):
        super().__init__()
        assert config.vocab_size is not None, "set model.vocab_size before building the model"
        self.config, self.plan, self.backend = config, config.plan(), backend
        self.gradient_checkpointing = False
        self.recompute_fusion = False
        """Make fused keys and values again for the gradient and keep none of them."""
        self.fp32_residual = False
        """Under autocast, keep the residual stream in fp32 and not in autocast's dtype."""
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        d_ff = d_ff or config.resolved_d_ff
        self.blocks = nn.ModuleList(Block(config, self.plan, i, d_ff) for i in range(config.n_layers))
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Head(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self._compiled: tuple[Any, ...] = ()
        """Blocks and the last norm for decoding; in a tuple, so that they are no second name for the weights."""
        self._last_reader = self.plan.last_readers()
        self._spans = dict(self.plan.cyclic_spans())
        for name, module in self.named_modules():
            _check_can_be_drawn(name, module)

    def init_weights(self) -> None:
        """Draw all weights from torch's global generator as `config.init` says; norms become 1, biases 0.

        A module of another kind that has parameters of its own draws them in its method `reset_parameters()`.

        Raises:
            TypeError: for a module that has such parameters and no `reset_parameters`, or leaves one of them out.
        """
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
            else:
                _reset(name, module)

    def compile_decoding(self) -> None:
        """Compile what a pass of one token over a static cache runs; other passes stay as they are.

        With coordinate descent the compiler also writes products with one row, a batch of one sequence, as reductions
        that read weights at the memory bound, where a matrix kernel would not.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(self.blocks))
        options: dict[str, Any] = {"coordinate_descent_tuning": True}
        self._compiled = tuple(torch.compile(m, dynamic=False, options=options) for m in (*self.blocks, self.norm))

    def compile_blocks(self) -> None:
        """Compile each block by itself with torch.compile; layers that do the same share the compiled code."""
        # Kinds of layer, times a few: with and without gradient, training and validation shapes.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(self.blocks))
        options: dict[str, Any] = {"post_grad_custom_pre_pass": SUM_PRODUCTS, "post_grad_custom_post_pass": FP8_CASTS}
        for block in self.blocks:
            block.compile(dynamic=False, options=options)
        self.norm.compile(dynamic=False)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        starts: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Logits (B, T, vocab_size), or (B, 1, vocab_size) for `last_only`; see `hidden` for the rest."""
        return self.head(
            self.hidden(input_ids, positions, document_ids, cache=cache, starts=starts, last_only=last_only)
        )

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

    def hidden(
        self,
        input_ids: Tensor | None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        starts: Tensor | None = None,
        last_only: bool = False,
        inputs_embeds: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """The normalised hidden states (B, T, d_model) that the head reads.

        Args:
            input_ids: (B, T) integers; None with `inputs_embeds`.
            positions: (B or 1, T) integers for RoPE; by default they count from 0 at the first token that is no
                padding, tokens in the cache included.
            document_ids: (B, T) integers, ascending; tokens see only their own document. Positions are not derived
                from it: pass positions that restart where documents should not know of each other.
            cache: tokens that stand before these; these are added to it.
            starts: (B,) int64, tokens of padding before each sequence; of a cache's first pass, which remembers them.
            last_only: compute what the last token needs and no more: above the last layer that owns a slot, it goes on
                alone. The result is exact, and (B, 1, d_model).
            inputs_embeds: (B, T, d_model), what the first layer reads in place of the embeddings of `input_ids`.
            states: a list to which the input of every layer is appended, n_layers tensors (B, T, d_model); of layers
                that are computed several times, the last input.

        Raises:
            UserError: for documents together with padding or a cache, and for a cache that does not fit.
        """
        if document_ids is not None and (cache is not None or starts is not None):
            raise UserError("document_ids (packed documents) go neither with a cache nor with padding")
        step = None
        tokens = input_ids if inputs_embeds is None else inputs_embeds[..., 0]  # for their number and device
        assert tokens is not None
        if cache is not None:
            cache.check(self.config)
            step, starts = cache.begin(self.plan, tokens, starts, self._dtype()), cache.starts
        context = self._context(tokens, positions, document_ids, starts, step, cache)
        top = max(self.plan.owners) if last_only and tokens.shape[1] > 1 else None
        x, layer = self.embed(input_ids) if inputs_embeds is None else inputs_embeds, 0
        if not self.fp32_residual:
            x = x.to(product_dtype(x))
        slots: Slots = {}
        while layer < len(self.blocks):
            last = self._spans.get(layer)
            if last is None:
                if layer == top:
                    context.tail = self._tail(context)
                if states is not None:
                    states.append(x)
                x, slots = self._layer(layer, x, slots, context, cache)
            else:
                x, slots = self._iterate(layer, last, x, slots, context, cache, states)
                layer = last
            if top is not None and layer >= top and x.shape[1] > 1:  # it was in a span
                x, context.tail = x[:, -1:], self._tail(context)
            if context.tail is not None:
                context = context.tail
            slots = {j: slot for j, slot in slots.items() if self._last_reader[j] > layer}
            layer += 1
        if cache is None or step is None:
            return self.norm(x)
        cache.finish(step)
        return self._compiled[-1](x) if self._decodes_compiled(cache, context) else self.norm(x)

    def prefill(
        self, input_ids: Tensor, cache: KVCache, *, starts: Tensor | None = None, chunk: int | None = None
    ) -> Tensor:
        """Fill `cache` with a prompt and return the hidden state of its last token, (B, 1, d_model).

        Layers above the last owner compute nothing but that token. With `chunk`, the prompt goes through that many
        tokens at a time, which bounds the memory of activations; the result is the same. Raises `UserError` for a chunk
        that would change it, see `check_chunk`.
        """
        if chunk is not None:
            self.check_chunk(chunk, input_ids.shape[1])
        parts = input_ids.split(chunk or input_ids.shape[1], dim=1)
        for part in parts[:-1]:
            self.hidden(part, cache=cache, starts=starts, last_only=True)
        return self.hidden(parts[-1], cache=cache, starts=starts, last_only=True)

    def check_chunk(self, chunk: int, length: int) -> None:
        """Raises `UserError` for a prompt of `length` tokens that goes through `chunk` at a time where that is no size,
        or another result: layers that read from above take a few passes over a whole prompt, and then as many over
        every part of it."""
        if chunk < 1:
            raise UserError(f"chunk of a prompt is {chunk}; allowed: 1 or more")
        passes = self.passes
        if chunk < length and passes is not None and passes < length:
            first, last = next(iter(self._spans.items()))
            raise UserError(
                f"chunk of a prompt is {chunk}: layers {first} to {last} read from above and take {passes} passes over "
                f"a whole prompt, which its parts do not add up to; allowed: none, or prompts of up to {passes} tokens"
            )

    @property
    def passes(self) -> int | None:
        """How often cyclic layers are computed for a sequence; None: there are none."""
        iterations = self.plan.iterations
        return iterations.forward + iterations.backward if self._spans and iterations is not None else None

    def _dtype(self) -> torch.dtype:
        """Of the residual stream's products: what slots are made in."""
        return product_dtype(self.embed.weight)

    def _context(
        self,
        input_ids: Tensor,
        positions: Tensor | None,
        document_ids: Tensor | None,
        starts: Tensor | None,
        step: Step | None,
        cache: KVCache | None,
    ) -> Context:
        length, device = input_ids.shape[1], input_ids.device
        past = 0 if step is None else step.past
        columns, documents = torch.arange(length, device=device), None
        if step is not None:
            columns = columns + step.column
        if positions is None:
            positions = columns[None] if starts is None else (columns - starts[:, None]).clamp(min=0)
        if starts is not None and (length > 1 or cache is None):  # padding is a document of its own
            document_ids = (torch.arange(past + length, device=device) >= starts[:, None]).long()
            if document_ids.is_cuda and past == 0:
                documents = document_boundaries(document_ids, 2 * len(document_ids))
        cached = sizes = None
        if step is not None and cache is not None:
            rings = cache.is_static and length == 1
            cached = Cached(step.column, starts, None if rings else past + length)
            sizes = {
                j: store.size if rings else store.kept(past) + length
                for j, store in cache.stores.items()
                if isinstance(store, SlotStore)
            }
        is_text = None if starts is None else columns >= starts[:, None]
        context = Context(self.config.rope, positions, document_ids, self.backend, documents, cached, step, is_text)
        context.recompute_fusion = self.recompute_fusion
        context.prepare(self.plan, self.config.resolved_head_dim, sizes)
        return context

    def _tail(self, context: Context) -> Context:
        """What the last token alone goes on with."""
        if context.cached is None:
            ids = context.document_ids
            starts = None if ids is None else (ids != ids[:, -1:]).sum(1)
            cached = Cached(context.positions.new_zeros(1), starts, context.length)
        else:
            cached = context.cached
        return Context(self.config.rope, context.positions[:, -1:], None, self.backend, cached=cached)

    def _layer(self, i: int, x: Tensor, slots: Slots, context: Context, cache: KVCache | None) -> tuple[Tensor, Slots]:
        block: Any = self.blocks[i]
        read = [tensor for j in self.plan.reads_others(i) for tensor in slots[j]]
        if cache is not None:
            if self._decodes_compiled(cache, context):
                block = self._compiled[i]
            x, own = block(x, context, *read, store=cache.stores.get(i))
        elif self.gradient_checkpointing and torch.is_grad_enabled() and not block.recomputes:
            x, own = recompute(block, x, context, *read)
        else:
            x, own = block(x, context, *read)
        return x, slots if own is None else {**slots, i: own}

    def _decodes_compiled(self, cache: KVCache, context: Context) -> bool:
        return bool(self._compiled) and context.length == 1 and cache.is_static and context.step is not None

    def _iterate(
        self,
        first: int,
        last: int,
        x: Tensor,
        slots: Slots,
        context: Context,
        cache: KVCache | None,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Slots]:
        """Layers `first` to `last`, some of which read slots from above (LCKV, arXiv 2405.10637, section 2.3).

        Every pass starts from the same `x`. Slots from above are those of the pass before, zeros in the first; the
        diagonal is masked, so after n passes the first n tokens are exact, and with a cache there are no more passes
        than tokens. Only the last `backward` passes have gradients.
        """
        iterations, passes = self.plan.iterations, self.passes
        assert iterations is not None
        assert passes is not None
        if cache is not None:
            passes = min(passes, context.length)
        from_above = {j for i in range(first, last + 1) for j in self.plan.reads(i) if j > i}
        carried = {j: self._empty_slot(j, x, context, cache) for j in from_above}
        out, after = x, slots
        for turn in range(passes):
            with torch.no_grad() if turn < passes - iterations.backward else contextlib.nullcontext():
                out, after = x, {**slots, **carried}
                for i in range(first, last + 1):
                    if states is not None and turn == passes - 1:
                        states.append(out)
                    out, after = self._layer(i, out, after, context, cache)
            carried = {j: after[j] for j in from_above}
        return out, after

    def _empty_slot(self, owner: int, x: Tensor, context: Context, cache: KVCache | None) -> Slot:
        """Zeros for the new tokens of `owner`, after those that the cache holds."""
        widths = self.plan.owned(owner).widths(self.config.resolved_head_dim)
        empty = Slot(*(x.new_zeros((*x.shape[:2], *width), dtype=self._dtype()) for width in widths))
        if cache is None:
            return empty
        store = cache.stores[owner]
        assert isinstance(store, SlotStore)
        assert context.step is not None
        return store.extend(empty, context.step)
