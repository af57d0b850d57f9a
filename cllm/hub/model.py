"""A decoder as a transformers model: `from_pretrained`, `generate`, `Trainer`, and all that builds on them.

The decoder does the work; this class speaks transformers' language to it. What a caller asks for and does not get is
an error here, never ignored.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from cllm.errors import UserError
from cllm.hub.config import CLLMConfig
from cllm.hub.generation import CLLMGenerationMixin, own_cache
from cllm.hub.inputs import read_inputs
from cllm.kv.cache import KVCache
from cllm.kv.plan import Retention
from cllm.model.decoder import Decoder
from cllm.model.graph import StepGraph
from cllm.model.loss import IGNORE, Head
from cllm.model.sizes import model_d_ff


class CLLMForCausalLM(PreTrainedModel, CLLMGenerationMixin):
    """`CLLMForCausalLM(config)` draws new weights; `from_pretrained(folder)` loads them.

    `model` is the `Decoder`, so tensors are called `model.blocks.0...` and layers that own nothing have no K/V weights.
    """

    config_class = CLLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _tied_weights_keys = {"model.head.weight": "model.embed.weight"}  # noqa: RUF012 - transformers copies it
    _keep_in_fp32_modules_strict = ["attention.keys.weight", "attention.values.weight"]  # noqa: RUF012
    """Fusion weights, whatever the model's dtype."""
    _no_split_modules = ["Decoder"]  # noqa: RUF012
    """Layers read each other's slots, so all of them are on one device."""
    _supports_context_parallel = False

    def __init__(self, config: CLLMConfig):
        super().__init__(config)
        self.model: Decoder = Decoder(config.model_config, d_ff=model_d_ff(config.model_config))  # post_init draws
        self._is_stateful = any(isinstance(layer.own, Retention) for layer in self.model.plan.layers)
        self.post_init()

    # ---- weights -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> Any:
        """As in transformers, but weights that are not exactly the model's are an error and not a warning.

        Raises:
            UserError: naming tensors that are missing, that the model has not, or that have another shape, and weight
                files that are broken.
        """
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise UserError("ignore_mismatched_sizes is True; allowed: False, every tensor has to fit")
        with _without_load_report(), _naming_broken_files(pretrained_model_name_or_path):
            found: Any = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
        model, info = found
        _check_loaded(model, info, pretrained_model_name_or_path)
        return (model, info) if output_loading_info else model

    def initialize_weights(self) -> None:
        """Draw new weights as the config's `init` says, unless weights were loaded."""
        if not any(getattr(parameter, "_is_hf_initialized", False) for parameter in self.parameters()):
            self.model.init_weights()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.model.embed

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding (vocab_size, d_model) in the place of the decoder's."""
        assert isinstance(value, nn.Embedding)
        self.model.embed = value
        self.model.config = self.model.config.model_copy(update={"vocab_size": value.num_embeddings})

    def get_output_embeddings(self) -> Head:
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        """Put a layer's weight (vocab_size, d_model) in the place of the head's."""
        head = Head(new_embeddings.in_features, new_embeddings.out_features, bias=False, device="meta")
        head.weight = new_embeddings.weight
        self.model.head = head

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        options = dict(getattr(gradient_checkpointing_func, "keywords", {}))
        plain = getattr(gradient_checkpointing_func, "func", gradient_checkpointing_func) is checkpoint
        if enable and (not plain or every_n_layers != 1 or options not in ({}, {"use_reentrant": False})):
            raise UserError(
                f"gradient checkpointing with {options or 'an option'}: every block is recomputed, and nothing can be "
                'chosen; allowed: gradient_checkpointing_kwargs {"use_reentrant": False}, or none'
            )
        self.model.gradient_checkpointing = enable

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
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits, and with `labels` the loss.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, tokens in the cache + T), zeros for padding; see `hub/inputs.py`.
            position_ids: (B or 1, T); documents of a packed batch begin where they do not count on by one.
            past_key_values: a `KVCache`, to which the tokens are added.
            labels: (B, T) int64, the input again: a token is scored against the label after it, -100 is not scored.
            use_cache: return a cache; by default what the config says, except in training and with labels.
            logits_to_keep: logits of the last so many places, or of the places in a (n,) tensor; 0: of all. None: of
                all, except with labels in training: the loss needs no logits.
            early_exit: above the last layer that owns a slot, compute the last token only, exactly, but without
                gradients. None: where neither those nor other logits are wanted, as `generate` says of its prompts
                (logits_to_keep=1, no labels).
            num_items_in_batch: the loss is the sum over scored tokens divided by this; None: their mean.
            inputs_embeds, output_attentions, output_hidden_states: not supported.

        Returns:
            `loss` (fp32 scalar, nats), `logits` (B, n, vocab_size), `past_key_values`, each only where there is one.

        Raises:
            UserError: for what is not supported, more tokens than the model's context, and what `read_inputs` refuses.
        """
        hidden_states = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        asked = {"inputs_embeds": inputs_embeds, "output_attentions": attentions, "output_hidden_states": hidden_states}
        _refuse({**asked, **kwargs})
        if input_ids is None or input_ids.ndim != 2:
            raise UserError(f"input_ids are {None if input_ids is None else tuple(input_ids.shape)}; allowed: (B, T)")
        cache = self._cache(past_key_values, use_cache, scored=labels is not None)
        past = None if cache is None else cache.get_seq_length()
        if cache is not None and past and cache.batch != len(input_ids):
            raise UserError(f"past_key_values holds {cache.batch} sequences and input_ids {len(input_ids)}")
        inputs = read_inputs(
            input_ids, attention_mask, position_ids, past=past, known=None if cache is None else cache.starts
        )
        if cache is not None and past and labels is None and self._replays(cache, input_ids):
            self._check_context(past + 1, None)
            return self._output(None, self._replay(cache, input_ids), cache, return_dict)
        self._check_context((past or 0) + input_ids.shape[1], inputs.positions)
        last_only = labels is None and isinstance(logits_to_keep, int) and logits_to_keep == 1
        if early_exit and not last_only:
            wanted = "labels" if labels is not None else f"logits_to_keep {logits_to_keep}"
            raise UserError(f"early_exit computes the last logits only, but {wanted} wants more; allowed: 1, no labels")
        learns = last_only and early_exit is not False and self._learns()
        if early_exit and learns:
            raise UserError("early_exit computes no gradients; use torch.no_grad(), or leave it out")
        last_only = last_only and early_exit is not False and not learns
        hidden = self.model.hidden(input_ids, *inputs[:2], cache=cache, starts=inputs.starts, last_only=last_only)
        loss = None if labels is None else self._loss(hidden, labels, num_items_in_batch)
        logits = None
        if labels is None or not self.training or logits_to_keep is not None:
            logits = self.model.head(_keep(hidden, logits_to_keep))
        return self._output(loss, logits, cache, return_dict)

    def _output(
        self, loss: Tensor | None, logits: Tensor | None, cache: KVCache | None, return_dict: bool | None
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _learns(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def _replays(self, cache: KVCache, input_ids: Tensor) -> bool:
        """Whether this is a step that a CUDA graph can make: one token over a static cache, without gradients."""
        return cache.is_static and input_ids.shape[1] == 1 and input_ids.is_cuda and not torch.is_grad_enabled()

    def _replay(self, cache: KVCache, input_ids: Tensor) -> Tensor:
        """Logits (B, 1, vocab_size) of one token, by a graph recorded at the first step over a cache."""
        graph = self._graph
        if graph is None or graph.cache is not cache or not graph.is_valid:
            graph = self._graph = StepGraph(self.model, cache)
        return graph(input_ids[:, 0])[:, None].clone()  # the next step writes over what the graph returns

    def _cache(self, given: Any, use_cache: bool | None, *, scored: bool) -> KVCache | None:
        if given is not None:
            return own_cache(given)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and not scored
        return KVCache(self.model.config) if use_cache else None

    def _check_context(self, tokens: int, positions: Tensor | None) -> None:
        context = self.config.max_position_embeddings
        if tokens > context and positions is not None:  # packed documents may be more tokens than any one of them
            tokens = int(positions.max()) + 1
        if tokens > context:
            raise UserError(f"{tokens} tokens, but the model's context (model.max_seq_len) is {context}")

    def _loss(self, hidden: Tensor, labels: Tensor, num_items: Tensor | int | None) -> Tensor:
        shifted = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
        total = self.model.head(hidden, shifted, reduction="mean" if num_items is None else "sum")
        if total.ndim:
            raise UserError(
                "model.head has an adapter, but computes the loss itself; leave it out of the adapter's modules, or "
                "train it whole (modules_to_save)"
            )
        if num_items is None:
            return total
        return total / (num_items.to(total.device) if isinstance(num_items, Tensor) else num_items)


def _refuse(asked: dict[str, Any]) -> None:
    for name, value in asked.items():
        if value is not None and value is not False:
            raise UserError(f"{name} is not supported by cllm models; leave it out")


def _keep(hidden: Tensor, places: int | Tensor | None) -> Tensor:
    """(B, n, d_model): the places of `hidden` (B, T, d_model) whose logits are asked for."""
    if isinstance(places, Tensor) and places.ndim != 1:
        raise UserError(
            f"logits_to_keep is {tuple(places.shape)}; allowed: a number of places, or a (n,) tensor of them"
        )
    return hidden[:, places] if isinstance(places, Tensor) else hidden[:, -(places or 0) :]


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """transformers prints a table of the tensors that do not fit; the error that follows says it in a line."""

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
    """safetensors says what is wrong with a file, but not with which."""
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


def _check_loaded(model: CLLMForCausalLM, info: dict[str, Any], path: Any) -> None:
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
    if model.config.tie_word_embeddings and model.model.head.weight is not model.model.embed.weight:
        wrong.append("model.tie_embeddings is true, but model.head.weight differs from model.embed.weight")
    if wrong:
        raise UserError(f"{path}: the weights are not those of the model in config.json: {'; '.join(wrong)}")


AutoModelForCausalLM.register(CLLMConfig, CLLMForCausalLM)
