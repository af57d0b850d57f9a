"""The suite of lm-evaluation-harness's tasks."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import functools
import importlib.util
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field

from cllm.errors import UserError
from cllm.evaluate.suites.suite import RUN, STEP, Job, Number, Record, Suite
from cllm.evaluate.tasks.harness.offline import offline_if_unreachable
from cllm.evaluate.tasks.suite import AS_IS, slug
from cllm.evaluate.units import calibration_slug
from cllm.section import MAX_COUNT, MAX_SEED, Section
from cllm.tables import Column

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from cllm.evaluate.subjects import Subject

_BOOTSTRAPS = 1000
"""Resamplings for standard errors of metrics that are not means."""


class HarnessSettings(Section):
    """Options of the suite `lm_eval`."""

    tasks: list[str] = Field([], min_length=0)
    """Names of lm-eval's tasks, groups or tags, e.g. `lm_eval:hellaswag|piqa`."""
    include_path: str | None = None
    """A folder with task files (YAML) of one's own."""
    shots: int | None = Field(None, ge=0, le=1000)
    """Solved examples before every question; null: the task's number."""
    limit: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Questions of each task, the first ones; null: all."""
    seed: int = Field(1234, ge=0, le=MAX_SEED)
    """Selects the examples; 1234 is lm-eval's default."""
    start: bool = True
    """Whether the model's start token (BOS or EOS) stands before every context; false: as lm-eval's model `hf`, which
    leaves it out where the tokenizer does not add it."""


class LmEval(Suite):
    """Tasks of lm-evaluation-harness on runs and Hugging Face folders, through lm-eval's own evaluation.

    With --posthoc the cache of each request's context is compressed, all but its last token.
    """

    name = "lm_eval"
    help = "tasks of lm-evaluation-harness, e.g. lm_eval:hellaswag|piqa (package lm-eval)"
    settings: ClassVar[type[BaseModel] | None] = HarnessSettings
    positional: ClassVar[str | None] = "tasks"
    numbers: ClassVar[tuple[Number, ...]] = ()
    takes_text = False
    compared = False
    compresses = True
    has_any_metric = True

    def spec_groups(self, specs: Sequence[str]) -> list[list[str]]:
        """Each spec alone: lm-eval reads every context once for each."""
        return [[spec] for spec in specs]

    def tokens(self, options: argparse.Namespace, given: BaseModel | None, data: Path | None) -> float:
        settings = given or HarnessSettings()
        assert isinstance(settings, HarnessSettings)
        return len(settings.tasks) * (settings.limit or 2000) * 200 * (1 + (settings.shots or 0))

    def check(self, subject: Subject, job: Job) -> None:
        from cllm.posthoc.registry import parse

        for spec in job.options.posthoc:
            parse(spec)
        settings = _settings(job)
        with _one_line(settings):
            _manager(settings).load(settings.tasks)

    def run(self, subject: Subject, job: Job) -> list[Record]:
        from cllm.evaluate.calibration import calibration_of
        from cllm.evaluate.tasks.harness.model import subject_lm
        from cllm.posthoc.registry import parse

        settings, text = _settings(job), job.settings.calibration
        records = []
        for spec in job.options.posthoc or (None,):
            model = subject_lm(
                subject,
                job.device,
                spec=spec,
                start=settings.start,
                batch=job.settings.batch,
                calibration=text,
            )
            try:
                results = _evaluate(model, settings)
            except UserError:
                if not model.refused:
                    raise
                job.refused.update(model.refused)
                continue
            for task, found in results["results"].items():
                values = {key.partition(",")[0]: v for key, v in found.items() if isinstance(v, (int, float))}
                identity = {"set": self.name, "task": task, "spec": spec or AS_IS}
                identity |= {"settings": settings.model_dump(mode="json"), "metrics": values}
                identity["calibration"] = None if spec is None else calibration_of(text, parse(spec))
                identity["shots"] = results.get("n-shot", {}).get(task)
                identity["questions"] = results.get("n-samples", {}).get(task, {}).get("effective")
                records.append(self.record(subject, job, identity))
        return records

    def table(self, records: Sequence[Record]) -> str:
        """One line for each metric of a task; a column for each way to compress."""
        from cllm.tables import aligned

        specs = list(dict.fromkeys(record["spec"] for record in records))
        lines: dict[tuple[str, str, str], dict[str, Record]] = {}
        for record in records:
            for metric in record["metrics"]:
                if not metric.endswith("_stderr") and metric not in ("alias", "sample_len"):
                    lines.setdefault((record["run"], record["task"], metric), {})[record["spec"]] = record
        rows = [{**next(iter(line.values())), "metric": key[2], "line": line} for key, line in lines.items()]
        columns = [RUN, STEP, Column[Record]("task", lambda row: row["task"], left=True)]
        columns.append(Column("shots", lambda row: "-" if row["shots"] is None else str(row["shots"])))
        columns.append(Column("questions", lambda row: "-" if row["questions"] is None else f"{row['questions']:,}"))
        columns.append(Column("metric", lambda row: row["metric"], left=True))
        columns += [Column(spec if len(specs) > 1 else "value", _cell(spec)) for spec in specs]
        return aligned(columns, rows)

    def save(self, subject: Subject, record: Record, out: Path | None = None) -> Path:
        """Write a record as JSON. Returns the file, `lm_eval/TASK[-SETTINGS].json`, with --posthoc in a folder SPEC.

        Raises:
            UserError: if it cannot be written.
        """
        given = record["settings"]
        default = HarnessSettings().model_dump(mode="json")
        changed = [key for key in default if key != "tasks" and given[key] != default[key]]
        shown = f"-{slug('-'.join(f'{key}={given[key]}' for key in changed))}" if changed else ""
        shown += "" if subject.latest else f"-{Path(record['checkpoint']).stem}"
        folder = subject.results(out) / self.name
        path = (
            folder
            if record["spec"] == AS_IS
            else folder / f"{slug(record['spec'])}{calibration_slug(record.get('calibration'))}"
        ) / f"{slug(record['task'])}{shown}.json"
        self._write(subject, record, path, path)  # no events
        return path


def _settings(job: Job) -> HarnessSettings:
    settings = job.given
    if not isinstance(settings, HarnessSettings) or not settings.tasks:
        raise UserError("--suite lm_eval: needs names of tasks: --suite 'lm_eval:hellaswag|piqa'")
    return settings


def _cell(spec: str) -> Any:
    def cell(row: Record) -> str:
        metrics = row["line"].get(spec, {}).get("metrics", {})
        if row["metric"] not in metrics:
            return "-"
        error = metrics.get(f"{row['metric']}_stderr")
        return f"{metrics[row['metric']]:.4f}" + (f" ± {error:.4f}" if isinstance(error, float) else "")

    return cell


@contextlib.contextmanager
def _one_line(settings: HarnessSettings) -> Iterator[None]:
    """lm-eval's errors in loading tasks and their data as `UserError`."""
    offline = False
    try:
        with offline_if_unreachable() as offline:
            yield
    except UserError:
        raise
    except Exception as error:  # its own errors, and those of datasets and of the Hub, have no common base
        text = " ".join(str(error).split()) or type(error).__name__
        why = "the Hugging Face Hub cannot be reached, and " if offline else ""
        raise UserError(
            f"--suite lm_eval: {', '.join(settings.tasks)}: cannot be loaded: {why}{type(error).__name__}: {text}; "
            "tasks need data on this machine (include_path= takes task files with local data)"
        ) from None


def _manager(settings: HarnessSettings) -> TaskManager:
    """lm-eval's index of tasks; only of `include_path` if all tasks are there, which is much faster.

    Raises:
        UserError: without lm-eval, for an `include_path` that is no folder, and for an unknown task.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("--suite lm_eval needs the package lm-eval: pip install lm-eval")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if settings.include_path is not None:
        folder = Path(settings.include_path).expanduser()
        if not folder.is_dir():
            raise UserError(f"--suite lm_eval: include_path={settings.include_path}: no such folder")
        manager = _index(str(folder), False)
        if set(settings.tasks) <= set(manager.all_tasks):
            return manager
        manager = _index(str(folder), True)
    else:
        manager = _index(None, True)
    _check_names(settings.tasks, manager.all_tasks)
    return manager


def _check_names(tasks: Sequence[str], known: Sequence[str]) -> None:
    """Raise `UserError` for a task that lm-eval does not know: neither a name nor a file."""
    for task in tasks:
        if task not in known and not Path(task).exists():
            close = difflib.get_close_matches(task, known, n=1, cutoff=0.0)
            nearest = f' (nearest: "{close[0]}")' if close else ""
            raise UserError(
                f"--suite lm_eval: {task}: no such task; allowed: tasks of lm-eval{nearest}, those of include_path=, "
                "and paths of task files"
            )


@functools.lru_cache(maxsize=2)
def _index(include_path: str | None, include_defaults: bool) -> TaskManager:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include_path, include_defaults=include_defaults)


@contextlib.contextmanager
def _without_commit() -> Iterator[None]:
    """lm-eval without the commit of the working directory, outside of which git would print an error."""
    from lm_eval import evaluator

    asked = getattr(evaluator, "get_git_commit_hash", None)
    evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asked


def _evaluate(model: Any, settings: HarnessSettings) -> dict[str, Any]:
    from lm_eval import simple_evaluate

    with _one_line(settings), _without_commit():
        manager = _manager(settings)
        results: dict[str, Any] = simple_evaluate(
            model,
            tasks=settings.tasks,
            num_fewshot=settings.shots,
            limit=settings.limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            task_manager=manager,
            fewshot_random_seed=settings.seed,
        )
    return results
