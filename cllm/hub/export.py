"""From a run to a checkpoint folder: config.json, safetensors, their checksums, a model card, and companions.

The companions (tokenizer, chat templates, generation config) are those of the checkpoint that the run started from. For
a run that drew its weights, the tokenizer is that of its data.

The folder appears under its name once it is complete. Weights equal those of the checkpoint bit for bit, unless another
dtype is requested; fusion weights are always fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from transformers.utils import logging

from cllm.config import Config
from cllm.data.manifest import TOKENIZER, Manifest, tokenizer_sha256
from cllm.errors import DataError, UserError
from cllm.faults import naming
from cllm.files import MARK, check_replaceable, new_folder, usual_permissions
from cllm.hub import companions
from cllm.hub.card import write_card
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
_HINT = "; give --no-tokenizer to export without one"


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """The content of a folder that was written."""

    folder: Path
    step: int | None
    """Of the run's checkpoint; None without a run."""
    parameters: int
    """Tied ones are counted once."""
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
        tokenizer: copy the tokenizer of the checkpoint that the run started from, or of its data.
        force: replace `out`, which must have been made by this package.

    Raises:
        UserError: for a run, checkpoint or tokenizer that cannot be read, for data whose tokenizer may not be the
            run's, and as `check_out` does.
    """
    run, out = Path(run), Path(out)
    if dtype not in get_args(Dtype):
        raise UserError(f"dtype is {dtype!r}; allowed: {', '.join(get_args(Dtype))}")
    check_out(out, force)
    kept = run / companions.FOLDER
    manifest = _manifest(RunFolder(run)) if tokenizer and not companions.has_tokenizer(kept) else None
    decoder, config, loaded_step = load_run(_checkpoint(run, step))
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
        write_card(partial, RunFolder.of(run), config, decoder, loaded_step)
        write_checksums(partial)
    return describe_export(decoder, out, loaded_step)


def describe_export(decoder: Decoder, out: Path, step: int | None = None) -> Exported:
    """The content of `out`, to which `decoder` was written."""
    return Exported(
        folder=out,
        step=step,
        parameters=count_parameters(decoder),
        nbytes=sum(file.stat().st_size for file in out.glob("*.safetensors")),
        files=tuple(sorted(file.name for file in out.iterdir() if file.name != MARK)),
    )


def as_pretrained(decoder: Decoder) -> CLLMForCausalLM:
    """A transformers model around `decoder`; it uses the same tensors."""
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


def _manifest(run: RunFolder) -> Manifest:
    """The manifest of the data that the run was trained on.

    Raises:
        UserError: if the tokenizer in the data's folder is missing, or is not known to be the run's.
    """
    config = run.config()
    path = Path(config.data.main_folder)
    try:
        manifest = Manifest.read(path)
        if tokenizer_sha256(path / TOKENIZER) != manifest.tokenizer_sha256:
            raise UserError(f"{path / TOKENIZER}: is not the tokenizer that made the tokens in {path}")
        _check_unchanged(run, config, manifest)
    except UserError as error:
        raise UserError(f"{error}{_HINT}") from None
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path / TOKENIZER}: the run's tokenizer cannot be read: {error}{_HINT}") from None
    return manifest


def _check_unchanged(run: RunFolder, config: Config, manifest: Manifest) -> None:
    """Refuse training data whose tokenizer may not be the one that the run was trained with.

    A run records a digest of each folder of its data. If the training data have another one by now, their tokenizer
    must be that of a validation set that is as it was: all sets of a run have one tokenizer.
    """
    recorded = run.data_digests()
    if recorded is None or recorded.train == manifest.digest():
        return
    for name, folder in config.data.validation_sets.items():
        try:
            other = Manifest.read(folder)
        except DataError:
            continue
        if other.digest() == recorded.validation.get(name):
            if other.eos_id == manifest.eos_id and other.same_tokenizer(manifest):
                return
            raise UserError(
                f"{manifest.folder}: its tokenizer is not the one that the run was trained with, that of {other.folder}"
            )
    manifest.check_unchanged(recorded.train, run.path)


def _tokenizer(source: Manifest | Path) -> PreTrainedTokenizerBase:
    try:
        return source.tokenizer() if isinstance(source, Manifest) else load_tokenizer(source)
    except UserError as error:
        raise UserError(f"{error}{_HINT}") from None


def _with_token_ids(
    generation: dict[str, Any], tokenizer: PreTrainedTokenizerBase, eos_id: int | None
) -> dict[str, Any]:
    """`generation` with the tokenizer's ids, unless it has an EOS. Without a padding token, EOS is the padding."""
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
    """Write config.json and weights. Raises `UserError` for a `max_shard_size` that is not a size."""
    try:
        with quiet(), naming(str(folder)):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        usual_permissions(folder)
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
"""The mark of checkpoint folders of this package, see `cllm/files.py`."""


def check_out(out: Path, force: bool) -> None:
    """Raises `UserError` if `out` exists and must not be replaced."""
    if out.exists() and not force:
        raise UserError(f"{out}: exists; give another name, or --force to replace it")
    check_replaceable(out, KIND)


@contextmanager
def new_checkpoint(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder that becomes `out` on success, and is deleted otherwise.

    Raises:
        UserError: as `check_out` does, if another process is writing to `out`, and if it cannot be written.
    """
    try:
        with new_folder(out, KIND, force=force) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"{out}: cannot be written: {error}") from None
