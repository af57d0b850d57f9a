"""Trained designs and post-hoc compression in one table and one figure: perplexity against bytes of cache.

A point is a run compressed by one method, from a record of `posthoc.measure`, or the uncompressed run. A point is on
the front if no other point has at most its bytes and at most its perplexity, and less of one of them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from cllm import tables
from cllm.errors import UserError, nearest
from cllm.evaluate.outputs import write_outputs
from cllm.evaluate.pareto_figure import figure
from cllm.evaluate.points import TRAINED, Point, Scores
from cllm.evaluate.suites.posthoc import specs_of
from cllm.posthoc import UNCOMPRESSED
from cllm.tables import Column


def expand(templates: Iterable[str], groups: Sequence[int], ratios: Sequence[float]) -> list[str]:
    """Fill in `{group}` and `{ratio}` in `templates` with all values; each result once, in order.

    A template @FILE stands for those on the lines of a file.

    Raises `UserError` for another name in braces, and for a file without templates.
    """
    specs: dict[str, None] = {}
    for template in specs_of([*templates], "--spec"):
        for group, ratio in itertools.product(groups, ratios):
            try:
                specs[template.format(group=group, ratio=f"{ratio:g}")] = None
            except (KeyError, IndexError, ValueError):
                raise UserError(f'--spec "{template}": allowed in braces: {{group}} and {{ratio}}') from None
    return list(specs)


def points(records: Sequence[dict[str, Any]], *, baseline: str | None = None) -> list[Point]:
    """The points of `records` and of the uncompressed runs, most bytes first, at equal bytes those as trained.

    The baseline is the uncompressed run called `baseline`, by default the one with the most bytes.

    Raises:
        UserError: for records of different sets, windows, prefixes or texts, for two runs of one name, and for a
            baseline that is not among the runs.
    """
    for key in ("set", "data", "prefix", "window", "max_tokens", "tokens_scored"):
        if len(seen := {str(record[key]) for record in records}) > 1:
            hint = ""
            if key == "tokens_scored":
                hint = " (another tokenizer, or windows left out that cross documents, make other texts)"
            raise UserError(f"measurements differ in {key}: {', '.join(sorted(seen))}; measure all alike{hint}")
    runs = {record["run"]: record for record in records}
    for record in records:
        one, other = (f"{r['path']}, {r['checkpoint']}" for r in (record, runs[record["run"]]))
        if one != other:
            raise UserError(f'two runs are called "{record["run"]}": {one}, and {other}; sweep them apart')
    if baseline is not None and baseline not in runs:
        raise UserError(f"--baseline {baseline}: not among the runs; {nearest(baseline, runs)}")
    base = runs[baseline] if baseline else max(runs.values(), key=lambda record: record["own_bf16_bytes_per_token"])
    exact = base["uncompressed_perplexity"]
    raw = [
        (record, TRAINED, record["own_bf16_bytes_per_token"], record["uncompressed_perplexity"])
        for record in runs.values()
    ]
    raw += [(r, r["spec"], r["bf16_bytes_per_token"], r["perplexity"]) for r in records if r["method"] != UNCOMPRESSED]
    found = [
        Point(
            run=record["run"],
            design=record["design"],
            spec=spec,
            bytes_per_token=n_bytes,
            ratio_to_own=record["own_bf16_bytes_per_token"] / n_bytes,
            ratio_to_mha=record["mha_bf16_bytes_per_token"] / n_bytes,
            perplexity=perplexity,
            increase_percent=100 * (perplexity / exact - 1),
            compression_share_of_prefill=None if spec == TRAINED else record["compression_share_of_prefill"],
            weight_bytes=0 if spec == TRAINED else record["weight_bytes"],
            host_bytes_per_token=0.0 if spec == TRAINED else record.get("bf16_host_bytes_per_token", 0.0),
            front=not any(
                other <= n_bytes and worse <= perplexity and (other, worse) != (n_bytes, perplexity)
                for _, _, other, worse in raw
            ),
            **{key: record.get(key) for key in ("window", "trained_tokens", "parameters", "text")},
        )
        for record, spec, n_bytes, perplexity in raw
    ]
    return sorted(found, key=lambda point: (-point.bytes_per_token, point.spec != TRAINED, point.perplexity))


def _time(point: Point) -> str:
    share = point.compression_share_of_prefill
    return "–" if share is None else f"{100 * share:.0f} %"


_COLUMNS = (
    Column[Point]("", lambda point: "*" if point.front else "", left=True),
    Column[Point]("run", lambda point: point.run, left=True),
    Column[Point]("design", lambda point: point.design, left=True),
    Column[Point]("compression", lambda point: point.spec, left=True),
    Column[Point]("bytes/token, bf16", lambda point: f"{point.bytes_per_token:,.0f}"),
    Column[Point]("own / x", lambda point: f"{point.ratio_to_own:.2f}"),
    Column[Point]("mha / x", lambda point: f"{point.ratio_to_mha:.2f}"),
    Column[Point]("perplexity", lambda p: f"{p.perplexity:.3f}" if p.perplexity < 1e4 else f"{p.perplexity:.3g}"),
    Column[Point]("increase", lambda point: f"{point.increase_percent:+.2f} %"),
    Column[Point]("time", _time),
)


def _columns(scores: Scores | None) -> Sequence[Column[Point]]:
    if scores is None:
        return _COLUMNS

    def cell(point: Point) -> str:
        return "–" if point.score is None else scores.form(point.score)

    names = [column.head for column in _COLUMNS]
    at = names.index("perplexity")
    return (*_COLUMNS[:at], Column(scores.head, cell), *_COLUMNS[at:])


def markdown(found: Sequence[Point], refused: Sequence[str] = (), scores: Scores | None = None) -> str:
    """The table, its notes, and the reasons of measurements that were refused."""
    quality = "at most the perplexity" if scores is None else f"at least as good a {scores.head}"
    notes = [
        f"`*`: no other point has at most as many bytes and {quality}. Bytes a token of the prefix "
        "with keys and values in bf16, whatever they were measured in; own and mha: the run's own cache and that of "
        "full attention, relative to it. Time: of compressing, relative to the prefill."
    ]
    notes += [
        f"- {p.run}, {p.spec}: and {p.weight_bytes:,} bytes of weights, for all caches together"
        for p in found
        if p.weight_bytes
    ]
    notes += [
        f"- {p.run}, {p.spec}: and {p.host_bytes_per_token:,.0f} bytes/token in host memory"
        for p in found
        if p.host_bytes_per_token
    ]
    notes += [f"- not measured: {line}" for line in refused]
    return tables.markdown(_columns(scores), found) + "\n\n" + "\n".join(notes) + "\n"


def csv_text(found: Sequence[Point], scores: Scores | None = None) -> str:
    """The points with full precision; with `scores`, also their scores."""
    names = [field.name for field in dataclasses.fields(Point) if scores is not None or field.name != "score"]
    rows = (dataclasses.asdict(point) for point in found)
    return tables.csv_text(names, ({name: row[name] for name in names} for row in rows))


def write(
    found: Sequence[Point], folder: Path, refused: Sequence[str] = (), scores: Scores | None = None
) -> list[Path]:
    """Write the points into `folder` as `write_outputs` does. Returns the files' paths. Raises `UserError`."""
    return write_outputs(
        folder,
        "posthoc",
        csv=csv_text(found, scores),
        markdown=markdown(found, refused, scores),
        figure=figure(found, scores),
    )
