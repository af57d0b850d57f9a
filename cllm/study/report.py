"""The report of a study, from its folder of results alone: Markdown, JSON, figures and TensorBoard events.

No checkpoint and no data are read. The same results, and files of `beside`, give the same bytes.
"""

from __future__ import annotations

import calendar
import json
import re
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from cllm.config.suites import SuiteSchedule
from cllm.counts import count_text
from cllm.evaluate.outputs import png
from cllm.evaluate.suites.registry import suites
from cllm.evaluate.tasks.suite import TaskSuite
from cllm.files import RESULTS, mark_new, write_atomic
from cllm.statistics import Mean
from cllm.study import events, figures
from cllm.study.beside import beside
from cllm.study.busy import busy_lines, busy_shares, read_sessions
from cllm.study.layout import Layout
from cllm.study.left_out import diverged, not_used
from cllm.study.overview import overview
from cllm.study.results import SUITE, Result, read_folder
from cllm.study.schema import Study
from cllm.study.status import duration
from cllm.study.summary import Row, Summary, summarise
from cllm.tables import Column, markdown

_DASH = "–"
AR_LOSS = "val/ar_loss"
"""Loss on the tokens that repeat an earlier pair of tokens, in runs that measure it."""
_NOTES = (
    "Loss: the last validation in training, nats per token, mean ± standard error over the seeds. Difference: "
    "loss less that of {baseline} with the same seed, the mean over the seeds that both have (if they have others "
    "too, it is not the difference of their losses), with its 95 % interval by Student's t; below 0 is better, and "
    "the verdict is what this interval allows. Cache and read × mha: bytes of cache that are kept, and that a "
    "step of decoding reads, relative to the same model with full attention in every layer. Tokens, FLOPs and "
    "tokens/s: of one run's training."
)
_RECALL_NOTE = "ar loss: of tokens that repeat a pair of tokens of their context; other loss: of the others. "
_FIGURES_NOTE = (
    "In the figures, thick lines are means over the seeds, thin lines single seeds, and bars standard errors."
)


def write_report(study: Study, layout: Layout, only: Sequence[str] = ()) -> list[Path]:
    """Write the report into the study's folder. Returns the paths of its files.

    Raises:
        UserError: if there is no result of the study, and for files of `beside` that cannot be read.
    """
    results, unread = read_folder(layout.results)
    summary = summarise(study, results, only)
    busy = tuple(busy_shares(read_sessions(layout.sessions, summary.code)))
    summary = replace(summary, busy=busy, unread=tuple(unread))
    folder = layout.report
    mark_new(folder, RESULTS)
    pictures = {f"{name}.png": png(figure) for name, figure in _figures(summary).items() if figure is not None}
    text = report_text(summary, list(pictures), beside(summary, layout.results))
    contents: dict[str, str | bytes] = {
        "report.md": text,
        "report.json": json.dumps(report_data(summary), indent=1) + "\n",
        **pictures,
    }
    for name, content in contents.items():
        write_atomic(folder / name, content)
    board = folder / "tensorboard"
    return [folder / name for name in contents] + _write_events(summary, board, text, pictures)


def _figures(summary: Summary) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for tokens in summary.budgets:
        rows = summary.rows_of(tokens)
        end = "" if len(summary.budgets) == 1 else f"-{count_text(tokens)}"
        found[f"loss{end}"] = figures.curves_figure(summary, rows, "val/loss", "Validation loss")
        found[f"pareto{end}"] = figures.pareto_figure(summary, rows)
        if any(row.curve(AR_LOSS) for row in rows):
            found[f"ar_loss{end}"] = figures.curves_figure(summary, rows, AR_LOSS, "Associative-recall loss")
        for label, tag, head in _probed(rows):
            name = re.sub(r"[^A-Za-z0-9._-]", "-", label)
            found[f"{name}{end}"] = figures.curves_figure(summary, rows, tag, label, head)
    found["scores"] = figures.scores_figure(summary)
    return found


def _probed(rows: Sequence[Row]) -> list[tuple[str, str, str]]:
    """(label, tag, title) of the main number of each of `evaluate_suites` that a row has."""
    found: dict[str, tuple[str, str, str]] = {}
    for row in rows:
        for entry in row.first.content["config"].get("evaluate_suites") or []:
            schedule = SuiteSchedule.model_validate(entry)
            suite = suites().get(schedule.suite.partition(":")[0].strip())
            if isinstance(suite, TaskSuite):
                head = next(number.head for number in suite.numbers if number.key == suite.main)
                tag = f"{SUITE}{schedule.label}/{suite.main}"
                if row.curve(tag):
                    found[tag] = schedule.label, tag, head
    return list(found.values())


# ---- Markdown


def report_text(summary: Summary, pictures: Sequence[str], others: Sequence[str] = ()) -> str:
    """The report in Markdown; `others` is the section of `beside`."""
    study = summary.study
    parts = [f"# Study {study.name}", _head(summary)]
    for tokens in summary.budgets:
        rows = summary.rows_of(tokens)
        parts += [f"## {count_text(tokens)} tokens: {study.match.rule}", markdown(_design_columns(study), rows)]
    if not summary.rows:
        parts.append(f"No run of full length has ended {'with a finite loss' if summary.diverged else 'yet'}.")
    else:
        parts.append(_NOTES.format(baseline=study.baseline))
    parts += [*diverged(summary), *overview(summary), *others, *_curves(summary), *_rates(summary), *_scores(summary)]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures]
    parts += [_FIGURES_NOTE] if pictures else []
    parts += not_used(summary)
    return "\n\n".join(parts) + "\n"


def _head(summary: Summary) -> str:
    def several(values: Sequence[str | None]) -> str:
        return ", ".join(dict.fromkeys(value or "unknown" for value in values))

    used = sorted(summary.used, key=lambda result: result.name)
    long = sum(not result.content["search"] for result in used)
    seconds = sum(result.content["trained_tokens"] / result.tokens_per_s for result in used if result.tokens_per_s)
    hardware = several([_hardware(result) for result in used])
    lines = [
        f"{long} {'run' if long == 1 else 'runs'} of full length and {len(used) - long} of the search for learning "
        "rates.",
        f"Hardware: {hardware}; {duration(seconds)} of training on one device.",
        f"Code {summary.code}, commit {several([result.content['commit'] for result in used])}.",
    ]
    lines += [f"{line[0].upper()}{line[1:]}." for line in busy_lines(summary.busy)]
    return "\n".join(f"- {line}" for line in lines)


def _hardware(result: Result) -> str:
    environment = result.content["environment"]
    return environment.get("gpus") or f"CPU, {environment.get('platform', 'unknown')}"


def signed(mean: Mean | None) -> str:
    """`-0.0123 [-0.0150, -0.0096]`; without an interval, the mean alone."""
    if mean is None:
        return _DASH
    if mean.interval is None:
        return f"{mean.mean:+.4f}"
    low, high = mean.interval
    return f"{mean.mean:+.4f} [{low:+.4f}, {high:+.4f}]"


def with_error(mean: Mean | None, form: str = ".4f") -> str:
    """`3.2012 ± 0.0031`; without an error, the mean alone."""
    if mean is None:
        return _DASH
    return format(mean.mean, form) + ("" if mean.error is None else f" ± {mean.error:{form}}")


def _ratio(row: Row, which: str) -> str:
    return f"{row.first.content['summary']['kv_vs_mha'][which]:.3f}"


def _flops(row: Row) -> str:
    per_token = row.first.content["summary"].get("training_flops_per_token")
    return _DASH if per_token is None else f"{per_token * row.first.content['trained_tokens']:.3g}"


def _rate(row: Row) -> str:
    return f"{row.first.rate:g}" + ("" if row.note in ("", "as configured", "found") else f" ({row.note})")


def _design_columns(study: Study) -> Sequence[Column[Row]]:
    return (
        Column("design", lambda row: row.label, left=True),
        Column("cache × mha", lambda row: _ratio(row, "resident")),
        Column("read × mha", lambda row: _ratio(row, "read")),
        Column("parameters", lambda row: count_text(row.first.content["summary"]["parameters"])),
        Column("tokens", lambda row: count_text(row.first.content["trained_tokens"])),
        Column("FLOPs", _flops),
        Column("learning rate", _rate),
        Column("seeds", lambda row: str(len(row.results))),
        Column("loss", lambda row: with_error(row.loss)),
        Column("difference", lambda row: "baseline" if _is_base(study, row) else signed(_pairs(row))),
        Column("verdict", lambda row: "" if _is_base(study, row) else _verdict(row), left=True),
        Column("tokens/s", lambda row: with_error(row.mean_of(lambda r: r.tokens_per_s), ",.0f").partition(" ")[0]),
    )


def _is_base(study: Study, row: Row) -> bool:
    return row.variant.design == study.baseline


def _pairs(row: Row) -> Mean | None:
    return None if row.difference is None else row.difference.pairs


def _verdict(row: Row) -> str:
    return "no baseline yet" if row.difference is None else row.difference.verdict


def _curves(summary: Summary) -> list[str]:
    fitted = [row for row in summary.rows if row.fit is not None]
    if not fitted:
        return []

    def parameter(row: Row, n: int) -> str:
        assert row.fit is not None
        low, high = row.fit.interval(n)
        return f"{row.fit.parameters[n]:.4g} [{low:.4g}, {high:.4g}]"

    columns = (
        Column[Row]("design", lambda row: row.label, left=True),
        Column[Row]("tokens", lambda row: count_text(row.tokens)),
        Column[Row]("E", lambda row: parameter(row, 0)),
        Column[Row]("A", lambda row: parameter(row, 1)),
        Column[Row]("b", lambda row: parameter(row, 2)),
        Column[Row](f"crosses {summary.study.baseline}", _crossing, left=True),
    )
    note = (
        "Fits of L = E + A / tokens^b to the mean validation loss after the first tenth, with 90 % intervals of a "
        "bootstrap of residuals. The learning rate falls within a run, so the curve of one run is steeper at its end "
        "than that of longer runs, and a crossing is a property of these fits, no forecast. Crossings are of the seeds "
        "that both designs have, and their intervals leave out the differences between seeds."
    )
    return ["## Learning curves", markdown(columns, fitted), note]


def _crossing(row: Row) -> str:
    return "" if row.crossing is None else row.crossing.text


def _rates(summary: Summary) -> list[str]:
    lines: list[list[str]] = []
    for label, found in summary.searches.items():
        for n, part in enumerate(found.rounds):
            losses = {rate: loss for rate, loss in part.losses.items() if loss is not None}
            if not losses:
                continue
            cells = ", ".join(f"{rate:g}: {loss:.4f}" for rate, loss in sorted(losses.items()))
            last = n + 1 == len(found.rounds) and bool(found.chosen)
            best = ", ".join(f"{rate:g}" for rate in found.chosen) if last else ""
            if found.diverged and n + 1 == len(found.rounds):
                best = "none: all diverged"
            lines.append([label, count_text(part.tokens), cells, best + (" (edge)" if last and found.at_edge else "")])
    if not lines:
        return []
    columns = (
        Column[list[str]]("design", lambda row: row[0], left=True),
        Column[list[str]]("tokens", lambda row: row[1]),
        Column[list[str]]("loss at each learning rate", lambda row: row[2], left=True),
        Column[list[str]]("best", lambda row: row[3], left=True),
    )
    note = (
        "Loss: the last validation of a run, nats per token, with one seed. edge: the best is the smallest or largest "
        "value of the search, so a better one may lie outside of it."
    )
    return ["## Learning rates", markdown(columns, lines), note]


def _scores(summary: Summary) -> list[str]:
    parts: list[str] = []
    labels = list(dict.fromkeys(label for _, means in summary.scores for label in means))
    for name in dict.fromkeys(score.label for score, _ in summary.scores):
        chosen = [(score, means) for score, means in summary.scores if score.label == name]
        columns = [Column[str]("design", lambda label: label, left=True)]
        for score, means in chosen:
            columns.append(Column(score.head, lambda label, s=score, m=means: _score(s.form, m.get(label))))  # type: ignore[misc]
        parts += [f"### {name}", markdown(columns, labels)]
    if refused := _refused(summary):
        parts += ["### Refused compressions", refused]
    recall = _RECALL_NOTE if any(score.head == "ar loss" for score, _ in summary.scores) else ""
    note = f"Mean ± standard error over the seeds. Losses are nats per token. {recall}".strip()
    return ["## Evaluations", *parts, note] if parts else []


def _refused(summary: Summary) -> str:
    """The specs that cannot compress the cache of a design, with the reason."""
    lines: dict[str, None] = {}
    for row in summary.rows:
        for result in row.results:
            for record in result.content["evaluations"]:
                for spec, reason in record.get("refused", {}).items():
                    lines[f"- {row.label}, {record['suite']}: `{spec}`: {reason}"] = None
    return "\n".join(lines)


def _score(form: Any, mean: Mean | None) -> str:
    if mean is None:
        return _DASH
    return form(mean.mean) + ("" if mean.error is None else f" ± {mean.error:.2g}")


# ---- JSON and TensorBoard


def report_data(summary: Summary) -> dict[str, Any]:
    """The report as plain data, with the commit and the config of every row."""
    return {
        "study": summary.study.name,
        "baseline": summary.study.baseline,
        "rule": summary.study.match.rule,
        "code": summary.code,
        "busy": [asdict(share) for share in summary.busy],
        "rows": [_row_data(row) for row in summary.rows],
        "rates": {
            label: {
                "rounds": [
                    {"tokens": part.tokens, "losses": {f"{rate:g}": loss for rate, loss in part.losses.items()}}
                    for part in found.rounds
                ],
                "chosen": list(found.chosen),
            }
            for label, found in summary.searches.items()
        },
        "scores": [
            {"suite": score.suite, "label": score.label, "number": score.head, "designs": _means(means)}
            for score, means in summary.scores
        ],
        "diverged": [result.name for result in summary.diverged],
        "not_used": [{"result": result.name, "reason": reason} for reason, result in summary.others],
        "not_read": list(summary.unread),
    }


def _means(means: dict[str, Mean]) -> dict[str, Any]:
    return {label: _mean_data(mean) for label, mean in means.items()}


def _mean_data(mean: Mean | None) -> dict[str, Any] | None:
    if mean is None:
        return None
    return {"n": mean.n, "mean": mean.mean, "standard_error": mean.error, "interval_95": mean.interval}


def _row_data(row: Row) -> dict[str, Any]:
    fit = None
    if row.fit is not None:
        fit = {name: [row.fit.parameters[n], *row.fit.interval(n)] for n, name in enumerate(("E", "A", "b"))}
    return {
        "design": row.variant.design,
        "settings": dict(row.variant.settings),
        "tokens": row.tokens,
        "learning_rate": row.first.rate,
        "rate_note": row.note,
        "losses": {str(result.content["seed"]): result.loss for result in row.results},
        "loss": _mean_data(row.loss),
        "difference": None if row.difference is None else _mean_data(row.difference.pairs),
        "verdict": None if row.difference is None else row.difference.verdict,
        "fit": fit,
        "crossing": None if row.crossing is None else row.crossing.tokens,
        "summary": row.first.content["summary"],
        "match": row.first.content["match"],
        "results": [result.name for result in row.results],
        "commits": sorted({result.content["commit"] or "unknown" for result in row.results}),
        "config": row.first.content["config"],
    }


def _write_events(summary: Summary, folder: Path, text: str, pictures: dict[str, bytes]) -> list[Path]:
    newest = max(result.content["finished"] for result in summary.used)
    wall_time = float(calendar.timegm(time.strptime(newest, "%Y-%m-%dT%H:%M:%SZ")))
    named = [events.text("report", text)]
    named += [events.image(name.removesuffix(".png"), content) for name, content in pictures.items()]
    written = [events.write_events(folder, named, wall_time)]
    for row in summary.rows:
        tags = [*(tag for tag in row.first.content["validation"] if tag != "tokens"), *row.first.suites]
        scalars = [events.scalar(tag, value, int(t)) for tag in tags for t, value in row.curve(tag)]
        name = f"{row.label}-{count_text(row.tokens)}".replace("/", "-").replace(" ", "")
        written.append(events.write_events(folder / name, scalars, wall_time))
    return written
