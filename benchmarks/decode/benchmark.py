"""The measurements of a decoding benchmark: steps, times to first token, capacity, peers, and `generate`."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.decode import generating, peers
from benchmarks.decode.capacity import Search, overhead
from benchmarks.decode.designs import Design, Point
from benchmarks.decode.measure import build, bytes_of, bytes_read, measure_first_token, measure_point
from benchmarks.decode.results import Results
from benchmarks.record import Row
from benchmarks.timing import free
from cllm.model.decoder import Decoder


class Model:
    """A design's decoder, built at first use and freed at the end of the context."""

    def __init__(self, design: Design, device: torch.device, compiled: bool):
        self.design, self.device, self.compiled = design, device, compiled
        self._decoder: Decoder | None = None

    @property
    def decoder(self) -> Decoder:
        if self._decoder is None:
            decoder = build(self.design.config, self.device)
            if self.compiled:
                decoder.compile_decoding()
            self._decoder = decoder
        return self._decoder

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self._decoder = None
        free(self.device)


def new_row(name: str, design: Design, point: Point, peer_of: str | None = None) -> Row:
    """A row without measurements."""
    return {
        "design": name,
        "context": point.context,
        "batch": point.batch,
        "storage": design.storage,
        "is_baseline": peer_of is None and design.is_baseline,
        "peer_of": peer_of,
    }


@dataclass(frozen=True)
class DecodeBenchmark:
    """Measures `designs` on `device` and adds a row to `results` for each measurement.

    Each method builds a design's model, measures all of the design's points, and frees the model.
    """

    results: Results
    designs: list[Design]
    device: torch.device
    compiled: bool
    """Compile the blocks of decoding steps."""
    repeat: int
    """Timed calls of a step."""

    def steps(self) -> None:
        """Add a row with a decoding step for every point of every design."""
        for design in self.designs:
            with Model(design, self.device, self.compiled) as model:
                for point in design.points:
                    row = new_row(design.label, design, point) | bytes_of(design, point)
                    self.results.rows.append(row)
                    step = functools.partial(self._step, model, point, row["kv_read_per_token"])
                    self.results.measure(f"{design.label} {point} step", row, step)

    def _step(self, model: Model, point: Point, kv_read: float) -> Row:
        measured = measure_point(model.decoder, model.design, point, self.repeat)
        read = bytes_read(model.decoder, model.decoder.embed, model.decoder.head, kv_read, point)
        return measured | {"bytes_read": read} | self._bound(read, measured["step_ms"])

    def _bound(self, nbytes: int, step_ms: float) -> Row:
        """ms in which `nbytes` can be read at the measured bandwidth, and the step as a multiple of it."""
        ms = 1000 * nbytes / self.results.results["copy_bytes_per_s"]
        return {"bound_ms": ms, "step_vs_bound": step_ms / ms}

    def first_tokens(self, chunk: int) -> None:
        """Add times to first token to the rows of `steps`. `chunk`: tokens of a prefill chunk."""
        for design in self.designs:
            with Model(design, self.device, compiled=False) as model:
                rows = [row for row in self.results.rows if row["design"] == design.label]
                for row, point in zip(rows, design.points, strict=True):
                    first = functools.partial(_first_token, model, point, chunk)
                    self.results.measure(f"{design.label} {point} time to first token", row, first, error="ttft_error")

    def capacity(self, budget: int, context: int) -> None:
        """Add the longest context, and the largest batch at `context` tokens, of every design in `budget` bytes."""
        for design in self.designs:
            row: Row = {"design": design.label, "is_baseline": design.is_baseline, "budget_bytes": budget}
            row |= {"batch_context": context, "context": {}, "batch": {}}
            self.results.capacity.append(row)
            measured = overhead(row for row in self.results.rows if row["design"] == design.label)
            with Model(design, self.device, compiled=False) as model:
                longest = functools.partial(self._longest_context, model, budget, measured)
                largest = functools.partial(self._largest_batch, model, budget, measured, context)
                self.results.measure(f"{design.label} longest context", row["context"], longest)
                self.results.measure(f"{design.label} largest batch", row["batch"], largest)

    def _longest_context(self, model: Model, budget: int, measured: dict[int, int]) -> Row:
        return Search(model.design, model.decoder, budget, measured, self.repeat).context()

    def _largest_batch(self, model: Model, budget: int, measured: dict[int, int], context: int) -> Row:
        if self.compiled:
            model.decoder.compile_decoding()
        return Search(model.design, model.decoder, budget, measured, self.repeat).batch(context)

    def peers(self, points: set[Point]) -> None:
        """Add a row with a step of Hugging Face's Llama for every design of that shape.

        `points`: only these of a design's points; empty: all of them.
        """
        llamas = [design for design in self.designs if peers.has_llama(design)]
        for design, kind in itertools.product(llamas, peers.KINDS):
            compiled = self.compiled and kind == "static"
            for point in design.points:
                if points and point not in points:
                    continue
                name = f"HF {kind}, {'compiled' if compiled else 'eager'} ({design.label})"
                row = new_row(name, design, point, peer_of=design.label)
                self.results.rows.append(row)
                step = functools.partial(self._peer_step, design, point, kind, compiled)
                self.results.measure(f"{name} {point} step", row, step)
                free(self.device)

    def _peer_step(self, design: Design, point: Point, kind: str, compiled: bool) -> Row:
        measured = peers.measure_peer(design, point, kind, self.repeat, self.device, compiled=compiled)
        return measured | self._bound(measured["bytes_read"], measured["step_ms"])

    def generate(self, new: int, points: set[Point] | None) -> None:
        """Add a row with `new` tokens by `generate` over a static cache, for every point of every design.

        `points`: also Hugging Face's Llama at these points, with an empty set at all points; None: without it.
        """
        own = functools.partial(generating.own_model, compiled=self.compiled)
        for design in self.designs:
            for point in design.points:
                makers: dict[str, Callable[[Design, Point, torch.device], nn.Module]] = {"generate": own}
                if points is not None and peers.has_llama(design) and (not points or point in points):
                    makers["HF generate"] = peers.llama
                for what, make in makers.items():
                    name = f"{what} ({design.label})"
                    row = new_row(name, design, point, peer_of=design.label)
                    self.results.generated.append(row)
                    tokens = functools.partial(self._generate, make, design, point, new)
                    self.results.measure(f"{name} {point}", row, tokens)
                    free(self.device)

    def _generate(
        self, make: Callable[[Design, Point, torch.device], nn.Module], design: Design, point: Point, new: int
    ) -> Row:
        return generating.measure_generate(make(design, point, self.device), point, new, self.device)


def _first_token(model: Model, point: Point, chunk: int) -> Row:
    return measure_first_token(model.decoder, model.design, point, chunk)
