"""From a run to a checkpoint folder: config.json, safetensors, generation_config.json and the tokenizer.

The folder appears under its name when it is whole. Weights are those of the checkpoint, bit for bit, unless another
dtype is asked for; fusion weights stay fp32 even then.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import GenerationConfig
from transformers.utils import logging

from cllm.data.manifest import TOKENIZER, Manifest, tokenizer_sha256
from cllm.errors import UserError
from cllm.faults import naming
from cllm.hub.config import CLLMConfig
from cllm.hub.model import CLLMForCausalLM
from cllm.kv.sources import FusedRead
from cllm.model.block import Block
from cllm.model.decoder import Decoder
from cllm.model.sizes import count_parameters
from cllm.runs import RunFolder, load_run

Dtype = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """What was written."""

    folder: Path
    step: int | None
    """Of the checkpoint; None where there is none."""
    parameters: int
    """Tied ones once."""
    nbytes: int
    """Of the weight files."""
    files: tuple[str, ...]
    """Names in the folder, sorted."""


def export_run(
    run: str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    dtype: Dtype = "fp32",
    max_shard_size: str = "5GB",
    tokenizer: bool = True,
    force: bool = False,
) -> Exported:
    """Write a run's decoder to `out` as a folder that transformers loads.

    Args:
        run: a run folder.
        out: the folder to make.
        step: of the checkpoint; None: the newest.
        dtype: of the weights. fp32 is what checkpoints hold.
        max_shard_size: largest weight file, as `5GB` or `300MB`.
        tokenizer: copy the tokenizer of the run's data; without it generate knows no EOS.
        force: replace `out`, which must be a checkpoint folder itself.

    Raises:
        UserError: for a run, checkpoint or tokenizer that cannot be read, and for an `out` that is in the way.
    """
    run, out = Path(run), Path(out)
    check_out(out, force)
    manifest = _manifest(run) if tokenizer else None
    decoder, config, found_step = load_run(_checkpoint(run, step))
    rows = config.model.vocab_size or 0
    if manifest is not None and manifest.vocab_size > rows:
        raise UserError(
            f"{manifest.folder}: its tokenizer has {manifest.vocab_size} tokens, the model {rows} rows: it is not the "
            "one that the run was trained with"
        )
    model = as_pretrained(decoder)
    if manifest is not None:
        _set_special_tokens(model, manifest)
    if dtype == "bf16":
        _to_bf16(decoder)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        save(model, partial, max_shard_size)
        if manifest is not None:
            for file in sorted((manifest.folder / TOKENIZER).iterdir()):
                shutil.copy(file, partial / file.name)
        put(partial, out)
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(
        folder=out,
        step=found_step,
        parameters=count_parameters(decoder),
        nbytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        files=tuple(sorted(file.name for file in out.iterdir())),
    )


def as_pretrained(decoder: Decoder) -> CLLMForCausalLM:
    """A transformers model around a decoder, whose tensors it shares."""
    block = decoder.blocks[0]
    assert isinstance(block, Block)
    model_config = decoder.config.model_copy(update={"d_ff": block.mlp.up_proj.out_features, "match_params": False})
    with torch.device("meta"):
        model = CLLMForCausalLM(CLLMConfig(model=model_config.model_dump(mode="json")))
    model.model = decoder
    model.tie_weights()
    model.config.dtype = decoder.embed.weight.dtype
    return model


def _checkpoint(run: Path, step: int | None) -> Path:
    if step is None:
        return run
    folder = RunFolder(run)
    folder.config()
    if not folder.checkpoint_path(step).exists():
        steps = ", ".join(str(found) for found, _ in folder.checkpoints()) or "none"
        raise UserError(f"--checkpoint is {step}; {folder.checkpoint_folder} has: {steps}")
    return folder.checkpoint_path(step)


def _manifest(run: Path) -> Manifest:
    """Of the folder that the run was trained on. Raises `UserError` where its tokenizer is missing or another."""
    path = Path(RunFolder(run).config().data.path)
    hint = "; give --no-tokenizer to export without one"
    try:
        manifest = Manifest.read(path)
        found = tokenizer_sha256(path / TOKENIZER)
    except UserError as error:
        raise UserError(f"{error}{hint}") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path / TOKENIZER}: the run's tokenizer cannot be read: {error}{hint}") from None
    if found != manifest.tokenizer_sha256:
        raise UserError(f"{path / TOKENIZER}: is not the tokenizer that made the tokens in {path}{hint}")
    return manifest


def _set_special_tokens(model: CLLMForCausalLM, manifest: Manifest) -> None:
    tokenizer = manifest.tokenizer()
    model.config.bos_token_id = tokenizer.bos_token_id
    model.config.eos_token_id = manifest.eos_id
    model.config.pad_token_id = tokenizer.pad_token_id
    pad = manifest.eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=manifest.eos_id, pad_token_id=pad
    )


def _to_bf16(decoder: Decoder) -> None:
    kept = {id(p) for module in decoder.modules() if isinstance(module, FusedRead) for p in module.parameters()}
    for parameter in decoder.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(torch.bfloat16)


def save(model: CLLMForCausalLM, folder: Path, max_shard_size: str) -> None:
    """Write config.json and weights. Raises `UserError` for a size that is none."""
    try:
        with quiet(), naming(str(folder)):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
    except ValueError as error:
        raise UserError(f"--max-shard-size is {max_shard_size}: {error}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def check_out(out: Path, force: bool) -> None:
    """Raises `UserError` where `out` exists and may not be replaced."""
    if not out.exists():
        return
    if not force:
        raise UserError(f"{out}: exists; give another name, or --force to replace it")
    try:
        replaceable = "model_type" in json.loads((out / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        replaceable = False
    if not replaceable:
        raise UserError(
            f"{out}: --force replaces checkpoint folders only, and this has no config.json with a model_type"
        )


def put(partial: Path, out: Path) -> None:
    """`partial` becomes `out`, and what was there is gone once it has."""
    old = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    shutil.rmtree(old, ignore_errors=True)
