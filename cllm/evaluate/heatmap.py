"""Scores by needle depth and length: one map for each run and compression, from the records of a suite of samples.

The records are those of `evaluate --suite SUITE`, whose `groups` have means by the facts `length` and `depth` of their
questions. A cell is the mean over all questions of its length and depth, over all tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from cllm import tables
from cllm.errors import UserError
from cllm.evaluate.measured_model import Measured
from cllm.evaluate.outputs import write_outputs
from cllm.evaluate.records import is_number, read_record
from cllm.evaluate.suites.suite import Number, Record, Suite
from cllm.files import inside, json_files, shorten
from cllm.runs import RunFolder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Image = Any

_DEPTH, _LENGTH = "depth", "length"
_PANEL = 2.6
"""Width and height of a map, in inches."""


class Cell(NamedTuple):
    """The mean of a number over the questions of a length and depth."""

    run: str
    spec: str
    """How the context's cache was compressed."""
    length: int
    """Tokens of the sample."""
    depth: float
    """Place of the needle in the context, in percent: 0 is the beginning."""
    value: float
    questions: int


@dataclass(frozen=True, kw_only=True, slots=True)
class HeatMap:
    """The maps of several runs and compressions, on one scale."""

    suite: str
    number: Number
    cells: list[Cell]

    @property
    def runs(self) -> list[str]:
        """Runs, in the order in which they were given."""
        return list(dict.fromkeys(cell.run for cell in self.cells))

    @property
    def specs(self) -> list[str]:
        """Compressions, in alphabetical order, the uncompressed cache first."""
        return sorted({cell.spec for cell in self.cells}, key=lambda spec: (spec not in ("as it is", "none"), spec))


def read_heatmap(runs: Sequence[RunFolder], suite: Suite, number: Number) -> HeatMap:
    """Read the records of `suite` in the folders of runs.

    If a run has several records of a task, length and compression, the one with the most questions counts.

    Raises:
        UserError: if a record cannot be read, or none has means by depth and length.
    """
    return _heatmap(suite, number, [(run.name, _of_run(run, suite)) for run in runs])


def heatmap_of(models: Sequence[Measured], suite: Suite, number: Number) -> HeatMap:
    """The maps of measured models, such as those of a study or of a Hugging Face folder. Raises as `read_heatmap`."""
    named = []
    for model in models:
        own = (record for record in model.records if record.get("suite") == suite.name)
        named.append((model.label, [(Path(model.name), record) for record in own]))
    return _heatmap(suite, number, named)


def _of_run(run: RunFolder, suite: Suite) -> list[tuple[Path, Record]]:
    """The records of `suite`, but those of a checkpoint that is not the newest, and their files."""
    folder = inside(run.path, f"{run.evaluation_folder.name}/{suite.name}", written_in=run.path)
    found = ((path, read_record(path)) for path in json_files(folder))
    return [(path, r) for path, r in found if not path.stem.endswith(f"-{Path(str(r.get('checkpoint'))).stem}")]


def _heatmap(suite: Suite, number: Number, named: Sequence[tuple[str, list[tuple[Path, Record]]]]) -> HeatMap:
    """The maps of records and their files, by the name of a run or model."""
    number = next(own for own in suite.numbers if own.key == number.key)  # without the suite's name
    cells = [cell for name, records in named for cell in _cells(name, records, number)]
    if not cells and not {_DEPTH, _LENGTH} <= set(getattr(suite, "groups", ())):
        raise UserError(
            f"--heatmap {suite.name}: its records have no means by depth and length; allowed: suites with needles at "
            "chosen depths, such as ruler"
        )
    if not cells:
        raise UserError(
            f"--heatmap {suite.name}: no run has records with means of {number.key} by depth and length; measure them "
            f"with evaluate --suite {suite.name}:length=1024|2048"
        )
    return HeatMap(suite=suite.name, number=number, cells=cells)


def _cells(name: str, found: list[tuple[Path, Record]], number: Number) -> list[Cell]:
    records: dict[tuple[str, str, int], Record] = {}
    sums: dict[tuple[str, int, float], tuple[float, int]] = {}
    for path, record in found:
        if (length := _length(record, path)) is None:
            continue  # means by depth alone
        place = str(record.get("spec")), str(record.get("task")), length
        kept = records.setdefault(place, record | {"file": path})
        if (record.get("questions") or 0) > (kept.get("questions") or 0):
            records[place] = record | {"file": path}
    for (spec, _, length), record in records.items():
        for depth, value, questions in _means(record, number):
            total, count = sums.get((spec, length, depth), (0.0, 0))
            sums[spec, length, depth] = (total + value * questions, count + questions)
    return [Cell(name, *place, total / count, count) for place, (total, count) in sums.items()]


def _length(record: dict[str, Any], file: Path) -> int | None:
    """The length of a record's samples; None if it has no means by depth for one length. Raises `UserError`."""
    groups = record.get("groups")
    if not isinstance(groups, dict) or not isinstance(groups.get(_DEPTH), dict):
        return None
    lengths = groups.get(_LENGTH)
    if not isinstance(lengths, dict) or len(lengths) != 1:
        return None
    if not (length := next(iter(lengths))).isdecimal():
        raise UserError(f"{file}: groups.{_LENGTH} has {shorten(repr(length))}; allowed: a whole number of tokens")
    return int(length)


def _means(record: dict[str, Any], number: Number) -> Iterator[tuple[float, float, int]]:
    """Depth, mean and number of questions of the means by depth. Raises `UserError` for other than numbers."""
    for depth, numbers in record["groups"][_DEPTH].items():
        where = f"{record['file']}: groups.{_DEPTH}.{depth}"
        if not isinstance(numbers, dict) or not depth.replace(".", "", 1).isdecimal():
            raise UserError(
                f"{where} is {shorten(repr(numbers))}; allowed: a depth in percent, with an object of means"
            )
        if (value := numbers.get(number.key)) is None:
            continue
        questions = numbers.get("questions")
        if not isinstance(questions, int) or isinstance(questions, bool) or questions < 1:
            raise UserError(f"{where}.questions is {shorten(repr(questions))}; allowed: a whole number of 1 or more")
        if not is_number(value) or math.isinf(value):
            raise UserError(f"{where}.{number.key} is {shorten(repr(value))}; allowed: a finite number")
        yield float(depth), value, questions


def csv_text(heatmap: HeatMap) -> str:
    """The cells with full precision."""
    return tables.csv_text(Cell._fields, (cell._asdict() for cell in heatmap.cells))


def markdown(heatmap: HeatMap) -> str:
    """A table of depths and lengths for each run and compression."""
    number, parts = heatmap.number, [_title(heatmap)]
    for run in heatmap.runs:
        for spec in heatmap.specs:
            own = {(c.depth, c.length): c.value for c in heatmap.cells if (c.run, c.spec) == (run, spec)}
            if not own:
                continue
            lengths = sorted({length for _, length in own})
            columns = [tables.Column[float]("depth %", lambda depth: f"{depth:g}")]
            columns += [tables.Column(f"{length:,}", _cell(own, length, number)) for length in lengths]
            depths = sorted({depth for depth, _ in own})
            parts += [f"{run}, {spec}:", tables.markdown(columns, depths)]
    return "\n\n".join(parts) + "\n"


def _cell(own: dict[tuple[float, int], float], length: int, number: Number) -> Any:
    return lambda depth: number.form(own[depth, length]) if (depth, length) in own else "–"


def _title(heatmap: HeatMap) -> str:
    better = "higher" if heatmap.number.higher_is_better else "lower"
    return f"{heatmap.suite}: {heatmap.number.head} by needle depth and length ({better} is better)"


def figure(heatmap: HeatMap) -> Figure:
    """Draw the maps on one scale of colours: a column for each run and a row for each compression, or of one run a
    column for each compression."""
    from matplotlib.figure import Figure

    runs, specs = heatmap.runs, heatmap.specs
    rows, columns = (specs, runs) if len(runs) > 1 else (runs, specs)
    lengths = sorted({cell.length for cell in heatmap.cells})
    depths = sorted({cell.depth for cell in heatmap.cells})
    width = max(_PANEL, 0.55 * len(lengths) + 0.9)
    size = (width * len(columns) + 1.6, _PANEL * len(rows) + 0.9)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=True)
    image = None
    for line, across in zip(grid, rows, strict=True):
        for axes, down in zip(line, columns, strict=True):
            own = {(c.depth, c.length): c.value for c in heatmap.cells if {c.run, c.spec} == {across, down}}
            image = _draw(axes, [[own.get((d, n)) for n in lengths] for d in depths], heatmap)
            if across == rows[0]:
                axes.set_title(down, fontsize=10 if columns is runs else 8)
            if across == rows[-1]:
                axes.set_xlabel("length, tokens", fontsize=8.5)
                axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], fontsize=8, rotation=30)
        line[0].set_ylabel(f"{across}\n\nneedle depth, %", fontsize=8.5)
        line[0].set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths], fontsize=8)
    assert image is not None
    figure.colorbar(image, ax=grid, label=heatmap.number.head, shrink=0.8, pad=0.01)
    figure.suptitle(_title(heatmap), fontsize=11, x=0.01, ha="left")
    return figure


def _draw(axes: Axes, values: Sequence[Sequence[float | None]], heatmap: HeatMap) -> Image:
    """Draw one map, (depths, lengths), with the numbers in its cells; cells without a number are grey."""
    import numpy as np
    from matplotlib import colormaps

    low, high = _scale(heatmap)
    colours = colormaps["viridis" if heatmap.number.higher_is_better else "viridis_r"].with_extremes(bad="0.88")
    array = np.array([[np.nan if value is None else value for value in row] for row in values])
    image = axes.imshow(np.ma.masked_invalid(array), cmap=colours, vmin=low, vmax=high, aspect="auto")
    for y, x in np.argwhere(np.isfinite(array)):
        text = f"{array[y, x]:.0f}" if high - low > 20 else f"{array[y, x]:.2g}"
        red, green, blue, _ = image.to_rgba(array[y, x])
        dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
        axes.text(x, y, text, ha="center", va="center", fontsize=7, color="white" if dark else "0.1")
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return image


def _scale(heatmap: HeatMap) -> tuple[float, float]:
    """The limits of the colours: 0 to 100 for percentages, else from the least to the largest number."""
    values = [cell.value for cell in heatmap.cells]
    if getattr(heatmap.number, "percent", False):
        return 0.0, 100.0
    return min(values), max(max(values), min(values) + 1e-9)


def write(heatmap: HeatMap, folder: Path) -> list[Path]:
    """Write `heatmap-SUITE` files into `folder` as `write_outputs` does. Returns their paths. Raises `UserError`."""
    name = f"heatmap-{heatmap.suite}"
    return write_outputs(folder, name, csv=csv_text(heatmap), markdown=markdown(heatmap), figure=figure(heatmap))
