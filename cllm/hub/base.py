"""The base model, a decoder without its head, and the part that both transformers classes share.

`AutoModel.from_pretrained` loads a `CLLMModel`. `CLLMForCausalLM.base_model` is one around the same decoder, so both
have the same weights under the same names.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.hub.config import CLLMConfig
from cllm.hub.generation import check_cache
from cllm.hub.inputs import Inputs, check_packing, pop_packing, read_inputs
from cllm.model.block import Block
from cllm.model.context import Context
from cllm.model.decoder import Decoder, recompute
from cllm.model.embedding import ScaledEmbedding
from cllm.model.loop import check_turns
from cllm.model.sizes import model_d_ff
from cllm.model.sources import Reader


class CLLMLayer(Block, GradientCheckpointingLayer):
    """A block with transformers' gradient checkpointing: it recomputes itself if `gradient_checkpointing` is set."""

    checkpoints_itself = True


class CLLMPreTrainedModel(PreTrainedModel):
    """Weights, embeddings and inputs of a `Decoder` in the attribute `model`: tensors are named `model.blocks.0...`."""

    config_class = CLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Decoder"]  # noqa: RUF012
    """Layers read each other's slots, so all must be on one device."""
    _supports_context_parallel = False

    model: Decoder

    def _new_decoder(self) -> Decoder:
        """The decoder of the config, with weights that `initialize_weights` draws later."""
        config = self.config.model_config
        decoder = Decoder(config, d_ff=model_d_ff(config))
        decoder._awaits_weights = True  # type: ignore[assignment]
        return decoder

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, Decoder):
            readers = {name: m for name, m in value.named_modules() if isinstance(m, Reader)}
            kept = {f"{name}.{p}" for name, m in readers.items() for p, _ in m.named_parameters()}
            self._keep_in_fp32_modules_strict = {name.split(".", 2)[2] for name in kept}  # in any dtype of the model
            self._is_stateful = any(value.plan.owned(j).is_state for j in value.plan.owners)
            for block in value.blocks:
                if type(block) is Block:
                    block.__class__ = CLLMLayer
                    block.gradient_checkpointing = value.gradient_checkpointing  # type: ignore[assignment]
                    block._gradient_checkpointing_func = _unless_cached(recompute)  # type: ignore[assignment]
        super().__setattr__(name, value)

    # ---- weights -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, but weights that do not fit the model are an error instead of a warning.

        Raises:
            UserError: naming tensors that are missing, unknown to the model or of another shape, and weight files that
                cannot be read.
        """
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise UserError("ignore_mismatched_sizes is True; allowed: False, every tensor has to fit")
        with without_load_report(), _naming_broken_files(pretrained_model_name_or_path):
            loaded: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, info = loaded
        _check_loaded(model, info, pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    def initialize_weights(self) -> None:
        """Draw new weights as `init` of the config says, unless they are drawn or loaded already."""
        if self.model.embed.weight.is_meta or not getattr(self.model, "_awaits_weights", False):
            return
        if not any(getattr(parameter, "_is_hf_initialized", False) for parameter in self.parameters()):
            self.model.init_weights()
        self.model._awaits_weights = False  # type: ignore[assignment]
        for module in self.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's embedding (vocab_size, d_model)."""
        assert isinstance(value, nn.Embedding)
        if self.model.config.scale_embeddings and not isinstance(value, ScaledEmbedding):
            raise UserError(
                f"the embedding is a {type(value).__name__}, which does not scale, but model.scale_embeddings is true; "
                "allowed: ScaledEmbedding of cllm.model.embedding"
            )
        self.model.embed = value
        self.model.config = self.model.config.model_copy(update={"vocab_size": value.num_embeddings})

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        function, options = gradient_checkpointing_func, dict(getattr(gradient_checkpointing_func, "keywords", {}))
        if enable and options.get("use_reentrant"):
            raise UserError(
                "gradient checkpointing with use_reentrant true loses the gradients of slots that other layers read; "
                'allowed: gradient_checkpointing_kwargs {"use_reentrant": False}, or none'
            )
        if options in ({}, {"use_reentrant": False}) and getattr(function, "func", function) is checkpoint:
            function = recompute
        elif isinstance(function, functools.partial):
            function = functools.partial(function, use_reentrant=False)
        self.model.gradient_checkpointing = enable
        for i, block in enumerate(self.model.blocks):
            block.gradient_checkpointing = enable and i % every_n_layers == 0  # type: ignore[assignment]
            block._gradient_checkpointing_func = _unless_cached(function)  # type: ignore[assignment]

    # ---- one forward pass --------------------------------------------------------------------------------------------

    def _states_wanted(
        self, states: bool | list[int] | None, attentions: bool | None, others: dict[str, Any]
    ) -> bool | list[int] | None:
        """`output_hidden_states`, by default as in the config.

        Raises:
            UserError: for `output_attentions`, and for unsupported arguments that are neither None nor False.
        """
        attentions = self.config.output_attentions if attentions is None else attentions
        for name, value in {"output_attentions": attentions, **others}.items():
            if value is not None and value is not False:
                raise UserError(f"{name} is not supported by cllm models; leave it out")
        return self.config.output_hidden_states if states is None else states

    def _as_requested(self, output: Any, return_dict: bool | None) -> Any:
        """`output`, or a tuple of its values if `return_dict`, by default as in the config, is false."""
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def _tokens(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """A tensor (B, T), an element for each token. Raises `UserError` unless one input is given, in its shape."""
        if input_ids is not None and inputs_embeds is not None:
            raise UserError("input_ids and inputs_embeds are both given; allowed: one of the two")
        if inputs_embeds is not None:
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[2] != self.config.hidden_size:
                found, width = tuple(inputs_embeds.shape), self.config.hidden_size
                raise UserError(f"inputs_embeds are {found}; allowed: (B, T, {width})")
            return inputs_embeds[..., 0]
        if input_ids is None or input_ids.ndim != 2:
            raise UserError(f"input_ids are {None if input_ids is None else tuple(input_ids.shape)}; allowed: (B, T)")
        return input_ids

    def _cache(self, given: Any, use_cache: bool | None, *, scored: bool = False) -> KVCache | None:
        if given is not None:
            return check_cache(given)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.model.training and not scored
        return KVCache(self.model.config) if use_cache else None

    def _inputs(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: KVCache | None,
        *,
        more_follow: bool,
    ) -> Inputs:
        """`read_inputs` for `tokens` (B, T). Padding on the right closes a cache that the caller did not ask for."""
        past = None if cache is None else cache.get_seq_length()
        if cache is not None and past and cache.batch != len(tokens):
            raise UserError(f"past_key_values holds {cache.batch} sequences and input_ids {len(tokens)}")
        known = None if cache is None else cache.starts
        inputs = read_inputs(tokens, attention_mask, position_ids, past=past, known=known, more_follow=more_follow)
        if cache is not None and inputs.after:
            cache.closed = (
                f"past_key_values: keeps {inputs.after} padding tokens at the end of a sequence, so that no tokens can "
                'follow; pad on the left (tokenizer.padding_side = "left")'
            )
        return inputs

    def _check_context(self, tokens: int, positions: Tensor | None) -> None:
        context = self.config.max_position_embeddings
        if tokens > context and positions is not None:  # packed documents restart their positions
            tokens = int(positions.max()) + 1
        if tokens > context:
            raise UserError(f"{tokens} tokens, but the model's context (model.max_seq_len) is {context}")

    def _hidden(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        inputs: Inputs,
        cache: KVCache | None,
        wanted: bool | list[int] | None,
        *,
        last_only: bool = False,
    ) -> tuple[Tensor, Any]:
        """The last hidden states, and if `wanted` a tuple: the input of every layer, then the last hidden states.

        `wanted` may list indices from 0 to n_layers, negative ones from the end; the other entries are then None.
        """
        states: list[Tensor] | None = [] if wanted is not None and wanted is not False else None
        check_turns(self.model.blocks, self.model.plan)
        hidden = self.model.hidden(
            input_ids,
            *inputs[:2],
            cache=cache,
            starts=inputs.starts,
            last_only=last_only,
            inputs_embeds=inputs_embeds,
            states=states,
        )
        if states is None:
            return hidden, None
        states.append(hidden)
        if wanted is True:
            return hidden, tuple(states)
        assert isinstance(wanted, list | tuple)
        kept = {i % len(states) for i in wanted}
        return hidden, tuple(state if i in kept else None for i, state in enumerate(states))


class CLLMModel(CLLMPreTrainedModel):
    """The base model: it returns hidden states instead of logits.

    `CLLMModel(config)` draws new weights and has no head. With `decoder` it is a view of that decoder.
    """

    _keys_to_ignore_on_load_unexpected = [r"^model\.head\."]  # noqa: RUF012 - in checkpoints with a head

    def __init__(self, config: CLLMConfig, decoder: Decoder | None = None):
        super().__init__(config)
        if decoder is None:
            decoder = self._new_decoder()
            decoder.head = None  # type: ignore[assignment]
        elif decoder.head is not None:
            self._keys_to_ignore_on_save = ["model.head.weight"]
        self.model = decoder
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        return self

    @property
    def layers(self) -> nn.ModuleList:
        """The decoder's blocks."""
        return self.model.blocks

    def get_output_embeddings(self) -> None:
        """None: the base model has no head."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """The normalised hidden states that the head reads, `last_hidden_state` (B, T, d_model).

        Arguments and the returned cache are as in `CLLMForCausalLM.forward`.

        Raises:
            UserError: for unsupported arguments, more tokens than the model's context, and as `read_inputs` does.
        """
        packing = pop_packing(kwargs)
        wanted = self._states_wanted(output_hidden_states, output_attentions, kwargs)
        tokens = self._tokens(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        asked = past_key_values is not None or bool(use_cache)
        inputs = self._inputs(tokens, attention_mask, position_ids, cache, more_follow=asked)
        check_packing(packing, tokens, inputs.document_ids)
        self._check_context((0 if cache is None else cache.get_seq_length()) + tokens.shape[1], inputs.positions)
        hidden, states = self._hidden(input_ids, inputs_embeds, inputs, cache, wanted)
        output = BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache, hidden_states=states)
        return self._as_requested(output, return_dict)


def _unless_cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, a form of `torch.utils.checkpoint`, except for passes with a cache.

    Recomputing one of those would write to the cache again, and read what later passes have changed.
    """
    return functools.partial(_checkpoint_unless_cached, function)


def _checkpoint_unless_cached(function: Callable[..., Any], block: Any, x: Tensor, context: Context, *read: Any) -> Any:
    return function(block, x, context, *read) if context.cache_layout is None else block(x, context, *read)


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Without transformers' table of tensors that do not fit; the error that follows names them."""

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextlib.contextmanager
def _naming_broken_files(folder: Any) -> Iterator[None]:
    """Name the broken file in errors of safetensors, which do not."""
    try:
        yield
    except SafetensorError as error:
        for file in sorted(Path(folder).glob("*.safetensors")):
            if fault := _fault(file):
                raise UserError(f"{file}: cannot be read: {fault}") from None
        raise UserError(f"{folder}: weights cannot be read: {error}") from None


def _fault(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt"):
            return None
    except (OSError, SafetensorError) as error:
        return str(error)


def _check_loaded(model: CLLMPreTrainedModel, info: dict[str, Any], path: Any) -> None:
    def named(names: Any) -> str:
        first, *more = sorted(names)
        return f"{first}{f' and {len(more)} more' if more else ''}"

    wrong = []
    if info["missing_keys"]:
        wrong.append(f"missing: {named(info['missing_keys'])}")
    if info["unexpected_keys"]:
        wrong.append(f"not in the model: {named(info['unexpected_keys'])}")
    if info["mismatched_keys"]:
        wrong.append(
            "of another shape: " + named(f"{n} is {tuple(a)}, not {tuple(b)}" for n, a, b in info["mismatched_keys"])
        )
    head: nn.Module | None = model.model.head
    if head is not None and model.config.tie_word_embeddings and head.weight is not model.model.embed.weight:
        wrong.append("model.tie_embeddings is true, but model.head.weight differs from model.embed.weight")
    if wrong:
        raise UserError(f"{path}: the weights are not those of the model in config.json: {'; '.join(wrong)}")


AutoModel.register(CLLMConfig, CLLMModel)
MODEL_MAPPING_NAMES[CLLMConfig.model_type] = CLLMModel.__name__
