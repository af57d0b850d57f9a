"""Measurements of the model during training, such as suites of samples, made by functions of the caller.

A probe gets a plain decoder with the weights of the current step, as `load_run` would load them from a checkpoint of
that step, and returns numbers. They are a row of metrics. A probe changes nothing in training: the decoder shares the
weights but no module, and the generators of random numbers are restored.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng

from cllm.model.decoder import Decoder
from cllm.model.sizes import meta_decoder
from cllm.train.measure import Metrics
from cllm.train.module import TrainingModule, step_is_complete


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A measurement that is repeated during training."""

    name: str
    """Begins the tags of its numbers: `suite/copying`."""
    every: int
    """Steps between measurements, besides one after the last step."""
    measure: Callable[[Decoder, int], Mapping[str, float]]
    """Numbers by the end of their tags, from a decoder in evaluation mode and the step of its weights. It is called on
    the first process only."""
    at_most: float | None = None
    """Share of the time of training so far that it may take; None: any."""


class Probes(Callback):
    """Calls probes after their steps, before a checkpoint of the step is saved.

    The first process measures and the others wait. All get the numbers, since callbacks may read them.
    """

    def __init__(self, probes: Sequence[Probe], metrics: Metrics, steps: int):
        self.probes, self.metrics, self.steps = probes, metrics, steps
        self._began = 0.0
        self._seconds: dict[str, float] = dict.fromkeys((probe.name for probe in probes), 0.0)
        self._last: dict[str, float] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if not step_is_complete(trainer, batch_idx):
            return
        due = [probe for probe in self.probes if step % probe.every == 0 or step == self.steps]
        if not due:
            return
        assert isinstance(pl_module, TrainingModule)
        self.metrics.clock.pause()
        values = self._measure(pl_module, due, step) if trainer.is_global_zero else {}
        values = trainer.strategy.broadcast(values)
        if values:
            self.metrics.record(trainer, values)
        if trainer.is_global_zero:
            self._report(step, due, values)
        self.metrics.clock.resume()

    def _measure(self, module: TrainingModule, due: Sequence[Probe], step: int) -> dict[str, float]:
        values: dict[str, float] = {}
        with isolate_rng():
            decoder = plain_decoder(module)
            for probe in due:
                if step != self.steps and self._exceeds(probe, step):
                    continue
                began = time.perf_counter()
                values |= {f"{probe.name}/{key}": float(value) for key, value in probe.measure(decoder, step).items()}
                values[f"{probe.name}/seconds"] = seconds = time.perf_counter() - began
                self._seconds[probe.name] += seconds
                self._last[probe.name] = seconds
        return values

    def _exceeds(self, probe: Probe, step: int) -> bool:
        """Whether `probe` would take more than its share of the time; then that is logged."""
        last = self._last.get(probe.name)
        if probe.at_most is None or last is None:
            return False
        share = (self._seconds[probe.name] + last) / max(time.perf_counter() - self._began + last, 1e-9)
        if share <= probe.at_most:
            return False
        self.metrics.say(
            f"step {step}: {probe.name} is left out: another {last:.1f} s would make it {share:.1%} of the time so "
            f"far; at_most is {probe.at_most:g}"
        )
        return True

    def _report(self, step: int, due: Sequence[Probe], values: Mapping[str, float]) -> None:
        share = sum(self._seconds.values()) / max(time.perf_counter() - self._began, 1e-9)
        for probe in due:
            prefix = f"{probe.name}/"
            if f"{prefix}seconds" not in values:
                continue
            numbers = {tag: value for tag, value in values.items() if tag.startswith(prefix)}
            seconds = numbers.pop(f"{prefix}seconds")
            shown = "  ".join(f"{tag} {value:.4f}" for tag, value in numbers.items() if math.isfinite(value))
            self.metrics.say(f"step {step}: {shown}  ({seconds:.1f} s; suites took {share:.1%} of the time so far)")


def plain_decoder(module: TrainingModule) -> Decoder:
    """A decoder in evaluation mode with the current weights of `module`, without what training adds to its model.

    It shares the memory of weights that are fp32. Nothing of it is compiled, in fp8 or recomputed.
    """
    config = module.config
    decoder = meta_decoder(config.model, backend=config.attention.backend)
    types = {name: tensor.dtype for name, tensor in decoder.state_dict().items()}
    weights = {name: tensor.detach().to(types[name]) for name, tensor in module.plain_weights().items()}
    decoder.load_state_dict(weights, assign=True)
    return decoder.eval()
