"""From a recipe to a prepared folder.

Everything is written to OUT.partial, which is renamed to OUT once its manifest is written. Both carry the mark of
prepared data (`cllm/files.py`); a folder without it is never emptied or replaced. Each time a shard is finished,
`progress.json` in OUT.partial records the documents of the corpus that are written, and the bytes of each file. A later
run of the same recipe and source truncates the files to that and resumes. Its output is the same, byte for byte, as
that of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from pydantic import Field, ValidationError

from cllm.data.integrity import Damaged, write_checksums
from cllm.data.manifest import MANIFEST, TOKENIZER, Count, Manifest, Split, partial_folder
from cllm.data.prepare import tokenizer
from cllm.data.prepare.corpus import TRAIN, VALIDATION, Corpus, after
from cllm.data.prepare.encode import Encoded, encode
from cllm.data.prepare.recipe import Recipe
from cllm.data.prepare.shards import Progress, ShardWriter
from cllm.errors import DataError, UserError
from cllm.files import MARK, check_replaceable, is_empty, mark, remove, remove_leftovers, replace, write_atomic
from cllm.lock import discard_dead, locked
from cllm.progress import ProgressMeter
from cllm.section import Section

log = logging.getLogger(__name__)

STATE = "progress.json"
KIND = "data"
"""The kind that prepared folders, finished or not, are marked as."""


class State(Section):
    """The content of `progress.json`."""

    key: str
    """Hash of what the output depends on: recipe, source and versions."""
    documents: Count = 0
    """Kept documents of the corpus that are written, all splits together."""
    splits: dict[str, Progress] = Field(default_factory=dict)

    def save(self, folder: Path) -> None:
        write_atomic(folder / STATE, self.model_dump_json())


def prepare(recipe: Recipe, *, force: bool = False) -> Manifest:
    """Make a recipe's prepared folder, if it is not there already.

    Args:
        force: replace a finished folder.

    Raises:
        DataError: for a corpus, tokenizer or folder that cannot be used. The partial folder is then removed, unless it
            holds finished shards that a rerun can use.
    """
    folder = recipe.folder
    if finished := _finished(folder, recipe, force):  # its parent may be read-only by now
        discard_dead(folder)
        return finished
    with locked(folder):
        remove_leftovers(folder, KIND)
        if finished := _finished(folder, recipe, force):  # by the process that held the lock before
            return finished
        partial = partial_folder(folder)
        check_replaceable(partial, KIND)
        corpus = Corpus(recipe)
        try:
            mark(partial, KIND)
            with _removed_on_error(partial):
                _fill(partial, recipe, corpus)
                (partial / STATE).unlink()
                replace(partial, folder, KIND)
        except OSError as error:
            raise DataError(f"{partial}: cannot be written: {error}") from None
    return Manifest.load(folder)


def _finished(folder: Path, recipe: Recipe, force: bool) -> Manifest | None:
    """The manifest of a folder that was made by this recipe; None if it must be made. Raises `DataError`."""
    if not folder.exists():
        return None
    if not (folder / MANIFEST).exists():
        if is_empty(folder):
            return None
        raise DataError(f"{folder}: exists and is not a prepared folder; name another with --out")
    if force:
        check_replaceable(folder, KIND)
        return None
    manifest = Manifest.load(folder)
    if manifest.recipe != recipe.content():
        keys = [key for key, value in recipe.content().items() if manifest.recipe.get(key) != value]
        raise DataError(
            f"{folder}: was prepared from a different recipe ({', '.join(keys) or 'other keys'} differ); "
            "name another folder with --out, or replace it with --force"
        )
    # The source may have been removed since; that is no error.
    with contextlib.suppress(DataError):
        if Corpus(recipe).fingerprint_sha256() != manifest.source_sha256:
            log.warning("%s: the source has changed since it was prepared; --force prepares it again", folder)
    log.info("%s: already prepared from this recipe (--force prepares it again)", folder)
    return manifest


@contextlib.contextmanager
def _removed_on_error(partial: Path) -> Iterator[None]:
    """Remove the partial folder after a user's error, unless a rerun can use it."""
    try:
        yield
    except UserError:
        state = _read_state(partial)
        if state is None or not any(progress.shards for progress in state.splits.values()):
            remove(partial, KIND)
        else:
            log.info("%s: keeps the finished shards for the next run", partial)
        raise


def _read_state(partial: Path) -> State | None:
    try:
        return State.model_validate_json((partial / STATE).read_bytes())
    except (OSError, ValidationError):
        return None


def _fill(partial: Path, recipe: Recipe, corpus: Corpus) -> None:
    """Write all files of a prepared folder, the manifest last."""
    fingerprint = corpus.fingerprint_sha256()
    versions = {"python": python_version()} | {name: version(name) for name in ("tokenizers", "numpy")}
    if recipe.tokenizer.load:
        versions["transformers"] = version("transformers")
    key = hashlib.sha256(json.dumps([recipe.sha256(), fingerprint, versions]).encode()).hexdigest()
    state = _resume(partial, key) or _start(partial, key, recipe, corpus)
    saved = tokenizer.inspect(partial / TOKENIZER)
    try:
        splits = _write_shards(partial, recipe, corpus, saved, state)
        manifest = Manifest(
            name=recipe.name,
            dtype=saved.dtype,
            vocab_size=saved.vocab_size,
            eos_id=saved.eos_id,
            tokenizer_sha256=saved.sha256,
            splits=splits,
            counts=corpus.counts,
            recipe=recipe.content(),
            source_sha256=fingerprint,
            versions=versions,
        )
        manifest.checksums = write_checksums(manifest, partial)
    except Damaged:
        (partial / STATE).unlink(missing_ok=True)  # a rerun can use nothing here
        raise
    manifest.save(partial)


def _resume(partial: Path, key: str) -> State | None:
    """The state that an interrupted run left, its files truncated to it; None if there is nothing to resume."""
    if os.listdir(partial) == [MARK]:
        return None
    state = _read_state(partial)
    if state is None or state.key != key:
        why = "never got as far as the tokens" if state is None else "is of another recipe, source or library version"
        log.info("starting clean: %s %s", partial, why)
        return None
    kept = {STATE, TOKENIZER}
    for split, progress in state.splits.items():
        kept |= {name for shard in progress.shards for name in (shard.file, shard.index)}
        kept |= {f"{split}-{len(progress.shards):05d}{suffix}" for suffix in (".bin", ".idx") if progress.documents}
    written = sum(
        progress.documents + sum(shard.documents for shard in progress.shards) for progress in state.splits.values()
    )
    if written != state.documents or any((partial / name).is_symlink() for name in kept):
        log.info("starting clean: %s: %s does not fit the files beside it", partial, STATE)
        return None
    _remove(partial, but=kept)
    n_shards = sum(len(progress.shards) for progress in state.splits.values())
    log.info("resuming %s: %d documents, %d finished shards", partial, state.documents, n_shards)
    return state


def _start(partial: Path, key: str, recipe: Recipe, corpus: Corpus) -> State:
    """Empty the folder and make its tokenizer."""
    _remove(partial, but=set())
    choice = recipe.tokenizer
    if choice.train:
        log.info("training the tokenizer")
        # Training on no text would be reported as a fault of the tokenizer.
        if next(corpus.documents(), None) is None:
            raise _no_documents(recipe, corpus)
        if recipe.validation.fraction == 1:
            raise DataError(
                f"{recipe.name}: validation.fraction 1 leaves no document to train a tokenizer on; give one with "
                "--tokenizer.train null --tokenizer.load FOLDER"
            )
        tokenizer.train(corpus.sample(choice.train.sample_bytes), choice.train, partial / TOKENIZER)
    elif choice.numbers is not None:
        tokenizer.number_words(choice.numbers, partial / TOKENIZER)
    else:
        assert choice.load is not None
        tokenizer.load(choice.load, partial / TOKENIZER)
    state = State(key=key)
    state.save(partial)
    return state


def _remove(folder: Path, but: set[str]) -> None:
    for path in folder.iterdir():
        if path.name not in (*but, MARK):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _write_shards(
    partial: Path, recipe: Recipe, corpus: Corpus, saved: tokenizer.SavedTokenizer, state: State
) -> dict[str, Split]:
    writers = {
        split: ShardWriter(partial, split, saved.dtype, recipe.shard_tokens, state.splits.get(split))
        for split in (TRAIN, VALIDATION)
    }
    encoded = encode(after(corpus.documents(), state.documents), saved, recipe.n_workers)
    resumed = state.documents > 0  # the first batch then comes after documents that are written already
    meter = ProgressMeter(corpus.n_bytes, recipe.name, "B", scaled=True)
    with meter, contextlib.closing(encoded):
        for batch in encoded:
            n_shards = sum(len(writer.progress.shards) for writer in writers.values())
            _write_batch(batch, writers)
            state.documents += len(batch.lengths)
            (meter.skip if resumed else meter.update)(batch.position - meter.done)
            resumed = False
            if sum(len(writer.progress.shards) for writer in writers.values()) > n_shards:
                state.splits = {split: writer.sync() for split, writer in writers.items()}
                state.save(partial)
    splits = {split: writer.finish() for split, writer in writers.items()}
    splits = {split: totals for split, totals in splits.items() if totals.documents}
    _check_splits(splits, recipe, corpus)
    return splits


def _write_batch(batch: Encoded, writers: dict[str, ShardWriter]) -> None:
    start = 0
    for length, split, n_bytes in zip(batch.lengths, batch.splits, batch.n_bytes, strict=True):
        writers[split].add(batch.tokens[start : start + length], n_bytes)
        start += length


def _check_splits(splits: dict[str, Split], recipe: Recipe, corpus: Corpus) -> None:
    """Refuse a data set that lacks a split the recipe asked for."""
    fraction = recipe.validation.fraction
    if not splits:
        raise _no_documents(recipe, corpus)
    if TRAIN not in splits and fraction != 1:
        raise DataError(f"{recipe.name}: no documents left to train on; validation.fraction {fraction} took all")
    if VALIDATION not in splits and fraction != 0:
        n_documents = splits[TRAIN].documents
        asked = "validation.paths holds no documents" if fraction is None else f"validation.fraction {fraction}"
        raise DataError(
            f"{recipe.name}: the validation split is empty: {asked}, of {n_documents} documents; "
            "ask for more of them, or for none with validation.fraction 0"
        )


def _no_documents(recipe: Recipe, corpus: Corpus) -> DataError:
    counts = corpus.counts
    return DataError(
        f"{recipe.name}: source.kind {recipe.source.kind} holds no documents to keep "
        f"({counts.empty_documents} empty, {counts.short_documents} shorter than min_chars)"
    )
