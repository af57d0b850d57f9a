"""Continuous batching: transformers' scheduler and paged cache around a decoder whose owners write the pages.

transformers' manager expects that every layer caches keys and values. `PagedModel` presents a decoder as such a model:
its config has a layer for each owner of the KV plan, so that pages exist for owners only, and its forward pass takes
the row of tokens and the indices of pages that the manager makes.

Plans that a paged cache cannot hold are refused before anything runs, with the layer: latents, recurrent states, layers
that read from above, and owners with different numbers of KV heads.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.modeling_outputs import CausalLMOutputWithPast

from cllm.cache.paged import PagedPass, PagedSlot, Update
from cllm.errors import UserError
from cllm.model.decoder import Decoder

_FULL, _WINDOW = "full_attention", "sliding_attention"
_INSTEAD = "use generate, or transformers serve without --continuous-batching"
_REFUSED = ("varlen_compile_config", "decode_compile_config", "default_compile_level", "use_cuda_graph")
"""Settings of a `ContinuousBatchingConfig` that pad or record the pass, whose shapes change here with every batch."""


def check_batchable(decoder: Decoder) -> None:
    """Refuse a decoder whose slots a paged cache cannot hold.

    Raises:
        UserError: naming the first layer, its kind, and what is allowed.
    """
    plan = decoder.plan
    for layer in plan.owners:
        if not (own := plan.owned(layer)).is_plain:
            raise UserError(
                f"continuous batching: layer {layer} stores a {own.noun} ({own.text}), and pages hold keys and values "
                f"of one shape; {_INSTEAD}"
            )
    for first, last in plan.cyclic_spans():
        raise UserError(
            f"continuous batching: layers {first} to {last} read from above and take several passes over a prompt, "
            f"which the scheduler does not make; {_INSTEAD}"
        )
    heads = {layer: plan.owned(layer).kv_heads for layer in plan.owners}
    first, expected = next(iter(heads.items()))
    for layer, count in heads.items():
        if count != expected:
            raise UserError(
                f"continuous batching: layer {first} stores {expected} KV heads and layer {layer} {count}, and pages "
                f"hold one number of KV heads; {_INSTEAD}"
            )
    for layer in plan.owners:
        if (own := plan.owned(layer)).head_dim is not None:
            raise UserError(
                f"continuous batching: layer {layer} stores heads of {own.head_dim} channels and model.head_dim is "
                f"{decoder.config.resolved_head_dim}, and pages hold one head size; {_INSTEAD}"
            )
    for layer, block in enumerate(decoder.blocks):
        mixer: Any = block.attention
        if not mixer.takes_requests:
            raise UserError(
                f"continuous batching: layer {layer} is computed by {type(mixer).__name__}, which takes one sequence a "
                f"row; {_INSTEAD}"
            )


def paged_config(decoder: Decoder) -> LlamaConfig:
    """The config by which transformers sizes its cache: a layer for each owner, windowed where the owner is.

    transformers has one window for all windowed layers, so it is the widest; readers mask their own. The name of the
    attention is one that needs no mask from the manager, since the decoder's attention makes its own. transformers
    needs a hidden size that the heads divide, even with head_dim, and takes it only to estimate memory.
    """
    config, plan = decoder.config, decoder.plan
    assert config.vocab_size is not None
    windows = [plan.layers[owner].window for owner in plan.owners]
    paged = LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=-(-config.d_model // config.n_heads) * config.n_heads,
        num_hidden_layers=len(plan.owners),
        num_attention_heads=config.n_heads,
        num_key_value_heads=plan.owned(plan.owners[0]).kv_heads,
        head_dim=config.resolved_head_dim,
        max_position_embeddings=config.max_seq_len,
    )
    paged.layer_types = [_FULL if window is None else _WINDOW for window in windows]
    paged.sliding_window = max((window for window in windows if window is not None), default=None)
    paged._attn_implementation = "flash_attention_2"
    return paged


class PagedModel(nn.Module):
    """A decoder as transformers' `ContinuousBatchingManager` sees it. `model` is a `CLLMForCausalLM`."""

    _supports_flash_attn = False

    def __init__(self, model: Any):
        super().__init__()
        check_batchable(model.model)
        self.inner = model
        self.config = paged_config(model.model)
        self.config.eos_token_id = model.config.eos_token_id

    @property
    def device(self) -> torch.device:
        return self.inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self.inner.dtype

    def set_attn_implementation(self, name: str) -> None:
        """Nothing: attention is that of the decoder's backend."""

    def _supports_logits_to_keep(self) -> bool:
        return True

    def _get_logits_processor(self, generation_config: Any) -> Any:
        return self.inner._get_logits_processor(generation_config)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cu_seq_lens_q: Tensor,
        cu_seq_lens_k: Mapping[str, Tensor] | Tensor,
        cache: Any,
        logits_to_keep: Tensor,
        **pages: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (1, n, vocab_size) of the tokens at the indices `logits_to_keep` (n,) of the row.

        Args:
            input_ids: (1, T), the tokens of all requests.
            position_ids: (1, T), in their requests.
            cu_seq_lens_q: (requests + 1,) cumulative numbers of tokens in the row.
            cu_seq_lens_k: the same for the entries that readers see; a mapping by kind of layer if there are several.
            cache: transformers' `PagedAttentionCache`.
            logits_to_keep: last tokens of requests. transformers fills up with zeros, whose logits are not used.
            pages: further arguments of `cache.update`.
        """
        decoder: Decoder = self.inner.model
        counts = cu_seq_lens_k.values() if isinstance(cu_seq_lens_k, Mapping) else [cu_seq_lens_k]
        stores = {
            owner: PagedSlot(_update(cache, n, {"cu_seq_lens_k": cu_seq_lens_k, **pages}))
            for n, owner in enumerate(decoder.plan.owners)
        }
        queries = cu_seq_lens_q.diff().tolist()
        step = PagedPass(stores, queries, [lengths.diff().tolist() for lengths in counts])
        hidden = decoder.hidden(input_ids, position_ids, cache=step, last_only=True)
        if hidden.shape[1] == len(queries):
            logits_to_keep = torch.searchsorted(step.ends(hidden.device), logits_to_keep.contiguous())
        return CausalLMOutputWithPast(logits=decoder.head(hidden[:, logits_to_keep]))

    @property
    def _cached_continuous_batching_manager(self) -> Any:
        """A manager that is kept for the next call. It is stored in the model, which is asked for it."""
        return self.inner._cached_continuous_batching_manager

    @_cached_continuous_batching_manager.setter
    def _cached_continuous_batching_manager(self, manager: Any) -> None:
        self.inner._cached_continuous_batching_manager = manager


def _update(cache: Any, layer: int, pages: dict[str, Any]) -> Update:
    """`cache.update` of transformers 5.17 and newer, for keys and values (1, T, G, D) as the decoder has them."""
    takes_all = "kwargs" in inspect.signature(cache.update).parameters
    indices = {name: pages[name] for name in ("read_index", "write_index")}

    def update(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        new = [t.to(cache.dtype).transpose(1, 2) for t in (k, v)]
        if takes_all:  # (1, G, S, D); the method changes its arguments
            keys, values = cache.update(*new, layer, dict(pages))
            return keys.transpose(1, 2), values.transpose(1, 2)
        keys, values = cache.update(*new, layer, **indices)  # (S, G, D)
        return keys[None], values[None]

    return update


class _Manager(ContinuousBatchingManager):
    """The manager, which refuses a request that the model cannot compute instead of failing all others with it."""

    def add_request(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        new = kwargs.get("max_new_tokens")
        new = self.generation_config.max_new_tokens if new is None else new
        model: Any = self.model
        check_prompt(model.inner.model, input_ids, new, "input_ids")
        return super().add_request(input_ids, *args, **{**kwargs, "max_new_tokens": new})


def check_prompt(decoder: Decoder, ids: Any, new: int | None, name: str) -> None:
    """Refuse a prompt that is not a list of the vocabulary's token ids, is empty, or does not fit the context.

    Args:
        decoder: of the model that continues the prompt.
        ids: the prompt.
        new: the most tokens that follow it; None: at least one.
        name: of the prompt, in messages.

    Raises:
        UserError: as described.
    """
    assert decoder.config.vocab_size is not None
    if isinstance(ids, str | bytes | Mapping) or not isinstance(ids, Sequence) or not len(ids):
        found = "empty" if isinstance(ids, Sequence) and not len(ids) else f"a {type(ids).__name__}"
        raise UserError(f"{name} is {found}; allowed: a list of one or more token ids")
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < decoder.config.vocab_size:
            raise UserError(f"{name} has {token!r}; allowed: token ids from 0 to {decoder.config.vocab_size - 1}")
    context = decoder.config.max_seq_len
    if len(ids) + (new or 1) > context:
        raise UserError(
            f"{name}: a prompt of {len(ids)} tokens and up to {new or 1} new ones do not fit the model's context "
            f"(model.max_seq_len), {context}"
        )


def batching_config(given: Any) -> ContinuousBatchingConfig:
    """`given`, or the defaults, without what pads or records passes.

    Raises:
        UserError: for a setting that asks for it.
    """
    config: Any = ContinuousBatchingConfig() if given is None else copy.deepcopy(given)
    if not isinstance(config, ContinuousBatchingConfig):
        raise UserError(
            f"continuous_batching_config is a {type(given).__name__}; allowed: transformers' ContinuousBatchingConfig"
        )
    for name in _REFUSED:
        if (value := getattr(config, name)) not in (None, 0, False, (False, False)):
            raise UserError(
                f"continuous_batching_config: {name} is {value}; allowed: its default, since the shapes of passes "
                "change with every batch"
            )
    config.use_cuda_graph, config.max_blocks_per_request = False, 0
    return config


def generation_config(model: Any, given: Any) -> Any:
    """A copy of `given`, or of the model's, in which no stop token is written as -1.

    Raises:
        UserError: for beams, which the scheduler ignores.
    """
    config = copy.deepcopy(model.generation_config if given is None else given)
    if (config.num_beams or 1) > 1:
        raise UserError(f"continuous batching: num_beams is {config.num_beams}; allowed: 1 (greedy or sampling)")
    config.eos_token_id = -1 if config.eos_token_id is None else config.eos_token_id
    return config


def new_manager(model: Any, config: Any, batching: Any, hints: Any) -> ContinuousBatchingManager:
    """A manager for `model`, a `CLLMForCausalLM`; the arguments are those of `init_continuous_batching`."""
    return _Manager(
        model=PagedModel(model),  # type: ignore[arg-type]
        generation_config=generation_config(model, config),
        continuous_batching_config=batching_config(batching),
        workload_hints=hints,
    )
