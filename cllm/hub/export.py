"""From a run to a checkpoint folder: config.json, safetensors, their checksums, and companions.

The companions (tokenizer, chat templates, generation config) are those of the checkpoint that the run started from,
where it did; otherwise the tokenizer is that of the run's data.

The folder appears under its name when it is whole. Weights are those of the checkpoint, bit for bit, unless another
dtype is asked for; fusion weights stay fp32 even then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.utils import logging

from cllm.data.manifest import TOKENIZER, Manifest, tokenizer_sha256
from cllm.errors import UserError
from cllm.faults import naming
from cllm.files import MARK, check_replaceable, new_folder
from cllm.hub import companions
from cllm.hub.checksums import write_checksums
from cllm.hub.config import CLLMConfig
from cllm.hub.model import CLLMForCausalLM
from cllm.model.block import Block
from cllm.model.decoder import Decoder
from cllm.model.sizes import count_parameters
from cllm.model.sources import Reader
from cllm.runs import RunFolder, load_run
from cllm.trust import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
        tokenizer: copy the tokenizer: that of the checkpoint the run started from, or of its data.
        force: replace `out`, which must have been made by this package.

    Raises:
        UserError: for a run, checkpoint or tokenizer that cannot be read, and for an `out` that is in the way.
    """
    run, out = Path(run), Path(out)
    check_out(out, force)
    kept = run / companions.FOLDER
    manifest = _manifest(run) if tokenizer and not companions.has_tokenizer(kept) else None
    decoder, config, found_step = load_run(_checkpoint(run, step))
    rows = config.model.vocab_size or 0
    generation = companions.generation_values(kept, rows) or {}
    if manifest is not None and manifest.vocab_size > rows:
        raise UserError(
            f"{manifest.folder}: its tokenizer has {manifest.vocab_size} tokens, the model {rows} rows: it is not the "
            "one that the run was trained with"
        )
    model = as_pretrained(decoder)
    if tokenizer:
        eos_id = None if manifest is None else manifest.eos_id
        generation = _with_token_ids(generation, _tokenizer(kept if manifest is None else manifest), eos_id)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(model.config, name, generation.get(name))
    if dtype == "bf16":
        _to_bf16(decoder)
    with new_checkpoint(out, force) as partial:
        save(model, partial, max_shard_size)
        if kept.is_dir():
            companions.copy_companions(kept, partial, generation=False, tokenizer=tokenizer)
        if manifest is not None:
            companions.copy_companions(manifest.folder / TOKENIZER, partial, generation=False)
        companions.write_object(partial / companions.GENERATION, generation)
        write_checksums(partial)
    return Exported(
        folder=out,
        step=found_step,
        parameters=count_parameters(decoder),
        nbytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        files=tuple(sorted(file.name for file in out.iterdir() if file.name != MARK)),
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


def _tokenizer(source: Manifest | Path) -> PreTrainedTokenizerBase:
    try:
        return source.tokenizer() if isinstance(source, Manifest) else load_tokenizer(source)
    except UserError as error:
        raise UserError(f"{error}; give --no-tokenizer to export without one") from None


def _with_token_ids(
    generation: dict[str, Any], tokenizer: PreTrainedTokenizerBase, eos_id: int | None
) -> dict[str, Any]:
    """`generation` with the tokenizer's ids where it says none; EOS is the padding where the tokenizer has none."""
    if generation.get("eos_token_id") is not None:
        return generation
    eos_id = tokenizer.eos_token_id if eos_id is None else eos_id
    pad = eos_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": eos_id, "pad_token_id": pad}
    return {name: i for name, i in ids.items() if i is not None} | generation


def _to_bf16(decoder: Decoder) -> None:
    kept = {id(p) for module in decoder.modules() if isinstance(module, Reader) for p in module.parameters()}
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


KIND = "export"
"""The kind that checkpoint folders of this package are marked as, see `cllm/files.py`."""


def check_out(out: Path, force: bool) -> None:
    """Raises `UserError` where `out` exists and may not be replaced."""
    if out.exists() and not force:
        raise UserError(f"{out}: exists; give another name, or --force to replace it")
    check_replaceable(out, KIND)


@contextmanager
def new_checkpoint(out: Path, force: bool) -> Iterator[Path]:
    """A folder to fill, which becomes `out` if all goes well and vanishes otherwise.

    Raises:
        UserError: as `check_out`, while another process writes to `out`, and where it cannot be written.
    """
    try:
        with new_folder(out, KIND, force=force) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
