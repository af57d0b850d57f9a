"""Perplexity after a compressed prefix. `cllm/evaluate/posthoc.py` measures."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.arguments import whole_number
from cllm.errors import UserError
from cllm.evaluate.suites.suite import RUN, SET, TOKENS, Job, Number, Option, Record, Suite, perplexity_text
from cllm.tables import Column

if TYPE_CHECKING:
    from cllm.evaluate.subjects import Subject


def _method(record: Record) -> str:
    """The spec, and the bytes that the other columns leave out."""
    in_host = record.get("host_bytes_per_token")
    return f"{record['spec']} (and {in_host:,.0f} bytes/token in host memory)" if in_host else record["spec"]


def _error(record: Record) -> str:
    """The largest error of a slot's tensors, relative to their norm."""
    errors = [error for slot in record["errors"].values() for error in slot.values()]
    return f"{max(errors):.3f}" if errors else "-"


def _generated(record: Record) -> str:
    """The share of generated tokens that are those after the exact prefix."""
    return f"{record['generated_same_percent']:.0f} %" if "generated_tokens" in record else "-"


def specs_of(words: Sequence[str], option: str = "--posthoc") -> list[str]:
    """The specs that `words` of `option` name, each once: a word is a spec, or @FILE with a spec on each line.

    Empty lines of a file are skipped, and so is what follows a # at the beginning of a line or after a space.

    Raises:
        UserError: for a file that cannot be read or has no spec.
    """
    specs: list[str] = []
    for word in words:
        if not word.startswith("@"):
            specs.append(word)
            continue
        try:
            lines = Path(word[1:]).read_text(encoding="utf-8-sig").splitlines()  # some editors begin with a mark
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{option} {word}: cannot be read: {error}") from None
        texts = [re.split(r"(?:^|\s)#", line, maxsplit=1)[0].strip() for line in lines]
        found = [text for text in texts if text]
        if not found:
            raise UserError(f"{option} {word}: has no spec; needed: one on a line, such as xkv:group=4,ratio=4")
        specs += found
    return list(dict.fromkeys(specs))


class Posthoc(Suite):
    """The prefix of each window is compressed; the rest is scored from the compressed cache."""

    name = "posthoc"
    help = "perplexity after a compressed prefix (--posthoc)"
    options = (
        Option(
            "--posthoc",
            compresses=True,
            action="append",
            default=[],
            metavar="SPEC",
            help="compress the cache of a prefix and score what follows, e.g. xkv:group=4,ratio=4 or none; "
            "repeatable; @FILE: the specs on the lines of a file. --list-posthoc lists the methods. The first 4 tokens "
            "stay exact, unless SPEC sets sinks=N",
        ),
        Option(
            "--prefix",
            type=whole_number(1),
            metavar="N",
            help="tokens of each window to compress (default: half the window)",
            unused="needs --posthoc, which says how to compress it",
        ),
        Option(
            "--calibration",
            compresses=True,
            type=Path,
            metavar="PATH",
            help="prepared folder (its train split) or text file on which methods of --posthoc calibrate (default: the "
            "first prefixes or contexts of what is scored)",
            unused="needs --posthoc, whose methods calibrate on it",
        ),
        Option(
            "--generate",
            type=whole_number(0),
            default=0,
            metavar="N",
            help="with --posthoc: also generate N tokens greedily after each prefix, and compare them with those "
            "generated from the uncompressed cache (default: 0)",
            unused="needs --posthoc, whose caches are compared",
        ),
        Option(
            "--skip-refused",
            compresses=True,
            action="store_true",
            help="go on without specs of --posthoc that cannot compress a run's cache; SUITE/refused.json has the "
            "reasons (default: such a spec is an error; in suites of samples only if no other spec is left)",
            unused="needs --posthoc, whose specs it concerns",
        ),
    )
    numbers = (
        Number(key="perplexity", head="perplexity", form=perplexity_text),
        Number(key="increase_percent", head="increase", form="{:+.2f} %".format),
        Number(key="ratio_to_own", head="own/x", form="{:.2f}".format),
        Number(key="ratio_to_mha", head="mha/x", form="{:.2f}".format),
        Number(key="compression_share_of_prefill", head="time", form=lambda share: f"{100 * share:.0f} %"),
    )
    compared = False  # experiments.sweep_posthoc compares them

    def is_asked_for(self, options: argparse.Namespace) -> bool:
        return bool(options.posthoc)

    def check_options(self, options: argparse.Namespace) -> None:
        if not options.posthoc:
            raise UserError("--suite posthoc: needs --posthoc SPEC, which says how to compress")

    def check(self, subject: Subject, job: Job) -> None:
        from cllm.evaluate import posthoc

        posthoc.resolve(subject, job.settings, job.options.prefix, job.device)

    def run(self, subject: Subject, job: Job) -> list[Record]:
        from cllm.evaluate import posthoc

        assert job.text is not None
        options = job.options
        return posthoc.measure(
            subject,
            job.text,
            job.settings,
            options.posthoc,
            job.device,
            prefix=options.prefix,
            generate=options.generate,
            refused=job.refused if job.skips_refused else None,
        )

    def makes_unnamed(self, record: Mapping[str, Any]) -> bool:
        return "uncompressed_loss" in record

    def columns(self) -> Sequence[Column[Record]]:
        return (
            RUN,
            Column("method", _method, left=True),
            SET,
            Column("prefix/window", lambda record: f"{record['prefix']}/{record['window']}"),
            TOKENS,
            *(number.column() for number in self.numbers),
            Column("error", _error),
            Column("written", _generated),
        )

    def save(self, subject: Subject, record: Record, out: Path | None = None) -> Path:
        from cllm.evaluate import posthoc

        return posthoc.save(subject, record, out)
