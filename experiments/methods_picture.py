"""Draw what compressions cost against their bytes, from tables of measurements of one model.

    python -m experiments.methods_picture docs/results/2026-11-27-quantisers-smollm2-cpu.csv --out methods.png
    python -m experiments.methods_picture TABLE.csv ... --copying RECORDS.json ... --out methods.png

A table has the columns `method`, `bf16_ratio` and `increase_percent`, as the tables in docs/results have; a file of
records (.json) has those of evaluate --posthoc in `rows`. Each increase is relative to the uncompressed cache on the
text of its own table; a compression that several tables have is taken from the first of them. With --copying, a second
panel shows the share of tokens that the model copies; RECORDS.json has `rows` with records of the suite, and again the
first of several files counts. A Markdown table is written beside the picture; its rows join both measurements of a
compression if their ratios differ by at most a tenth.
"""

from __future__ import annotations

import csv
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.arguments import Parser
from cllm.errors import UserError, one_line
from cllm.evaluate.labels import place_labels
from cllm.evaluate.outputs import png
from cllm.evaluate.records import is_number
from cllm.files import write_atomic
from cllm.signals import stoppable
from cllm.trust import parse_json

_SIZES = {"ratio", "bits", "rank", "tokens", "group", "residual", "svd", "sinks"}
"""Options that do not make a line of its own in the picture."""
_EQUAL_RATIOS = 0.1
"""Measurements of one compression belong together if their ratios differ by less than this share."""
_LINEAR = 1.0
"""Percent up to which the axis of the increase is linear; logarithmic beyond."""


@dataclass(frozen=True, slots=True)
class Point:
    """A compression of the model."""

    spec: str
    ratio: float
    """Bytes of the uncompressed cache over bytes of the compressed one, in bf16."""
    value: float
    """Increase of the perplexity in percent, or share of copied tokens in percent."""

    def __post_init__(self) -> None:
        if not isinstance(self.spec, str) or not self.spec:
            raise ValueError(f"a spec is {self.spec!r}; allowed: the name of a compression")
        if not (is_number(self.ratio) and 0 < self.ratio < math.inf):
            raise ValueError(f"{self.spec}: the ratio of bytes is {self.ratio}; allowed: a positive number")
        if not (is_number(self.value) and math.isfinite(self.value)):
            raise ValueError(f"{self.spec}: the increase or share is {self.value}; allowed: a finite number")

    @property
    def series(self) -> str:
        """The spec without options that set the size or hardly change it: `xkv codes=mixed`, `snapkv+kivi`."""
        parts = []
        for part in self.spec.split("+"):
            name, _, options = part.partition(":")
            kept = [o for o in options.split(",") if o and o.partition("=")[0] not in _SIZES]
            parts.append(" ".join([name, ",".join(kept)]).strip())
        return "+".join(parts)


def read_table(file: Path, run: str) -> list[Point]:
    """The points of a CSV table, or of the records of the suite `posthoc` in a file of records (.json).

    Args:
        file: .csv or .json.
        run: the model whose records are read, if a file of records has several.

    Raises:
        UserError: for a file that cannot be read, lacks a column, has a value that is no number, or has records of
            several models, none of them `run`.
    """
    if file.suffix == ".json":
        return _read_records(file, run)
    try:
        with file.open(encoding="utf-8", newline="") as lines:
            rows = list(csv.DictReader(lines))
        return [Point(row["method"], float(row["bf16_ratio"]), float(row["increase_percent"])) for row in rows]
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error}") from None
    except KeyError as error:
        raise UserError(f"{file}: has no column {error}; needed: method, bf16_ratio, increase_percent") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: {error}") from None


def _of_records(file: Path, where: str, points: Callable[[list[dict[str, Any]]], Iterable[Point]]) -> list[Point]:
    """The `points` of the records in `rows` of a file. Raises `UserError`, which begins with `where`."""
    try:
        data = parse_json(file.read_text(encoding="utf-8"))
        rows = data.get("rows") if isinstance(data, dict) else None
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("has no records; needed: a JSON object with a list of objects in `rows`")
        return list(points(rows))
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{where}: a record has no {error}") from None
    except (OSError, ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"{where}: cannot be read: {error}") from None


def _read_records(file: Path, run: str) -> list[Point]:
    def points(rows: list[dict[str, Any]]) -> Iterator[Point]:
        own = [row for row in rows if "increase_percent" in row]
        runs = sorted({str(row.get("run")) for row in own})
        if len(runs) > 1 and run not in runs:
            raise UserError(f"{file}: has records of {', '.join(runs)}; select one with --run")
        for row in own:
            if len(runs) > 1 and row.get("run") != run:
                continue
            ratio = row["own_bf16_bytes_per_token"] / row["bf16_bytes_per_token"]
            if row["spec"] != "none":
                yield Point(row["spec"], ratio, float(row["increase_percent"]))

    return _of_records(file, str(file), points)


def read_copying(file: Path, run: str) -> list[Point]:
    """The means over tasks of the suite `copying` of one run. Raises `UserError` if the file has none."""

    def points(rows: list[dict[str, Any]]) -> Iterator[Point]:
        for row in rows:
            if (row.get("suite"), row.get("run"), row.get("task")) == ("copying", run, "all"):
                yield Point(row["spec"], row["ratio_to_own"], row["accuracy"])

    found = _of_records(file, f"--copying {file}", points)
    if not found:
        raise UserError(f"--copying {file}: has no record of copying by run {run}; see --run")
    return found


def merged(tables: Iterable[Iterable[Point]]) -> list[Point]:
    """The points of all tables; of one compression with nearly one ratio, only those of the first table that has it."""
    points: list[Point] = []
    for own in tables:
        earlier = list(points)
        points += [p for p in dict.fromkeys(own) if not any(_same(p, q) for q in earlier)]
    return points


def _same(a: Point, b: Point) -> bool:
    return a.spec == b.spec and abs(a.ratio / b.ratio - 1) < _EQUAL_RATIOS


def table(points: Sequence[Point], copied: Sequence[Point]) -> str:
    """A Markdown table, the smallest caches last."""
    lines = ["| compression | own / x | perplexity |" + (" copied, % |" if copied else "")]
    lines.append("|---|---:|---:|" + ("---:|" if copied else ""))
    rows: list[tuple[Point, Point | None, Point | None]] = [
        (p, p, next((c for c in copied if _same(c, p)), None)) for p in points
    ]
    joined = [c for _, _, c in rows]
    rows += [(c, None, c) for c in copied if c not in joined and c.spec != "none"]
    for place, lost, kept in sorted(rows, key=lambda row: (row[0].ratio, row[0].spec)):
        line = f"| `{place.spec}` | {place.ratio:.2f} | {f'{lost.value:+.2f} %' if lost else ''} |"
        lines.append(line.replace("|  |", "| |") + ((f" {kept.value:.1f} |" if kept else " |") if copied else ""))
    return "\n".join(lines) + "\n"


def draw(points: Sequence[Point], copied: Sequence[Point], title: str) -> bytes:
    """The picture as PNG: a line for each method and its variants, through its compressions."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullLocator

    series = sorted({point.series for point in [*points, *copied]})
    colour = {name: colormaps["turbo"](0.05 + 0.9 * i / max(len(series) - 1, 1)) for i, name in enumerate(series)}
    panels = [(points, "increase of perplexity, % (logarithmic beyond 1)", "log")]
    panels += [(copied, "random tokens copied, %", "linear")] if copied else []
    figure = Figure(figsize=(10 * len(panels), 8), dpi=130, layout="constrained")
    for n, (shown, label, scale) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), n + 1)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.92", linewidth=0.8)
        axes.set_xscale("log", base=2)
        if scale == "log":
            axes.set_yscale("symlog", linthresh=_LINEAR)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        axes.set_xlabel("bytes of the uncompressed cache / bytes of the compressed one")
        axes.set_ylabel(label)
        axes.set_title(title if n == 0 else "", loc="left", fontsize=11)
        ends, names, lines = [], [], []
        for name in series:
            own = sorted((p.ratio, p.value) for p in shown if p.series == name)
            if not own:
                continue
            axes.plot(*zip(*own, strict=True), "o-", color=colour[name], markersize=5, linewidth=1.2)
            ends.append(own[-1])
            names.append(name)
            lines += own[:-1]
        low, high = min(p.ratio for p in shown), max(p.ratio for p in shown)
        axes.set_xlim(low / 1.25, high * 1.7)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}x"))
        axes.xaxis.set_minor_locator(NullLocator())
        figure.draw_without_rendering()  # fixes limits and layout, which the positions of labels depend on
        place_labels(axes, ends, names, avoid=lines)
    return png(figure)


def parser() -> Parser:
    """The command line's arguments."""
    parser = Parser(prog="python -m experiments.methods_picture", description=__doc__)
    add = parser.add_argument
    add("tables", nargs="+", type=Path, metavar="TABLE", help="measurements of one model, .csv or .json")
    add("--copying", nargs="+", default=[], type=Path, metavar="RECORDS.json",
        help="records of the suite copying for a second panel")  # fmt: skip
    add("--run", default="smollm2", metavar="NAME", help="the model, in files of several (default: %(default)s)")
    add("--title", default="What compressing a cache costs", help="above the picture (default: %(default)s)")
    add("--out", type=Path, default=Path("methods.png"), metavar="FILE.png", help="default: %(default)s")
    return parser


@one_line
@stoppable()
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns its exit status."""
    options = parser().parse_args(arguments)
    if options.out.suffix != ".png":
        raise UserError(f"--out is {str(options.out)!r}; allowed: a file that ends in .png")
    points = merged([read_table(file, options.run) for file in options.tables])
    copied = merged([read_copying(file, options.run) for file in options.copying])
    if not points:
        raise UserError(f"{options.tables[0]}: has no rows")
    try:
        write_atomic(options.out, draw(points, copied, options.title))
        write_atomic(options.out.with_suffix(".md"), table(points, copied))
    except OSError as error:
        raise UserError(f"--out {options.out}: cannot be written: {error}") from None
    print(f"written: {options.out}, {options.out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
