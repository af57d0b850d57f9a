"""Run folders as rows of one table, and warnings about differences between them.

A row's loss comes from the run's evaluation of the set if there is one, else from its last validation during training.
The size of a run's cache is read from its summary: no design is known by name here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.config import Config
from cllm.data.manifest import Manifest
from cllm.errors import DataError, UserError, nearest
from cllm.evaluate.left_out import LeftOut
from cllm.evaluate.quality import PERPLEXITY, Quality, of_choice
from cllm.evaluate.records import read_record
from cllm.evaluate.run_numbers import number, suite_numbers, training_numbers
from cllm.evaluate.score_choice import ScoreChoice, parse_score_choice
from cllm.evaluate.seeds import CONSTANTS, Group, Row, group_name, percent_above
from cllm.evaluate.suites.registry import suites
from cllm.evaluate.suites.suite import Number
from cllm.evaluate.units import perplexity, set_label
from cllm.files import inside, shorten
from cllm.rows import Row as MetricsRow
from cllm.runs import RunFolder

log = logging.getLogger(__name__)

EVALUATED, TRAINING = "evaluate", "training"


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """The table, largest cache first, and its warnings."""

    rows: list[Row]
    baseline: Row
    set_name: str | None
    """The set asked for; None: the main validation set of each run."""
    warnings: list[str]
    left_out: list[str] = dataclasses.field(default_factory=list)
    """Paths of runs whose files cannot be read."""
    suite_numbers: dict[str, Number] = dataclasses.field(default_factory=dict)
    """The numbers in `Row.suites` of any row, in the order of their columns."""
    groups: list[Group] = dataclasses.field(default_factory=list)
    """The rows, those of runs that differ in their seed only together; largest cache first."""
    quality: Quality = PERPLEXITY
    """The number by which the runs are compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Run:
    """A run's row, and what it is compared by with other runs."""

    row: Row
    config: Config
    tokenizer: str | None
    evaluation: dict[str, Any] | None
    suite_steps: dict[str, int]
    """The optimizer step of each suite's record."""
    suite_settings: dict[str, str]
    """The settings of each suite's record."""
    suite_samples: dict[str, str]
    """The numbers of tasks and questions of each suite's record: defaults may depend on the model."""
    ended_early: bool = False


def find_runs(paths: Iterable[str | Path]) -> list[RunFolder]:
    """The run folders among `paths`, each once; others are skipped with a warning.

    Raises:
        UserError: if none is left.
    """
    candidates = [Path(path) for path in paths]
    found: dict[Path, RunFolder] = {}
    for path in candidates:
        run = RunFolder(path)
        missing = [file.name for file in (run.config_file, run.summary_file) if not file.exists()]
        if missing:
            log.warning("%s: skipped: not a run folder (it has no %s)", path, " and no ".join(missing))
        else:
            found.setdefault(path.resolve(), run)
    if not found:
        raise UserError(
            f"no run to compare among: {' '.join(map(str, paths)) or '(nothing)'}; give run folders: runs/*"
        )
    return list(found.values())


def compare(
    runs: Sequence[RunFolder],
    *,
    baseline: str | None = None,
    set_name: str | None = None,
    score: str | Sequence[str] | None = None,
) -> Comparison:
    """Compare `runs` on a set (default: each run's main validation set).

    With `score`, which is `SUITE[:TASK][/NUMBER]`, they are compared by that number of their records of the suite, else
    by perplexity. Of several scores the first decides, and all are columns. The baseline is the run called `baseline`,
    by default the one with the largest resident cache, then the largest read. If there are several runs, one whose
    files cannot be read is named on stderr and left out.

    Raises:
        UserError: if no run can be read, two runs have one name, the baseline is not among them, no run has a loss on
            the set or a record with the score, or there is no such score.
    """
    if set_name is not None and ("/" in set_name or set_name != set_name.strip("./")):
        raise UserError(f"--set {set_name}: is not the name of a validation set")
    known_suites = suites()
    texts = [score] if isinstance(score, str) else list(score or ())
    wanted = [parse_score_choice(text, known_suites) for text in texts]
    names = [run.name for run in runs]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"two runs are called {twice[0]}; a comparison needs a name for each")
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline {baseline}: not among the runs; {nearest(baseline, names)}")
    read, left_out = [], LeftOut(len(runs))
    for run in runs:
        with left_out.unless_usable(run.path):
            read.append(_read(run, set_name, wanted))
    left_out.status()
    if set_name is not None and all(run.row.loss is None for run in read):
        known = sorted({name for run in runs for name in _sets(run)})
        raise UserError(f"--set {set_name}: no run has a loss on it; {nearest(set_name, known)}")
    qualities = [of_choice(choice) for choice in wanted]
    for text, one in zip(texts, qualities, strict=True):
        if all(one.of(run.row) is None for run in read):
            raise UserError(f"--score {text}: no run has a record of it; first run evaluate --suite {one.suite}")
    quality = next(iter(qualities), PERPLEXITY)
    if baseline is not None and baseline not in [run.row.run for run in read]:
        raise UserError(f"--baseline {baseline}: cannot be read")
    rows = sorted((run.row for run in read), key=lambda row: (-row.kv_resident, -row.kv_read, row.run))
    base = next(row for row in rows if baseline in (None, row.run))
    if base.perplexity is not None:
        rows = [
            dataclasses.replace(row, perplexity_vs_baseline=percent_above(row.perplexity, base.perplexity))
            for row in rows
        ]
    base = next(row for row in rows if row.run == base.run)
    return Comparison(
        rows=rows,
        baseline=base,
        set_name=set_name,
        warnings=_warnings(read, base, quality),
        left_out=left_out.names,
        groups=_groups(rows, base, {run.row.run: run.config for run in read}),
        suite_numbers={
            name: number
            for name, number in {
                **{f"{s.name}_{number.key}": number for s in known_suites.values() for number in s.compared_numbers()},
                **{choice.name: choice.titled for choice in wanted},
            }.items()
            if any(name in row.suites for row in rows)
        },
        quality=quality,
    )


def _sets(run: RunFolder) -> set[str]:
    """Names of the sets that a run was evaluated or validated on, as far as its files can be read."""
    names = {path.stem for path in run.evaluation_folder.glob("*.json")}
    with contextlib.suppress(UserError):
        names |= set(run.config().data.validation or ["validation"])
    return names


def _groups(rows: Sequence[Row], baseline: Row, configs: dict[str, Config]) -> list[Group]:
    """Put the runs together whose settings differ in `train.seed`, name and folder only."""
    alike: dict[str, list[Row]] = {}
    for row in rows:
        settings = configs[row.run].as_yaml_data()
        settings["train"] = {key: value for key, value in settings["train"].items() if key != "seed"}
        settings = {key: value for key, value in settings.items() if key not in ("name", "runs_dir")}
        constants = [getattr(row, name) for name in CONSTANTS]
        alike.setdefault(json.dumps([settings, constants, row.steps], sort_keys=True), []).append(row)
    groups = [Group(name=group_name([row.run for row in some]), rows=tuple(some)) for some in alike.values()]
    names = [group.name for group in groups]
    unique = [g if names.count(g.name) == 1 else dataclasses.replace(g, name=", ".join(g.runs)) for g in groups]
    base = next(group for group in unique if baseline.run in group.runs).mean("perplexity")
    return [dataclasses.replace(g, vs_baseline=percent_above(g.mean("perplexity"), base)) for g in unique]


def _read(run: RunFolder, set_name: str | None, scores: Sequence[ScoreChoice]) -> _Run:
    config, summary = run.config(), run.summary()
    main = next(iter(config.data.validation_sets))
    evaluation = _evaluation(run, set_name or main)
    prefix = "val" if set_name in (None, main) else f"val-{set_name}"
    metrics = training_numbers(run, prefix)
    numbers, records = suite_numbers(run, set_name or main, scores)
    file = run.summary_file
    row = Row(
        run=run.name,
        design=str(summary.get("design")),
        parameters=number(file, summary, "parameters"),
        kv_resident=number(file, summary, "kv_bytes_per_token", "resident"),
        kv_resident_vs_mha=number(file, summary, "kv_vs_mha", "resident"),
        kv_read=number(file, summary, "kv_bytes_per_token", "read"),
        kv_read_vs_mha=number(file, summary, "kv_vs_mha", "read"),
        tokens=metrics.tokens,
        tokens_per_s=metrics.tokens_per_s,
        last_step=metrics.step,
        steps=number(file, summary, "steps"),
        suites=numbers,
        **(_from_evaluation(evaluation) if evaluation else _from_training(run, metrics.validated, prefix)),
    )
    return _Run(
        row=row,
        config=config,
        tokenizer=evaluation["tokenizer_sha256"] if evaluation else _tokenizer(config),
        evaluation=evaluation,
        suite_steps={
            name: number(path, record, "step")
            for name, (path, record) in records.items()
            if record.get("step") is not None
        },
        suite_settings={
            name: ",".join(f"{key}={value}" for key, value in record["settings"].items())
            for name, (_, record) in records.items()
            if isinstance(record.get("settings"), dict)
        },
        suite_samples={
            name: ", ".join(f"{record[key]} {key}" for key in ("tasks", "questions") if key in record)
            for name, (_, record) in records.items()
            if "questions" in record
        },
        ended_early=run.early_stop() is not None,
    )


_FIGURES = ("loss", "perplexity", "bits_per_byte", "tokens_scored", "window", "stride")
_WORDS = ("data", "precision", "tokenizer_sha256")
"""Keys of an evaluation's record that a comparison reads, besides `step`."""


def _evaluation(run: RunFolder, set_name: str) -> dict[str, Any] | None:
    path = inside(run.path, f"{run.evaluation_folder.name}/{set_label(set_name)}.json", written_in=run.path)
    if not path.exists():
        return None
    record = read_record(path)
    for key in (*_FIGURES, *(["step"] if record.get("step") is not None else [])):
        number(path, record, key)
    for key in _WORDS:
        if not isinstance(record.get(key), str | None) or key not in record:
            raise UserError(f"{path}: {key} is {shorten(repr(record.get(key)))}; allowed: a text")
    return record


def _from_evaluation(record: dict[str, Any]) -> dict[str, Any]:
    return {key: record.get(key) for key in ("loss", "perplexity", "bits_per_byte", "step")} | {"source": EVALUATED}


def _from_training(run: RunFolder, last: MetricsRow | None, prefix: str) -> dict[str, Any]:
    if last is None:
        return {}
    loss = number(run.metrics_file, last, f"{prefix}/loss")
    return {
        "loss": loss,
        "perplexity": perplexity(loss),
        "bits_per_byte": last.get(f"{prefix}/bits_per_byte"),
        "step": number(run.metrics_file, last, "step"),
        "source": TRAINING,
    }


def _tokenizer(config: Config) -> str | None:
    try:
        return Manifest.read(config.data.main_folder).tokenizer_sha256
    except DataError:
        return None  # the data may have been moved since; the vocabulary is compared in any case


def _suite_settings(suite: str, run: _Run) -> str | None:
    return run.suite_settings.get(suite)


def _suite_samples(suite: str, run: _Run) -> str | None:
    return run.suite_samples.get(suite)


def _warnings(runs: list[_Run], baseline: Row, quality: Quality) -> list[str]:
    """Differences that make rows less comparable, one line each."""

    def differ(what: str, value: Callable[[_Run], Any], among: list[_Run] = runs) -> list[str]:
        groups: dict[Any, list[str]] = {}
        for run in among:
            if (seen := value(run)) is not None:
                groups.setdefault(seen, []).append(run.row.run)
        if len(groups) < 2:
            return []
        return [what + ": " + "; ".join(f"{seen}: {', '.join(names)}" for seen, names in groups.items())]

    evaluated = [run for run in runs if run.evaluation]

    def of(key: str) -> Callable[[_Run], Any]:
        return lambda run: run.evaluation[key] if run.evaluation else None

    found = differ("trained on different numbers of tokens", lambda run: f"{run.row.tokens:,}")
    found += differ("trained on different data", lambda run: run.config.data.description)
    found += differ("trained at different lengths", lambda run: run.config.data.seq_len)
    found += differ("documents hidden from each other in some runs", lambda run: run.config.data.document_mask)
    tokenizers = differ("tokenizers differ (sha256)", lambda run: run.tokenizer and run.tokenizer[:12])
    tokenizers = tokenizers or differ("vocabularies differ", lambda run: run.config.model.vocab_size)
    found += [f"{line}; perplexities do not compare, bits per byte do" for line in tokenizers]
    found += differ("losses come from different places", lambda run: run.row.source)
    found += differ("evaluated on different data", of("data"), evaluated)
    if not tokenizers:
        found += differ("evaluated on different numbers of tokens", of("tokens_scored"), evaluated)
    found += differ("evaluated with different windows", of("window"), evaluated)
    found += differ("evaluated with different strides", of("stride"), evaluated)
    found += differ("evaluated in different precisions", of("precision"), evaluated)
    for suite in dict.fromkeys(name for run in runs for name in run.suite_settings):
        options = differ(f"{suite} was measured with different options", functools.partial(_suite_settings, suite))
        found += options or differ(
            f"{suite} was measured on different samples", functools.partial(_suite_samples, suite)
        )
    for run in runs:
        if quality.suite is not None and quality.of(run.row) is None:
            found.append(f"{run.row.run}: has no {quality.head}; evaluate --suite {quality.suite} measures it")
        if run.row.loss is None:
            found.append(f"{run.row.run}: has no loss on this set")
        elif run.row.step is not None and run.row.step < run.row.last_step:
            measured = "was evaluated" if run.evaluation else "was last validated"
            found.append(f"{run.row.run}: {measured} at step {run.row.step} and trained to {run.row.last_step} since")
        for suite, step in run.suite_steps.items():
            if step < run.row.last_step:
                measured = f"{suite} was measured at step {step}"
                found.append(f"{run.row.run}: {measured} and trained to {run.row.last_step} since")
        if run.row.last_step < run.row.steps:
            ended = "was ended early by a callback" if run.ended_early else "is not finished"
            found.append(f"{run.row.run}: {ended}: its last row is of step {run.row.last_step} of {run.row.steps}")
    if baseline.perplexity is None:
        found.append(f"the baseline {baseline.run} has no loss: no differences are shown")
    return found
