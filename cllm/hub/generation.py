"""`generate` over a `KVCache`: the cache, the prompt, and refusals before anything is computed.

transformers calls most of these methods by name. They override its defaults for caches with one entry per layer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.generation import GenerationMode
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.hub.inputs import padding_of
from cllm.model.decoder import Decoder
from cllm.model.graph import StepGraph

_TOKENIZERS = ("tokenizer", "assistant_tokenizer")


class CLLMGenerationMixin(GenerationMixin):
    """`generate` over a `KVCache`."""

    config: Any
    model: Decoder
    _graph: StepGraph | None = None
    """The decode step over the current static cache, recorded by the model's forward pass."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers. A CUDA graph recorded meanwhile is released, because it keeps its cache alive."""
        if kwargs.get("cache_implementation") == "paged":
            raise UserError(
                "cache_implementation is paged; allowed: dynamic, static (continuous batching is generate_batch)"
            )
        base: Any = super()
        try:
            return base.generate(*args, **kwargs)
        finally:
            self._graph = None

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)  # transformers looks at the signature
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """`generate` calls this before every pass. It hands on the tokenizers that it takes for `stop_strings`."""
        base: Any = super()
        inputs = {name: value for name, value in kwargs.items() if name not in _TOKENIZERS}
        return base.prepare_inputs_for_generation(*args, **inputs)

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> Any:
        """`generate` calls this to make its cache. Allowed values of `cache_implementation`: None, dynamic, static."""
        kind, given = generation_config.cache_implementation, model_kwargs.get("past_key_values")
        embeds, context = model_kwargs.get("inputs_embeds"), self.config.max_position_embeddings
        if embeds is not None and max_cache_length >= context:  # the length of the prompt was unknown until now
            new = max_cache_length + 1 - embeds.shape[1]
            raise UserError(
                f"inputs_embeds of {embeds.shape[1]} tokens and up to {new} new ones do not fit the model's context "
                f"(model.max_seq_len), {context}"
            )
        if embeds is not None and generation_config.prefill_chunk_size is not None:
            raise UserError(
                f"prefill_chunk_size is {generation_config.prefill_chunk_size} and the prompt is inputs_embeds; "
                "allowed: chunks of input_ids"
            )
        if generation_mode == GenerationMode.ASSISTED_GENERATION and self.model.passes is not None:
            raise UserError(
                "assisted decoding: layers that read from above are iterated over several new tokens, which is not "
                "what one token at a time gives; allowed: plans in which no layer does"
            )
        if generation_mode == GenerationMode.ASSISTED_GENERATION or generation_config.is_assistant:
            self._check_windows(max_cache_length)
        if given is not None:
            if kind is not None:
                raise UserError(f"cache_implementation is {kind} and past_key_values is given; allowed: one of the two")
            most = check_cache(given).max_len
            if most is not None and most < max_cache_length:
                raise UserError(
                    f"past_key_values has places for {most} tokens (max_len), but the prompt and max_new_tokens need "
                    f"{max_cache_length}"
                )
        elif generation_config.use_cache is not False:
            if kind not in (None, "dynamic", "static"):
                raise UserError(f"cache_implementation is {kind}; allowed: dynamic, static")
            reserved = getattr(generation_config, "max_cache_len", None) or 0
            max_len = max(max_cache_length, reserved) if kind == "static" else None
            model_kwargs["past_key_values"] = KVCache(self.model.config, max_len=max_len)

    def _prepare_attention_mask_for_generation(
        self, inputs_tensor: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
    ) -> Any:
        """`generate` calls this if no mask is given. transformers treats every pad token as padding.

        Here only pad tokens before a sequence are padding, and in a batch also those after it. Others are text, as are
        all tokens that follow those in a cache.
        """
        base: Any = super()
        mask = base._prepare_attention_mask_for_generation(inputs_tensor, generation_config, model_kwargs)
        cache = model_kwargs.get("past_key_values")
        if isinstance(cache, KVCache) and cache.seen:
            starts = mask.new_zeros(len(mask)) if cache.starts is None else cache.starts.to(mask.device)
            if len(starts) == len(mask):
                return (torch.arange(mask.shape[1], device=mask.device) >= starts[:, None]).to(mask.dtype)
        before = mask.cumsum(1) == 0
        if len(mask) == 1:
            return mask.new_ones(mask.shape) if before.all() else (~before).to(mask.dtype)
        after = mask.flip(1).cumsum(1).flip(1) == 0
        return (~(before | after)).to(mask.dtype)

    def _prefill(
        self, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """`generate` calls this for the prompt, and splits it into chunks together with its mask.

        The first chunk of a sequence may be all padding, so the padding is read from the full mask here.
        """
        cache, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        embeds, chunk = model_kwargs.get("inputs_embeds"), generation_config.prefill_chunk_size
        length = input_ids.shape[1] if embeds is None else embeds.shape[1]
        columns = getattr(generation_config, "_mask_length", -1) if mask is None else mask.shape[1]
        past = 0 if cache is None or columns != length else cache.seen  # otherwise input_ids are only the new tokens
        if past >= length:
            raise UserError(
                f"past_key_values holds {past} tokens and the prompt has {length}; a prompt begins with the tokens "
                "that are in the cache and has more (for another prompt, reset() the cache)"
            )
        if chunk is not None and cache is not None:
            self.model.check_chunk(chunk, length - past)
            if cache.seen == 0:
                cache.starts = None if mask is None else padding_of(mask, cached=True)
        base: Any = super()
        return base._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _get_candidate_generator(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """`generate` calls this for assisted decoding.

        Prompt look-up is the only candidate generator that may propose tokens beyond the maximum length, which might
        not fit the context, so it is wrapped here.
        """
        if generation_config.assistant_early_exit is not None:
            raise UserError(
                f"assistant_early_exit is {generation_config.assistant_early_exit}: the model has no heads after lower "
                "layers; allowed: assistant_model or prompt_lookup_num_tokens"
            )
        base: Any = super()
        generator = base._get_candidate_generator(generation_config, *args, **kwargs)
        if isinstance(generator, PromptLookupCandidateGenerator):
            bounded: Any = generator
            propose, most = generator.get_candidates, generation_config.max_length - 1
            bounded.get_candidates = lambda ids, **given: (propose(ids, **given)[0][:, :most], None)
        return generator

    def _check_windows(self, length: int) -> None:
        """Refuse windows below `length`: assisted decoding removes tokens, and a ring has overwritten earlier ones."""
        windows = [window for slot in self.model.plan.slots if (window := self.model.plan.kept(slot))]
        if windows and min(windows) < length:
            raise UserError(
                f"assisted decoding of {length} tokens: it takes tokens back, and a slot with a window of "
                f"{min(windows)} has forgotten what stood before them"
            )

    def _validate_generated_length(
        self, generation_config: Any, input_ids_length: int, has_default_max_length: bool
    ) -> None:
        """`generate` calls this before it computes anything."""
        context, longest = self.config.max_position_embeddings, generation_config.max_length
        if input_ids_length > context:
            raise UserError(
                f"the prompt has {input_ids_length} tokens, but the model's context (model.max_seq_len) is {context}"
            )
        if longest > context:
            raise UserError(
                f"a prompt of {input_ids_length} tokens and up to {longest - input_ids_length} new ones do not fit the "
                f"model's context (model.max_seq_len), {context}; allowed: max_new_tokens up to "
                f"{context - input_ids_length}"
            )
        base: Any = super()
        base._validate_generated_length(generation_config, input_ids_length, has_default_max_length)

    # ---- continuous batching -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def init_continuous_batching(
        self, generation_config: Any = None, continuous_batching_config: Any = None, workload_hints: Any = None
    ) -> Any:
        """transformers' manager of continuous batching, whose paged cache has one layer for each owner.

        Raises:
            UserError: for a plan that a paged cache cannot hold, and settings that do not apply (see `batching.py`).
        """
        from cllm.hub.batching import new_manager

        if (manager := self.__dict__.get("_cached_continuous_batching_manager")) is not None:
            return manager
        return new_manager(self, generation_config, continuous_batching_config, workload_hints)

    def generate_batch(self, inputs: Any, generation_config: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As in transformers: `{request: GenerationOutput}` for prompts of any lengths, lists of token ids.

        Raises:
            UserError: before anything is computed, as `init_continuous_batching` does, and for a prompt that is empty,
                has unknown tokens, or does not fit the context.
        """
        from cllm.hub.batching import check_prompt

        new = kwargs.get("max_new_tokens")
        if new is None:
            new = (generation_config or self.generation_config).max_new_tokens
        if isinstance(inputs, Tensor):
            inputs = inputs.tolist()
        if not isinstance(inputs, list | tuple):
            raise UserError(f"inputs is a {type(inputs).__name__}; allowed: a list of prompts, lists of token ids")
        for n, ids in enumerate(inputs):
            check_prompt(self.model, ids, new, f"inputs[{n}]")
        base: Any = super()
        return base.generate_batch(inputs, generation_config, *args, **kwargs)


def check_cache(given: Any) -> KVCache:
    """Return `given`. Raises `UserError` for a cache of another class."""
    if not isinstance(given, KVCache):
        raise UserError(f"past_key_values is a {type(given).__name__}; allowed: cllm.cache.cache.KVCache")
    return given
