"""Runs: data prepared, a model trained, runs compared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.api.arguments import is_path, objects_of, path_of, paths_of, wrong_type
from cllm.api.models import load, load_tokenizer
from cllm.api.settings import AnyConfig, each_of, run_config, settings_of
from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.data.module import DataModule
from cllm.data.prepare.build import prepare as prepare_recipe
from cllm.data.prepare.recipe import Recipe
from cllm.errors import UserError
from cllm.evaluate.comparison import Comparison, find_runs
from cllm.evaluate.comparison import compare as compare_runs
from cllm.evaluate.during_training import training_probes
from cllm.evaluate.report import figure as comparison_figure
from cllm.evaluate.report import markdown_table, terminal, write
from cllm.files import write_atomic
from cllm.lock import locked
from cllm.runs import RunFolder
from cllm.train.launch import Launch
from cllm.train.metrics import COMMON_KEYS
from cllm.train.module import TrainingModule
from cllm.train.run import make_module, with_vocabulary
from cllm.train.run import train as train_run

if TYPE_CHECKING:
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_TEXTS: dict[str, Any] = {
    "name": "texts",
    "source": {"kind": "files", "paths": ["texts.jsonl"]},
    "tokenizer": {"train": {"vocab_size": 2048}},
    "validation": {"fraction": 0.1},
}
"""The recipe of texts; the name of their file follows from them."""


def prepare(
    recipe: AnyConfig | None = None, *, texts: Iterable[str] | None = None, force: bool = False, **settings: Any
) -> Manifest:
    """Prepare a corpus for training, as `cllm prepare` does: a tokenizer, and the tokens of two splits.

    A folder that the same recipe has made before is used as it is. One process tokenises unless `workers=` says
    otherwise; a script that asks for several needs `if __name__ == "__main__":`.

    Args:
        recipe: a YAML file, the name of a shipped recipe such as `recipes/stdlib`, a dict, or a `Recipe`.
        texts: instead of a recipe, documents. They are stored beside the prepared folder, as JSON lines. The tokenizer
            is trained on them with up to 2,048 tokens, and a tenth of the documents is for validation.
        force: replace a folder that another recipe has made.
        settings: keys of the recipe, such as `name`, `out`, `max_bytes`, or dotted in `**{"tokenizer.train.vocab_size":
            512}`.

    Returns:
        The manifest. Its `folder` is what `data.path` of a run's config takes, and `tokenizer()` loads its tokenizer.

    Raises:
        UserError: for a recipe, corpus, tokenizer or folder that cannot be used.

    Examples:
        >>> import cllm
        >>> data = cllm.prepare(texts=[f"{n} fine days" for n in range(200)], name="days")
        >>> data.folder.as_posix(), sorted(data.splits)
        ('data/prepared/days', ['train', 'validation'])
    """
    if (recipe is None) == (texts is None):
        raise UserError("prepare: give either a recipe or texts=")
    layers: list[Any] = [{"workers": 1}]
    if texts is None:
        assert recipe is not None
        layers += each_of(recipe, "prepare: recipe")
        return prepare_recipe(settings_of(Recipe, layers, settings), force=force)
    file = _store(texts, settings_of(Recipe, [*layers, _TEXTS], settings).folder)
    return prepare_recipe(settings_of(Recipe, [*layers, _TEXTS, {"source.paths": [file]}], settings), force=force)


def _store(texts: Iterable[str], folder: Path) -> Path:
    """Write documents beside a prepared folder, and return the file. Other texts have another name, and so recipe."""
    documents = list(texts)
    if isinstance(texts, str) or not all(isinstance(text, str) for text in documents):
        raise UserError("prepare: texts is not a list of str; allowed: a str for each document")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
    digest = hashlib.sha256(lines.encode()).hexdigest()[:8]
    file = folder.with_name(f"{folder.name}-texts-{digest}.jsonl")
    if not file.exists():
        write_atomic(file, lines)
    return file


@dataclass(frozen=True, slots=True)
class Run(os.PathLike[str]):
    """A run on disk. Whatever takes a path takes it: `cllm.score(run)`, `cllm.export(run, folder)`."""

    path: Path
    """Its folder; docs/training.md lists the files in it."""

    def __fspath__(self) -> str:
        return str(self.path)

    @property
    def folder(self) -> RunFolder:
        """Its files."""
        return RunFolder(self.path)

    @property
    def config(self) -> Config:
        """Its complete config."""
        return self.folder.config()

    @property
    def is_finished(self) -> bool:
        """Whether it has reached its last step, or a callback has ended it; else `resume="auto"` continues it."""
        return self.folder.early_stop() is not None or self.folder.last_step() >= self.config.train.steps

    @property
    def metrics(self) -> dict[str, float]:
        """The last value of each metric, such as `train/loss`, `val/loss`, `val/ppl`; and `step` and `tokens`."""
        last: dict[str, float] = {}
        for row in self.folder.metrics():
            last |= {tag: value for tag, value in row.items() if tag != "time"}
        return last

    def history(self, tag: str) -> tuple[list[int], list[float]]:
        """The steps at which a metric was logged, and its values.

        Raises:
            UserError: for a metric that the run has not logged.
        """
        rows = [(row["step"], row[tag]) for row in self.folder.metrics() if row.get(tag) is not None]
        if not rows:
            known = sorted(self.metrics.keys() - set(COMMON_KEYS))
            raise UserError(f"{self.path}: has no values of {tag}; it has {', '.join(known) or 'none'}")
        return [step for step, _ in rows], [value for _, value in rows]

    def load(self, *, device: str = "cpu") -> PreTrainedModel:
        """The model at its newest checkpoint, see `cllm.load`."""
        return load(self.path, device=device)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer, see `cllm.load_tokenizer`."""
        return load_tokenizer(self.path)


def train(
    config: AnyConfig,
    *,
    resume: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] = (),
    **settings: Any,
) -> Run:
    """Train a run, as `cllm train` does.

    Args:
        config: a YAML file, the name of a shipped config, a dict, a `Config`, or a list of these, in which later ones
            win and a design may be one: `["quickstart", "fusedkv"]`.
        resume: `auto` for the newest checkpoint if there is one, or the path of one; None: a new run.
        overwrite: replace a run of the same name.
        callbacks: Lightning callbacks, besides `train.callbacks`.
        loggers: Lightning loggers, besides `train.loggers`. They get the hyperparameters and every row of metrics.
        settings: keys of the config: `name`, sections as dicts (`train={"steps": 100}`), or dotted keys
            (`**{"train.steps": 100}`).

    Raises:
        UserError: for whatever a user can correct, if possible before anything is written. Options of the command line
            in its message are arguments here: `--overwrite` is `overwrite=True`.

    Examples:
        >>> import cllm
        >>> run = cllm.train("tiny.yaml", name="tiny-cla", **{"model.kv.preset": "cla"})
        >>> run.is_finished, run.metrics["val/ppl"] > 1
        (True, True)
        >>> run.history("train/loss")[0]
        [1, 2]
    """
    from lightning.pytorch import Callback
    from lightning.pytorch.loggers import Logger

    if resume is not None and not is_path(resume):
        raise wrong_type("train: resume", resume, '"auto", the path of a checkpoint, or None')
    callbacks = objects_of("train: callbacks", callbacks, Callback)
    loggers = objects_of("train: loggers", loggers, Logger)
    complete = run_config(config, settings)
    folder = train_run(
        complete,
        resume=None if resume is None else os.fspath(resume),
        overwrite=overwrite,
        callbacks=callbacks,
        loggers=loggers,
        probes=training_probes(complete),
    )
    return Run(folder.path)


def lightning_modules(config: AnyConfig, **settings: Any) -> tuple[TrainingModule, DataModule]:
    """The LightningModule and the LightningDataModule of a config, for a Trainer of your own.

    The Trainer decides what `train.steps`, precision, devices, accumulation and checkpoints would decide in a run. Its
    training batches never end, so give it `max_steps`. It needs `use_distributed_sampler=False`, and for the batches of
    a run `accumulate_grad_batches` = global_batch / (micro_batch x devices). `module.model` is the `Decoder`.
    `train.cuda_graph` has no effect: a recorded step could neither accumulate gradients nor be of several processes.

    Args:
        config: as for `train`.
        settings: as for `train`.

    Raises:
        UserError: as `train` does.

    Examples:
        >>> import cllm
        >>> module, data = cllm.lightning_modules("tiny.yaml")
        >>> type(module).__name__, data.validation_names
        ('TrainingModule', ['validation'])
    """
    complete = with_vocabulary(run_config(config, settings))
    train = complete.train.model_copy(update={"cuda_graph": False})
    complete = complete.model_copy(update={"train": train})
    data = DataModule.of(complete)
    return make_module(complete, Launch.here(complete), data), data


@dataclass(frozen=True, slots=True, repr=False)
class ComparisonView:
    """A comparison of runs. `print` it for the table and its warnings."""

    comparison: Comparison
    """The rows, largest cache first: loss, perplexity, bytes of cache, speed."""
    files: tuple[Path, ...] = ()
    """Files that were written."""

    def figure(self) -> Figure:
        """Draw perplexity against bytes of cache."""
        return comparison_figure(self.comparison)

    def __str__(self) -> str:
        return terminal(self.comparison)

    __repr__ = __str__

    def _repr_markdown_(self) -> str:
        """The table, for notebooks."""
        return markdown_table(self.comparison) + "".join(f"\n\nwarning: {line}" for line in self.comparison.warnings)


def compare(
    runs: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    baseline: str | None = None,
    set_name: str | None = None,
    out: str | os.PathLike[str] | None = None,
) -> ComparisonView:
    """Compare runs in one table, as `cllm compare` does.

    Args:
        runs: run folders, or one.
        baseline: name of the run to compare with; default: the one with the largest cache.
        set_name: the validation set; default: each run's main one.
        out: a folder for the table as Markdown and CSV, and the figure; None: write nothing.

    Raises:
        UserError: if no run can be read, and for names that are unknown.

    Examples:
        >>> import cllm
        >>> view = cllm.compare(["runs/tiny", "runs/tiny-cla"])
        >>> [row.design for row in view.comparison.rows]
        ['mha', 'cla']
    """
    folder = None if out is None else path_of("compare: out", out)
    for name, value in (("baseline", baseline), ("set_name", set_name)):
        if value is not None and not isinstance(value, str):
            raise wrong_type(f"compare: {name}", value, "a name, as a str")
    found = compare_runs(find_runs(paths_of("compare: runs", runs)), baseline=baseline, set_name=set_name)
    if folder is None:
        return ComparisonView(found)
    with locked(folder):
        return ComparisonView(found, tuple(write(found, folder)))
