"""One table of trained designs and ways to compress their caches: bytes, perplexity and scores of suites.

A row is a model with one `--posthoc` spec, or uncompressed; models that differ in their seed are one row. Each number
has a column with its change, so that a compression that keeps the perplexity and loses retrieval is seen.
"""

from __future__ import annotations

import fnmatch
import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from cllm.errors import UserError, nearest
from cllm.evaluate.measured_model import EXACT, Measured, spec_of
from cllm.evaluate.score_choice import ScoreChoice, Value, suite_of
from cllm.evaluate.seeds import group_name
from cllm.evaluate.suites.suite import Record
from cllm.evaluate.units import perplexity
from cllm.statistics import Mean

_UNCHANGED = 1.0
"""Percent of perplexity up to which a compression counts as free."""
_NEEDED = ("perplexity", "bf16_bytes_per_token", "own_bf16_bytes_per_token", "mha_bf16_bytes_per_token")
"""Keys of post-hoc records; those of early versions lack some and are not read."""
_CLEAR = 2.0
"""Standard errors over questions by which a score of one seed is clearly worse."""


class Cell(NamedTuple):
    """A number of a row."""

    value: float
    error: float | None = None
    """Standard error."""
    change: float | None = None
    """To the uncompressed cache, or to the baseline: percent of a perplexity, else a difference."""
    hidden_loss: bool = False
    """Whether it is clearly worse though the perplexity is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A row: a design with one way to compress its cache."""

    label: str
    spec: str
    """`EXACT`: not compressed."""
    seeds: int
    """Of which a number of the row was measured."""
    kv_bytes: float | None
    ratio_to_own: float | None
    ratio_to_mha: float | None
    perplexity: Cell | None
    scores: tuple[Cell | None, ...]
    """In the order of the table's scores; None: not measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """The table."""

    rows: list[Answer]
    scores: tuple[ScoreChoice, ...]
    baseline: str
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Numbers:
    """The numbers of one model, by spec."""

    model: Measured
    perplexities: dict[str, float]
    text: str
    """Text on which the perplexity was measured; perplexities are compared on the same text only."""
    sizes: dict[str, tuple[float | None, float | None, float | None]]
    """Bytes, own / x and mha / x."""
    scores: tuple[dict[str, Value], ...]
    settings: tuple[str, ...]
    """Of each score; empty: not measured."""


def answers(
    models: Sequence[Measured],
    scores: Sequence[ScoreChoice],
    *,
    specs: Sequence[str] = ("*",),
    baseline: str | None = None,
    set_name: str | None = None,
) -> Answers:
    """The table of `models`.

    Args:
        models: as `read_measured` returns them.
        scores: the columns.
        specs: patterns of the specs to show, with `*` and `?`; uncompressed rows are always shown.
        baseline: the label of a row; default: the model with the largest cache.
        set_name: the set of the perplexity; default: the first that a model has.

    Raises:
        UserError: if a score was measured for no model, no spec has a pattern's name, or there is no such baseline.
    """
    warnings: list[str] = []
    read = [_numbers(model, scores, set_name, warnings) for model in models]
    for n, score in enumerate(scores):
        if not any(one.scores[n] for one in read):
            asked = f"evaluate --suite {score.suite.name} measures it"
            raise UserError(f"--score {score.text}: no model has a record of {score.head}; {asked}")
    if set_name is not None and not any(one.perplexities for one in read):
        raise UserError(f"--set {set_name}: no model has a perplexity on it")
    _check_specs(read, specs)
    groups: dict[str, list[_Numbers]] = {}
    for one in read:
        groups.setdefault(one.model.alike, []).append(one)
    alike = [_with_one_setting(_with_one_text(group, warnings), scores, warnings) for group in groups.values()]
    ordered = sorted(alike, key=lambda group: (-(_bytes(group[0], EXACT) or -1), _label(group)))
    labels = list(map(_label, ordered))
    if baseline is not None and baseline not in labels:
        raise UserError(f"--baseline {baseline}: not among the rows; {nearest(baseline, labels)}")
    base = ordered[labels.index(baseline) if baseline else 0]
    rows = [row for group in ordered for row in _rows(group, base, scores, specs)]
    if len({one.text for group in ordered for one in group if one.perplexities}) > 1:
        warnings.append("perplexities of some models are of other texts, and have no change to the baseline")
    for n, score in enumerate(scores):
        by_settings: dict[str, list[str]] = {}
        for one in read:
            if one.scores[n]:
                by_settings.setdefault(_shown(one.settings[n]), []).append(one.model.name)
        if len(by_settings) > 1:
            different = "; ".join(f"{text}: {', '.join(names)}" for text, names in by_settings.items())
            warnings.append(f"{score.suite.name} was measured with different options: {different}")
    return Answers(rows=rows, scores=tuple(scores), baseline=_label(base), warnings=_once(warnings))


def _label(group: Sequence[_Numbers]) -> str:
    return group_name(_once([one.model.label for one in group]))


def _once(lines: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(lines))


def _check_specs(read: Sequence[_Numbers], patterns: Sequence[str]) -> None:
    known = {spec for one in read for spec in (*one.sizes, *one.perplexities) if spec != EXACT}
    for pattern in patterns:
        if pattern not in ("*", "none") and not any(fnmatch.fnmatchcase(spec, pattern) for spec in known):
            hint = nearest(pattern, known) if known else "no compressed cache was measured"
            raise UserError(f"--posthoc {pattern}: no record of it; {hint}")


# ---- the numbers of one model


def _numbers(model: Measured, scores: Sequence[ScoreChoice], set_name: str | None, warnings: list[str]) -> _Numbers:
    by_suite: dict[str, list[Record]] = {}
    for record in model.records:
        by_suite.setdefault(suite_of(record), []).append(record)
    complete = [record for record in by_suite.get("posthoc", []) if all(record.get(key) for key in _NEEDED)]
    compressed = _on_one_text(complete, set_name)
    texts = [record for record in by_suite.get("perplexity", []) if record.get("perplexity") is not None]
    plain = _on_one_text(texts, set_name)
    perplexities, text = _perplexities(model, compressed, plain, set_name)
    found, settings, sizes = [], list[str](), dict[str, tuple[float | None, float | None, float | None]]()
    for record in compressed:
        own, mha = record["own_bf16_bytes_per_token"], record["mha_bf16_bytes_per_token"]
        sizes[EXACT] = own, 1.0, mha / own
        size = record["bf16_bytes_per_token"]
        sizes.setdefault(spec_of(record), (size, own / size, mha / size))
    for score in scores:
        own_records = plain if score.suite.name == "perplexity" else by_suite.get(score.suite.name, [])
        chosen, measured = _of_one_setting(score, own_records, model, warnings)
        settings.append(chosen)
        found.append({spec: value for spec, (value, _) in measured.items()})
        for spec, (_, record) in measured.items():
            sizes.setdefault(spec, _size(model, record.get("ratio_to_own") if spec else 1.0))
    sizes.setdefault(EXACT, _size(model, 1.0))
    return _Numbers(model, perplexities, text, sizes, tuple(found), tuple(settings))


def _size(model: Measured, ratio: float | None) -> tuple[float | None, float | None, float | None]:
    """Bytes, own / x and mha / x of a cache that is smaller by `ratio`."""
    if ratio is None or model.kv_bytes is None:
        return None, ratio, None
    return model.kv_bytes / ratio, ratio, None if model.kv_vs_mha is None else ratio / model.kv_vs_mha


def _on_one_text(records: Sequence[Record], set_name: str | None) -> list[Record]:
    """The records on one set with one window, the one that has most of them."""
    kept = [record for record in records if set_name in (None, record.get("set"))]
    groups: dict[str, list[Record]] = {}
    for record in kept:
        groups.setdefault(_text_of(record), []).append(record)
    return max(groups.values(), key=len, default=[])


def _text_of(record: Record) -> str:
    keys = ("set", "prefix", "window", "stride", "max_tokens", "tokens_scored")
    return json.dumps([record.get(key) for key in keys])


def _perplexities(
    model: Measured, compressed: Sequence[Record], plain: Sequence[Record], set_name: str | None
) -> tuple[dict[str, float], str]:
    """Perplexities by spec, and what they were measured on.

    Those after a compressed prefix, if there are any; else that of an evaluation; else of the training's validation.
    """
    if compressed:
        found = {spec_of(record): record["perplexity"] for record in compressed}
        exact = compressed[0].get("uncompressed_perplexity")
        return (found if exact is None else found | {EXACT: exact}), _text_of(compressed[0])
    if plain:
        return {EXACT: plain[-1]["perplexity"]}, _text_of(plain[-1])
    if model.loss is not None and set_name is None:
        return {EXACT: perplexity(model.loss)}, model.text
    return {}, ""


def _with_one_text(group: Sequence[_Numbers], warnings: list[str]) -> list[_Numbers]:
    """The seeds of a row, with perplexities on the text for which most were measured: a mean needs one text."""
    counts = Counter[str]()
    for one in group:
        counts[one.text] += len(one.perplexities)
    text = counts.most_common(1)[0][0]
    others = [one.model.name for one in group if one.text != text and one.perplexities]
    if others:
        warnings.append(f"{_label(group)}: perplexity without {', '.join(others)}, measured on another text")
    return [one if one.text == text else replace(one, perplexities={}, text=text) for one in group]


def _with_one_setting(group: Sequence[_Numbers], scores: Sequence[ScoreChoice], warnings: list[str]) -> list[_Numbers]:
    """The seeds of a row, with each score by the settings for which most seeds, then most specs, were measured."""
    chosen = list(group)
    for n, score in enumerate(scores):
        counts: dict[str, tuple[int, int]] = {}
        for one in group:
            if one.scores[n]:
                seeds, specs = counts.get(one.settings[n], (0, 0))
                counts[one.settings[n]] = seeds + 1, specs + len(one.scores[n])
        if len(counts) < 2:
            continue
        kept = max(counts, key=lambda settings: (*counts[settings], settings))
        others = [one.model.name for one in group if one.scores[n] and one.settings[n] != kept]
        warnings.append(
            f"{_label(group)}: {score.suite.name} without {', '.join(others)}, measured with other options than "
            f"{_shown(kept)}"
        )
        for i, one in enumerate(chosen):
            if one.settings[n] != kept:
                empty = tuple({} if k == n else found for k, found in enumerate(one.scores))
                chosen[i] = replace(one, scores=empty)
    return chosen


def _of_one_setting(
    score: ScoreChoice, records: Sequence[Record], model: Measured, warnings: list[str]
) -> tuple[str, dict[str, tuple[Value, Record]]]:
    """Settings and the number by spec: the settings for which most specs were measured, then with most questions."""
    by_settings: dict[str, dict[str, tuple[Value, Record]]] = {}
    for record in records:
        if (value := score.value(record)) is not None:
            settings = json.dumps(record.get("settings"), sort_keys=True)
            place = by_settings.setdefault(settings, {})
            spec = spec_of(record)
            if score.task is None and spec in place and place[spec][1].get("task") != record.get("task"):
                tasks = f"{place[spec][1].get('task')} and {record.get('task')}"
                raise UserError(f"--score {score.text}: {model.name} has several tasks, {tasks}; name one: SUITE:TASK")
            place[spec] = value, record
    if not by_settings:
        return "", {}

    def weight(measured: dict[str, tuple[Value, Record]]) -> tuple[int, int]:
        return len(measured), sum(record.get("questions") or 0 for _, record in measured.values())

    chosen = max(by_settings, key=lambda settings: (*weight(by_settings[settings]), settings))
    if len(by_settings) > 1:
        warnings.append(
            f"{model.name}: {score.suite.name} was measured with several options; shown are those of {_shown(chosen)}"
        )
    return chosen, by_settings[chosen]


def _shown(settings: str) -> str:
    values = json.loads(settings) or {}
    return ",".join(f"{key}={value}" for key, value in values.items() if value is not None) or "the defaults"


# ---- rows


def _rows(
    group: Sequence[_Numbers], base: Sequence[_Numbers], scores: Sequence[ScoreChoice], patterns: Sequence[str]
) -> list[Answer]:
    specs = [spec for one in group for spec in (*one.sizes, *one.perplexities) if spec != EXACT]
    shown = [spec for spec in _once(specs) if any(fnmatch.fnmatchcase(spec, pattern) for pattern in patterns)]
    rows = [_row(group, base, spec, scores) for spec in (EXACT, *shown)]
    return sorted(rows, key=lambda row: (row.spec != EXACT, row.ratio_to_own or 0.0))


def _row(group: Sequence[_Numbers], base: Sequence[_Numbers], spec: str, scores: Sequence[ScoreChoice]) -> Answer:
    is_base = spec == EXACT and group[0] is base[0]
    against = base if spec == EXACT else group
    ppl = _perplexity_cell(group, spec, against, is_base=is_base)
    unchanged = spec != EXACT and ppl is not None and ppl.change is not None and ppl.change <= _UNCHANGED
    # Windows are another share of the cache at another length, so bytes are those of the perplexity's text.
    of_text = [one for one in group if spec in one.perplexities and spec in one.sizes]
    sizes = [one.sizes[spec] for one in of_text or [one for one in group if spec in one.sizes]]
    size, own, mha = (_mean([size[n] for size in sizes]) for n in range(3))
    measured = [one for one in group if spec in one.perplexities or any(spec in found for found in one.scores)]
    cells = []
    for n, score in enumerate(scores):
        values = [one.scores[n].get(spec) for one in group]
        exact = [one.scores[n].get(EXACT) for one in against]
        comparable = not is_base and _setting(group, n) == _setting(against, n)
        cells.append(
            _score_cell(score, values, exact if comparable else [], unchanged=unchanged, same=against is group)
        )
    return Answer(
        label=_label(group), spec=spec, seeds=len(measured) or len(group), kv_bytes=size, ratio_to_own=own,
        ratio_to_mha=mha, perplexity=ppl, scores=tuple(cells),
    )  # fmt: skip


def _setting(group: Sequence[_Numbers], n: int) -> str:
    """The settings of a score, of the first seed with one."""
    return next((one.settings[n] for one in group if one.scores[n]), "")


def _bytes(one: _Numbers, spec: str) -> float | None:
    return one.sizes.get(spec, (None,))[0]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None


def _perplexity_cell(
    group: Sequence[_Numbers], spec: str, against: Sequence[_Numbers], *, is_base: bool
) -> Cell | None:
    """The mean over seeds, and its change in percent."""
    measured = [one for one in group if spec in one.perplexities]
    values = [one.perplexities[spec] for one in measured]
    if not values:
        return None
    mean = statistics.fmean(values)
    if against is group:  # of the same seeds
        against = measured
    exact = [one.perplexities[EXACT] for one in against if EXACT in one.perplexities]
    comparable = not is_base and group[0].text == against[0].text and bool(exact)
    if against is measured and len(exact) < len(values):
        comparable = False
    return Cell(mean, Mean.of(values).error, 100 * (mean / statistics.fmean(exact) - 1) if comparable else None)


def _score_cell(
    score: ScoreChoice, values: Sequence[Value | None], exact: Sequence[Value | None], *, unchanged: bool, same: bool
) -> Cell | None:
    """The mean over seeds with its standard error, and its change; `same`: `exact` has the same seeds.

    Then the change is that of the seeds that have both.
    """
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean, error, reach = _over_seeds(known)
    if same:
        exact = [b if a is not None else None for a, b in zip(values, exact, strict=False)]
    base = [value for value in exact if value is not None]
    if not base or (same and len(base) < len(known)):
        return Cell(mean, error)
    base_mean, _, base_reach = _over_seeds(base)
    change = mean - base_mean
    pairs = [a.value - b.value for a, b in zip(values, exact, strict=False) if a is not None and b is not None]
    clear = Mean.of(pairs).reach if same and len(pairs) == len(known) else None
    if clear is None and reach is not None and base_reach is not None:
        clear = math.hypot(reach, base_reach)
    worse = -change if score.number.higher_is_better else change
    return Cell(mean, error, change, unchanged and clear is not None and worse > clear and worse > 0)


def _over_seeds(values: Sequence[Value]) -> tuple[float, float | None, float | None]:
    """The mean, its standard error over the seeds, and half of its 95 % confidence interval; of one seed, the standard
    error is that over questions, of which there are many."""
    if len(values) == 1:
        error = values[0].error
        return values[0].value, error, None if error is None else _CLEAR * error
    mean = Mean.of([value.value for value in values])
    return mean.mean, mean.error, mean.reach
