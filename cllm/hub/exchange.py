"""From another family's checkpoint folder to a folder of this package, and back to the family's own format.

Folders appear under their name when they are whole, and bring their companions along: tokenizer, chat templates,
generation config, licence.
"""

from __future__ import annotations

from pathlib import Path

import torch

from cllm.errors import UserError
from cllm.files import MARK
from cllm.hub.checksums import write_checksums
from cllm.hub.companions import GENERATION, copy_companions, generation_values, write_object
from cllm.hub.export import Dtype, Exported, as_pretrained, check_out, new_checkpoint, save
from cllm.hub.families import export_family, load_weights, read_family
from cllm.hub.loading import load_exported
from cllm.hub.model import CLLMForCausalLM
from cllm.model.sizes import count_parameters, meta_decoder

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
    """Write another family's checkpoint as a folder of this package: a decoder with a plan that can be changed.

    Args:
        source: folder of a Llama, Qwen, Mistral or dense DeepSeek checkpoint; see `families.read_family`.
        out: the folder to make.
        dtype: of the weights; None: as they are.
        max_shard_size: largest weight file.
        allow_pickle: also read `pytorch_model.bin`.
        force: replace `out`, which must have been made by this package.

    Raises:
        UserError: for what `read_family` and `load_weights` refuse, and for an `out` that is in the way.
    """
    source, out = Path(source), Path(out)
    check_out(out, force)
    found = read_family(source)
    weights = load_weights(found, None if dtype is None else _DTYPES[dtype], allow_pickle=allow_pickle)
    decoder = meta_decoder(found.config)
    decoder.load_state_dict(weights, assign=True)
    if found.config.tie_embeddings:
        decoder.head.weight = decoder.embed.weight
    model = as_pretrained(decoder)
    for name, value in found.token_ids.items():
        setattr(model.config, name, value)
    generation = generation_values(source, found.config.vocab_size or 0, found.token_ids)
    with new_checkpoint(out, force) as partial:
        save(model, partial, max_shard_size)
        copy_companions(source, partial, generation=False)
        write_object(partial / GENERATION, generation or {})
        write_checksums(partial)
    return _told(model, out)


def export_folder(
    source: str | Path,
    out: str | Path,
    *,
    family: str | None = None,
    max_shard_size: str = "5GB",
    force: bool = False,
) -> tuple[Exported, str]:
    """Write a folder of this package in a family's own format, for programs that know nothing of this package.

    Args:
        source: a folder that `import_folder` or `export_run` made.
        out: the folder to make.
        family: `llama`, `mistral`, `qwen2` or `qwen3`; None: the first of them that fits.
        max_shard_size: largest weight file.
        force: replace `out`, which must have been made by this package.

    Returns:
        What was written, and the family.

    Raises:
        UserError: where a layer reads another one's keys and values, or the family lacks something else of the model,
            and for a folder that cannot be loaded.
    """
    source, out = Path(source), Path(out)
    check_out(out, force)
    if not (source / "config.json").exists():
        raise UserError(f"{source}: has no config.json; `convert.py export` makes such a folder of a run")
    model = load_exported(source, dtype="auto")
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with new_checkpoint(out, force) as partial:
        taken = export_family(
            model.model.config,
            model.model.state_dict(),
            partial,
            family,
            token_ids=ids,
            max_shard_size=max_shard_size,
        )
        copy_companions(source, partial)
        write_checksums(partial)
    return _told(model, out), taken


def _told(model: CLLMForCausalLM, out: Path) -> Exported:
    return Exported(
        folder=out,
        step=None,
        parameters=count_parameters(model.model),
        nbytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        files=tuple(sorted(file.name for file in out.iterdir() if file.name != MARK)),
    )
