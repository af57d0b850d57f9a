"""A decoder as a transformers model, for `from_pretrained`, `generate`, `Trainer`, and libraries that build on them.

Arguments that the decoder does not support are errors, never ignored.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cllm.cache.cache import KVCache
from cllm.errors import UserError
from cllm.hub.base import CLLMModel, CLLMPreTrainedModel
from cllm.hub.config import CLLMConfig
from cllm.hub.generation import CLLMGenerationMixin
from cllm.hub.inputs import check_packing, pop_packing
from cllm.kernels.cross_entropy import IGNORE
from cllm.model.graph import StepGraph
from cllm.model.loss import Head, head_loss


class CLLMForCausalLM(CLLMPreTrainedModel, CLLMGenerationMixin):
    """`CLLMForCausalLM(config)` draws new weights; `from_pretrained(folder)` loads them.

    `model` is the `Decoder`, so tensors are named `model.blocks.0...`, and layers that own nothing have no K/V weights.
    `base_model` is a `CLLMModel` of the same decoder; it computes hidden states, as transformers' base models do.
    """

    accepts_loss_kwargs = True
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # noqa: RUF012 - transformers copies it
    _base: tuple[CLLMModel, ...] = ()
    """The base model; in a tuple, so it is no submodule that would repeat the weights."""

    def __init__(self, config: CLLMConfig):
        super().__init__(config)
        self.model = self._new_decoder()
        self.post_init()

    # ---- weights -----------------------------------------------------------------------------------------------------

    @property
    def base_model(self) -> CLLMModel:
        """The decoder without its head, under the name that transformers and other libraries use."""
        if not self._base or self._base[0].model is not self.model:
            config: Any = self.config
            self._base = (CLLMModel(config, self.model),)
        return self._base[0]

    def set_decoder(self, decoder: CLLMModel) -> None:
        """Replace the decoder by that of another base model."""
        self.model = decoder.model

    def get_output_embeddings(self) -> Head:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Replace the head's weight by that of a layer, (vocab_size, d_model)."""
        head = Head(new_embeddings.in_features, new_embeddings.out_features, bias=False, device="meta")
        head.weight = new_embeddings.weight
        self.model.head = head

    # ---- one forward pass --------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor | None = None,
        early_exit: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | list[int] | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with `labels` the loss.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, tokens in the cache + T), zeros for padding; see `hub/inputs.py`.
            position_ids: (B or 1, T); in packed batches a document begins wherever they do not increase by one.
            past_key_values: a `KVCache`, to which the tokens are added.
            labels: (B, T) int64, equal to the input: a token is scored against the next label; -100 is not scored.
            use_cache: return a cache; by default as in the config, except in training and with labels.
            logits_to_keep: the number of last positions with logits, or a (n,) tensor of positions; 0: all. None: all,
                except with labels in training, since the loss needs no logits.
            early_exit: above the last layer that owns a slot, compute the last token only, and above the last that
                owns one of all tokens only those that windows reach: exact, without gradients. None: do so if neither
                gradients nor other logits are needed, as for the prompts of `generate` (logits_to_keep=1, no labels).
            num_items_in_batch: the loss is the sum over scored tokens divided by this; None: their mean.
            inputs_embeds: (B, T, d_model), the input of the first layer, instead of `input_ids`.
            output_hidden_states: return the input of every layer and of the head; or a list of their indices.
            output_attentions: not supported.

        Keyword Args:
            shift_labels: (B, T) int64 instead of `labels`: a token is scored against the label at its own
                position. It is not in the signature, from which `Trainer` would infer that every batch has it.
            cu_seq_lens_q, cu_seq_lens_k, seq_idx, max_length_q, max_length_k: the documents of a packed
                batch a second time; see `hub/inputs.py`.

        Returns:
            `loss` (fp32 scalar, nats), `logits` (B, n, vocab_size), `past_key_values`, and `hidden_states` (n_layers +
            1 tensors (B, T, d_model)); None for those that were not computed.

        Raises:
            UserError: for unsupported arguments, more tokens than the model's context, and as `read_inputs` and
                `check_packing` do.
        """
        shift_labels: Tensor | None = kwargs.pop("shift_labels", None)
        packing = pop_packing(kwargs)
        wanted = self._states_wanted(output_hidden_states, output_attentions, kwargs)
        tokens = self._tokens(input_ids, inputs_embeds)
        if labels is not None and shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        scored = shift_labels is not None
        cache = self._cache(past_key_values, use_cache, scored=scored)
        past = 0 if cache is None else cache.get_seq_length()
        asked = past_key_values is not None or bool(use_cache)
        inputs = self._inputs(tokens, attention_mask, position_ids, cache, more_follow=asked)
        check_packing(packing, tokens, inputs.document_ids)
        plain = input_ids is not None and not scored and not wanted
        if cache is not None and past and plain and self._replays(cache, tokens):
            self._check_context(past + 1, None)
            return self._output(None, self._replay(cache, tokens), cache, None, return_dict)
        self._check_context(past + tokens.shape[1], inputs.positions)
        last_only = self._exits_early(
            early_exit, logits_to_keep, other="labels" if scored else "output_hidden_states" if wanted else None
        )
        hidden, states = self._hidden(input_ids, inputs_embeds, inputs, cache, wanted, last_only=last_only)
        loss = None if shift_labels is None else self._loss(hidden, shift_labels, num_items_in_batch)
        logits = None
        if not scored or not self.training or logits_to_keep is not None:
            logits = self.model.head(_keep(hidden, logits_to_keep))
        return self._output(loss, logits, cache, states, return_dict)

    def _output(
        self,
        loss: Tensor | None,
        logits: Tensor | None,
        cache: KVCache | None,
        states: Any,
        return_dict: bool | None,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=states)
        return self._as_requested(output, return_dict)

    def _exits_early(self, early_exit: bool | None, logits_to_keep: int | Tensor | None, *, other: str | None) -> bool:
        """Whether layers above the last owner compute the last token only; `other`: an argument that needs all tokens.

        Raises:
            UserError: for an `early_exit` that other arguments, or gradients, do not allow.
        """
        suffices = other is None and isinstance(logits_to_keep, int) and logits_to_keep == 1
        if early_exit and not suffices:
            more = other or f"logits_to_keep {logits_to_keep}"
            raise UserError(f"early_exit computes the last logits only, but {more} wants more; allowed: 1, no labels")
        if not suffices or early_exit is False:
            return False
        learns = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())
        if early_exit and learns:
            raise UserError("early_exit computes no gradients; use torch.no_grad(), or leave it out")
        return not learns

    def _replays(self, cache: KVCache, input_ids: Tensor) -> bool:
        """Whether a CUDA graph can compute this step: one token over a static cache, without gradients."""
        if hasattr(self.model.embed, "token_adapter"):  # its weight is a new tensor in every step
            return False
        return cache.is_static and input_ids.shape[1] == 1 and input_ids.is_cuda and not torch.is_grad_enabled()

    def _replay(self, cache: KVCache, input_ids: Tensor) -> Tensor:
        """Logits (B, 1, vocab_size) of one token, from a CUDA graph that is recorded at the first step over a cache."""
        graph = self._graph
        if graph is None or graph.cache is not cache or not graph.is_valid:
            graph = self._graph = StepGraph(self.model, cache)
        return graph(input_ids[:, 0])[:, None].clone()  # the next step overwrites the output of the graph

    def _loss(self, hidden: Tensor, targets: Tensor, num_items: Tensor | int | None) -> Tensor:
        head, reduction = self.model.head, "mean" if num_items is None else "sum"
        if _is_weight(head):
            total = head_loss(hidden, head.weight, targets, reduction)
        else:
            total = head(hidden, targets, reduction=reduction)
        if total.ndim:
            raise UserError(
                "model.head has an adapter, but computes the loss itself; leave it out of the adapter's modules, or "
                "train it whole (modules_to_save)"
            )
        if num_items is None:
            return total
        return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _is_weight(head: Any) -> bool:
    """Whether `head` is a linear layer without a loss, fully described by its `weight`.

    PEFT makes such heads for trained tokens (`token_adapter`), and for tied heads that are trained (`modules_to_save`).
    """
    inner = getattr(head, "modules_to_save", None)
    candidates = [head] if inner is None else list(inner.values())
    return hasattr(head, "token_adapter") or any(type(module) is nn.Linear for module in candidates)


def _keep(hidden: Tensor, positions: int | Tensor | None) -> Tensor:
    """The positions of `hidden` (B, T, d_model) whose logits are requested, (B, n, d_model)."""
    if isinstance(positions, Tensor) and positions.ndim != 1:
        raise UserError(
            f"logits_to_keep is {tuple(positions.shape)}; allowed: a number of places, or a (n,) tensor of them"
        )
    return hidden[:, positions] if isinstance(positions, Tensor) else hidden[:, -(positions or 0) :]


AutoModelForCausalLM.register(CLLMConfig, CLLMForCausalLM)
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[CLLMConfig.model_type] = CLLMForCausalLM.__name__
"""From this table `Trainer` knows that it has to shift labels when it smooths them itself."""
