"""Contenders against the first one, one at a time: memory for two, a row after each, a limit of time."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from benchmarks.record import Record, reason_of
from benchmarks.timing import wait
from benchmarks.train.contender import Batches, Contender
from benchmarks.train.designs import design
from benchmarks.train.measure import measure, warm_up
from benchmarks.train.report import rows_of
from cllm.config import Config
from cllm.environment import clocks
from cllm.errors import UserError


@dataclass
class OneByOne:
    """Builds, warms up and measures each design in turns with the first one, then frees it.

    The time of a design is compared with that of the first one in the same turns. A design that fails is noted, and
    the others go on.
    """

    configs: Mapping[str, Config]
    """The designs by their names, the first one being what the others are compared with."""
    batches: Batches
    record: Record
    limit: float = math.inf
    """Seconds after which no further design is started."""
    warmup: int = 4
    """Untimed steps of each design."""
    rounds: int = 4
    """Turns of each design, and as many of the first one beside it."""
    steps: int = 6
    """Timed steps of a turn."""

    def __post_init__(self) -> None:
        self.begin = time.monotonic()
        self.record.results |= {"failed": {}, "not_measured": [], "out_of_memory": [], "rows": [], "rows_fp8": []}

    @property
    def device(self) -> torch.device:
        return self.batches[0][0][0].device

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return sum(ids.numel() for ids, _ in self.batches[0])

    def run(self) -> None:
        """Measure all designs, as far as the time goes.

        Raises:
            UserError: if the first design does not fit in memory.
        """
        names = list(self.configs)
        results, before = self.record.results, clocks()
        first = design(names[0], self.configs[names[0]])
        if not warm_up(first, self.batches, self.warmup):
            raise UserError(f"{names[0]}, which the others are compared with, does not fit in memory")
        for _ in range(self.rounds):
            measure(first, self.batches, self.steps)
        self._add(first, first)
        for name in names[1:]:
            if time.monotonic() - self.begin > self.limit:
                results["not_measured"].append(name)
                continue
            self._against(first, name)
            results["clocks"] = [before, clocks()]
            self.record.write()
        self.record.write()

    def _against(self, first: Contender, name: str) -> None:
        begin = time.monotonic()
        contender: Contender | None = None
        try:
            contender = design(name, self.configs[name])
            if not warm_up(contender, self.batches, self.warmup):
                self.record.results["out_of_memory"].append(name)
                return
            for _ in range(self.rounds):
                measure(first, self.batches, self.steps)
                measure(contender, self.batches, self.steps)
            self._add(contender, dataclasses.replace(first, rounds=first.rounds[-self.rounds :]))
        except torch.OutOfMemoryError:
            self.record.results["out_of_memory"].append(name)
        except Exception as failure:
            text = f"{type(failure).__name__}: {reason_of(failure)}"
            self.record.results["failed"][name] = text
            print(f"failed: {name}: {text[:300]}", file=sys.stderr, flush=True)
        finally:
            if contender is not None:
                contender.drop()
            wait(self.device)
            seconds = time.monotonic() - self.begin, time.monotonic() - begin
            print(f"[{seconds[0]:6.1f} s] {name}: {seconds[1]:.1f} s", file=sys.stderr, flush=True)

    def _add(self, contender: Contender, base: Contender) -> None:
        self.record.rows.extend(rows_of([contender], base, self.tokens, self.device))
        self.record.write()
