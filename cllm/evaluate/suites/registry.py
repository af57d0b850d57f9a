"""The evaluation suites there are: those of cllm, then plug-ins."""

from __future__ import annotations

import argparse

from cllm.arguments import Parser
from cllm.errors import UserError
from cllm.evaluate.suites.perplexity import Perplexity
from cllm.evaluate.suites.posthoc import Posthoc
from cllm.evaluate.suites.suite import Suite
from cllm.plugins import origin, plugins

GROUP = "cllm.suites"
"""The entry point group of plug-ins: each names a subclass of `Suite`, or an instance."""
DEFAULT = Perplexity.name
_REQUIRED = ("name", "help", "numbers", "run")
"""Members that a subclass of `Suite` must define."""


def suites() -> dict[str, Suite]:
    """Every suite by name.

    Raises:
        UserError: for a plug-in that cannot be loaded, is not a suite, or has another suite's name.
    """
    known: dict[str, Suite] = {suite.name: suite for suite in (Perplexity(), Posthoc())}
    for name, plugin in plugins(GROUP).items():
        suite = plugin
        if isinstance(plugin, type) and issubclass(plugin, Suite):
            missing = [key for key in _REQUIRED if getattr(plugin, key, None) in (None, Suite.run)]
            if missing:
                raise UserError(f"{origin(GROUP, name)}: a suite without {', '.join(missing)}; every suite needs it")
            suite = plugin()
        if not isinstance(suite, Suite):
            raise UserError(f"{origin(GROUP, name)}: is a {type(plugin).__name__}; allowed: a subclass of Suite")
        if suite.name != name:
            raise UserError(f'{origin(GROUP, name)}: the name of the suite is "{suite.name}"; use one name for both')
        if name in known:
            raise UserError(f"{origin(GROUP, name)}: has the name of one of cllm's own suites; rename it")
        known[name] = suite
    return known


def add_options(parser: Parser) -> None:
    """Add `--suite`, and the options of every suite. Raises `UserError` for a plug-in's option that is taken."""
    known = suites()
    listed = "; ".join(f"{suite.name}: {suite.help}" for suite in known.values())
    parser.add_argument(
        "--suite",
        choices=tuple(known),
        metavar="NAME",
        help=f"what to measure (default: {DEFAULT}, or posthoc with --posthoc). {listed}".replace("%", "%%"),
    )
    for suite in known.values():
        for option in suite.options:
            try:
                parser.add_argument(option.flag, **option.keywords)
            except argparse.ArgumentError as error:
                raise UserError(f"{origin(GROUP, suite.name)}: {option.flag}: {error}") from None


def choose(parser: Parser, options: argparse.Namespace) -> Suite:
    """The suite that the options select, which `parser` has read.

    Raises:
        UserError: for an option of a suite that is not selected, and for options that do not fit together.
    """
    known = suites()
    asked_for = [suite.name for suite in known.values() if suite.is_asked_for(options)]
    chosen = known[options.suite or next(iter(asked_for), DEFAULT)]
    for suite in known.values():
        for option in suite.options if suite is not chosen else ():
            value = getattr(options, option.dest)
            if value != parser.get_default(option.dest):
                text = " ".join(map(str, value)) if isinstance(value, list) else value
                raise UserError(f"{option.flag} {text}: {option.unused or f'goes with --suite {suite.name}'}")
    if not chosen.takes_text and options.data:
        raise UserError(f"--data: --suite {chosen.name} takes no text; leave it out")
    chosen.check_options(options)
    return chosen
