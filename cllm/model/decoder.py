"""The decoder: token ids to logits. The KV plan decides which layer reads which slots.

`Decoder.hidden` runs the layers from the bottom up with a dictionary of slots. Each block gets the slots that it reads.
An owner's slot is added to the dictionary, and removed after its last reader. Cyclic spans of layers, which read slots
from above, are computed several times, each time with the slots of the previous pass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cllm.cache.paged import PagedPass
from cllm.cache.slot import Slot
from cllm.cache.stores import SlotStore, Step
from cllm.config import ModelConfig
from cllm.errors import UserError
from cllm.kernels.few_rows import FEW_ROWS
from cllm.kernels.fp8_casts import FP8_CASTS
from cllm.kernels.sum_products import SUM_PRODUCTS
from cllm.model.block import Block
from cllm.model.context import Context, sequence_context
from cllm.model.embedding import ScaledEmbedding
from cllm.model.initial import check_can_initialise, check_no_buffers, draw_weights
from cllm.model.loop import share_turns
from cllm.model.loss import Head
from cllm.model.norm import RMSNorm
from cllm.model.precision import product_dtype
from cllm.model.requests import request_context
from cllm.model.tail import last_token, with_tail
from cllm.plan.prompt import prompt_tail, tail_slots

if TYPE_CHECKING:
    from cllm.cache.cache import KVCache

Slots = dict[int, Slot]


def recompute(function: Any, *inputs: Any, **more: Any) -> Any:
    """`function(*inputs, **more)` with gradient checkpointing: activations are recomputed in the backward.

    `function` may not draw random numbers. Their state is not kept, which a CUDA graph could not record.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **more)


class Decoder(nn.Module):
    """A pre-norm decoder. `config.vocab_size` must be set; `d_ff` overrides the config's.

    The constructor does not initialise the weights: call `init_weights`, or load weights. In `model/sizes.py`,
    `build_decoder` returns an initialised decoder, and `meta_decoder` one whose parameters are counted or loaded.
    """

    def __init__(self, config: ModelConfig, *, d_ff: int | None = None, backend: str = "auto"):
        super().__init__()
        assert config.vocab_size is not None, "set model.vocab_size before building the model"
        self.config, self.plan, self.backend = config, config.plan(), backend
        self.gradient_checkpointing = False
        self.recompute_fusion = False
        """Recompute fused keys and values in the backward instead of saving them."""
        self.fp32_residual = False
        """Under autocast, keep the residual stream in fp32 instead of autocast's dtype."""
        embedding = ScaledEmbedding if config.scale_embeddings else nn.Embedding
        self.embed = embedding(config.vocab_size, config.d_model)
        d_ff = d_ff or config.resolved_d_ff
        self.blocks = nn.ModuleList(Block(config, self.plan, i, d_ff) for i in range(config.n_layers))
        share_turns(self, self.blocks, self.plan)
        self.stream_norms = nn.ModuleDict(
            {str(i): RMSNorm(config.d_model, eps=config.norm_eps) for i in sorted(self.plan.inputs)}
        )
        """Norms of the outputs of layers that higher layers project, by layer (SwiftKV's norm_swift)."""
        self.norm = RMSNorm(config.d_model, eps=config.norm_eps)
        self.head = Head(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight
        self._compiled: tuple[Any, ...] = ()
        """Compiled blocks and final norm for decoding. The tuple hides them from `state_dict`."""
        self.on_layer: Callable[[Tensor], None] | None = None
        """Called with the residual stream (B, T, d_model) after every layer."""
        self.observers = 0
        """Contexts that record what layers compute, such as queries. While there are any, no layer skips tokens."""
        self.hand_slots(None)
        self._spans, self._prompt_tail = dict(self.plan.cyclic_spans()), prompt_tail(self.plan)
        self._tail_slots = tail_slots(self.plan)
        for name, module in self.named_modules():
            check_can_initialise(name, module)
            check_no_buffers(name, module)

    def hand_slots(self, table: Sequence[Sequence[int]] | None) -> None:
        """Hand layer i the slots of layers `table[i]`, all of which must return theirs (`Block.returns_slot`).

        None: those of the plan.
        """
        self._reads = [self.plan.reads_others(i) for i in range(len(self.plan))] if table is None else table
        readers = {j: [i for i, reads in enumerate(self._reads) if j in reads] for j in self.plan.owners}
        self._last_reader = {j: max(layers, default=j) for j, layers in readers.items()}

    def init_weights(self) -> None:
        """Draw all weights from torch's global generator as `config.init` says; norms become 1, biases 0.

        Other modules with direct parameters must initialise them in a method `reset_parameters()`.

        Raises:
            TypeError: for such a module without `reset_parameters`, or whose `reset_parameters` leaves one out.
        """
        draw_weights(self, self.config)

    def compile_decoding(self) -> None:
        """Compile the blocks for passes of one token over a static cache. Other passes stay uncompiled.

        With coordinate descent tuning, the compiler also writes matrix products with one row (a batch of one sequence)
        as reductions. These read weights at the full memory bandwidth, which a matrix kernel does not reach. Products
        of up to 16 rows have a kernel of their own.
        """
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(self.blocks))
        options: dict[str, Any] = {"coordinate_descent_tuning": True, "post_grad_custom_post_pass": FEW_ROWS}
        self._compiled = tuple(torch.compile(m, dynamic=False, options=options) for m in (*self.blocks, self.norm))

    def compile_blocks(self) -> None:
        """Compile each block separately with torch.compile. Layers of the same kind share the compiled code."""
        # A few versions of each kind of layer: with and without gradient, training and validation shapes.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 * len(self.blocks))
        options: dict[str, Any] = {"post_grad_custom_pre_pass": SUM_PRODUCTS, "post_grad_custom_post_pass": FP8_CASTS}
        for block in self.blocks:
            block.compile(dynamic=False, options=options)
        for norm in (self.norm, *self.stream_norms.values()):
            norm.compile(dynamic=False)

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
        """Next-token cross-entropy in nats, computed in chunks of logits; see `model/loss.py` for `labels` (B, T)."""
        return self.head(self.hidden(input_ids, positions, document_ids), labels, reduction=reduction)

    def hidden(
        self,
        input_ids: Tensor | None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        *,
        cache: KVCache | PagedPass | None = None,
        starts: Tensor | None = None,
        last_only: bool = False,
        inputs_embeds: Tensor | None = None,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """The normalised hidden states (B, T, d_model) that the head reads.

        Args:
            input_ids: (B, T) integers; None with `inputs_embeds`.
            positions: (B or 1, T) integers for RoPE; by default they count from 0 at the first token after padding,
                tokens in the cache included.
            document_ids: (B, T) integers, ascending; tokens see only their own document. Positions are not derived
                from it: pass positions that restart at each document if documents must be independent.
            cache: the previous tokens. The new tokens are added to it. With a `PagedPass`, `input_ids` is one row
                (1, T) of the tokens of several requests, and `positions` (1, T) is required.
            starts: (B,) int64, tokens of padding before each sequence. Pass them with a cache's first tokens; the cache
                stores them.
            last_only: compute only what the last token and the cache need: above the layers that write slots of all
                tokens, only the last tokens continue (`prompt_tail`). The result is exact, and (B, 1, d_model), or
                for a `PagedPass` (1, requests, d_model). While queries are recorded (`observers`,
                `KVCache.records_queries`), all layers compute all tokens.
            inputs_embeds: (B, T, d_model), input of the first layer instead of the embeddings of `input_ids`.
            states: a list to which the input of every layer is appended, n_layers tensors (B, T, d_model). For layers
                that are computed several times, it is the input of the last time.

        Raises:
            UserError: for documents together with padding or a cache, and for a cache of another model, another batch
                size or too few free tokens.
        """
        if document_ids is not None and (cache is not None or starts is not None):
            raise UserError("document_ids (packed documents) cannot be combined with a cache or with padding")
        step = None
        tokens = input_ids if inputs_embeds is None else inputs_embeds[..., 0]  # only for shape and device
        assert tokens is not None
        if isinstance(cache, PagedPass):
            assert positions is not None
            context = request_context(self.config.rope, positions, self.backend, cache, dtype=self._dtype())
        else:
            if cache is not None:
                cache.check(self.config)
                step, starts = cache.begin(self.plan, tokens, starts, self._dtype()), cache.starts
            context = self._context(tokens, positions, document_ids, starts, step, cache)
        exits = last_only and tokens.shape[1] > 1 and not self._is_observed(cache)
        top, tail = self._exit(tokens.shape[1], cache) if exits else (None, 1)
        x, layer = self.embed(input_ids) if inputs_embeds is None else inputs_embeds, 0
        if not self.fp32_residual:
            x = x.to(product_dtype(x))
        slots: Slots = {}
        while layer < len(self.blocks):
            last = self._spans.get(layer)
            if last is None:
                if layer == top and layer not in self.plan.inputs:  # only its slot is needed of all tokens
                    context = with_tail(context, cache, tail)
                elif tail > 1 and layer == self.plan.last_of_prompt:  # only its slot is needed of the tail
                    assert context.tail is not None
                    context = replace(context, tail=replace(context.tail, tail=last_token(context, cache)))
                if states is not None:
                    states.append(x)
                x, slots = self._layer(layer, x, slots, context, cache)
            else:
                x, slots = self._iterate(layer, last, x, slots, context, cache, states)
                layer = last
            if layer == top and context.tail is None:  # all of its tokens were needed
                x, context = context.last_of(x, tail), with_tail(context, cache, tail)
            slots = {j: slot for j, slot in slots.items() if self._last_reader[j] > layer}
            layer += 1
        if last_only and not exits:
            x = x[:, -1:]
        if cache is None or step is None or isinstance(cache, PagedPass):
            return self.norm(x)
        cache.finish(step)
        return self._compiled[-1](x) if self._decodes_compiled(cache, context) else self.norm(x)

    def prefill(
        self, input_ids: Tensor, cache: KVCache, *, starts: Tensor | None = None, chunk: int | None = None
    ) -> Tensor:
        """Fill `cache` with a prompt and return the hidden state of its last token, (B, 1, d_model).

        Upper layers compute only the last tokens, if they can (`prompt_tail`). With `chunk`, the prompt is processed in
        pieces of that many tokens, which bounds the memory of activations and gives the same result. Raises `UserError`
        for a chunk that would change the result, see `check_chunk`.
        """
        if chunk is not None:
            self.check_chunk(chunk, input_ids.shape[1])
        parts = input_ids.split(chunk or input_ids.shape[1], dim=1)
        for part in parts[:-1]:
            self.hidden(part, cache=cache, starts=starts, last_only=True)
        return self.hidden(parts[-1], cache=cache, starts=starts, last_only=True)

    def check_chunk(self, chunk: int, length: int) -> None:
        """Check that a prompt of `length` tokens can be processed in pieces of `chunk` tokens.

        Raises:
            UserError: for a chunk below 1, and for one that would change the result. Layers that read from above take a
                fixed number of passes over a prompt, and would take as many over each of its pieces.
        """
        if chunk < 1:
            raise UserError(f"chunk of a prompt is {chunk}; allowed: 1 or more")
        passes = self.passes
        if chunk < length and passes is not None and passes < length:
            first, last = next(iter(self._spans.items()))
            raise UserError(
                f"chunk of a prompt is {chunk}: layers {first} to {last} read from above and take {passes} passes over "
                "the entire prompt, so that its parts give another result; allowed: None, or prompts of up to "
                f"{passes} tokens"
            )

    @property
    def passes(self) -> int | None:
        """How often cyclic layers are computed for a sequence; None without cyclic layers."""
        iterations = self.plan.iterations
        return iterations.forward + iterations.backward if self._spans and iterations is not None else None

    def _dtype(self) -> torch.dtype:
        """The dtype of matrix products, and so of slots."""
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
        return sequence_context(
            *(self.config, self.plan, input_ids, positions, document_ids, starts, step, cache),
            backend=self.backend,
            recompute_fusion=self.recompute_fusion,
        )

    def _is_observed(self, cache: KVCache | PagedPass | None) -> bool:
        """Whether queries of the pass are recorded, which no layer may skip then."""
        if isinstance(cache, PagedPass):
            return False
        return self.observers > 0 or (cache is not None and cache.records_queries)

    def _exit(self, length: int, cache: KVCache | PagedPass | None) -> tuple[int, int]:
        """The layer above which only the last tokens of `length` continue, and their number."""
        exit_at = self._prompt_tail
        return exit_at if exit_at[1] < length and not isinstance(cache, PagedPass) else (self.plan.last_of_prompt, 1)

    def _layer(
        self, i: int, x: Tensor, slots: Slots, context: Context, cache: KVCache | PagedPass | None
    ) -> tuple[Tensor, Slots]:
        block: Any = self.blocks[i]
        read = [slots[j] for j in self._reads[i]]
        source = self.plan.layers[i].own
        more: dict[str, Any] = {}
        if source is not None and source.input is not None:
            stream = context.streams[source.input]
            more["source"] = context.of_tail(stream) if i in self._tail_slots else stream
        if cache is not None:
            if self._decodes_compiled(cache, context):
                block = self._compiled[i]
            if self.plan.layers[i].local is not None:
                more["local_store"] = cache.stores[len(self.plan) + i]
            x, own = block(x, context, *read, store=cache.stores.get(i), **more)
        elif self.gradient_checkpointing and torch.is_grad_enabled() and not block.checkpoints_itself:
            x, own = recompute(block, x, context, *read, **more)
        else:
            x, own = block(x, context, *read, **more)
        if str(i) in self.stream_norms:
            context.streams[i] = self.stream_norms[str(i)](x)
        if self.on_layer is not None:
            self.on_layer(x)
        return x, slots if own is None else {**slots, i: own}

    def _decodes_compiled(self, cache: KVCache | PagedPass, context: Context) -> bool:
        return bool(self._compiled) and context.length == 1 and cache.is_static and context.step is not None

    def _iterate(
        self,
        first: int,
        last: int,
        x: Tensor,
        slots: Slots,
        context: Context,
        cache: KVCache | PagedPass | None,
        states: list[Tensor] | None = None,
    ) -> tuple[Tensor, Slots]:
        """Layers `first` to `last`, some of which read slots from above (LCKV, arXiv 2405.10637, section 2.3).

        Every pass starts from the same `x`. Slots from above are those of the previous pass, zeros in the first. The
        diagonal is masked, so that after n passes the first n tokens are exact; with a cache, there are at most as many
        passes as tokens. Only the last `backward` passes have gradients.
        """
        iterations, passes = self.plan.iterations, self.passes
        assert iterations is not None
        assert passes is not None
        if cache is not None:
            passes = min(passes, context.length)
        from_above = {j for i in range(first, last + 1) for j in self.plan.reads(i) if j > i}
        carried = {j: self._empty_slot(j, x, context, cache) for j in from_above}
        out, updated = x, slots
        for n in range(passes):
            with torch.no_grad() if n < passes - iterations.backward else contextlib.nullcontext():
                out, updated = x, {**slots, **carried}
                for i in range(first, last + 1):
                    if states is not None and n == passes - 1:
                        states.append(out)
                    out, updated = self._layer(i, out, updated, context, cache)
            carried = {j: updated[j] for j in from_above}
        return out, updated

    def _empty_slot(self, owner: int, x: Tensor, context: Context, cache: KVCache | PagedPass | None) -> Slot:
        """A slot of zeros for the new tokens of `owner`, after its cached tokens, as readers see it."""
        widths = self.plan.owned(owner).widths(self.config.resolved_head_dim)
        empty = Slot(*(x.new_zeros((*x.shape[:2], *width), dtype=self._dtype()) for width in widths))
        if cache is not None:
            store = cache.stores[owner]
            assert isinstance(store, SlotStore)
            assert context.step is not None
            empty = store.extend(empty, context.step)
        mixer: Any = self.blocks[owner].attention
        return mixer.as_read(empty, context, self._dtype())
