"""Companions: the files of a checkpoint besides weights and config.json that import, export and uptraining copy.

They are the tokenizer, its chat templates, the generation config, and the licence. Not copied are model cards
(README.md describes another model), processors of images and sound (the decoder takes text), Python code, and pickled
files. `auto_map`, which asks programs to run code from the folder, is removed from JSON files.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from cllm.files import inside, write_atomic
from cllm.hub.kind import identify, is_export
from cllm.runs.folder import RunFolder
from cllm.trust import read_object

log = logging.getLogger(__name__)

TOKENIZER = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json", "tiktoken.model"),
)
"""A tokenizer's files, those of older formats included."""
TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
"""Chat templates: the default one, and a folder with one file for each named template, `NAME.jinja`."""
GENERATION = "generation_config.json"
_LICENCES = ("LICENSE", "LICENCE", "COPYING", "NOTICE", "USE_POLICY")
"""Beginnings of the names of files that must accompany weights."""
_CODE = "auto_map"
_CACHES = (None, "dynamic", "static")
"""Values of `cache_implementation` that the model's `generate` takes."""
_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def companions(folder: Path, *, generation: bool = True, tokenizer: bool = True) -> list[str]:
    """Sorted names of the companions in `folder`; named templates include their folder, as in `a/b.jinja`.

    `generation=False` leaves out the generation config, `tokenizer=False` the tokenizer and its templates. Raises
    `UserError` for a folder of templates that is a link leaving `folder`.
    """
    names = [*((*TOKENIZER, *TEMPLATES) if tokenizer else ()), *([GENERATION] if generation else ())]
    found = [name for name in names if (folder / name).is_file()]
    found += [file.name for file in folder.iterdir() if _is_licence(file)]
    for name in TEMPLATES if tokenizer else ():
        if (folder / name).is_dir():
            found += [f"{name}/{file.name}" for file in (folder / name).glob("*.jinja") if file.is_file()]
    for name in found:
        inside(folder, name, written_in=folder)
    return sorted(found)


def _is_licence(file: Path) -> bool:
    return file.is_file() and file.name.startswith(_LICENCES) and file.suffix in ("", ".txt", ".md")


def copy_companions(source: Path, folder: Path, *, generation: bool = True, tokenizer: bool = True) -> list[str]:
    """Copy the companions of `source` to `folder`, overwriting existing ones; returns their names.

    Links are followed. `auto_map` is removed from JSON files; those without it are copied byte for byte.

    Raises:
        UserError: for a JSON file that cannot be read.
        OSError: if `folder` cannot be written.
    """
    names = companions(source, generation=generation, tokenizer=tokenizer)
    for name in names:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / name, target)
        if name.endswith("_config.json"):
            content = read_object(target)
            if content.pop(_CODE, None) is not None:
                write_object(target, content)
    return names


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder of companions holds a tokenizer."""
    return (folder / "tokenizer.json").is_file()


def generation_values(
    folder: Path, vocab_size: int, token_ids: dict[str, int | list[int] | None] | None = None
) -> dict[str, Any] | None:
    """The settings of `generation_config.json` in `folder` that the model supports.

    Token ids beyond the embedding, and caches that the model does not have, are left out with a warning.

    Args:
        folder: a checkpoint, or a folder of companions.
        vocab_size: rows of the embedding.
        token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id` of config.json, for a folder without the file.

    Returns:
        The content of the file to write; None if the folder has no such file and `token_ids` is None.

    Raises:
        UserError: naming a file that cannot be read.
    """
    file = folder / GENERATION
    if not file.exists():
        if token_ids is None:
            return None
        file, values = folder / "config.json", {name: ids for name, ids in token_ids.items() if ids is not None}
    else:
        values = {name: value for name, value in read_object(file).items() if name != _CODE}
    for name in _IDS:
        if name in values:
            values[name] = _valid_ids(file, name, values[name], vocab_size)
    if values.get("cache_implementation") not in _CACHES:
        kind = values.pop("cache_implementation")
        log.warning("%s: cache_implementation %s is left out: the model has dynamic and static caches", file, kind)
    return values


def _valid_ids(file: Path, name: str, given: Any, vocab_size: int) -> Any:
    ids = given if isinstance(given, list) else [given]
    kept = [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < vocab_size]
    if given is None or kept == ids:
        return given
    log.warning("%s: %s is %s; left out is what is no token of the model (0 to %d)", file, name, given, vocab_size - 1)
    return (kept or None) if isinstance(given, list) else None


def write_object(file: Path, content: dict[str, Any]) -> None:
    """Write a JSON object as transformers does: indented by two, keys sorted."""
    write_atomic(file, json.dumps(content, indent=2, sort_keys=True) + "\n")


# ---- in a run --------------------------------------------------------------------------------------------------------

FOLDER = "companions"
"""The folder in a run with the companions of the checkpoint that it started from (`init.from`)."""


def keep_companions(source: Path, run: Path, vocab_size: int) -> None:
    """Copy the companions of the model that a run starts from into the run, for its export.

    Args:
        source: a checkpoint folder of any kind, a run, or one of its checkpoints.
        run: the folder of the new run.
        vocab_size: rows of its embedding.

    Raises:
        UserError: for a companion that cannot be read.
        OSError: if the run cannot be written.
    """
    is_run = identify(source).is_run
    if is_run:
        source = RunFolder.of(source).path / FOLDER
    if not source.is_dir():
        return
    target = inside(run, FOLDER, written_in=run, to_write=True)
    names = copy_companions(source, target, generation=False)
    values = generation_values(source, vocab_size, None if is_run else _token_ids(source))
    if values is not None:
        write_object(target / GENERATION, values)
        names.append(GENERATION)
    if names:
        log.info("from %s come along: %s", source, ", ".join(names))


def _token_ids(source: Path) -> dict[str, int | list[int] | None]:
    from cllm.hub.families import read_family

    config = read_object(source / "config.json")
    if is_export(config):
        return {name: config.get(name) for name in _IDS[:3]}
    return read_family(source).token_ids
