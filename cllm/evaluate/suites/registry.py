"""The evaluation suites there are: those of cllm, then plug-ins."""

from __future__ import annotations

import argparse
import re
from typing import Any

from cllm.arguments import Parser
from cllm.errors import UserError
from cllm.evaluate.suites.choice import Chosen, parse_choice
from cllm.evaluate.suites.perplexity import Perplexity
from cllm.evaluate.suites.posthoc import Posthoc, specs_of
from cllm.evaluate.suites.suite import Option, Suite
from cllm.evaluate.tasks.code.suite import CodeCompletion
from cllm.evaluate.tasks.copying import Copying
from cllm.evaluate.tasks.harness.suite import LmEval
from cllm.evaluate.tasks.language.suites import language_suites
from cllm.evaluate.tasks.longbench.suite import LongBench
from cllm.evaluate.tasks.mqar import Mqar
from cllm.evaluate.tasks.ruler.suite import Ruler
from cllm.plugins import origin, plugins

GROUP = "cllm.suites"
"""The entry point group of plug-ins: each names a subclass of `Suite`, or an instance."""
DEFAULT = Perplexity.name
_REQUIRED = ("name", "help", "numbers", "run")
"""Members that a subclass of `Suite` must define."""


def _own_suites() -> dict[str, Suite]:
    own: tuple[Suite, ...] = (
        Perplexity(),
        Posthoc(),
        Copying(),
        Mqar(),
        Ruler(),
        *language_suites(),
        LongBench(),
        CodeCompletion(),
        LmEval(),
    )
    return {suite.name: suite for suite in own}


def suites() -> dict[str, Suite]:
    """Every suite by name.

    Raises:
        UserError: for a plug-in that cannot be loaded, is not a suite, or has another suite's name.
    """
    known = _own_suites()
    for name, plugin in plugins(GROUP).items():
        suite = plugin
        if isinstance(plugin, type) and issubclass(plugin, Suite):
            missing = [key for key in _REQUIRED if getattr(plugin, key, None) in (None, Suite.run)]
            if missing:
                raise UserError(f"{origin(GROUP, name)}: a suite without {', '.join(missing)}; every suite needs it")
            try:
                suite = plugin()
            except Exception as error:
                raise UserError(f"{origin(GROUP, name)}: cannot be made: {type(error).__name__}: {error}") from error
        if not isinstance(suite, Suite):
            raise UserError(f"{origin(GROUP, name)}: is a {type(plugin).__name__}; allowed: a subclass of Suite")
        if suite.name != name:
            raise UserError(f'{origin(GROUP, name)}: the name of the suite is "{suite.name}"; use one name for both')
        if name in known:
            raise UserError(f"{origin(GROUP, name)}: has the name of one of cllm's own suites; rename it")
        if wrong := [option for option in suite.options if not isinstance(option, Option)]:
            raise UserError(f"{origin(GROUP, name)}: its option {wrong[0]!r} is no Option")
        known[name] = suite
    return known


def _escaped(help: str | None) -> str | None:
    """A help text for argparse, in which only `%(default)s` and its like are formats."""
    return help if help is None else re.sub(r"%(?!\()", "%%", help)


def add_options(parser: Parser) -> None:
    """Add `--suite`, and the options of every suite.

    A plug-in that cannot be used is left out, so that `--help` works; `choose` raises its fault.
    """
    fault = None
    try:
        known = suites()
    except UserError as error:
        known, fault = _own_suites(), error
    for suite in known.values():
        for option in suite.options:
            try:
                parser.add_argument(option.flag, **option.keywords | {"help": _escaped(option.keywords.get("help"))})
            except (argparse.ArgumentError, TypeError, ValueError) as error:
                fault = fault or UserError(f"{origin(GROUP, suite.name)}: {option.flag}: {error}")
    listed = "; ".join(f"{suite.name}: {suite.help}" for suite in known.values())
    action: Any = parser.add_argument(
        "--suite",
        action="append",
        default=[],
        metavar="NAME[:KEY=VALUE,...]",
        help=f"what to measure; repeatable (default: {DEFAULT}, or posthoc with --posthoc). With a suite of samples, "
        "each --posthoc compresses the cache of a sample's context. --list-suites lists the options of suites. "
        f"{listed}".replace("%", "%%"),
    )
    action.completer = lambda **_: list(known)  # read by the shell's completion
    parser.set_defaults(suite_fault=fault)


def choose(parser: Parser, options: argparse.Namespace) -> list[Chosen]:
    """The suites that the options select, which `parser` has read, with their settings.

    Raises:
        UserError: for a plug-in that cannot be used, an unknown suite, wrong settings, an option of a suite that is not
            selected, and options that do not fit together.
    """
    if options.suite_fault is not None:
        raise options.suite_fault
    known = suites()
    asked_for = [suite.name for suite in known.values() if suite.is_asked_for(options)]
    texts = options.suite or [next(iter(asked_for), DEFAULT)]
    chosen = [parse_choice(text, known) for text in texts]
    if repeated := [text for text, choice in zip(texts, chosen, strict=True) if chosen.count(choice) > 1]:
        raise UserError(f"--suite {repeated[0]}: is given twice; allowed: once, or with other options")
    selected = [choice.suite for choice in chosen]
    for suite in known.values():
        for option in suite.options if suite not in selected else ():
            value = getattr(options, option.dest)
            if value == parser.get_default(option.dest):
                continue
            compresses = bool(options.posthoc) and any(suite.compresses for suite in selected)
            if option.compresses and compresses:
                continue
            words = [
                option.flag,
                *(map(str, value) if isinstance(value, list) else () if value is True else [str(value)]),
            ]
            missing = option.unused if option.unused and not compresses else f"goes with --suite {suite.name}"
            raise UserError(f"{' '.join(words)}: {missing}")
    if options.data and not any(suite.takes_text for suite in selected):
        raise UserError(f"--data: --suite {selected[0].name} takes no text; leave it out")
    options.posthoc = specs_of(options.posthoc)
    for suite in selected:
        suite.check_options(options)
    return chosen
