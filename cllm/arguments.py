"""An argument parser that reports mistakes in one line, as all parts of a command do."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cllm.errors import UserError, nearest


class _Help(argparse.Action):
    """`--help`, and `--help WORD` for the options that have to do with a word."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        assert isinstance(parser, Parser)
        if values is None:
            print(parser.full_help().rstrip("\n"))
        elif found := parser.topics(values):
            print("\n".join(found))
        else:
            raise UserError(f"--help {values}: nothing about it; --help alone lists everything")
        parser.exit()


class Parser(argparse.ArgumentParser):
    """argparse's parser, with mistakes as `UserError`, help that keeps its line breaks, and no abbreviated options.

    Texts and paths must not be empty. `--help WORD` shows only the options in which a word occurs.

    Args:
        usage_hint: a short command that works, for the message about missing arguments.
    """

    def __init__(self, *args: Any, usage_hint: str = "", add_help: bool = True, **kwargs: Any):
        usual: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
        super().__init__(*args, **{**usual, **kwargs, "add_help": False})
        self.usage_hint = usage_hint
        if add_help:
            self.add_argument(
                "-h", "--help", action=_Help, nargs="?", metavar="WORD", default=argparse.SUPPRESS,
                help="show this help; with WORD only what has to do with it, as in --help batch",
            )  # fmt: skip

    def full_help(self) -> str:
        """The text of `--help`."""
        return self.format_help()

    def topics(self, word: str) -> list[str]:
        """Texts about the options that have to do with `word`: it occurs in their name, values or help."""
        formatter, word = self._get_formatter(), word.casefold()
        found = [
            action
            for action in self._actions
            if not isinstance(action, (_Help, argparse._SubParsersAction))
            and word in " ".join(map(str, (*action.option_strings, action.choices or "", action.help))).casefold()
        ]
        formatter.add_arguments(found)
        texts = [formatter.format_help().rstrip("\n")] if found else []
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for name, parser in action.choices.items():
                    texts += [f"{name}:\n{text}" for text in parser.topics(word)]
        return texts

    def add_device(self) -> None:
        """Add `--device`, which `cllm.environment.choose_device` reads."""
        self.add_argument(
            "--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one"
        )

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError`; argparse would print its usage and exit."""
        message = re.sub(r"^argument ([^:]+): is ", r"\1 is ", message).removeprefix("argument ")
        if message.startswith("the following arguments are required: "):
            message = message.removeprefix("the following arguments are required: ") + ": missing"
            message += f"; for example: {self.usage_hint}" if self.usage_hint else "; --help describes every argument"
        raise UserError(message)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's. Raises `UserError` for an unknown option, naming the nearest one."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            word = unknown[0].partition("=")[0]
            if word.startswith("-") and len(word) > 1:
                raise UserError(f"{word}: unknown option; {nearest(word, self.long_options())}")
            raise UserError(f"{unknown[0]}: unexpected argument; --help describes the allowed ones")
        return options

    def parse_with_settings(
        self, args: Sequence[str] | None, settings: Sequence[str]
    ) -> tuple[argparse.Namespace, list[str]]:
        """The options of this parser and the remaining words, which are settings such as `--train.steps 3`.

        A remaining word that resembles an option more than any of `settings` (names without dashes) is a misspelt
        option, and raises `UserError`.
        """
        options, rest = super().parse_known_args(args)
        for word in rest:
            name = word.partition("=")[0]
            if not re.fullmatch(r"--[A-Za-z][A-Za-z_-]*", name) or name[2:] in settings:
                continue
            close = difflib.get_close_matches(name, self.long_options(), n=1, cutoff=0.75)
            if close and not difflib.get_close_matches(name[2:], settings, n=1, cutoff=_likeness(name, close[0])):
                raise UserError(f'{name}: unknown option; did you mean "{close[0]}"?')
        return options, rest

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if action.type in (None, Path) and action.nargs != argparse.PARSER and arg_string != action.default:
            if not arg_string.strip():
                raise argparse.ArgumentError(action, "is empty")
            if "\0" in arg_string:
                raise argparse.ArgumentError(action, f"is {arg_string!r}; allowed: text without NUL characters")
        return super()._get_value(action, arg_string)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            allowed = [str(choice) for choice in action.choices]
            hint = nearest(str(value), allowed) if len(allowed) > 4 else f"allowed: {', '.join(allowed)}"
            raise argparse.ArgumentError(action, f"is {value!r}; {hint}")

    def long_options(self) -> list[str]:
        """Every option that begins with `--`, including those of subcommands."""
        found = {o for action in self._actions for o in action.option_strings if o.startswith("--")}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {o for parser in action.choices.values() for o in parser.long_options()}
        return sorted(found)


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """The `type` of an option that takes an integer from `least` to `most` (None: any).

    >>> whole_number(1)("3")
    3
    """
    allowed = f"{least} or more" if most is None else f"{least} to {most}"

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}; allowed: an integer, {allowed}") from None
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"is {value}; allowed: {allowed}")
        return value

    return convert


def number(
    *, above: float | None = None, least: float | None = None, up_to: float | None = None
) -> Callable[[str], float]:
    """The `type` of an option that takes a finite number larger than `above`, at least `least`, and at most `up_to`."""
    bounds = (("above", above), ("at least", least), ("up to", up_to))
    allowed = ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"is {text!r}; allowed: a number {allowed}") from None
        fits = (above is None or value > above) and (least is None or value >= least)
        if not fits or not value < float("inf") or (up_to is not None and value > up_to):
            raise argparse.ArgumentTypeError(f"is {text}; allowed: {allowed}")
        return value

    return convert
