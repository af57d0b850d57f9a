"""The table of a study's points, what is left of it, and the plan of a dry run."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from cllm.cache.accounting import kv_bytes
from cllm.config import Config
from cllm.config.unused import unused_settings
from cllm.counts import count_text
from cllm.errors import UserError
from cllm.study.busy import busy_lines, busy_shares, read_sessions
from cllm.study.estimate import Estimates, progress
from cllm.study.layout import Layout, is_held
from cllm.study.matching import cache_share
from cllm.study.points import Grid, Point, sized
from cllm.study.queue import Queue
from cllm.study.results import read_results
from cllm.tables import Column, aligned

_DASH = "–"
_TOLERANCE = 0.05
"""Relative difference of a reached share of mha's cache from the declared one above which the dry run names it."""


@dataclass(frozen=True, slots=True)
class Line:
    """A point in the table."""

    point: str
    state: str
    detail: str
    seconds: float | None
    """Seconds that it still takes; None: unknown."""


def duration(seconds: float | None) -> str:
    """`2 h 05 min`, `3 min` or `40 s`."""
    if seconds is None or not math.isfinite(seconds):
        return "unknown"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def lines_of(queue: Queue, estimates: Estimates) -> list[Line]:
    """A line for each point that is wanted so far, by priority, then for the results of other versions."""
    found = [_line(queue, point, estimates) for point in queue.wanted()]
    known = {point.name for point in queue.grid.all_points()}
    others = [result for result in read_results(queue.layout.results) if result.name not in known]
    for result in others:
        if any(variant == result.variant for variant in queue.grid.variants):
            why = "other settings" if result.code == queue.grid.code else f"other code, {result.code}"
            detail = f"{why}, commit {(result.content['commit'] or 'unknown')[:10]}: not used"
            found.append(Line(result.name, "other version", detail, 0.0))
    return found


def _line(queue: Queue, point: Point, estimates: Estimates) -> Line:
    layout, result, work = queue.layout, queue.result(point), queue.work(point)
    if result is not None:
        loss = "diverged" if result.loss is None else f"loss {result.loss:.4f}"
        if work is None and queue.lacks_evaluations(point, result):
            why = "not evaluated to the end" if result.evaluated is None else "evaluated by other code or suites"
            loss += f"; {why}, and its checkpoint is gone"
        state = "done" if work is None else ("evaluating" if is_held(layout.lock(point)) else "to be evaluated")
        return Line(point.short_name, state, loss, 0.0 if work is None else estimates.evaluation)
    config = queue.grid.config(point, layout.runs)
    tokens = config.train.steps * config.train.global_batch * config.data.seq_len
    so_far, speed = progress(layout.run(point))
    evaluated = bool(queue.commands) and not point.search
    seconds = estimates.seconds(point.variant.design, max(0, tokens - so_far), evaluated=evaluated)
    detail = f"{count_text(so_far)} of {count_text(tokens)}" if so_far else ""
    if is_held(layout.lock(point)):
        return Line(point.short_name, "running", detail + (f", {speed:,.0f} tokens/s" if speed else ""), seconds)
    if layout.failure(point).exists():
        return Line(point.short_name, "failed", layout.failure(point).read_text(encoding="utf-8").strip(), seconds)
    return Line(point.short_name, "waiting", detail, seconds)


def status(queue: Queue, estimates: Estimates, slots: int) -> str:
    """The table, the counts of each state, and the time that is left on `slots` devices."""
    lines = lines_of(queue, estimates)
    columns = (
        Column[Line]("point", lambda line: line.point, left=True),
        Column[Line]("state", lambda line: line.state, left=True),
        Column[Line]("", lambda line: line.detail, left=True),
    )
    counts: dict[str, int] = {}
    for line in lines:
        counts[line.state] = counts.get(line.state, 0) + 1
    parts = [aligned(columns, lines), "", ", ".join(f"{n} {state}" for state, n in counts.items())]
    left = [line.seconds for line in lines if line.state not in ("done", "other version")]
    known = [seconds for seconds in left if seconds is not None]
    total = None if len(known) < len(left) else sum(known) / slots
    parts.append(f"left: {duration(total)} on {slots} {'device' if slots == 1 else 'devices'}{_later(queue)}")
    parts += busy_lines(busy_shares(read_sessions(queue.layout.sessions, queue.grid.code)))
    return "\n".join(parts)


def _later(queue: Queue) -> str:
    """A remark on runs whose learning rate is not found yet."""
    if not queue.is_blocked:
        return ""
    return ", without runs at learning rates that the search has yet to find"


def dry_run(grid: Grid, layout: Layout, estimates: Estimates, slots: int) -> str:
    """The variants with what the rule makes of them, their settings without effect, and the number, tokens and hours of
    the runs."""
    study, unused = grid.study, list[str]()
    columns = (
        Column[list[str]]("design", lambda row: row[0], left=True),
        Column[list[str]]("× mha cache", lambda row: row[1]),
        Column[list[str]]("bytes/token", lambda row: row[5]),
        Column[list[str]]("parameters", lambda row: row[6]),
        Column[list[str]]("changed by the rule", lambda row: row[2], left=True),
        Column[list[str]]("steps", lambda row: row[3]),
        Column[list[str]]("seeds", lambda row: row[4]),
    )
    rows = []
    for variant in grid.variants:
        points = [grid.point(variant, tokens, 0, None) for tokens in study.tokens]
        configs = [grid.config(point, layout.runs) for point in points]
        match = grid.cache_match(variant)
        changed = "" if match is None else ", ".join(f"{key} {value}" for key, value in match.kv.items())
        steps = ", ".join(f"{config.train.steps:,}" for config in configs)
        seeds = ", ".join(map(str, study.seeds_of(variant.design)))
        model = configs[0].model
        bytes_ = f"{kv_bytes(model).resident:,.0f}"
        rows.append(
            [variant.label, f"{cache_share(model):.3f}", changed, steps, seeds, bytes_, _parameters(configs[0])]
        )
        unused += [f"{variant.label}: {line}" for line in _unused(configs[0])]
        if match is not None and abs(match.reached / match.wanted - 1) > _TOLERANCE:
            nearest = f"{match.wanted} of mha's cache cannot be reached; the nearest is {match.reached:.3f}"
            unused.append(f"{variant.label}: {nearest}")
    counts = _counts(grid)
    tokens = sum(n * each for n, each in counts)
    text = [f"rule: {study.match.rule}", aligned(columns, rows), *unused, ""]
    text += [f"{n:>5} runs of {count_text(each)} tokens" for n, each in counts]
    if study.rates is not None and study.rates.extend:
        text.append(f"      up to {study.rates.extend} more for a design whose best rate is at the edge of the values")
    speed = estimates.speed("")
    total = f"{sum(n for n, _ in counts):>5} runs, {count_text(tokens)} tokens"
    if speed is None:
        return "\n".join([*text, f"{total}; --tokens-per-second N adds the hours"])
    where = "one device" if slots == 1 else f"{slots} devices"
    text.append(f"{total}, {tokens / speed / 3600 / slots:,.2f} hours on {where} at {speed:,.0f} tokens/s each")
    return "\n".join(text)


def _parameters(config: Config) -> str:
    """The number of parameters; a dash if neither `model.vocab_size` nor prepared data give the vocabulary."""
    from cllm.model.sizes import count_parameters, meta_decoder

    try:
        return f"{count_parameters(meta_decoder(sized(config).model)):,}"
    except UserError:
        return _DASH


def _unused(config: Config) -> list[str]:
    """The settings of a run that have no effect."""
    from cllm.model.parts import has_fusion_weights
    from cllm.model.sizes import meta_decoder

    model = config.model.model_copy(update={"vocab_size": 2})  # the vocabulary may not be known
    return unused_settings(config, fusion_weights=has_fusion_weights(meta_decoder(model)))


def _counts(grid: Grid) -> list[tuple[int, int]]:
    """(number of runs, tokens of each): those of the searches, then the long ones.

    A known rate that the search tries is counted as one that it finds. Rates that it finds on a budget of the study are
    trained there already, with the first seed.
    """
    study = grid.study
    short, long = Counter[int](), Counter[int]()
    for variant in grid.variants:
        keep, more, searched = 1, 0, list[int]()
        if study.rates is not None:
            halving, known = study.rates.search_of(variant.design), study.rates.known_of(variant.design)
            keep, searched = halving.keep, halving.budgets
            more = sum(rate not in halving.values for rate in known)
            short.update(dict(zip(searched, halving.sizes, strict=True)))
        for tokens in study.tokens:
            seeds = len(study.seeds_of(variant.design)) - (tokens in searched)
            long[tokens] += seeds * keep + more
    return [(runs, tokens) for counted in (short, long) for tokens, runs in sorted(counted.items()) if runs]
