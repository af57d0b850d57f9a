"""Models: drawn, loaded from any path, exported."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from cllm.api.arguments import device_of, path_of
from cllm.api.settings import AnyConfig, model_config
from cllm.data.manifest import Manifest
from cllm.hub.export import Dtype, Exported, as_pretrained, export_run
from cllm.hub.kind import identify_model
from cllm.hub.loading import load_model
from cllm.hub.model import CLLMForCausalLM
from cllm.model.sizes import build_decoder
from cllm.runs import RunFolder, load_run
from cllm.trust import load_tokenizer as read_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VOCAB_SIZE = 32_768
"""Vocabulary of a model whose config leaves it to a tokenizer."""


def build(design: AnyConfig, **settings: Any) -> CLLMForCausalLM:
    """Draw the weights of a model, from torch's global generator: call `torch.manual_seed` before.

    The result is a transformers model. `model(input_ids).logits` are the logits (B, T, vocab_size), and
    `model(input_ids, labels=input_ids).loss` is the mean cross-entropy in nats, fp32; labels are shifted inside, and
    -100 is not scored. In training mode logits are left out when there are labels. `model.model` is the `Decoder`.

    Args:
        design: a design such as `fusedkv` or `gqa:n_kv_heads=4`, a YAML file, the name of a shipped config such as
            `model/332m`, a dict, a config object, or a list of these, in which later ones win:
            `["model/332m", "fusedkv"]`.
        settings: keys of the config's `model` section, such as `d_model`, `n_layers`, `n_heads`, `vocab_size`,
            `max_seq_len`. For a design alone d_model is 512, n_layers 8, and n_heads d_model / 64. Where the config
            leaves the vocabulary to a tokenizer, vocab_size is 32,768.

    Raises:
        UserError: for a config that is unknown or wrong, and a model larger than the memory.

    Examples:
        >>> import cllm, torch
        >>> model = cllm.build("fusedkv", d_model=64, n_layers=4, vocab_size=256)
        >>> tokens = torch.randint(256, (2, 16))
        >>> model(tokens, labels=tokens).loss.backward()
        >>> model(tokens).logits.shape
        torch.Size([2, 16, 256])
    """
    config = model_config(design, settings)
    if config.vocab_size is None:
        config = config.model_copy(update={"vocab_size": VOCAB_SIZE})
    return as_pretrained(build_decoder(config))


def load(path: str | os.PathLike[str], *, device: str = "cpu") -> PreTrainedModel:
    """Load the model in any path, in evaluation mode.

    Args:
        path: a run (its newest checkpoint), one of its checkpoints, a folder that `export` wrote, or the Hugging Face
            folder of another family, of which no code is run.
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.

    Returns:
        A `CLLMForCausalLM`, or for another family the class of transformers, with weights as stored.

    Raises:
        UserError: for a path without a model, and weights that are damaged or do not fit.

    Examples:
        >>> import cllm
        >>> model = cllm.load("runs/tiny")
        >>> type(model).__name__, model.training
        ('CLLMForCausalLM', False)
    """
    path, place = path_of("load: path", path), device_of("load: device", device)
    if identify_model(path).is_run:
        return as_pretrained(load_run(path, device=place)[0]).eval()
    return load_model(path, dtype="auto").to(place)


def load_tokenizer(path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model: for a run that of its data, else that in the Hugging Face folder.

    Raises:
        UserError: for a path without a model, and a tokenizer that is missing or not the run's.

    Examples:
        >>> import cllm
        >>> tokenizer = cllm.load_tokenizer("runs/tiny")
        >>> tokenizer.decode(tokenizer("hello world")["input_ids"])
        'hello world'
    """
    path = path_of("load_tokenizer: path", path)
    if not identify_model(path).is_run:
        return read_tokenizer(path)
    run = RunFolder.of(path)
    manifest, recorded = Manifest.read(run.config().data.main_folder), run.data_digests()
    manifest.check_unchanged(None if recorded is None else recorded.train, run.path)
    return manifest.tokenizer()


def export(
    run: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    step: int | None = None,
    dtype: Dtype = "fp32",
    tokenizer: bool = True,
    force: bool = False,
) -> Exported:
    """Write a run's model as a Hugging Face folder, with its tokenizer and a model card, as `cllm convert export` does.

    Args:
        run: the run's folder.
        folder: the folder to make.
        step: of the checkpoint; None: the newest.
        dtype: of the weights, `fp32` or `bf16`.
        tokenizer: whether to copy the tokenizer.
        force: replace `folder`, if cllm made it.

    Raises:
        UserError: as `export_run` does.

    Examples:
        >>> import cllm
        >>> made = cllm.export("runs/tiny", "exported/tiny")
        >>> "model.safetensors" in made.files
        True
    """
    run = path_of("export: run", run, "the path of a run; a model in memory has save_pretrained")
    folder = path_of("export: folder", folder)
    return export_run(run, folder, step=step, dtype=dtype, tokenizer=tokenizer, force=force)
