"""From another family's checkpoint folder to a folder of this package, and back to the family's format.

A folder appears under its name once it is complete. Companions are copied: tokenizer, chat templates, generation
config, licence.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cllm.errors import UserError
from cllm.hub.card import write_conversion_card
from cllm.hub.checksums import write_checksums
from cllm.hub.companions import GENERATION, copy_companions, generation_values, write_object
from cllm.hub.export import Dtype, Exported, as_pretrained, check_out, describe_export, new_checkpoint, save
from cllm.hub.families import export_family, load_weights, read_family
from cllm.hub.loading import load_exported
from cllm.model.sizes import meta_decoder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def import_folder(
    source: str | Path,
    out: str | Path,
    *,
    dtype: Dtype | None = None,
    max_shard_size: str = "5GB",
    allow_pickle: bool = False,
    force: bool = False,
) -> Exported:
    """Write another family's checkpoint as a folder of this package.

    Args:
        source: folder of a Llama, Qwen, Mistral, Gemma or dense DeepSeek checkpoint; see `families.read_family`.
        out: the folder to make.
        dtype: of the weights; None: as stored.
        max_shard_size: largest weight file.
        allow_pickle: also read `pytorch_model.bin`.
        force: replace `out`, which must have been made by this package.

    Raises:
        UserError: as `read_family`, `load_weights` and `check_out` do.
    """
    source, out = Path(source), Path(out)
    check_out(out, force)
    family = read_family(source)
    weights = load_weights(family, None if dtype is None else _DTYPES[dtype], allow_pickle=allow_pickle)
    decoder = meta_decoder(family.config)
    decoder.load_state_dict(weights, assign=True)
    if family.config.tie_embeddings:
        decoder.head.weight = decoder.embed.weight
    model = as_pretrained(decoder)
    for name, value in family.token_ids.items():
        setattr(model.config, name, value)
    generation = generation_values(source, family.config.vocab_size or 0, family.token_ids)
    with new_checkpoint(out, force) as partial:
        save(model, partial, max_shard_size)
        copy_companions(source, partial, generation=False)
        write_object(partial / GENERATION, generation or {})
        write_conversion_card(partial, decoder, source=source, family=family.family)
        write_checksums(partial)
    return describe_export(model.model, out)


def export_folder(
    source: str | Path,
    out: str | Path,
    *,
    family: str | None = None,
    max_shard_size: str = "5GB",
    force: bool = False,
) -> tuple[Exported, str]:
    """Write a folder of this package in a family's format, for programs without cllm.

    Args:
        source: a folder that `import_folder` or `export_run` made.
        out: the folder to make.
        family: `llama`, `mistral`, `qwen2` or `qwen3`; None: the first of them that fits.
        max_shard_size: largest weight file.
        force: replace `out`, which must have been made by this package.

    Returns:
        The content of the folder, and the family.

    Raises:
        UserError: if a layer reads another layer's keys and values, the family lacks another feature of the model, or
            the folder cannot be loaded; and as `check_out` does.
    """
    source, out = Path(source), Path(out)
    check_out(out, force)
    if not (source / "config.json").exists():
        raise UserError(f"{source}: has no config.json; `convert.py export` makes such a folder of a run")
    model = load_exported(source, dtype="auto")
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with new_checkpoint(out, force) as partial:
        chosen = export_family(
            model.model.config,
            model.model.state_dict(),
            partial,
            family,
            token_ids=ids,
            max_shard_size=max_shard_size,
        )
        copy_companions(source, partial)
        write_conversion_card(partial, model.model, source=source, family=chosen, plain=True)
        write_checksums(partial)
    return describe_export(model.model, out), chosen
