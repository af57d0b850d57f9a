"""From another family's checkpoint folder to a folder of this package, and back to the family's own format.

Folders appear under their name when they are whole, and bring the tokenizer and the generation config along.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from cllm.errors import UserError
from cllm.hub.export import Dtype, Exported, as_pretrained, check_out, put, quiet, save
from cllm.hub.families import export_family, load_weights, read_family
from cllm.hub.model import CLLMForCausalLM
from cllm.model.sizes import count_parameters, meta_decoder

_COMPANIONS = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
"""Files that go along with the weights as they are."""
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
        force: replace `out`, which must be a checkpoint folder itself.

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
    model.generation_config = _generation_config(source, model)
    with _made(out) as partial:
        save(model, partial, max_shard_size)
        _copy_companions(source, partial)
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
        force: replace `out`, which must be a checkpoint folder itself.

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
    model = _loaded(source)
    if not isinstance(model, CLLMForCausalLM):
        raise UserError(f"{source}: is a {model.config.model_type} checkpoint already")
    ids = {name: getattr(model.config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    with _made(out) as partial:
        taken = export_family(
            model.model.config,
            model.model.state_dict(),
            partial,
            family,
            token_ids=ids,
            max_shard_size=max_shard_size,
        )
        _copy_companions(source, partial)
    return _told(model, out), taken


def _loaded(source: Path) -> Any:
    # Whatever goes wrong in reading a folder is, to the user, one fault told in one line.
    try:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(source, dtype="auto", local_files_only=True)
    except UserError as error:
        raise error if str(source) in str(error) else UserError(f"{source}: {error}") from None
    except Exception as error:
        raise UserError(f"{source}: cannot be loaded: {type(error).__name__}: {error}") from None


def _generation_config(source: Path, model: CLLMForCausalLM) -> GenerationConfig:
    if (source / "generation_config.json").exists():
        return GenerationConfig.from_pretrained(str(source), local_files_only=True)
    return GenerationConfig.from_model_config(model.config)


def _copy_companions(source: Path, folder: Path) -> None:
    for name in _COMPANIONS:
        if (source / name).exists() and not (folder / name).exists():
            shutil.copy(source / name, folder / name)


@contextmanager
def _made(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `out` if all goes well and vanishes otherwise."""
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        put(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _told(model: CLLMForCausalLM, out: Path) -> Exported:
    return Exported(
        folder=out,
        step=None,
        parameters=count_parameters(model.model),
        nbytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        files=tuple(sorted(file.name for file in out.iterdir())),
    )
