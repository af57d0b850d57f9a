"""Suites of samples during training: `evaluate_suites` of a config as probes for `cllm.train.run.train`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from cllm.arguments import Parser
from cllm.config import Config
from cllm.config.suites import SuiteSchedule
from cllm.errors import UserError
from cllm.evaluate.perplexity import Settings
from cllm.evaluate.subjects import RunSubject
from cllm.evaluate.suites.choice import Chosen, parse_choice
from cllm.evaluate.suites.registry import add_options, suites
from cllm.evaluate.suites.suite import Job
from cllm.evaluate.tasks.suite import ALL
from cllm.model.decoder import Decoder
from cllm.train.launch import Launch
from cllm.train.probes import Probe
from cllm.train.run import with_vocabulary


def choose_suites(config: Config) -> list[Chosen]:
    """The suites that `evaluate_suites` names, with their settings.

    Raises:
        UserError: for an unknown suite, wrong settings, and a suite that measures on texts.
    """
    return [_choose(n, entry) for n, entry in enumerate(config.evaluate_suites)]


def _choose(n: int, entry: SuiteSchedule) -> Chosen:
    key = f"evaluate_suites.{n}.suite"
    known = suites()  # new objects: a suite remembers the samples of one entry
    try:
        chosen = parse_choice(entry.suite, known)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    if chosen.suite.takes_text:
        allowed = ", ".join(name for name, suite in known.items() if not suite.takes_text)
        raise UserError(f"{key} is {entry.suite!r}, which measures on texts, as validation does; allowed: {allowed}")
    return chosen


def training_probes(config: Config) -> list[Probe]:
    """The suites of `evaluate_suites` as probes. Their samples are made now, so that mistakes end the command early.

    Raises:
        UserError: as `choose_suites`; for data without a tokenizer, and for samples that do not fit the model.
    """
    chosen = choose_suites(config)
    if not chosen:
        return []
    config = with_vocabulary(config)
    launch = Launch.here(config)
    subject = TrainedSubject(config, bf16=launch.bf16)
    parser = Parser()
    add_options(parser)
    options = parser.parse_args([])
    probes = []
    for n, (entry, choice) in enumerate(zip(config.evaluate_suites, chosen, strict=True)):
        measure = _Measurement(subject, choice, options, launch.device)
        try:
            choice.suite.check(subject, measure.job)
        except UserError as error:
            raise UserError(f"evaluate_suites.{n}.suite: {error}") from None
        probes.append(Probe(name=f"suite/{entry.label}", every=entry.every, measure=measure, at_most=entry.at_most))
    return probes


class TrainedSubject(RunSubject):
    """The model of a run in training. Give it a decoder before each measurement."""

    def __init__(self, config: Config, *, bf16: bool):
        self._data, self._digest = Path(config.data.main_folder), None
        self.name = config.name
        self.path = self.folder = Path(config.runs_dir) / config.name
        self.checkpoint, self.latest, self.step = "", True, None
        self.design = config.model.design
        self.context, self.window = config.model.max_seq_len, config.data.seq_len
        self.document_mask = config.data.document_mask
        self.precision = "bf16" if bf16 else "fp32"
        self.default_sets, self.digests = {}, {}
        assert config.model.vocab_size is not None
        self.vocab_size = config.model.vocab_size

    def set_weights(self, decoder: Decoder, step: int) -> None:
        """Measure `decoder` from now on, whose weights are those after `step`."""
        self._model, self.step = decoder, step


class _Measurement:
    """Measures a suite on the weights of a step: the function of a probe."""

    def __init__(
        self, subject: TrainedSubject, chosen: Chosen, options: argparse.Namespace, device: torch.device
    ) -> None:
        self.subject, self.suite = subject, chosen.suite
        self.job = Job(settings=Settings(), device=device, options=options, given=chosen.given)

    def __call__(self, decoder: Decoder, step: int) -> dict[str, float]:
        """The numbers of the suite, over all of its tasks."""
        self.subject.set_weights(decoder, step)
        records = self.suite.run(self.subject, self.job)
        record = next((record for record in records if record.get("task") == ALL), records[0])
        return {number.key: record[number.key] for number in self.suite.numbers if record.get(number.key) is not None}
